"""Pickles of persistent classes (EDM, EDM2, TVM) as data: no code in them runs, what no checkpoint needs is refused.

They are pickles of objects that carry the source code of their classes. ``read_objects`` turns these into inert records
without looking at that source, and hands the storages inside to torch's ``weights_only`` reader.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmaps.errors import shorten
from flowmaps.importers.inert import REMEDY, Reader, Unsupported, check_extent, refusal, same, shown
from flowmaps.importers.torch_files import check_sizes, weights_only
from flowmaps.reading import regular_file

# The classes in files of EDM, EDM2, ECT, CMT and TVM. A record of one of these is a name and a state, whatever it says.
CLASSES = {
    *("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Linear"),
    *("Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding", "EDMLoss", "VPLoss", "VELoss", "AugmentPipe"),
    *("ECMPrecond", "ECMLoss", "DPMSolverLoss"),
    *("Precond", "UNet", "Block", "MPConv", "MPFourier", "EDM2Loss", "StandardRGBEncoder", "StabilityVAEEncoder"),
    *("TVMWrapper", "DiT", "DiT_XL_2_18h", "TimestepEmbedder", "LabelEmbedder", "DiTBlock", "FinalLayer", "Attention"),
}
# Classes that a pickle may name, by module: records of them are made as of the others.
MODULES = {
    "torch.nn.modules.container": "ModuleDict ModuleList Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.linear": "Linear Identity",
    "torch.nn.modules.sparse": "Embedding",
    "torch.nn.modules.normalization": "RMSNorm",
    "torch.nn.modules.activation": "GELU SiLU",
    "torch.nn.modules.dropout": "Dropout",
    "torch._dynamo.eval_frame": "OptimizedModule",
    "timm.layers.patch_embed": "PatchEmbed",
    "timm.layers.mlp": "Mlp",
    "timm.models.vision_transformer": "PatchEmbed Mlp",
}


class Record:
    """An object of a pickle: the name of its class and its attributes, nothing that could run."""

    def __init__(self) -> None:
        self.name, self.state = "module", dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        if key not in self.state:
            raise pickle.UnpicklingError(f"its {self.name} has no {key}")
        return self.state[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the attribute ``key``, or ``default``."""
        return self.state.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the attribute ``key`` as a finite number that is not negative."""
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, (int, float)) or not 0 <= value < 1 << 31:
            raise pickle.UnpicklingError(f"its {self.name}.{key} is {shown(value)}, which is not a number in range")
        return value

    def count(self, key: str) -> int:
        """Return the attribute ``key`` as a whole number that is not negative."""
        if (value := self.number(key)) != int(value):
            raise pickle.UnpicklingError(f"its {self.name}.{key} is {shown(value)}, which is not a whole number")
        return int(value)

    def check(self, place: str, **expected: Any) -> None:
        """Refuse by name an attribute that is there and is not ``expected``, the value that our network has."""
        for key, value in expected.items():
            if not same(found := self.get(key, value), value):
                raise Unsupported(f"its {place}.{key} is {shown(found)}, and only {shown(value)} has a network here")

    def child(self, key: str, name: str) -> "Record":
        """Return the sub-module ``key``, which must be of class ``name``."""
        found = self.children.get(key)
        if found is None or found.name != name:
            kind = "missing" if found is None else f"a {found.name}"
            raise pickle.UnpicklingError(f"its {self.name}.{key} is {kind}, expected {name}")
        return found

    @property
    def children(self) -> dict[str, "Record"]:
        """The sub-modules of a module, in order."""
        found = self["_modules"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise pickle.UnpicklingError(f"its {self.name} has modules without names")
        return {name: child for name, child in found.items() if isinstance(child, Record)}

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers of a module by their names in a state dict; every module has one place."""
        found: dict[str, Tensor] = {}
        seen, waiting = {id(self)}, [("", self)]
        while waiting:
            prefix, module = waiting.pop()
            own = {**module["_parameters"], **module["_buffers"]}
            found |= {f"{prefix}{name}": tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
            for name, child in module.children.items():
                if id(child) in seen:
                    raise pickle.UnpicklingError(f"its module {shorten(prefix + name, 80)} is also in another place")
                seen.add(id(child))
                waiting.append((f"{prefix}{name}.", child))
        return found


class _Dict(dict[Any, Any]):
    """Stands for dnnlib's EasyDict and for OrderedDict."""

    def __init__(self) -> None:
        super().__init__()


class _DType:
    """Stands for the type of NumPy numbers."""

    def __init__(self, code: Any = "", *flags: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<|]?[fiu][1248]|\|?b1", code):
            raise pickle.UnpicklingError(f"it has numbers of type {shown(code)}")
        self.numpy = np.dtype(code)


class _Array:
    """Stands for a NumPy array under construction."""

    def __init__(self, *shape: Any) -> None:
        self.value = np.empty(0)


def _array(content: Any, dtype: _DType, shape: Any, order: str) -> _Array:
    array = _Array()
    values = np.frombuffer(content, dtype.numpy)
    array.value = values.reshape(tuple(map(int, shape)), order="F" if order == "F" else "C")
    return array


def _scalar(dtype: _DType, content: bytes) -> Any:
    return np.frombuffer(content, dtype.numpy)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {shown(encoding)}")
    return text.encode(encoding)


def _reconstruct(meta: Any) -> Record:
    """Make a record of the object that NVIDIA's persistence would build by running ``meta["module_src"]``."""
    name, kind = (meta.get(key) if isinstance(meta, dict) else None for key in ("class_name", "type"))
    if kind != "class" or not isinstance(name, str) or name not in CLASSES:
        raise pickle.UnpicklingError(
            f"it brings its own code for {shown(name)}, which is not a class of EDM, EDM2, ECT or TVM"
        )
    record = Record()
    record.name, record.state = name, _state(meta.get("state"))
    return record


def _state(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise pickle.UnpicklingError("the state of an object is not a dictionary")
    return state


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor has no storage")
    untyped = storage._untyped_storage  # what torch itself does here; its public name warns
    check_extent(untyped.nbytes() // storage.dtype.itemsize, offset, size, stride)
    return torch.empty(0, dtype=storage.dtype).set_(untyped, offset, size, stride)


def _parameter(tensor: Tensor, *rest: Any) -> Tensor:
    return tensor


def _storage(content: bytes) -> Any:
    check_sizes(io.BytesIO(content), len(content))
    return weights_only(io.BytesIO(content))


def _nothing(*items: Any) -> None:
    """Stands for sets of names and methods of losses, which are of no use."""


def _no_bytes() -> bytes:
    return b""


def _member(value: Any) -> Any:
    """Stands for a member of timm's Format."""
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    **{(builtins, "set"): _nothing for builtins in ("builtins", "__builtin__")},  # the second in protocol 2
    **{(builtins, "getattr"): _nothing for builtins in ("builtins", "__builtin__")},
    **{(builtins, "bytes"): _no_bytes for builtins in ("builtins", "__builtin__")},
    ("_codecs", "encode"): _latin1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    **{(module, name): Record for module, names in MODULES.items() for name in names.split()},
    ("timm.layers.format", "Format"): _member,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}

# Of NVIDIA's torch_utils and dnnlib, which others keep in folders of other names.
_ANYWHERE: dict[str, Any] = {"_reconstruct_persistent_obj": _reconstruct, "EasyDict": _Dict}


class _ObjectReader(Reader):
    """Makes records of what a pickle of persistent classes may name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ANYWHERE:
            return _ANYWHERE[name]
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such checkpoint needs")
        return _KNOWN[module, name]

    def call(self, function: Any, arguments: list[Any]) -> Any:
        if not any(function is known for known in (*_KNOWN.values(), *_ANYWHERE.values())):
            raise pickle.UnpicklingError("it calls what is not a name")
        return function(*arguments)

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Record):
            target.state = _state(state)
        elif isinstance(target, _Array):
            _, shape, dtype, fortran, content = state
            target.value = _array(content, dtype, shape, "F" if fortran else "C").value
        elif not isinstance(target, _DType):
            raise pickle.UnpicklingError("it changes what is not an object of a checkpoint")
        elif state[1] not in ("<", "|", "=") or any(state[2:5]):
            raise pickle.UnpicklingError("it has numbers in another order of bytes, or records of several")


def read_objects(path: Path) -> Any:
    """Return the content of an NVIDIA pickle: dicts, lists, numbers, tensors, and a ``Record`` for each object.

    Raises:
        UserError: The file is damaged or hostile: it names what no checkpoint needs, or has fewer numbers than its
            tensors.
    """
    size = regular_file(path, REMEDY).stat().st_size
    try:
        with path.open("rb") as file:
            return _ObjectReader(file, size).load()
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise refusal(path, error, reading="pickle") from None
