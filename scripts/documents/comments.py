"""An extension of griffe, which reads the docstrings: fields are described by their comments; examples are code."""

import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Object


class FieldComments(Extension):
    """Make ``name: type = value  # comment`` the description of ``name``, with the comment lines that continue it."""

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        if attr.docstring or not attr.endlineno or isinstance(attr.filepath, list):
            return
        if text := comment(attr.lines_collection[attr.filepath], attr.endlineno):
            attr.docstring = Docstring(text, parent=attr)

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:  # griffe's name of a section of code
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def comment(lines: list[str], last: int) -> str:
    """Return the comment at the end of line number ``last`` (from 1), with the lines of comments after it."""
    found = re.search(r"""  # (?!noqa|type:)([^"']*(?:["'][^"']*["'][^"']*)*)$""", lines[last - 1])
    if not found:
        return ""
    parts = [found[1]]
    for line in lines[last:]:
        if not line.strip().startswith("# "):
            break
        parts.append(line.strip()[2:])
    text = " ".join(parts).strip()
    return text[0].upper() + text[1:]
