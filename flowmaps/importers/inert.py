"""Pickles read without running anything in them, and without following what is shared in them more than once."""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from flowmaps.errors import UserError, shorten

REMEDY = "choose a file of this format"
# What a file is, by its first bytes; of the first two, the file itself never came.
STARTS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS instead of the file"),
    (b"<", "it is a web page or another text"),
    (b"{", "it is a JSON file"),
    (b"PK\3\4", ZIP := "it is a zip archive, as torch.save writes them"),
    (b"\x89HDF", "it is an HDF5 file"),
    (b"\x93NUMPY", "it is a NumPy array"),
    (b"\x1f\x8b", "it is compressed by gzip"),
    (b"GGUF", "it is a GGUF file"),
)
NOT_LOADED = 2
DAMAGE = (  # in the words of torch, safetensors, zipfile and of this package
    *("truncated", "ncomplete", "central directory", "deserializing header", "StreamReader", "ends before"),
    *("too few numbers", "not a zip"),
)


class Unsupported(Exception):
    """A sound checkpoint of a network, or of a training, that this package does not have."""


def shown(value: Any) -> str:
    """Return a value of a file for a message. Only a plain one is written out: a nested one can be of any length."""
    if isinstance(value, list) and len(value) <= 8 and all(isinstance(item, (int, float)) for item in value):
        return f"[{', '.join(map(shown, value))}]"
    plain = isinstance(value, (str, float, type(None))) or (isinstance(value, int) and abs(value) < 1 << 99)
    return shorten(repr(value), 80) if plain else type(value).__name__


def same(found: Any, value: Any) -> bool:
    """Return whether a plain value of a file is ``value``, floats up to the rounding of float32."""
    if isinstance(value, float) and not isinstance(found, bool) and isinstance(found, (int, float)):
        return math.isclose(found, value, rel_tol=1e-6)
    if isinstance(value, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(value) and all(map(same, found, value))
    return isinstance(found, (str, bool, int, float, type(None))) and bool(found == value)


def check_extent(numbers: int, offset: Any, size: Any, stride: Any) -> None:
    """Refuse a tensor that does not have its own number, among ``numbers`` stored ones, for each of its places.

    Torch would let the storage grow by whatever the memory holds, or read one number as many.
    """
    if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise pickle.UnpicklingError("the shape of a tensor is not made of whole numbers")
    reach = 1
    for step, length in sorted((step, length) for step, length in zip(stride, size, strict=True) if length > 1):
        if step < reach:
            raise pickle.UnpicklingError(f"a tensor of shape {shown(size)} has too few numbers")
        reach += step * (length - 1)
    if 0 not in size and offset + reach > numbers:
        raise pickle.UnpicklingError(f"a tensor of shape {shown(size)} has too few numbers")


class _Bounded:
    """A file that is never asked for more bytes than it has left, since they would be allocated first."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise pickle.UnpicklingError(f"it ends before the {count:,} bytes that it announces")
        return self.file.read(count)


def _last(count: int) -> Callable[[Any], None]:
    """Return the operation that makes one list of the last ``count`` objects on the stack."""

    def load(reader: Any) -> None:
        reader.stack[-count:] = [reader.stack[-count:]]

    return load


class Reader(pickle._Unpickler):
    """Python's own unpickler, in which sub-classes decide what names, calls and states mean.

    Tuples are read as lists, which have no hash: that of tuples shared in each other follows every path, and takes
    for ever at a depth of 40.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.EMPTY_TUPLE[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.TUPLE[0]] = dispatch[pickle.LIST[0]]
    dispatch |= {pickle.TUPLE1[0]: _last(1), pickle.TUPLE2[0]: _last(2), pickle.TUPLE3[0]: _last(3)}
    dispatch[pickle.REDUCE[0]] = lambda self: self._reduce()
    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]]
    dispatch[pickle.BUILD[0]] = lambda self: self._build()
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(_Bounded(file, size), encoding="latin1")  # of strings of Python 2
        self.size, self.budget = size, 4 * size  # bytes given to calls: none is read over and over again
        self.stack: list[Any]

    def call(self, function: Any, arguments: list[Any]) -> Any:
        """Return the meaning of a call of what ``find_class`` returned."""
        return function(*arguments)

    def build(self, target: Any, state: Any) -> None:
        """Give ``target`` its state."""
        raise NotImplementedError

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.budget -= sum(len(argument) for argument in arguments if isinstance(argument, (bytes, str)))
        if self.budget < 0:
            raise pickle.UnpicklingError("it reads the same bytes many times")
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)


def _what(path: Path) -> tuple[str, bool]:
    """Return what a file seems to be by its first bytes, empty if it may be a pickle, and if it has to be loaded again.

    A pickle starts with a byte for its protocol; pickles of protocol 0 do not, and no published checkpoint is one.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        return "it is empty", True
    if start[8:9] == b"{":
        return "it is a safetensors file", False
    found = next((n for n, (known, _) in enumerate(STARTS) if start.startswith(known)), None)
    if found is not None:
        return STARTS[found][1], found < NOT_LOADED
    return "" if start[0] == 0x80 else "it is not a pickle", False


def refusal(path: Path, error: Exception, reading: str = "") -> Exception:
    """Return ``error``, of anything that went wrong in a file, as one line; the system's own errors as they are.

    ``reading`` a "pickle" or a "torch" file: it went wrong before the content was there, so that the file's first bytes
    may tell more. "Download it again" is the remedy for a damaged file alone.
    """
    message = " ".join(str(error).split())
    if isinstance(error, (OSError, MemoryError)) or "(os error" in message or "DefaultCPUAllocator" in message:
        return error
    if isinstance(error, UserError):
        if not error.field:
            error.field, error.value = "src", path
        return error
    if isinstance(error, Unsupported):
        return UserError(f"cannot be imported: {message}; take another checkpoint", field="src", value=path)
    if named := re.search(r"GLOBAL (\S+)", message):
        message = f"it names {named[1]}, which no such checkpoint needs"
    if isinstance(error, KeyError):
        message = f"it has no {message}"
    message = message.partition("WeightsUnpickler error: ")[2] or message
    message = re.split(r" Check the documentation|\. This is an internal", message)[0]
    damaged = isinstance(error, EOFError) or any(word in message for word in DAMAGE)
    internal = (
        isinstance(error, (LookupError, TypeError, ValueError, AttributeError, EOFError)) or "persistent" in message
    )
    if reading and (internal or not path.stat().st_size):  # of Python's own unpickler: not for a reader
        what, again = _what(path)
        what = "" if what == ZIP and reading == "torch" else what
        damaged = again or not what
        message = what or (message if isinstance(error, TypeError) else "its content does not make sense")
    kind, remedy = (", or damaged,", "download it again, or choose") if damaged else (",", "choose")
    return UserError(
        f"is not a checkpoint of this format{kind} and was not run: {shorten(message)}; {remedy} another format",
        field="src",
        value=path,
    )
