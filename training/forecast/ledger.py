"""The books of a step: bytes alive by part and phase, and the arithmetic of its products by precision."""

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
PRODUCTS: dict[Any, Any] = {  # operator -> FLOPs of a call; torch's table lacks attention on a CPU
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
SMALL = 4096  # numbers in a tensor that is also computed for real


class Peak(NamedTuple):
    """The most bytes alive at once, and their parts at that moment."""

    total: int
    parts: dict[str, int]


class Known(NamedTuple):
    """The true value of a fake tensor, None if unknown. A copy of the tensor starts unknown."""

    value: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> "Known":
        return UNKNOWN


UNKNOWN = Known()


class Ledger(TorchDispatchMode):
    """Count what the operators inside the block allocate and compute, on real or on fake tensors.

    Every storage that an operator returns counts from then until it is freed. It belongs to the part "activations"
    until ``label`` says otherwise. FLOPs are those of matrix products, convolutions and attention, two per
    multiplication with addition, from torch's own table; elementwise work is left out. The precision of a product is
    "bf16" (or "fp16") by its type, "TF32" or "fp32" by torch's switch for CUDA at that moment.

    Among fake tensors, small ones that depend on no random number and no data (grids of times, counters of the
    optimiser) are also computed for real, so that Python code may read them. Any other number reads as 1, and ``asked``
    counts such readings: in a training step the norm of the gradient alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.live: Counter[str] = Counter()  # part -> bytes
        self.peaks: dict[str, Peak] = {}  # by phase
        self.products: defaultdict[str, Counter[str]] = defaultdict(Counter)  # phase -> precision -> FLOPs
        self.asked = 0
        self._storages: dict[int, tuple[str, int]] = {}  # address -> part, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the parts that this process holds come by themselves
        if func is torch.ops.prim.device.default:  # most calls, of no interest
            return func(*args)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._read(args[0])
        out = func(*args, **kwargs)
        made = _tensors(out)
        for tensor in made:
            if tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        if func.overloadpacket in PRODUCTS:
            flops = PRODUCTS[func.overloadpacket](*args, **kwargs, out_val=out)
            self.products[self.phase][precision(made[0].dtype)] += flops
        remember(func, args, kwargs, made)
        return out

    def label(self, tensor: Tensor, part: str) -> None:
        """Count the storage of ``tensor`` under ``part`` from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages[key]
        self._storages[key] = part, size
        self.live[before] -= size
        self.live[part] += size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follow a storage that is resized without an operator, as FSDP does."""
        if storage._cdata in self._storages:
            self._resize(storage._cdata, storage.nbytes())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = "activations", 0
            weakref.finalize(storage, self._free, key).atexit = False
            self._resize(key, storage.nbytes())

    def _free(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size

    def _resize(self, key: int, size: int) -> None:
        part, before = self._storages[key]
        self._storages[key] = part, size
        self.live[part] += size - before
        total = self.live.total()
        if self.phase not in self.peaks or total > self.peaks[self.phase].total:
            self.peaks[self.phase] = Peak(total, dict(self.live))

    def _read(self, tensor: FakeTensor) -> Any:
        value = known(tensor)
        if value is None:
            self.asked += 1
            return 1
        with _disable_current_modes():
            return value.item()


def precision(dtype: torch.dtype) -> str:
    """Return the name under which products of ``dtype`` are counted."""
    if dtype.itemsize == 2:
        return "bf16"
    return "TF32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an operator's arguments or results; torch's tree_leaves takes a quarter of a forecast."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def known(value: Any) -> Any:
    """Return the true value of a tensor, None if it is fake and unknown; other values as they are."""
    return getattr(value, "known", UNKNOWN).value if isinstance(value, FakeTensor) else value


def remember(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> None:
    """Compute the results ``made`` by ``func`` for real too, if they are small fake tensors made of known ones.

    Otherwise forget the values that ``func`` has overwritten.
    """
    given, changes = _tensors((*args, *kwargs.values())), func._schema.is_mutable
    if not any(isinstance(tensor, FakeTensor) for tensor in (*given, *made)):
        return
    random = torch.Tag.nondeterministic_seeded in func.tags
    if random or any(tensor.numel() > SMALL or known(tensor) is None for tensor in given):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if changes and argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    tensor.known = UNKNOWN  # type: ignore[attr-defined]
    elif changes or all(tensor.numel() <= SMALL for tensor in made):
        with _disable_current_modes():
            values = _tensors(func(*tree_map(known, args), **tree_map(known, kwargs)))
        for tensor, value in zip(made, values, strict=True):
            tensor.known = Known(value)  # type: ignore[attr-defined]


class OneMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of all fake tensors, also of those in a deep copy."""

    def __deepcopy__(self, memo: Any) -> "OneMode":
        return self


@contextmanager
def pretend() -> Iterator[Ledger]:
    """Give tensors made inside the block shapes but no memory, and keep the books of what they would take."""
    mode = OneMode(allow_non_fake_inputs=True)
    # Its memo of results holds weak references, with which Module.to cannot swap parameters.
    forgetful = patch.object(mode.fake_tensor_converter, "set_tensor_memo", lambda tensor, fake: None)
    ledger, resize = Ledger(), torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        ledger.resized(storage)
        return result

    followed = patch.object(torch.UntypedStorage, "resize_", resize_)
    with warnings.catch_warnings(), forgetful, followed, mode, ledger:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copy.deepcopy does
        yield ledger
