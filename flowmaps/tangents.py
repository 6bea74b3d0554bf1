"""Forward derivatives of layers by formula, where torch's own are expensive: ``AnalyticTangents`` inside a jvp."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from flowmaps import jvp_attention

Rule = Callable[..., tuple[Tensor, Tensor]]  # (function, x, its tangent, further arguments) -> value, its tangent


def linear_tangent(
    layer: Callable[..., Tensor],
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> tuple[Tensor, Tensor]:
    """Linear layer. Torch would also compute the layer at a zero tangent of the weight and add that."""
    return layer(x, weight, bias, *args, **kw), layer(dx, weight, None, *args, **kw)


def sigmoid_gate_tangent(x: Tensor, dx: Tensor, gate: Tensor, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x g with the gate g = sigmoid(z) and dz = ``slope`` dx (None: 1). Torch's second derivatives take more passes."""
    y = x * gate
    bend = y - y * gate
    return y, dx * (gate + (bend if slope is None else bend * slope))


def silu_tangent(silu: Callable[..., Tensor], x: Tensor, dx: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """x sigmoid(x)."""
    return sigmoid_gate_tangent(x, dx, torch.sigmoid(x))


def gelu_tangent(gelu: Callable[..., Tensor], x: Tensor, dx: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """GELU's tanh form is x sigmoid(a x + b x^3): Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2."""
    a, square = math.sqrt(8 / math.pi), x.square()
    b = 0.044715 * a
    return sigmoid_gate_tangent(x, dx, torch.sigmoid(x * (b * square + a)), 3 * b * square + a)


TANGENT_RULES: dict[Any, Rule] = {
    F.linear: linear_tangent,
    F.conv2d: linear_tangent,
    F.silu: silu_tangent,
    F.gelu: gelu_tangent,
}


def unpack(value: Any) -> tuple[Any, Tensor | None]:
    """Return a value and its tangent, None if it does not move."""
    if not isinstance(value, Tensor):
        return value, None
    return forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call,no-any-return]


def without_tangent_graph(value: Any) -> Any:
    """Return ``value``, a tensor or a sequence of them, with its tangent as a constant; its own graph stays.

    Inside torch.func.jvp a tangent says that it needs no gradient even where it does, so all are detached.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(without_tangent_graph(item) for item in value)
    primal, tangent = unpack(value)
    return value if tangent is None else forward_ad.make_dual(primal, tangent.detach())  # type: ignore[no-untyped-call]


class AnalyticTangents(TorchFunctionMode):
    """Inside a jvp, apply TANGENT_RULES to functions of which only the first argument moves. The results are equal.

    Backward and torch.compile go through a rule as through any code. With ``constant`` no tangent has a graph.
    """

    def __init__(self, constant: bool = False) -> None:
        super().__init__()
        self.constant = constant

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.constant and func is F.scaled_dot_product_attention and jvp_attention.applies(*args, **kwargs):
            return jvp_attention.attention(*args)
        result = self._apply(func, args, kwargs)
        return without_tangent_graph(result) if self.constant else result

    @staticmethod
    def _apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.native_group_norm:  # in torch 2.11 its forward derivative fails on channels-last tensors
            args = (args[0].contiguous(), *args[1:])
        covered = func in TANGENT_RULES and args and not kwargs.get("inplace")
        if not covered or (func is F.gelu and kwargs.get("approximate") != "tanh"):
            return func(*args, **kwargs)
        x, dx = unpack(args[0])
        if dx is None or any(unpack(value)[1] is not None for value in (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        value, tangent = TANGENT_RULES[func](func, x, dx, *args[1:], **kwargs)
        return forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
