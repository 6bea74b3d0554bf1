"""The command of flowmaps/cli/export.py."""

from flowmaps.cli import export
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(export)
