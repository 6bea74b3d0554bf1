"""Tables in Markdown, and counts in words."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """Return a Markdown table; ``aligned`` pads the cells to equal widths and aligns them to the right."""
    lines = [list(columns), *map(list, rows)]
    if not aligned:
        header, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
        return "\n".join([header, "|---" * len(columns) + "|", *body])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    header, *body = ["| " + " | ".join(map(str.rjust, cells, widths)) + " |" for cells in lines]
    return "\n".join([header, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *body])


def counted(count: int, noun: str) -> str:
    """Return "1 step", "2 steps", "10,000 steps"."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"
