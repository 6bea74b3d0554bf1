"""The command of flowmaps/cli/schedule.py."""

from flowmaps.cli import schedule
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(schedule)
