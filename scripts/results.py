"""Write the tables of results in README.md and docs/results.md from the records in assets/.

python scripts/results.py  # after a benchmark has written new records

A table stands between the comments "results: NAME" and "end of results"; what is outside them stays as it is. A table
whose record does not exist is left empty.
"""

import sys
from pathlib import Path

from flowmaps.cli.run import run

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md")


def main() -> None:
    from benchmarks.pages import with_tables

    for page in PAGES:
        file = ROOT / page
        before = file.read_text(encoding="utf-8")
        after = with_tables(before, ROOT / "assets")
        if after != before:
            file.write_text(after, encoding="utf-8")
        print(f"{page}: {'changed' if after != before else 'up to date'}")


if __name__ == "__main__":
    run(sys.modules[__name__])
