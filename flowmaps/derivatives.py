"""Exact directional derivatives of a flow map: every rule about forward-mode differentiation lives here.

The rules, each measured (torch 2.15):

* ``torch.func.jvp`` over the velocity, closed over its weights; backward through the tangent is then exact.
  Raw ``forward_ad`` breaks on softmax, and ``torch.func.linearize`` gives wrong gradients silently.
* So does F.layer_norm, whose forward derivative has no correct backward: use ``networks.layers.layer_norm``.
* Scaled dot-product attention has a forward derivative only in its MATH kernel, on every device.
* The derivative is taken in at least float32 with autocast off; float64 stays float64.
* Activations cannot be recomputed inside it (activation checkpointing), but the whole of it can.
* Where torch's own tangent is dear, it is taken by hand (``ByHand``).
* Only the arguments that move get a tangent: no spatial Jacobian when x stands still.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowmaps.errors import UserError
from flowmaps.networks.layers import run_whole
from samplers.callables import expand


class TwoTime(Protocol):
    """Anything with a two-time velocity: a FlowMap, or a closed form in a test."""

    def velocity(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor: ...


Rule = Callable[..., tuple[Tensor, Tensor]]  # (function, x, its tangent, further arguments) -> value, its tangent


def layer_rule(
    layer: Callable[..., Tensor],
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> tuple[Tensor, Tensor]:
    """A linear layer: torch adds its value at a weight of zeros, computed, where the weight does not move."""
    return layer(x, weight, bias, *args, **kw), layer(dx, weight, None, *args, **kw)


def gated(x: Tensor, dx: Tensor, gate: Tensor, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x g with the gate g = sigmoid(z) and dz = ``slope`` dx (None: 1): torch's second derivatives take more passes."""
    y = x * gate
    bend = y - y * gate
    return y, dx * (gate + (bend if slope is None else bend * slope))


def silu_rule(silu: Callable[..., Tensor], x: Tensor, dx: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """x sigmoid(x)."""
    return gated(x, dx, torch.sigmoid(x))


def gelu_rule(gelu: Callable[..., Tensor], x: Tensor, dx: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    """GELU's tanh form is x sigmoid(a x + b x^3): Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2."""
    a, square = math.sqrt(8 / math.pi), x.square()
    b = 0.044715 * a
    return gated(x, dx, torch.sigmoid(x * (b * square + a)), 3 * b * square + a)


RULES: dict[Any, Rule] = {F.linear: layer_rule, F.conv2d: layer_rule, F.silu: silu_rule, F.gelu: gelu_rule}


def unpack(value: Any) -> tuple[Any, Tensor | None]:
    """A value and its tangent, None if it does not move."""
    if not isinstance(value, Tensor):
        return value, None
    return forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call,no-any-return]


class ByHand(TorchFunctionMode):
    """Inside a jvp, a function of RULES of which only the first argument moves goes by its rule: the same numbers.

    Backward and torch.compile go through a rule as through any code.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        covered = func in RULES and args and not kwargs.get("inplace")
        if not covered or (func is F.gelu and kwargs.get("approximate") != "tanh"):
            return func(*args, **kwargs)
        x, dx = unpack(args[0])
        if dx is None or any(unpack(value)[1] is not None for value in (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        return forward_ad.make_dual(*RULES[func](func, x, dx, *args[1:], **kwargs))  # type: ignore[no-untyped-call]


def velocity_jvp(
    fm: TwoTime,
    x: Tensor,
    s: Tensor,
    t: Tensor,
    label: Tensor | None = None,
    *,
    dx: Tensor | None = None,
    ds: float = 0.0,
    dt: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """v_{s,t}(x) and its derivative along (dx, ds, dt): grad v . dx + ds d_s v + dt d_t v, both [B, ...].

    ``x``, ``dx`` [B, ...]; ``s``, ``t`` [B]; ``ds``, ``dt`` the same rate for every sample.
    """
    at_least = torch.promote_types(x.dtype, torch.float32)
    # clones, since a compiled jvp cannot view a moving time that is a view itself
    point = {"x": x.to(at_least), "s": s.to(at_least).clone(), "t": t.to(at_least).clone()}
    tangent = {}
    if dx is not None:
        tangent["x"] = dx.to(at_least)
    for name, rate in (("s", ds), ("t", dt)):
        if rate:
            tangent[name] = torch.full_like(point[name], rate)

    def velocity(*moving: Tensor) -> Tensor:
        return fm.velocity(**(point | dict(zip(tangent, moving, strict=True))), label=label)

    def derivative(*primals: Tensor) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False), ByHand():
            v, dv = torch.func.jvp(velocity, primals, tuple(tangent.values()))[:2]
        return v, dv

    v, dv = run_whole(getattr(fm, "network", None), derivative, *(point[name] for name in tangent))
    return v, dv


def velocity_difference(
    fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None, step: float = 5e-3
) -> tuple[Tensor, Tensor]:
    """v_{s,t}(x) and d_t v by a difference over [t - step, t + step] within [s, 1], both [B, ...].

    Half precision is refused, since its rounding is multiplied by 1 / step, and dropout must be off. The velocity lies
    on the straight line between the two evaluations, an error of the same order, step^2.
    """
    if x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type):
        raise UserError(
            "a finite difference needs float32: --config.precision=fp32, or --config.objective.derivative=exact"
        )
    early, late = torch.maximum(t - step, s), (t + step).clamp(max=1)
    twice = None if label is None else torch.cat([label, label])
    v = fm.velocity(torch.cat([x, x]), torch.cat([s, s]), torch.cat([early, late]), twice)
    before, after = v.chunk(2)
    slope = (after - before) / expand((late - early).clamp(min=1e-9), x)  # s = t = 1 leaves no room
    return before + expand(t - early, x) * slope, slope


def d_dt(fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X_{s,t}(x) and d/dt X_{s,t}(x) = v + (t - s) d_t v."""
    v, dv = velocity_jvp(fm, x, s, t, label, dt=1.0)
    gap = expand(t - s, x)
    return x + gap * v, v + gap * dv


def d_ds(fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X_{s,t}(x) and d/ds X_{s,t}(x) = -v + (t - s) d_s v."""
    v, dv = velocity_jvp(fm, x, s, t, label, ds=1.0)
    gap = expand(t - s, x)
    return x + gap * v, gap * dv - v


def transport(
    fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, w: Tensor, label: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """X_{s,t}(x) and its derivative when s moves at rate 1 and x along ``w``: d_s X + grad X . w.

    In terms of v: w - v + (t - s) (d_s v + grad v . w). With w = b_s(x) it vanishes for the
    exact map (Eulerian identity).
    """
    v, dv = velocity_jvp(fm, x, s, t, label, dx=w, ds=1.0)
    gap = expand(t - s, x)
    return x + gap * v, w - v + gap * dv
