"""The command of training/cli/extractor.py."""

from flowmaps.cli.run import run
from training.cli import extractor

if __name__ == "__main__":
    run(extractor)
