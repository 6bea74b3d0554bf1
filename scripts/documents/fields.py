"""An extension of griffe, which reads docstrings: the comment behind a field says what the field is."""

import re
from typing import Any

from griffe import Attribute, Class, Docstring, ExprCall, Extension, Object

DECLARED = ("new_option", "may_change")  # functions whose first argument is the default of a field


class FieldComments(Extension):
    """Add the fields ``name: type = value  # comment`` to the docstring of a class, as a list of attributes."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Show the default of a field, rather than the call that declares it."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) in DECLARED:
            attr.value = attr.value.arguments[0]

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        fields = {name: member for name, member in cls.members.items() if isinstance(member, Attribute)}
        comments = {name: comment_of(field) for name, field in fields.items() if not name.startswith("_")}
        described = [f"    {name}: {text}" for name, text in comments.items() if text]
        if described:
            cls.docstring = cls.docstring or Docstring("", parent=cls)
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(described)

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:  # griffe's name of a section of code
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def comment_of(attribute: Attribute) -> str:
    """Return the comment behind an attribute's definition, in one line."""
    if attribute.docstring or not attribute.endlineno or isinstance(attribute.filepath, list):
        return ""
    return comment(attribute.lines_collection[attribute.filepath], attribute.endlineno)


def comment(lines: list[str], last: int) -> str:
    """Return the comment at the end of line ``last`` (from 1) and the comment lines that continue it."""
    found = re.search(r"  # (?!noqa|type:)(.*)$", lines[last - 1])
    if not found:
        return ""
    parts = [found[1]]
    for line in lines[last:]:
        if not line.strip().startswith("# "):
            break
        parts.append(line.strip()[2:])
    text = " ".join(parts).strip()
    return text[0].upper() + text[1:]
