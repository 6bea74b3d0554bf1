"""The command of flowmaps/cli/fid.py."""

from flowmaps.cli import fid
from flowmaps.cli.run import run

if __name__ == "__main__":
    run(fid)
