"""Reading of files that may be damaged, hostile, or something else: JSON, arrays, and values against a schema.

Sizes are compared with limits before anything is allocated, and only regular files are opened: a named pipe or a device
would be read without an end.
"""

import dataclasses
import enum
import json
import math
import stat
import types
import typing
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np

from flowmaps.errors import UserError, shorten

LARGEST_JSON = 64 << 20  # bytes; the largest that flowmaps writes lists the files of a data set
LARGEST_PACKED, PACKING = 256 << 20, 100  # bytes of arrays above which a file may not be so many times smaller


def regular_file(path: str | Path, remedy: str = "give another path") -> Path:
    """Return ``path`` if it is a regular file, links followed.

    Raises:
        UserError: It is missing, may not be looked at, or is a directory, a pipe or a device.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shorten(path)} cannot be read ({reason}): {remedy}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{shorten(path)} is {kind}, not a file: {remedy}")
    return path


def read_bytes(path: str | Path, remedy: str = "give another path", largest: int = LARGEST_JSON) -> bytes:
    """Return the content of a regular file of at most ``largest`` bytes."""
    path = regular_file(path, remedy)
    try:
        if (size := path.stat().st_size) > largest:
            raise UserError(f"{path} has {size:,} bytes, more than {largest:,}: {remedy}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from None


def read_text(path: str | Path, remedy: str) -> str:
    """Return the content of a text file in UTF-8."""
    try:
        return read_bytes(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}): {remedy}") from None


def parse_json(text: str | bytes, where: str, remedy: str) -> Any:
    """Return the value of a JSON text without NaN and infinities; errors name ``where`` and end with ``remedy``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:  # not JSON, not text, a number of too many digits; too deep
        reason = "too deeply nested" if isinstance(error, RecursionError) else shorten(error, 120)
        raise UserError(f"{where} is not readable JSON ({reason}): {remedy}") from None


def read_json(path: str | Path, remedy: str) -> Any:
    """Return the value of a JSON file by ``parse_json``."""
    return parse_json(read_bytes(path, remedy), shorten(path), remedy)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shorten(text, 40)} is out of range")
    return value


T = TypeVar("T")


def parse(kind: type[T], value: Any, where: str) -> T:
    """Return a JSON value as an instance of ``kind``, every part checked against its annotation.

    Args:
        kind: A dataclass, whose fields without defaults must be there and whose others may be; or an annotation made
            of bool, int, float, str, None, Any, Literal, enumerations (by name), tuple, list, dict, unions and
            dataclasses. An int passes for a float, a bool does not for an int.
        value: The value, as ``read_json`` returns it.
        where: What errors call it, such as the file's name.

    Raises:
        UserError: A part is missing, unknown, or of another type; the message names it.

    Example:
        >>> parse(tuple[int, ...], [1, 2], "shape")
        (1, 2)
        >>> parse(int, "1", "state.json: step")
        Traceback (most recent call last):
        flowmaps.errors.UserError: state.json: step is '1', expected int
    """
    found: T = _parse(kind, value, where)
    return found


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal and value in args:
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(args, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _parse_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if origin is dict and isinstance(value, dict):
        return {_parse(args[0], k, where): _parse(args[1], v, f"{where}: {shorten(k, 60)}") for k, v in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        kinds = args[:1] * len(value) if origin is list or args[-1] is ... else args
        if len(kinds) == len(value):
            return origin(_parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind in (None, types.NoneType) and value is None:
        return None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300:
        return float(value)
    if kind in (bool, int, str) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {shorten(repr(value), 80)}, expected {_name(kind)}")


def _parse_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return _parse(kind, value, where)
        except UserError as error:
            last = error
    if len([k for k in kinds if k is not types.NoneType]) == 1:
        raise last if value is not None else UserError(f"{where} is null")
    raise UserError(f"{where} is {shorten(repr(value), 80)}, expected {' or '.join(_name(k) for k in kinds)}")


def _parse_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.init}
    if unknown := sorted(map(str, value.keys() - fields.keys())):
        raise UserError(f"{where}: {shorten(unknown[0], 60)} is unknown to this version")
    needed = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - value.keys()):
        raise UserError(f"{where}: {missing[0]} is missing")
    found = {name: _parse(hints[name], item, f"{where}: {name}") for name, item in value.items()}
    try:
        return kind(**found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _name(kind: Any) -> str:
    if get_origin(kind) is None and isinstance(kind, type):
        return "null" if kind is types.NoneType else kind.__name__
    return str(kind).replace("typing.", "")


@contextmanager
def _opened_npz(path: str | Path, remedy: str) -> Iterator[Any]:
    """Open an .npz without unpickling; errors name the file and end with ``remedy``."""
    try:
        with regular_file(path, remedy).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path} is not a readable .npz ({shorten(error, 120)}): {remedy}") from None


def read_npz(path: str | Path, remedy: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Return the arrays of an .npz, all or those among ``keys``; a damaged file is refused with ``remedy``."""
    with _opened_npz(path, remedy) as archive:
        wanted = [key for key in archive.files if keys is None or key in keys]
        headers, size = _headers(archive), Path(path).stat().st_size
        claimed = sum(bytes_ for name, (_, bytes_) in headers.items() if name in wanted)
        if claimed > max(LARGEST_PACKED, PACKING * size):
            raise UserError(f"{path} claims {claimed:,} bytes of arrays in a file of {size:,}: {remedy}")
        return {key: archive[key] for key in wanted}


def npz_shapes(path: str | Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the arrays in an .npz from their headers alone, since they may be large."""
    with _opened_npz(path, remedy) as archive:
        return {name: shape for name, (shape, _) in _headers(archive).items()}


def _headers(archive: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and bytes of each array of an opened .npz, as its header claims."""
    found = {}
    for entry in archive.zip.namelist():
        with archive.zip.open(entry) as array:
            version = np.lib.format.read_magic(array)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(array)
            found[entry.removesuffix(".npy")] = tuple(shape), math.prod(shape) * dtype.itemsize
    return found
