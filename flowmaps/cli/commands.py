"""The command ``flowmaps``: it imports the module of a sub-command by its name and runs it."""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import NoReturn

from flowmaps.cli.run import as_typed, fail, run
from flowmaps.errors import UserError, choose

COMMANDS = {  # name -> module, imported when called: this package must not import training
    "train": "training.cli.train",
    "sample": "flowmaps.cli.sample",
    "fid": "flowmaps.cli.fid",
    "stats": "flowmaps.cli.stats",
    "schedule": "flowmaps.cli.schedule",
    "export": "flowmaps.cli.export",
    "app": "flowmaps.cli.app",
    "import": "flowmaps.cli.import_checkpoint",
    "prepare": "training.cli.prepare",
    "extractor": "training.cli.extractor",
    "compare": "training.cli.compare",
}
PACKAGES = ("samplers", "training")  # installed next to flowmaps, under names that other folders have too
HOME = Path(__file__).resolve().parents[2]


def main() -> NoReturn:
    """Run ``flowmaps COMMAND --flag=value ...``."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("--help", "-h", "-help", "help"):
        print(overview())
        sys.exit(0)
    if name not in COMMANDS:
        wrong = f"unknown command {name!r}" if name else "missing command"
        fail("flowmaps", UserError(f"{wrong}: {choose(name, COMMANDS)}"))
    sys.argv = [f"flowmaps {name}", *rest]
    run_command(name)


def run_command(name: str) -> NoReturn:
    """Run the sub-command ``name`` with the arguments in ``sys.argv``."""
    own_packages_first()
    run(importlib.import_module(COMMANDS[name]))


def overview() -> str:
    """Return the help text: the first sentence of each command's docstring, up to a colon."""
    own_packages_first()
    lines = []
    for name, module in COMMANDS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        first = re.split(r"[.:](?:\s|$)", as_typed(doc, "flowmaps"))[0]
        lines.append(f"  {name:10}{first}")
    usage = "flowmaps COMMAND --flag=value ...\n\nflowmaps COMMAND --help lists the flags of a command.\n\nCommands:\n"
    return usage + "\n".join(lines)


def own_packages_first() -> None:
    """Move folders that have another ``training`` or ``samplers``, such as the current one, behind this package's.

    Processes that are started later inherit the order.
    """
    places = [(entry, Path(entry or ".").resolve()) for entry in sys.path]
    others = [entry for entry, place in places if place != HOME and any(_has(place, name) for name in PACKAGES)]
    sys.path[:] = [entry for entry in sys.path if entry not in others] + others


def _has(place: Path, name: str) -> bool:
    return (place / name).is_dir() or (place / f"{name}.py").is_file()
