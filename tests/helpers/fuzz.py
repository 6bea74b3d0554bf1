"""Calls of commands with wrong values and damaged files, and what every one of them must keep."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

NUMBERS = ("-1", "0", "1.5", "nan", "inf", "-1e400", "99999999999999999999999", "abc", "")
TEXTS = (
    "",
    "abc",
    "é☃",
    "x" * 5000,
    ",",
    "a,b,,c",
    "1,2.5",
    "-1",
    "nan",
    "99999999999999999999999",
    "../..",
    "~nobody/x",
)
JSONS = (
    "null",
    "[]",
    "{}",
    "3",
    '"text"',
    "[" * 100_000,
    "9" * 10_000,
    '{"a": NaN}',
    '{"a": 1e999}',
    "\udcff",
    "{",
    "",
)
LEAVES = (None, True, -1, 10**12, 1e300, 0, "", "x" * 3000, "../../x", [], {}, [[1]], {"a": None}, "é")
LONGEST = 1000


class Server:
    """Calls of one command, each in a fork of a process that has imported it."""

    def __init__(self, module, script, folder):
        """``folder`` becomes the current one: a relative path in a call must not land in the repository."""
        for name in ("assets", "configs", "README.md"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(ROOT / "tests/helpers/fuzz_server.py"), module]
        self.script = script
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, argv, largest=None):
        """Return exit code and stderr of a call; ``largest`` limits its files, in bytes, as a full disk does."""
        return self.send(argv, largest, None)[:2]

    def dying(self, argv, at=None):
        """Return exit code and number of file operations of a call that dies at number ``at``, if given."""
        code, _, operations = self.send(argv, None, at)
        return code, operations

    def send(self, *call):
        self.process.stdin.write(json.dumps([[self.script, *call[0]], *call[1:]]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def fault(code, stderr):
    """Return what is wrong with the end of a call; None for 0, 1, 130 and for 2 with one line at the end of stderr."""
    if "Traceback" in stderr:
        return f"exit {code} with a traceback: {stderr.strip().splitlines()[-1][:300]}"
    if code not in (0, 1, 2, 130):
        return f"exit {code}: {stderr[-300:]}"
    lines = stderr.strip().splitlines()
    if code == 2 and not (lines and re.match(r"\S+: error: \S", lines[-1])):
        return f"exit 2, but the last line is {lines[-1:]}"
    if lines and len(lines[-1]) >= LONGEST:
        return f"a line of {len(lines[-1])} characters"
    return None


def tree(folder):
    """Return the digest of every file below ``folder``, links as their targets."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory or special"
    return found


def foreign(folder):
    """Make the user's own files of every kind, none of which a call may touch; return targets for an output flag."""
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "data.json").write_text('{"mine": [1, 2]}')
    (folder / "empty-looking").mkdir()
    (folder / "empty-looking" / ".hidden").write_text("mine")
    project = folder / "project"
    for name in ("model/weights.bin", "samples/a.png", "checkpoints/step-00000001/x", "README.md", "config.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("mine")
    for name in (
        "steps-1/000000.png",
        "samples-1.npz",
        "grid.png",
        "log.jsonl",
        "tb/events",
        "shard-00000.safetensors",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    os.mkfifo(folder / "pipe")
    names = ("notes.txt", "data.json", "empty-looking", "project", "project/model", "link", "pipe")
    long, under_file = folder / ("x" * 300), folder / "notes.txt" / "below"
    return [*(str(folder / name) for name in names), str(long), str(under_file), "/dev/null", "/proc/none", "/dev/full"]


def mutate(content, rng):
    """Return a damaged copy of a file's bytes."""
    content, kind = bytearray(content), rng.randrange(6)
    at = rng.randrange(max(1, len(content)))
    if kind == 0:
        return bytes(content[:at])
    if kind == 1 and content:
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[at : at + 64] = rng.randbytes(64)
    elif kind == 3:
        content[at : at + 256] = bytes(256)
    elif kind == 4:
        content[at:at] = rng.randbytes(rng.randrange(1, 512))
    else:
        return rng.choice(
            (b"", rng.randbytes(3000), content[at:] + content[:at], b"\x80\x05" + content, b"%!PS\n" + content)
        )
    return bytes(content)


def mutate_json(text, rng):
    """Return JSON text of which one part was dropped, replaced or added, or another text altogether."""
    if rng.random() < 0.2:
        return rng.choice(JSONS)
    values = json.loads(text)
    places = list(_places(values))
    if not places:
        return rng.choice(JSONS)
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder["unknown key"] = rng.choice(LEAVES)
    else:
        holder[key] = rng.choice(LEAVES)
    return json.dumps(values)


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def damage(path, rng):
    """Damage one file in place: by structure if it is JSON and the dice say so, else by bytes."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        i = rng.randrange(max(1, len(lines)))
        lines[i : i + 1] = [mutate_json(lines[i], rng)] if lines else [rng.choice(JSONS)]
        path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    else:
        path.write_bytes(mutate(content, rng))


def seeded(*key):
    return random.Random(repr(key))
