"""The command of training/cli/train.py."""

from flowmaps.cli.run import run
from training.cli import train

if __name__ == "__main__":
    run(train)
