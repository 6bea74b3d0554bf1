"""An extension of griffe, which reads docstrings: the comment behind a field says what the field is."""

import contextlib
import re
from typing import Any

from griffe import Alias, AliasResolutionError, Attribute, Class, Docstring, ExprCall, Extension, Object

DECLARED = ("new_option", "may_change")  # functions whose first argument is the default of a field


class FieldComments(Extension):
    """Add the fields ``name: type = value  # comment`` to the docstring of a class, as a list of attributes."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Show the default of a field, rather than the call that declares it."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) in DECLARED:
            attr.value = attr.value.arguments[0]

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        fields = {name: member for name, member in cls.members.items() if isinstance(member, Attribute)}
        texts = {
            name: described(field)
            for name, field in fields.items()
            if not ("property" in field.labels or name[0] == "_")
        }
        rows = [f"    {name}: {text[0].upper()}{text[1:]}" for name, text in texts.items() if text]
        if rows:
            cls.docstring = cls.docstring or Docstring("", parent=cls)
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:  # griffe's name of a section of code
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def described(field: Attribute) -> str:
    """Return the comment behind a field's definition, and the choices that it has."""
    choices = field.module.members.get(str(field.annotation)) if field.annotation else None
    if isinstance(choices, Alias):
        with contextlib.suppress(AliasResolutionError):  # a class of another package
            choices = choices.final_target
    named = []
    if isinstance(choices, Class) and any(str(base).endswith("Enum") for base in choices.bases):
        members = [(name, member) for name, member in choices.members.items() if isinstance(member, Attribute)]
        named = [f"`{name}`" + (f" ({text})" if (text := comment_of(member)) else "") for name, member in members]
    return ". ".join(part for part in (comment_of(field), f"One of {', '.join(named)}" * bool(named)) if part)


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
    return " ".join(parts).strip()
