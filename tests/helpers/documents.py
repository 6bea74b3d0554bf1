"""The commands and Python blocks of a Markdown page, in their order."""

import re

ITEM = re.compile(r"^```(\w*)\n(.*?)^```|^    (\S(?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE | re.DOTALL)


def items(text: str) -> list[tuple[str, str]]:
    """Return ("command", line) for each line indented by four spaces and ("python", code) for each Python block.

    Continued lines are joined; other fenced blocks are left out.
    """
    found = []
    for item in ITEM.finditer(text):
        if item[3]:
            found.append(("command", item[3].replace("\\\n", " ").strip()))
        elif item[1] == "python":
            found.append(("python", item[2]))
    return found


def commands(text: str) -> list[str]:
    return [what for kind, what in items(text) if kind == "command"]


def blocks(text: str) -> list[str]:
    return [what for kind, what in items(text) if kind == "python"]
