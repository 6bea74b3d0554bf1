"""The command of training/cli/prepare.py."""

from flowmaps.cli.run import run
from training.cli import prepare

if __name__ == "__main__":
    run(prepare)
