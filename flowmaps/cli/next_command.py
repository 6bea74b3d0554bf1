"""The command to type next, written as the present one was: `python scripts/fid.py` or `flowmaps fid`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import flowmaps
from flowmaps.cli.run import COMMAND_OF

SCRIPTS = Path(flowmaps.__file__).parents[1] / "scripts"  # of a checkout
FILES = {name: f"{script}.py" for script, name in COMMAND_OF.items()}  # of scripts not named after their command
FIRST_SCORE = 2000  # samples: enough to compare runs, and quick
SOLVER_STEPS = 32  # enough for a drift
REAL_IMAGES = "FOLDER_OF_REAL_IMAGES"


def command(name: str, *arguments: str) -> str:
    """Return the command ``name`` with ``arguments``, quoted for a shell."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.resolve().parent == SCRIPTS.resolve():
        return shlex.join(["python", str(script.with_name(FILES.get(name, f"{name}.py"))), *arguments])
    return shlex.join(["flowmaps", name, *arguments])


def sample(checkpoint: str, sampler: str, *flags: str) -> str:
    """Return the command that samples from ``checkpoint`` by ``sampler``."""
    out = f"--out=samples/{Path(checkpoint).resolve().name}"
    return command("sample", f"--checkpoint={checkpoint}", *sampling(sampler), *flags, out)


def fid(checkpoint: str, data: str, flags: Sequence[str], root: str = "data") -> str:
    """Return the command that scores ``checkpoint``, sampled by ``flags``, against ``data``.

    That is a built-in data set, an address, a path, or statistics to be made; for anything else there is a name in
    capitals.
    """
    from flowmaps.data.registry import DATASETS, is_address

    there = data and (Path(data).exists() or is_address(data) or data.endswith("-reference.npz"))
    reference = f"{data}:heldout" if data in DATASETS else data if there else REAL_IMAGES
    where = [f"--root={root}"] if data in DATASETS and root != "data" else []
    return command(
        "fid", f"--checkpoint={checkpoint}", f"--reference={reference}", *where, *flags, f"--num={FIRST_SCORE}"
    )


def sampling(sampler: str) -> list[str]:
    """Return the flags that ``sampler`` needs; the map, in 1, 2, 4 and 8 steps, is what commands do by themselves."""
    if sampler in ("map", "stochastic"):
        return [] if sampler == "map" else [f"--sampler={sampler}"]
    return [f"--sampler={sampler}", f"--steps={SOLVER_STEPS}"]


def show(*commands: str) -> str:
    """Return lines that say what to type next."""
    return "\n".join(f"next     {line}" for line in commands)
