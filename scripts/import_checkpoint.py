"""The command of flowmaps/cli/import_checkpoint.py."""

from flowmaps.cli import import_checkpoint
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(import_checkpoint)
