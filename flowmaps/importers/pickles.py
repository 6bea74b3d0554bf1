"""Released checkpoints read as data: no code of a pickle runs, and what no checkpoint needs is refused by name.

Two kinds of files. Those of ``torch.save`` go through torch's own ``weights_only`` reader. NVIDIA's (EDM, EDM2) are
pickles of objects that carry the source code of their classes; ``read_objects`` turns these into inert records without
looking at that source, and hands the tensors inside to ``weights_only`` again.
"""

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flowmaps.errors import UserError

# The classes in released EDM and EDM2 files. A record of one of these is a name and a state, whatever its source says.
CLASSES = {
    *("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Linear"),
    *("Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding", "EDMLoss", "VPLoss", "VELoss", "AugmentPipe"),
    *("Precond", "UNet", "Block", "MPConv", "MPFourier", "EDM2Loss", "StandardRGBEncoder", "StabilityVAEEncoder"),
}


class _Inert(type):
    """A class that a pickle may name, and not change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class Record(metaclass=_Inert):
    """An object of a pickle: the name of its class and its attributes, nothing that could run."""

    name = "module"

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __getitem__(self, key: str) -> Any:
        state = self.__dict__.get("state")
        if not isinstance(state, dict) or key not in state:
            raise pickle.UnpicklingError(f"its {self.name} has no {key}")
        return state[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the attribute ``key``, or ``default``."""
        state = self.__dict__.get("state")
        return state.get(key, default) if isinstance(state, dict) else default

    @property
    def children(self) -> dict[str, "Record"]:
        """The sub-modules of a module, in order."""
        found: dict[str, Record] = self["_modules"]
        return {name: child for name, child in found.items() if isinstance(child, Record)}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return parameters and buffers of a module by their names in a state dict."""
        own = {**self["_parameters"], **self["_buffers"]}
        found = {
            prefix + name: check_not_expanded(tensor) for name, tensor in own.items() if isinstance(tensor, Tensor)
        }
        for name, child in self.children.items():
            found |= child.tensors(f"{prefix}{name}.")
        return found


class _Dict(dict[Any, Any], metaclass=_Inert):
    """Stands for dnnlib's EasyDict."""


class _Array(metaclass=_Inert):
    """Stands for a NumPy array under construction."""

    def __init__(self, *shape: Any) -> None:
        self.__dict__["value"] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        values = np.frombuffer(content, dtype.numpy())
        self.__dict__["value"] = values.reshape(tuple(map(int, shape)), order="F" if fortran else "C")


class _DType(metaclass=_Inert):
    """Stands for the type of NumPy numbers."""

    def __init__(self, code: str = "", *flags: Any) -> None:
        self.__dict__["code"] = code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like: they are the same for all machines that wrote these files."""

    def numpy(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[<|]?[fiu][1248]|b1|\|b1", str(self.code)):
            raise pickle.UnpicklingError(f"it has numbers of type {self.code}")
        return np.dtype(str(self.code))

    code: str


def _reconstruct(meta: Any) -> Record:
    """Make a record of the object that NVIDIA's persistence would build by running ``meta["module_src"]``."""
    name, kind = (meta.get(key) if isinstance(meta, dict) else None for key in ("class_name", "type"))
    if kind != "class" or name not in CLASSES:
        raise pickle.UnpicklingError(f"it brings its own code for {name}, which is not a class of EDM or EDM2")
    record = Record()
    record.__dict__.update(name=name, state=meta.get("state"))
    return record


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor has no storage")
    untyped = storage._untyped_storage  # what torch itself does here; its public name warns
    return torch.empty(0, dtype=storage.dtype).set_(untyped, offset, size, stride)


def check_not_expanded(tensor: Tensor) -> Tensor:
    """Return ``tensor``, refuse a small storage expanded to a large shape, which would fill the memory when copied."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(tensor.shape)} has too few numbers")
    return tensor


def _parameter(tensor: Tensor, *rest: Any) -> Tensor:
    return tensor


def _storage(content: bytes) -> Any:
    return _weights_only(io.BytesIO(content))


def _scalar(dtype: _DType, content: bytes) -> Any:
    return np.frombuffer(content, dtype.numpy())[0].item()


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    **{("torch.nn.modules.container", name): Record for name in ("ModuleDict", "ModuleList", "Sequential")},
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such checkpoint needs")
        return _KNOWN[module, name]


def read_objects(path: Path) -> Any:
    """Return the content of an NVIDIA pickle: dicts, lists, numbers, tensors, and a ``Record`` for each object."""
    try:
        with path.open("rb") as file:
            for opcode, argument, position in pickletools.genops(file):
                if "PUT" in opcode.name and isinstance(argument, int) and argument > (position or 0):
                    raise pickle.UnpicklingError(f"it asks for a memo of {argument} entries")
            file.seek(0)
            return _Reader(file).load()
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise refusal(path, error) from None


def read_tensors(path: Path) -> Any:
    """Return the content of a file of ``torch.save``: dicts, lists, numbers, tensors, plain argparse namespaces."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
                if packed:
                    largest = max(packed, key=lambda entry: entry.file_size)
                    raise pickle.UnpicklingError(
                        f"{largest.filename} in it unpacks to {largest.file_size} bytes, but torch does not compress"
                    )
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise pickle.UnpicklingError("its parts add up to more than the file")
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return _weights_only(file)
    except Exception as error:
        raise refusal(path, error) from None


def _weights_only(file: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols: what cannot be read is refused
        return torch.load(file, map_location="cpu", weights_only=True)


def refusal(path: Path, error: Exception) -> UserError:
    """Describe in one line why a file was not read."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}: choose a file of this format", field="src", value=path)
    message = " ".join(str(error).split())
    if named := re.search(r"GLOBAL (\S+)", message):
        message = f"it names {named[1]}, which no such checkpoint needs"
    if isinstance(error, KeyError):
        message = f"it has no {message}"
    message = message.partition("WeightsUnpickler error: ")[2] or message
    message = re.split(r" Check the documentation|\. This is an internal", message)[0]
    return UserError(
        f"is not a checkpoint of this format, or damaged, and was not run: {message[:200]}; "
        "download it again, or choose another format",
        field="src",
        value=path,
    )
