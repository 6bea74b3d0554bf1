"""A network as a program for engine.js: one image, fixed shapes, few operators, everything constant computed."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import default_decompositions
from torch.export.graph_signature import InputKind
from torch.fx import Node

from flowmaps.errors import UserError

aten = torch.ops.aten
SMALL = 1024  # numbers: constants with fewer stay float32, such as frequencies
KEPT = (aten._safe_softmax.default, aten.upsample_nearest2d.vec, aten.silu.default, aten.gelu.default)  # operators that are not taken apart


class Live(NamedTuple):
    """A value that depends on the inputs: its number in the program, and one value of it, from the traced inputs."""

    id: int
    value: Tensor


@dataclass
class Program:
    """Nodes in order, each writing one value; values are contiguous float32 arrays of ``sizes`` numbers."""

    inputs: dict[str, int] = field(default_factory=dict)
    output: int = -1
    sizes: list[int] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)

    def add(self, value: Tensor) -> Live:
        """Number a new value."""
        self.sizes.append(value.numel())
        return Live(len(self.sizes) - 1, value)

    def node(self, op: str, value: Tensor, inputs: Sequence[int], **options: Any) -> Live:
        """Append a node whose result is ``value``."""
        live = self.add(value)
        self.nodes.append({"op": op, "out": live.id, "inputs": list(inputs), **options})
        return live

    def packed(self, half: bool) -> tuple[dict[str, Any], bytes]:
        """Return the program as JSON values, and its constants as bytes, with ``half`` the large ones as float16."""
        self._drop_unused()
        listed, parts = [], []
        for id, tensor in self.constants.items():
            numbers = tensor.detach().float().contiguous().numpy().ravel()
            short = half and numbers.size >= SMALL and float(np.abs(numbers).max()) < 65504
            listed.append([id, int(short)])
            parts.append(numbers.astype("<f2" if short else "<f4").tobytes())
        values = {"inputs": self.inputs, "output": self.output, "sizes": self.sizes, "nodes": self.nodes}
        return {**values, "constants": listed}, b"".join(parts)

    def _drop_unused(self) -> None:
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if node["out"] in needed:
                needed.update(node["inputs"])
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {id: tensor for id, tensor in self.constants.items() if id in needed}


def write_program(network: nn.Module, inputs: dict[str, Tensor]) -> Program:
    """Translate ``network(**inputs)``, a network in eval mode at a batch of one.

    Raises:
        UserError: It has an operator that engine.js does not know.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        table = default_decompositions()
        for kept in KEPT:
            table.pop(kept, None)
        exported = torch.export.export(network, (), kwargs=inputs).run_decompositions(table)
        return _Translator(exported, inputs).program


class _Translator:
    """Walks the traced graph with real numbers; what no input reaches stays a plain tensor."""

    def __init__(self, exported: torch.export.ExportedProgram, inputs: dict[str, Tensor]) -> None:
        self.program, self.known = Program(), dict[str, Any]()
        self.registered: dict[Any, Live] = {}
        given = iter(inputs.items())
        for spec in exported.graph_signature.input_specs:
            name = getattr(spec.arg, "name", "")
            if spec.kind == InputKind.USER_INPUT:
                key, value = next(given)
                self.known[name] = live = self.program.add(value)
                self.program.inputs[key] = live.id
            else:
                stored = exported.state_dict if spec.target in exported.state_dict else exported.constants
                self.known[name] = stored[spec.target or ""].detach()
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self.known[node.name] = self.call(node)
            elif node.op == "output":
                result = self.known[node.args[0][0].name]
                self.program.output = result.id

    def call(self, node: Node) -> Any:
        """Compute a node of the traced graph, or append what computes it to the program."""
        args = torch.fx.map_arg(node.args, lambda n: self.known[n.name])
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: self.known[n.name])
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if not any(isinstance(arg, Live) for arg in _flat((args, kwargs))):
            return target(*args, **kwargs)
        plain = _map((args, kwargs), lambda arg: arg.value if isinstance(arg, Live) else arg)
        result = target(*plain[0], **plain[1])
        name = target.overloadpacket.__name__
        if name in _FILLED:
            return result
        if name in ("view", "_unsafe_view", "clone", "_to_copy", "alias", "detach", "copy_strided"):
            return Live(args[0].id, result)
        if name in _VIEWS:
            return self.view(target, args, kwargs, result)
        if name in _ELEMENTWISE:
            return self.elementwise(_ELEMENTWISE[name], name, args, kwargs, result)
        handler: Callable[..., Any] | None = getattr(self, f"on_{name}", None)
        if handler is None:
            raise UserError(f"the page's engine does not know {name}: {BEYOND}")
        return handler(result, *args, **kwargs)

    def live(self, value: Any) -> Live:
        """Return a number or constant as a value of the program."""
        if isinstance(value, Live):
            return value
        key = id(value) if isinstance(value, Tensor) else float(value)
        if key not in self.registered:
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            live = self.program.add(tensor)
            self.program.constants[live.id] = tensor
            self.registered[key] = live
        return self.registered[key]

    def view(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Append the copy that makes a view contiguous, unless it is already; all parts of a split."""
        base = torch.empty(args[0].value.shape)  # the program's values are contiguous
        found = target(base, *args[1:], **kwargs)
        if isinstance(found, Tensor):
            return self.strided(args[0], found, result)
        return [self.strided(args[0], *pair) for pair in zip(found, result, strict=True)]

    def strided(self, source: Live, view: Tensor, value: Tensor) -> Live:
        if view.is_contiguous() and view.storage_offset() == 0 and view.numel() == source.value.numel():
            return Live(source.id, value)
        shape, strides = _merged(view.shape, view.stride())
        return self.copy(value, [(source, shape, strides, view.storage_offset(), _contiguous(shape), 0)])

    def copy(self, value: Tensor, parts: list[tuple[Any, ...]], fill: bool = False) -> Live:
        names = ("shape", "from", "at", "to", "start")
        listed = [dict(zip(names, part[1:], strict=True)) for part in parts]
        return self.program.node("copy", value, [part[0].id for part in parts], parts=listed, fill=fill)

    def elementwise(
        self, name: str, called: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Live:
        numbers: list[float] = []
        if called == "clamp":
            low, high = (*args[1:], kwargs.get("min"), kwargs.get("max"))[:2]
            numbers = [-1e38 if low is None else low, 1e38 if high is None else high]
            args = args[:1]
        if called == "gelu":
            if kwargs.get("approximate", "none") != "tanh":
                raise UserError(f"the page's engine does not know the exact gelu: {BEYOND}")
        if called in ("add", "sub") and kwargs.get("alpha", 1) != 1:
            args = (args[0], self.elementwise("mul", "mul", (args[1], kwargs["alpha"]), {}, _value(args[1])))
        given = [self.live(arg) for arg in args]
        shapes = [live.value.expand(result.shape) for live in given]
        spread = [torch.empty(live.value.shape).expand(result.shape).stride() for live in given]
        if all(_contiguous(shape.shape) == list(strides) for shape, strides in zip(shapes, spread, strict=True)):
            shape, strides = [result.numel()], [[1]] * len(given)
        else:
            shape, strides = list(result.shape), [list(stride) for stride in spread]
        inputs = [live.id for live in given]
        return self.program.node("map", result, inputs, name=name, shape=shape, strides=strides, numbers=numbers)

    def moved_last(self, x: Live, dims: Sequence[int]) -> Live:
        """Return x with the dimensions ``dims`` last."""
        rank = x.value.ndim
        last = [dim % rank for dim in dims]
        order = [*(dim for dim in range(rank) if dim not in last), *last]
        return self.strided(x, torch.empty(x.value.shape).permute(order), x.value.permute(order))

    def reduce(self, name: str, result: Tensor, x: Live, dims: Any) -> Live:
        dims = range(x.value.ndim) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
        n = math.prod(x.value.shape[dim] for dim in dims)
        return self.program.node("reduce", result, [self.moved_last(x, dims).id], name=name, n=n)

    def on_mean(self, result: Tensor, x: Live, dims: Any = (), keepdim: bool = False, dtype: Any = None) -> Live:
        return self.reduce("mean", result, x, dims)

    def on_sum(self, result: Tensor, x: Live, dims: Any = (), keepdim: bool = False, dtype: Any = None) -> Live:
        return self.reduce("sum", result, x, dims)

    def on_amax(self, result: Tensor, x: Live, dims: Any = (), keepdim: bool = False) -> Live:
        return self.reduce("amax", result, x, dims)

    def on__safe_softmax(self, result: Tensor, x: Live, dim: int, dtype: Any = None) -> Live:
        if dim % x.value.ndim != x.value.ndim - 1:
            raise UserError(f"the page's engine knows softmax along the last dimension alone: {BEYOND}")
        return self.program.node("softmax", result, [x.id], n=x.value.shape[-1])

    def on_native_group_norm(
        self, result: Any, x: Live, weight: Any, bias: Any, n: int, c: int, pixels: int, groups: int, eps: float
    ) -> Any:
        if weight is not None or bias is not None:
            raise UserError(f"the page's engine knows norms without weights alone: {BEYOND}")
        return [self.program.node("norm", result[0], [x.id], n=c * pixels // groups, eps=eps)]

    def on_cat(self, result: Tensor, parts: list[Any], dim: int = 0) -> Live:
        strides, start, listed = _contiguous(result.shape), 0, []
        for part in map(self.live, parts):
            shape = part.value.shape
            listed.append((part, list(shape), _contiguous(shape), 0, strides, start * strides[dim % result.ndim]))
            start += shape[dim]
        return self.copy(result, listed)

    def on_constant_pad_nd(self, result: Tensor, x: Live, pad: list[int], value: float = 0) -> Live:
        if value != 0 or min(pad) < 0:
            raise UserError(f"the page's engine pads with zeros alone: {BEYOND}")
        strides, shape = _contiguous(result.shape), list(x.value.shape)
        start = sum(before * strides[-1 - i] for i, before in enumerate(pad[::2]))
        return self.copy(result, [(x, shape, _contiguous(shape), 0, strides, start)], fill=True)

    def on_upsample_nearest2d(self, result: Tensor, x: Live, size: Any, scales: Any) -> Live:
        n, c, h, w = x.value.shape
        down, across = result.shape[2] // h, result.shape[3] // w
        view = torch.empty(n, c, h, 1, w, 1).expand(n, c, h, down, w, across)
        return self.strided(x, view, result)

    def on_convolution(
        self, result: Tensor, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
        transposed: bool, output_padding: Any, groups: int,
    ) -> Live:  # fmt: skip
        if transposed or groups != 1 or {*dilation} != {1} or len({*stride}) > 1 or len({*padding}) > 1:
            raise UserError(f"the page's engine knows plain convolutions alone: {BEYOND}")
        given = [self.live(v) for v in (x, weight, bias) if v is not None]
        sizes = [*_value(x).shape[1:], *_take(_value(weight).shape, 0, 2, 3), stride[0], padding[0], *result.shape[2:]]
        return self.program.node("conv", result, [live.id for live in given], sizes=sizes)

    def on_avg_pool2d(
        self, result: Tensor, x: Live, kernel: Any, stride: Any = (), padding: Any = (0, 0), *more: Any
    ) -> Live:
        if len({*kernel}) > 1 or (more and more[0]):
            raise UserError(f"the page's engine knows square pooling alone: {BEYOND}")
        sizes = [*x.value.shape[1:], kernel[0], (stride or kernel)[0], padding[0], *result.shape[2:]]
        return self.program.node("pool", result, [x.id], sizes=sizes)

    def product(self, result: Tensor, a: Any, b: Any) -> Live:
        (m, k), n, batch = _value(a).shape[-2:], _value(b).shape[-1], math.prod(result.shape[:-2])
        given = [self.live(a).id, self.live(b).id]
        return self.program.node("multiply", result, given, sizes=[batch, m, k, n], spread=_value(b).ndim == 2)

    on_mm = on_bmm = product

    def on_addmm(self, result: Tensor, bias: Any, a: Any, b: Any) -> Live:
        made = self.product(result, a, b)
        return self.elementwise("add", "add", (made, bias), {}, result)


BEYOND = "use --onnx and onnxruntime-web"
_VIEWS = {"permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split_with_sizes"}
_VIEWS |= {"split", "unbind"}
_FILLED = {"_assert_tensor_metadata", "full_like", "ones_like", "zeros_like", "new_zeros", "new_ones", "new_full"}  # knows only the shape of its input
_ELEMENTWISE = {
    **{name: name for name in ("abs", "cos", "exp", "log", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sin", "sqrt")},
    **{name: name for name in ("tanh", "silu", "add", "sub", "mul", "div", "maximum", "minimum", "pow", "clamp")},
    **{name: name for name in ("where", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_not")},
    "gelu": "gelu_tanh",
    "logical_or": "logical_or",
    "bitwise_and": "logical_and",
}


def _value(value: Any) -> Tensor:
    return value.value if isinstance(value, Live) else value if isinstance(value, Tensor) else torch.tensor(value)


def _take(shape: Sequence[int], *dims: int) -> list[int]:
    return [shape[dim] for dim in dims]


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the same walk over memory with as few dimensions as possible."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return [size for size, _ in found], [stride for _, stride in found]


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Live):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Live) or not isinstance(value, (tuple, list, dict)):
        return [value]
    return [one for item in (value.values() if isinstance(value, dict) else value) for one in _flat(item)]
