"""The command of flowmaps/cli/sample.py."""

from flowmaps.cli import sample
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(sample)
