"""Exact directional derivatives of a flow map, and every rule about forward-mode differentiation.

The rules, each measured (torch 2.15):

* ``torch.func.jvp`` over the velocity, closed over its weights; backward through the tangent is then exact.
  Raw ``forward_ad`` breaks on softmax, and ``torch.func.linearize`` gives wrong gradients silently.
* So does F.layer_norm, whose forward derivative has no correct backward: use ``networks.layers.layer_norm``.
* Scaled dot-product attention has a forward derivative only in its MATH kernel, on every device. ``jvp_attention`` may
  replace it on a GPU, where no gradient flows through the derivative.
* The derivative is taken in at least float32 with autocast off; float64 stays float64. ``derivative_dtype`` lowers its
  products to bfloat16, and torch's switches for TF32 apply to it as to any float32 product.
* Activations cannot be recomputed inside it (activation checkpointing), but all of it can be recomputed.
* Where torch's own tangent is expensive, a formula replaces it (``tangents.AnalyticTangents``).
* Only the arguments that move get a tangent: no spatial Jacobian when x stands still.
* Where no gradient flows through the derivative, no graph of tangents is kept (``constant``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmaps.networks.layers import run_whole
from flowmaps.tangents import AnalyticTangents
from samplers.callables import expand


class TwoTime(Protocol):
    """Anything with a two-time velocity: a FlowMap, or a closed form in a test."""

    def velocity(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor: ...


_dtype = torch.float32  # of the products of derivatives, see ``derivative_dtype``
_derivatives: list[Tensor] | None = None  # of ``recorded_derivatives``


@contextmanager
def derivative_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Compute matrix products and convolutions of all derivatives in the block in ``dtype``: float32 or bfloat16.

    So is the drift that an objective compares a derivative with (``derivative_autocast``). The result, (t - s) dv and
    the residual are in float32 in any case. Outside of such a block derivatives are in float32.
    """
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def derivative_autocast(x: Tensor) -> torch.autocast:
    """Return the autocast under which derivatives at ``x`` are taken: off unless ``derivative_dtype`` is bfloat16."""
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=_dtype is torch.bfloat16)


@contextmanager
def tf32_products(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products on CUDA inside the block: matrix products and cuDNN's convolutions.

    Torch's defaults differ: TF32 in convolutions, IEEE float32 in matrix products. The switches are process-wide, and a
    backward pass follows those of the moment it runs. Other devices have no TF32.
    """
    backends: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = enabled
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def recorded_derivatives() -> Iterator[list[Tensor]]:
    """Collect the derivatives that ``velocity_jvp`` returns inside the block, detached."""
    global _derivatives
    before, _derivatives = _derivatives, []
    try:
        yield _derivatives
    finally:
        _derivatives = before


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
    constant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute v_{s,t}(x) and its derivative along (dx, ds, dt): grad v . dx + ds d_s v + dt d_t v.

    The derivative is exact, and so is backward through it, for networks that keep to the rules above.

    A ``constant`` derivative, as objectives with a stop-gradient around it use, costs half of the memory or less: its
    graph is not kept. Where v itself may be computed under autocast and the derivative may not, v then comes from a
    separate pass under autocast, and keeps no more than any other pass of the network.

    Args:
        fm: A flow map, or anything with its ``velocity``.
        x: Points [B, ...].
        s: Start times [B].
        t: End times [B].
        label: Labels as the network takes them, or None.
        dx: Direction [B, ...] in which x moves, None if x stands still.
        ds: Rate at which s moves, the same for every sample.
        dt: Rate at which t moves, the same for every sample.
        constant: Let no gradient flow through the derivative.

    Returns:
        v and its derivative, both [B, ...] in at least float32.

    Example:
        >>> v, dv = velocity_jvp(fm, x, s, t, dt=1.0)
        >>> dX_dt = v + (t - s)[:, None, None, None] * dv
    """
    (v,), dv = _derivative(
        lambda **at: (fm.velocity(**at, label=label),), getattr(fm, "network", None), (x, s, t), (dx, ds, dt), constant
    )
    return v, dv


def pair_jvp(
    network: Any, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both velocities of ``network.pair``, and the constant derivative of the first along (dx, ds = 1).

    The arguments are those of ``velocity_jvp``, all results [B, ...] in at least float32.
    """
    (v, second), dv = _derivative(
        lambda **at: network.pair(**at, label=label), network, (x, s, t), (dx, 1.0, 0.0), constant=True
    )
    return v, second, dv


def _derivative(
    function: Callable[..., tuple[Tensor, ...]],
    network: Any,
    point: tuple[Tensor, Tensor, Tensor],
    rates: tuple[Tensor | None, float, float],
    constant: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the results of ``function(x=, s=, t=)`` at ``point``, and the derivative of the first along ``rates``."""
    x = point[0]
    at_least = torch.promote_types(x.dtype, torch.float32)
    # clones, since a compiled jvp cannot view a moving time that is a view itself
    here = {
        "x": x.to(at_least),
        **{name: time.to(at_least).clone() for name, time in zip("st", point[1:], strict=True)},
    }
    tangent = {}
    if rates[0] is not None:
        tangent["x"] = rates[0].to(at_least)
    for name, rate in zip("st", rates[1:], strict=True):
        if rate:
            tangent[name] = torch.full_like(here[name], rate)

    def parts(*moving: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        first, *others = function(**(here | dict(zip(tangent, moving, strict=True))))
        return first, tuple(others)

    def derivative(*primals: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH), derivative_autocast(x), AnalyticTangents(constant):
            moved: Any = torch.func.jvp(parts, primals, tuple(tangent.values()), has_aux=True)
            v, dv, others = moved
        return tuple(value.to(at_least) for value in (dv, v, *others))

    own_pass = constant and torch.is_autocast_enabled(x.device.type) and _dtype is torch.float32
    with torch.no_grad() if own_pass else nullcontext():
        dv, *values = run_whole(network, derivative, *(here[name] for name in tangent))
    if own_pass:
        values = [value.to(at_least) for value in function(**dict(zip("xst", point, strict=True)))]
    if _derivatives is not None:
        _derivatives.append(dv.detach())
    return tuple(values), dv


def velocity_difference(
    fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None, step: float = 5e-3
) -> tuple[Tensor, Tensor]:
    """Approximate v_{s,t}(x) and d_t v by a difference over [t - step, t + step] within [s, 1], both [B, ...].

    Both passes are in at least float32 without TF32, since their rounding is multiplied by 1 / step: the ten bits of
    TF32 would leave an error of 5 to 10 %. A backward pass must run without TF32 too (``tf32_products``), and so must
    all of a compiled function. Dropout must be off. The velocity is interpolated linearly between the two evaluations,
    with an error of the same order, step^2.
    """
    at_least = torch.promote_types(x.dtype, torch.float32)
    x, s, t = x.to(at_least), s.to(at_least), t.to(at_least)
    early, late = torch.maximum(t - step, s), (t + step).clamp(max=1)
    twice = None if label is None else torch.cat([label, label])
    ieee = nullcontext() if torch.compiler.is_compiling() else tf32_products(False)
    with torch.autocast(x.device.type, enabled=False), ieee:
        v = fm.velocity(torch.cat([x, x]), torch.cat([s, s]), torch.cat([early, late]), twice)
    before, after = v.chunk(2)
    slope = (after - before) / expand((late - early).clamp(min=1e-9), x)  # s = t = 1 leaves no room
    return before + expand(t - early, x) * slope, slope


def d_dt(fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return X_{s,t}(x) and d/dt X_{s,t}(x) = v + (t - s) d_t v."""
    v, dv = velocity_jvp(fm, x, s, t, label, dt=1.0)
    gap = expand(t - s, x)
    return x + gap * v, v + gap * dv


def d_ds(fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return X_{s,t}(x) and d/ds X_{s,t}(x) = -v + (t - s) d_s v."""
    v, dv = velocity_jvp(fm, x, s, t, label, ds=1.0)
    gap = expand(t - s, x)
    return x + gap * v, gap * dv - v


def transport(
    fm: TwoTime, x: Tensor, s: Tensor, t: Tensor, w: Tensor, label: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return X_{s,t}(x) and its derivative when s moves at rate 1 and x along ``w``: d_s X + grad X . w.

    In terms of v: w - v + (t - s) (d_s v + grad v . w). With w = b_s(x) it vanishes for the
    exact map (Eulerian identity).
    """
    v, dv = velocity_jvp(fm, x, s, t, label, dx=w, ds=1.0)
    gap = expand(t - s, x)
    return x + gap * v, w - v + gap * dv
