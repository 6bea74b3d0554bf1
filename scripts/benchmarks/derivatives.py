"""Bench of derivatives: the routes of a constant derivative, and the error of each precision."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.objectives import Work, loss_and_gradient, medians, peak_memory
from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.derivatives import derivative_dtype, recorded_derivatives, velocity_jvp
from flowmaps.images import from_uint8
from flowmaps.objectives import (
    Eulerian,
    FlowMatching,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    Objective,
    SelfDistillation,
)
from flowmaps.objectives.base import rms
from flowmaps.objectives.self_distillation import OffDiagonalBatch
from flowmaps.rng import generator
from samplers.callables import Drift, expand


@dataclass
class Recorded(MeanFlow):
    """MeanFlow whose tangents keep their graph until the end of the derivative: the reference."""

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        u, gap = batch.conditional_velocity, expand(batch.t - batch.s, batch.x)
        v, dv = velocity_jvp(fm, batch.x, batch.s, batch.t, batch.label, dx=u, ds=1.0)
        terms["jvp_norm"] = rms(dv)
        return v - u - gap * dv.detach()


@dataclass
class Constant(MeanFlow):
    """MeanFlow whose tangents have no graph, in one pass in float32: the package's route without autocast."""

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        with torch.autocast(batch.x.device.type, enabled=False):
            return super().residual(fm, batch, teacher, terms)


@dataclass
class TwoPasses(MeanFlow):
    """MeanFlow whose velocity comes from a separate pass: the package's route under autocast."""

    def residual(self, fm: FlowMap, batch: OffDiagonalBatch, teacher: Drift | None, terms: dict[str, Tensor]) -> Tensor:
        u, gap = batch.conditional_velocity, expand(batch.t - batch.s, batch.x)
        with torch.no_grad():
            dv = velocity_jvp(fm, batch.x, batch.s, batch.t, batch.label, dx=u, ds=1.0)[1]
        terms["jvp_norm"] = rms(dv)
        return fm.velocity(batch.x, batch.s, batch.t, batch.label) - u - gap * dv


ROUTES: dict[str, type[MeanFlow]] = {"recorded": Recorded, "constant": Constant, "two passes": TwoPasses}


def routes(name: str, rounds: int = 9, batch: int = 32) -> Iterator[tuple[str, dict[str, float]]]:
    """Time and peak memory of loss and gradient of MeanFlow by each route, at 75 % and 25 % off-diagonal rows.

    In interleaved rounds of one process, together with flow matching. "+bf16" behind the name: under autocast.
    """
    network, bf16, _ = name.partition("+bf16")
    device, step = loss_and_gradient(network, batch, bool(bf16))
    objectives: dict[str, Objective] = {"flow matching": FlowMatching()}
    for share in (0.75, 0.25):
        objectives |= {f"{route}, {share:.0%}": cls(diagonal=1 - share) for route, cls in ROUTES.items()}

    def work(objective: Objective, k: int) -> None:
        step(objective, objective.loss, k)

    works: dict[str, Work] = {key: functools.partial(work, objective) for key, objective in objectives.items()}
    median = medians(works, rounds, warm=2)
    for key, value in median.items():
        mib = peak_memory(functools.partial(works[key], 0), device) / 2**20
        yield f"{name}, {key}", {"ms": 1e3 * value, "MiB": mib, "time / flow matching": value / median["flow matching"]}


class EmulatedTF32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Round the operands of matrix products and convolutions to TF32's 10 bits of mantissa, backward passes included.

    As tensor cores do before they multiply; sums are in float32.
    """

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            args = tuple(round_tf32(value) if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


def round_tf32(x: Tensor) -> Tensor:
    """Round float32 values to the nearest with 10 bits of mantissa, ties to even."""
    if x.dtype is not torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Gaussian(FlowMap):
    """The exact flow map between Gaussians whose covariance is Q diag(variances) Q^T, through products with Q.

    Each coordinate along Q is scaled: X_{s,t}(y) = y sigma_t / sigma_s with sigma_t^2 = (1 - t)^2 + t^2 variance
    (base_std 1, linear path). The velocity is too large by the share ``wrong``.
    """

    def __init__(self, wrong: float = 0.0, dim: int = 64) -> None:
        stream = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=stream, dtype=torch.float64))[0]
        network = torch.nn.Linear(dim, dim, bias=False, dtype=torch.float64)
        network.weight.data.copy_(rotation)
        super().__init__(network)
        self.wrong = wrong
        self.register_buffer("variances", torch.linspace(0.1, 2.0, dim, dtype=torch.float64))

    def velocity(  # type: ignore[override]  # times of each row alone
        self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """Return (X_{s,t}(x) - x) / (t - s), with (sigma_t / sigma_s - 1) / (t - s) in a form that has no 0 / 0."""
        s, t, variances = s[:, None], t[:, None], self.get_buffer("variances")
        first, second = (((1 - u) ** 2 + u**2 * variances).sqrt() for u in (s, t))
        rate = (1 + self.wrong) * ((s + t) * (1 + variances) - 2) / (first * (first + second))
        weight: Tensor = self.network.weight  # type: ignore[assignment]
        rotated = torch.nn.functional.linear(x, weight)
        return torch.nn.functional.linear(rotated * rate.to(rotated.dtype), weight.t())


PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "fp32": (torch.float32, nullcontext),
    "tf32": (torch.float32, EmulatedTF32),
    "bf16": (torch.bfloat16, nullcontext),
}
DIFFERENTIATED: dict[str, SelfDistillation] = {
    "lagrangian": Lagrangian(diagonal=0.0),
    "eulerian": Eulerian(diagonal=0.0),
    "mean_flow": MeanFlow(diagonal=0.0),
    "improved_mean_flow": ImprovedMeanFlow(diagonal=0.0),
}


def _subject(name: str, batch: int) -> tuple[FlowMap, Tensor, Tensor | None]:
    """Return a flow map in float64, with data and labels."""
    if name in ("gaussian", "gaussian, 1 % wrong"):
        fm = Gaussian(wrong=0.01 if "wrong" in name else 0.0)
        z = torch.randn(batch, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rotation: Tensor = fm.network.weight.detach()  # type: ignore[operator]
        return fm, z * fm.get_buffer("variances").sqrt() @ rotation, None
    if name != "digits":
        raise UserError(f"--rows={name}: choose from gaussian, digits")
    items, label = open_dataset("digits", "train").fetch(torch.arange(batch))
    return FlowMap.from_pretrained("assets/digits").double(), from_uint8(items).double(), label


def precision_errors(name: str, batch: int = 256) -> Iterator[tuple[str, dict[str, float]]]:
    """Off-diagonal loss in each precision, and relative errors of derivative and gradient, against float64.

    Of ``gaussian``, the exact flow map in 64 dimensions, whose Lagrangian and Eulerian losses are zero, so that the
    loss shown is what the precision leaves; of the same 1 % wrong, where there is a gradient; and of the shipped
    ``digits``.
    """
    for subject in ("gaussian", "gaussian, 1 % wrong") if name == "gaussian" else (name,):
        fm, x1, label = _subject(subject, batch)
        single = _subject(subject, batch)[0].float()
        for key, objective in DIFFERENTIATED.items():
            draws = objective.draw(fm, x1, generator(0, "precision", 0))
            few = draws._replace(**{k: v.float() for k, v in draws._asdict().items() if v is not None})
            exact = _off_diagonal(fm, objective, x1, label, draws)
            for precision, (dtype, products) in PRECISIONS.items():
                with derivative_dtype(dtype), products():
                    found = _off_diagonal(single, objective, x1.float(), label, few)
                errors = [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], exact[1:], strict=True)]
                scores = {"loss": float(found[0]), "loss in float64": float(exact[0]), "error of dv": errors[0]}
                if subject != "gaussian":  # the exact map has no gradient
                    scores["error of gradient"] = errors[1]
                yield f"{subject}, {key}, {precision}", scores


def _off_diagonal(
    fm: FlowMap, objective: SelfDistillation, x1: Tensor, label: Tensor | None, draws: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the first derivative that it takes, and its gradient, in float64."""
    with recorded_derivatives() as taken:
        value = replace(objective).loss(fm, x1, label, draws).value
    gradients = torch.autograd.grad(value, list(fm.parameters()), allow_unused=True)
    flat = torch.cat([g.flatten() for g in gradients if g is not None])
    return value.detach().double(), taken[0].flatten().double(), flat.double()
