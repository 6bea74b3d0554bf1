"""Run the parts, each in a separate process, and keep what they report in OUT/gpu.json."""

import importlib.util
import platform
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowmaps import UserError
from flowmaps.errors import shorten
from flowmaps.export import MODEL
from flowmaps.files import WRITER, check_new_file, writable_directory, write_json
from flowmaps.reading import parse, read_json
from gpu.process import ROOT, PartProcess

SHARES = {"a": 50, "b": 50, "c": 65, "d": 35}  # of the time that the remaining parts have


@dataclass
class Call:
    """The arguments of gpu_check.py."""

    parts: str
    out: Path
    seconds: float
    data: Path
    smoke: bool


@dataclass
class Content:
    """The values in gpu.json."""

    run: str
    calls: list[dict[str, Any]]
    results: dict[str, dict[str, dict[str, Any]]]  # by part and item; each has a "status"
    left: dict[str, list[str]]
    written_by: str = WRITER

    def __post_init__(self) -> None:
        for part in self.results.values():
            for name, result in part.items():
                parse(str, result.get("status"), f"{shorten(name, 60)}: status")


@dataclass
class Results:
    """The content of gpu.json, written after every change."""

    file: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path) -> "Results":
        content = {"run": uuid.uuid4().hex[:8], "calls": [], "results": {}, "left": {}}
        if check_new_file(file).exists():
            remedy = "choose another --out"
            found = parse(Content, read_json(file, remedy), str(file))
            if not re.fullmatch("[0-9a-f]{8}", found.run):  # it names a directory
                raise UserError(f"{file}: run is {shorten(found.run, 60)!r}: {remedy}")
            content = asdict(found)
        check_new_file(file.with_name("log.json"))
        MODEL.check(file.with_name("model"))
        return cls(file, content)

    def write(self) -> None:
        write_json(self.file, self.content)

    def part(self, part: str) -> dict[str, Any]:
        results: dict[str, Any] = self.content["results"].setdefault(part, {})
        return results

    def done(self, part: str) -> list[str]:
        """Return the items that need no further try."""
        return [name for name, result in self.part(part).items() if result["status"] == "ok"]

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        self.part(part)[name] = {**result, "call": len(self.content["calls"]) - 1}
        self.write()
        shown = {k: v for k, v in result.items() if k not in ("status", "traceback")}
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"{part}  {result['status']:7}  {name}: {facts}"[:400], flush=True)


def machine() -> dict[str, Any]:
    """Return the facts of the machine, with the GPU's memory and driver and the commit of the source."""
    import torch
    from benchmarks.speed import machine as facts

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    found: dict[str, Any] = {**facts(), "system": platform.platform(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changed = "+" * bool(output("git", "status", "--porcelain"))
    return {**found, "commit": output("git", "rev-parse", "HEAD") + changed}


def run(call: Call) -> int:
    """Run the parts of ``call`` and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of a part is stopped too
    start = time.time()
    try:
        results = Results.open(writable_directory(call.out) / "gpu.json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    this = {"parts": call.parts, "smoke": call.smoke, "minutes": call.seconds / 60, "machine": machine()}
    results.content["calls"].append(this)
    failed = 0
    for i, part in enumerate(call.parts):
        share = SHARES[part] / sum(SHARES[other] for other in call.parts[i:])
        deadline = time.time() + share * (start + call.seconds - time.time())
        failed += _run_part(results, part, call, deadline)
        this["seconds"] = round(time.time() - start, 1)
        results.write()
    for part in call.parts:
        if left := results.content["left"].get(part):
            print(f"{part}  left for another call with the same --out: {len(left)} items, first {left[0]}")
    print(f"{failed} failed; results in {results.file}")
    return 1 if failed else 0


def _run_part(results: Results, part: str, call: Call, deadline: float) -> int:
    """Run a part until all is done or its time is over; return the number of items that failed."""
    tried: dict[str, str] = {}  # item -> status, in this call
    results.part(part).pop("start", None)  # an earlier call's process that listed no items

    def add(name: str, result: dict[str, Any]) -> None:
        tried[name] = result["status"]
        results.add(part, name, result)

    if part == "a" and importlib.util.find_spec("pytest") is None:
        add("pytest", {"status": "skipped", "reason": "needs pytest"})
        return 0
    while True:
        before, skip = len(tried), [*results.done(part), *tried]
        run_id = results.content["run"]
        process = PartProcess(part, skip, deadline, call.smoke, call.out, call.data, run_id, add)
        names = process.run()
        left = [name for name in names if name not in results.done(part) and name not in tried]
        if not names and not tried:  # the time was over before the items were known
            left = ["all"]
        results.content["left"][part] = left
        if not left or len(tried) == before or time.time() >= deadline:
            return sum(status == "failed" for status in tried.values())
