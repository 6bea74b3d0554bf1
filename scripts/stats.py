"""The command of flowmaps/cli/stats.py."""

from flowmaps.cli import stats
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(stats)
