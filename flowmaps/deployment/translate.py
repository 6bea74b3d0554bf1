"""A network as a program for engine.js: one image, fixed shapes, few operators, all constants computed."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import default_decompositions
from torch.export.graph_signature import InputKind
from torch.fx import Node

from flowmaps.deployment.program import Live, Program, contiguous, merged
from flowmaps.errors import UserError

aten = torch.ops.aten
KEPT = (
    aten._safe_softmax.default,
    aten.upsample_nearest2d.vec,
    aten.silu.default,
    aten.gelu.default,
)  # operators that are not taken apart

BEYOND = "use --onnx and onnxruntime-web"
_SAME = {"view", "_unsafe_view", "clone", "_to_copy", "alias", "detach", "copy_strided"}  # the same numbers in order
_VIEWS = {"permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split_with_sizes"}
_VIEWS |= {"split", "unbind"}
_CONSTANT = {"full_like", "ones_like", "zeros_like", "new_zeros", "new_ones", "new_full", "_assert_tensor_metadata"}
_ELEMENTWISE = {
    **{name: name for name in ("abs", "cos", "exp", "log", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sin")},
    **{name: name for name in ("sqrt", "tanh", "silu", "add", "sub", "mul", "div", "maximum", "minimum", "pow")},
    **{name: name for name in ("clamp", "where", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_not")},
    "gelu": "gelu_tanh",
    "logical_or": "logical_or",
    "bitwise_and": "logical_and",
}


def write_program(network: nn.Module, inputs: dict[str, Tensor]) -> Program:
    """Translate ``network(**inputs)``, a network in eval mode at a batch of one.

    Raises:
        UserError: It has an operator that engine.js does not know.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        table: Any = default_decompositions()
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
        [output] = exported.graph_signature.user_outputs
        self.program.output = self.known[str(output)].id

    def call(self, node: Node) -> Any:
        """Compute a node of the traced graph, or append what computes it to the program."""
        args: Any = torch.fx.map_arg(node.args, lambda n: self.known[n.name])
        kwargs: Any = torch.fx.map_arg(node.kwargs, lambda n: self.known[n.name])
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if not any(isinstance(arg, Live) for arg in _flat((args, kwargs))):
            return target(*args, **kwargs)
        plain = _map((args, kwargs), lambda arg: arg.value if isinstance(arg, Live) else arg)
        result = target(*plain[0], **plain[1])
        name = target.overloadpacket.__name__
        if name in _CONSTANT:
            return result
        if name in _SAME:
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
        shape, strides = merged(view.shape, view.stride())
        return self.copy(value, [(source, shape, strides, view.storage_offset(), contiguous(shape), 0)])

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
        if all(contiguous(shape.shape) == list(strides) for shape, strides in zip(shapes, spread, strict=True)):
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
        strides, start, listed = contiguous(result.shape), 0, []
        for part in map(self.live, parts):
            shape = part.value.shape
            listed.append((part, list(shape), contiguous(shape), 0, strides, start * strides[dim % result.ndim]))
            start += shape[dim]
        return self.copy(result, listed)

    def on_constant_pad_nd(self, result: Tensor, x: Live, pad: list[int], value: float = 0) -> Live:
        if value != 0 or min(pad) < 0:
            raise UserError(f"the page's engine pads with zeros alone: {BEYOND}")
        strides, shape = contiguous(result.shape), list(x.value.shape)
        start = sum(before * strides[-1 - i] for i, before in enumerate(pad[::2]))
        return self.copy(result, [(x, shape, contiguous(shape), 0, strides, start)], fill=True)

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
        kernels = _value(weight)
        sizes = [*_value(x).shape[1:], kernels.shape[0], *kernels.shape[2:], stride[0], padding[0], *result.shape[2:]]
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


def _value(value: Any) -> Tensor:
    return value.value if isinstance(value, Live) else value if isinstance(value, Tensor) else torch.tensor(value)


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
