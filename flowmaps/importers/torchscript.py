"""Weights in an archive of TorchScript, read without running the program that it also has."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flowmaps.importers.inert import REMEDY, Reader, check_extent, refusal, shown
from flowmaps.reading import regular_file

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Object:
    """A name, a call or a module of the program: attributes, nothing that could run."""

    def __init__(self, name: str = "") -> None:
        self.name, self.state = name, dict[str, Any]()


class _ModuleReader(Reader):
    """Makes an ``_Object`` of everything but tensors."""

    def __init__(self, file: BinaryIO, size: int, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file, size)
        self.archive, self.folder, self.storages = archive, folder, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        return _Object(name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, *_ = pid
        dtype = DTYPES.get(kind.name if isinstance(kind, _Object) else "")
        if dtype is None or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"it has a storage of {shown(count)} numbers of an unknown type")
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.folder}/data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"it has too few numbers, or too many, in storage {shown(key)}")
            content = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def call(self, function: Any, arguments: list[Any]) -> Any:
        if isinstance(function, _Object) and function.name.startswith("_rebuild_tensor"):
            storage, offset, size, stride, *_ = arguments
            if not isinstance(storage, Tensor):
                raise pickle.UnpicklingError("a tensor has no storage")
            check_extent(len(storage), offset, size, stride)
            return storage.as_strided(size, stride, offset)
        return _Object()

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Object) and isinstance(state, dict):
            target.state = state


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers in an archive of ``torch.jit.save`` by their names in the state dict.

    Raises:
        UserError: The file is damaged, hostile or something else.
    """
    size = regular_file(path, REMEDY).stat().st_size
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            [content] = [e for e in archive.infolist() if e.filename.partition("/")[2] == "data.pkl"]
            stored = [e.file_size for e in archive.infolist() if "/data/" in e.filename]
            if content.file_size + sum(stored) > size:
                raise pickle.UnpicklingError("its parts add up to more than the file")
            pickled = archive.read(content)
            folder = content.filename.partition("/")[0]
            root = _ModuleReader(io.BytesIO(pickled), len(pickled), archive, folder).load()
        return _tensors(root)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise refusal(path, error, reading="torch") from None


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is an archive that has a program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())


def _tensors(root: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen, waiting = {id(root)}, [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.state.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Object) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
    return found
