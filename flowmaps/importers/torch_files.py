"""Files of ``torch.save``, read by torch's own ``weights_only`` reader once all sizes in them have been checked."""

import argparse
import io
import itertools
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowmaps.errors import shorten
from flowmaps.importers.inert import REMEDY, Reader, check_extent, refusal, shown
from flowmaps.reading import regular_file

Weights = dict[str, Tensor]
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first in a file of torch before its version 1.6
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names
# Parts of a training checkpoint that can have the weights, averages first, and counters that averages keep with them.
CONTAINERS = ("ema", "model_ema", "ema_model", "state_dict_ema", "state_dict", "model", "module", "network", "net")
COUNTERS = {"n_averaged", "initted", "step", "num_updates", "decay"}
FAMILIES = {  # the format of weights by a part of one of their names; the first that is found
    "x_embedder.proj1.": "pmf",
    "u_heads.": "imf",
    "guidance_embedder.": "tvm",
    "s_embedder.mlp.": "soflow",
    "r_embedder.mlp.": "meanflow_sit",
    "logvar_linear.": "dmf",
    "q_norm.scale": "dmf",
    "mlp.w12.": "facm",
    "x_embedder.proj.weight": "dit or sit",
    "all_modules.": "rectified_flow",
    "transformer_blocks.": "diffusers_dit, which takes its folder",
    "down_blocks.": "diffusers_unet, which takes its folder",
}
BYTES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "UntypedStorage": 1},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
    **{"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8},
}


class _Nothing:
    """Stands for every object but storages."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def append(self, item: Any) -> None:
        """Ignore an item of a list."""

    def add(self, item: Any) -> None:
        """Ignore a member of a set."""

    def __setitem__(self, key: Any, item: Any) -> None:
        """Ignore an item of a dictionary."""


class _Storage:
    """Stands for a storage of ``count`` numbers."""

    def __init__(self, count: int) -> None:
        self.count = count


class _SizeReader(Reader):
    """Checks the sizes of storages and tensors; ``records`` are the bytes that the file has for each storage."""

    def __init__(self, file: BinaryIO, size: int, records: dict[str, int] | None = None) -> None:
        super().__init__(file, size)
        self.records, self.claimed = records, dict[str, int]()

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing(name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, *_ = pid
        name = kind.name if isinstance(kind, _Nothing) else ""
        if name not in BYTES or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError(f"it has a storage of {shown(count)} numbers of type {shown(name)}")
        self.claimed[key] = count * BYTES[name]
        if self.claimed[key] > (self.size if self.records is None else self.records.get(key, 0)):
            raise pickle.UnpicklingError(
                f"it has too few numbers: {shown(count)} are announced for storage {shown(key)}"
            )
        return _Storage(count)

    def call(self, function: Any, arguments: list[Any]) -> Any:
        inside = [argument for argument in arguments if isinstance(argument, list)]
        for candidate in (arguments, *inside):  # inside: of torch._utils._rebuild_from_type_v2
            if len(candidate) >= 4 and isinstance(candidate[0], _Storage):
                check_extent(candidate[0].count, *candidate[1:4])
        return _Nothing()

    def build(self, target: Any, state: Any) -> None:
        """Ignore the state."""


def read_tensors(path: Path) -> Any:
    """Return the content of a file of ``torch.save``: dicts, lists, numbers, tensors, plain argparse namespaces.

    A safetensors file is a dict of tensors.

    Raises:
        UserError: The file is damaged or hostile: it names what no checkpoint needs, is compressed, or has fewer
            numbers than its tensors.
    """
    size = regular_file(path, REMEDY).stat().st_size
    try:
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            head = file.read(len(MAGIC))
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
                return load_file(path)
            if head[:4] == b"PK\3\4":
                _check_archive(file, size)
            elif head[2:] != MAGIC[2:]:
                raise (pickle.UnpicklingError if head[:1] == MAGIC[:1] else ValueError)(
                    "it is a pickle of another kind, as formats edm, edm2 and ect read them"
                )
            else:
                check_sizes(file, size)
            return weights_only(file)
    except Exception as error:
        raise refusal(path, error, reading="torch") from None


def _check_archive(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if packed := [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            largest = max(packed, key=lambda entry: entry.file_size)
            raise pickle.UnpicklingError(
                f"{largest.filename} in it unpacks to {largest.file_size} bytes, but torch does not compress"
            )
        if sum(entry.file_size for entry in entries) > size:
            raise pickle.UnpicklingError("its parts add up to more than the file")
        named = {entry.filename: entry for entry in entries}
        if len(named) != len(entries):
            raise pickle.UnpicklingError("two of its parts have one name")
        content = next((name for name in named if name.partition("/")[2] == "data.pkl"), None)
        if content is None:
            raise pickle.UnpicklingError("it has no data.pkl")
        folder = content.partition("/")[0] + "/data/"
        records = {name.removeprefix(folder): named[name].file_size for name in named if name.startswith(folder)}
        pickled = archive.read(content)
        _SizeReader(io.BytesIO(pickled), len(pickled), records).load()


def check_sizes(file: BinaryIO, size: int) -> None:
    """Check the sizes in a file of ``torch.save`` as it was before its version 1.6: five pickles, then the storages."""
    file.seek(0)
    claimed: dict[str, int] = {}
    for _ in range(5):
        reader = _SizeReader(file, size)
        reader.load()
        claimed |= reader.claimed
    if sum(count + 8 for count in claimed.values()) > size - file.tell():
        raise pickle.UnpicklingError("it has too few numbers: it ends before the last storage does")


def weights_only(file: BinaryIO) -> Any:
    """Return the content of a file of ``torch.save`` whose sizes have been checked."""
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols: what cannot be read is refused
        return torch.load(file, map_location="cpu", weights_only=True, encoding="latin1")


def plain_names(weights: Any) -> Weights:
    """Return weights by their names in the bare network, without the parts that wrappers such as compile add."""
    if not isinstance(weights, dict) or not weights:
        raise pickle.UnpicklingError("it has no weights")
    found: Weights = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise pickle.UnpicklingError(f"{shown(name)} among its weights is not a tensor")
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in found:
            raise pickle.UnpicklingError(f"it has {shorten(plain, 80)} twice")
        found[plain] = tensor
    return found


class Found(NamedTuple):
    """The weights of a network in a file, whether they are a part of its content, and the names of the rest."""

    weights: Weights
    inside: bool
    left_out: tuple[str, ...]


def network_weights(content: Any, first: str) -> Found:
    """Return the weights of the network that has a weight called ``first``.

    They may lie in a part of ``content``, and their names may start with "model.", "ema." and the like; averages are
    preferred.
    """
    outer = [content[name] for name in CONTAINERS if name in content] if isinstance(content, dict) else []
    parts = [[part, *(part[name] for name in CONTAINERS if name in part)] for part in outer if isinstance(part, dict)]
    seen: list[str] = []
    for part in (*itertools.chain(*parts), content):
        if not isinstance(part, dict) or not any(isinstance(weight, Tensor) for weight in part.values()):
            continue
        weights = plain_names({name: weight for name, weight in part.items() if name not in COUNTERS})
        seen += weights
        prefixes = [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]
        if prefixes:
            best = min(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix)))
            others = tuple(prefix for prefix in prefixes if prefix and prefix != best)
            kept = {
                name.removeprefix(best): weight
                for name, weight in weights.items()
                if name.startswith(best) or not (name.startswith(others) or name.split(".")[-1] in COUNTERS)
            }
            left = [] if part is content else _others(content, part)
            return Found(kept, part is not content, (*left, *(f"{prefix}*" for prefix in others)))
    form = family(seen)
    raise pickle.UnpicklingError(f"it has no {first}" + (f", and seems to be of format {form}" if form else ""))


def _others(content: dict[Any, Any], part: Any) -> list[str]:
    """Return the names of everything in ``content`` but ``part``, which may lie one level down."""
    found = []
    for name, value in content.items():
        inside = isinstance(value, dict) and any(item is part for item in value.values())
        found += [f"{name}.{key}" for key, item in value.items() if item is not part] if inside else []
        found += [str(name)] if not inside and value is not part else []
    return found


def family(names: Iterable[str]) -> str:
    """Return the format of weights with these names, or an empty text."""
    names = list(names)
    return next((form for start, form in FAMILIES.items() if any(start in name for name in names)), "")
