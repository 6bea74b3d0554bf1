"""Values of a config against the annotations of its fields: one check for flags, config files and Python."""

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from flowmaps.errors import UserError, choose, within

LARGEST = 10**9  # of the integers of a config, so that a slip of the keyboard does not run for years
LARGEST_OF = {  # and of these
    "seed": 2**63 - 1,
    "batch": 10**6,
    "accumulate": 10**6,
    "timeout": 10**6,
    "data.workers": 1000,
    "lora": 10**4,
    "sample_steps": 10**4,
    "best.steps": 10**4,
    "best.num": 10**7,
    "trajectories.steps": 10**4,
    "trajectories.substeps": 10**4,
    "network": 10**6,  # any argument
}
WORDS: dict[Any, str] = {int: "an integer", float: "a finite number", str: "a text", bool: "True or False"}
MANY: dict[Any, str] = {int: "integers", float: "finite numbers", str: "texts"}


def check_values(section: Any, prefix: str = "") -> None:
    """Check the fields of a config, or of the ``section`` at the dotted ``prefix``, against their annotations.

    On the way, lists become tuples, an empty text becomes an empty tuple, and a leading ~ the home directory.

    Raises:
        UserError: A value, or an element of a tuple, has another type or is out of all proportion.
    """
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        if not f.init:
            continue
        hint, value, path = hints[f.name], getattr(section, f.name), f"{prefix}{f.name}"
        made = _tidy(hint, value)
        if not fits(hint, made):
            raise UserError(f"must be {describe(hint)}", field=f.name, value=_shown(value))
        _check_size(path, f.name, made)
        if made is not value:
            setattr(section, f.name, made)
        if dataclasses.is_dataclass(made):
            with within(f.name):
                check_values(made, f"{path}.")


def check_assigned(section: Any) -> None:
    """Refuse what was assigned to a config, or to a part of it, under a name that is not a field.

    Raises:
        UserError: The message names the field that may have been meant.
    """
    for name in vars(section).keys() - vars(dataclasses.replace(section)).keys():
        fields = [f.name for f in dataclasses.fields(section)]
        reason = f"{type(section).__name__} has no such field: {choose(name, fields, every=False)}"
        raise UserError(reason, field=name)
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(value := getattr(section, f.name)):
            with within(f.name):
                check_assigned(value)


def _tidy(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple and isinstance(value, (list, str)) and (value == "" or isinstance(value, list)):
        return tuple(value)
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)  # noqa: PTH111 (Path.expanduser can raise)
    return value


def _check_size(path: str, name: str, value: Any) -> None:
    section = path.partition(".")[0]
    largest = LARGEST_OF.get(path, LARGEST_OF.get(section, LARGEST)) if section != "seed" else LARGEST_OF["seed"]
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, int) and abs(item) > largest:
            raise UserError(f"must be at most {largest:,}", field=name, value=_shown(value))


def _shown(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def fits(hint: Any, value: Any) -> bool:
    """Return whether ``value`` is of the annotation ``hint``; an int passes for a float, a bool does not for an int.

    What an annotation says beyond classes, tuples, literals and unions is not looked at.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(one, value) for one in args)
    if origin is Literal:
        return value in args
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(kinds) == len(value) and all(map(fits, kinds, value))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if kind in (Any, Callable) or getattr(kind, "_is_protocol", False):
        return True
    return not isinstance(kind, type) or isinstance(value, kind)


def describe(hint: Any) -> str:
    """Return an annotation in words, such as "integers, separated by commas"."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is tuple and args[0] in MANY:
        number = "" if args[-1] is ... else f"{len(args)} "
        return f"{number}{MANY[args[0]]}, separated by commas"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(hint.__members__)}"
    if origin in (Union, types.UnionType):
        return " or ".join("None" if one is types.NoneType else describe(one) for one in args)
    return f"a {hint.__name__}" if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
