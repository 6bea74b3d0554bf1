"""The base of all objectives: the call, the weights, the reduction to one number."""

import enum
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.networks.conditions import condition_rows
from samplers.callables import Drift
from samplers.schedule import Schedule
from samplers.trajectories import Trajectory

T = TypeVar("T")


def new_option(default: T, before: T) -> T:
    """Declare an option that objectives did not always have; runs whose config.json lacks it did as ``before``."""
    return field(default=default, metadata={"before": before})


class Loss(NamedTuple):
    """``value``: the scalar to minimise; ``terms``: unweighted mean squared residuals, detached, for the log."""

    value: Tensor
    terms: dict[str, Tensor]


class Draws(NamedTuple):
    """The random part of one step on data: noise x0 [B, ...] and times s <= t [B], diagonal rows (s = t) first.

    ``gamma`` [B], uniform on [0, 1], is for methods that need one more number per row; some put a schedule there, with
    None where it has ended. ``guidance`` [B] holds the weights of baked-in guidance, None without. ``told`` is
    (w, low, high) [B, 3] if the network is conditioned on all three. ``crop`` is (top, left, height, width) [B, 4] in
    pixels if images are compared after random crops.
    """

    x0: Tensor
    s: Tensor
    t: Tensor
    gamma: Tensor | None
    guidance: Tensor | None = None
    told: Tensor | None = None
    crop: Tensor | None = None


class Segments(NamedTuple):
    """The random part of one step on trajectories: segments from x_s [n, ...] at time s [n] to a state at t [n]."""

    x_s: Tensor
    s: Tensor
    t: Tensor


class DerivativeRole(enum.Enum):
    """The part that derivatives of the network have in an objective."""

    absent = "absent"
    constant = "constant"  # no gradient flows through them
    trained = "trained"  # the gradient flows through them
    finite = "finite"  # a difference of two passes stands in for them


@dataclass
class Objective:
    """A loss for training a flow map. Options are the fields of the dataclass.

    Objectives are mutable because they are sections of a training config, whose fields command-line flags override one
    by one. ``__post_init__`` validates the options; ``dataclasses.replace(objective)`` validates them again after a
    change, and discards what was derived from them.

    A subclass implements ``row_losses``. The properties below are neutral values of options that only some objectives
    have, so that callers can ask any objective for them.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
                raise UserError("must be finite", field=f.name, value=value)
        if not 0 <= self.adaptive <= 2:
            raise UserError("a power must lie in [0, 2]", field="adaptive", value=self.adaptive)
        if not self.adaptive_floor > 0:
            raise UserError("must be positive", field="adaptive_floor", value=self.adaptive_floor)

    @property
    def diagonal(self) -> float:
        """Share of rows with s = t."""
        return 0.0

    @property
    def adaptive(self) -> float:
        """Power of the adaptive weight, 0 for none."""
        return 0.0

    @property
    def adaptive_floor(self) -> float:
        """Constant c of the adaptive weight 1 / sg[|r|^2 + c]^p."""
        return 1e-3

    @property
    def teacher_ema(self) -> float:
        """Decay of the weight average that serves as teacher, 0 for none."""
        return 0.0

    @property
    def guidance(self) -> float:
        """Weight of baked-in guidance, 1 for none."""
        return 1.0

    @property
    def guidance_max(self) -> float:
        """Largest guidance weight that the network is conditioned on, 1 for none."""
        return 1.0

    def idle(self) -> set[str]:
        """Return the options that have no effect at the present values of the others."""
        return set() if self.adaptive else {"adaptive_floor"}

    @property
    def guidance_interval(self) -> bool:
        """True if the network is conditioned on the times of guidance too."""
        return False

    @property
    def guided(self) -> bool:
        """True if guidance is baked in."""
        return max(self.guidance, self.guidance_max) > 1

    @property
    def uses_teacher(self) -> bool:
        """True if the target involves a drift, so that a teacher can provide it."""
        return False

    @property
    def derivative_role(self) -> DerivativeRole:
        """The part that derivatives of the network have in the loss."""
        return DerivativeRole.absent

    @property
    def kind(self) -> str:
        """``FlowMapInfo.kind`` of the trained network."""
        return "map"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Step sizes that the network is trained for, by sampler."""
        return {}

    def for_run(self, steps: int) -> Self:
        """Return a validated copy for a run of ``steps`` training steps."""
        return replace(self)

    def check_samples(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Refuse, before any training, samples of ``shape`` or weight files that the objective cannot take."""

    def diagonal_rows(self, batch_size: int) -> int:
        """Return how many rows of a batch have s = t."""
        return math.floor(self.diagonal * batch_size + 1e-9)  # 0.29 * 100 is 28.999...

    def __call__(
        self,
        fm: FlowMap,
        batch: Tensor | Trajectory,
        label: Tensor | None = None,
        *,
        generator: torch.Generator,
        teacher: Drift | None = None,
        weight: nn.Module | None = None,
        step: int = 0,
    ) -> Loss:
        """Compute the loss of ``fm`` on one batch. Dropout follows the network's mode.

        Args:
            fm: The flow map to train.
            batch: Data x1 [B, ...], or a ``Trajectory`` for a ``TrajectoryObjective``.
            label: Class labels [B], conditions [B, ...], or None. A trajectory has its own.
            generator: Source of all random draws: noise, times, guidance weights, choice of segments.
            teacher: Drift b(x, t, label) that the off-diagonal target uses, None for the live network's.
            weight: A module w(s, t) -> [B] such as ``LogVariance``, None for an unweighted loss.
            step: Training steps done so far, for methods whose times change over training.

        Returns:
            The scalar loss with its gradient, and detached terms for the log.

        Raises:
            UserError: The batch is data where a trajectory is needed or the reverse, or guidance lacks labels.

        Example:
            >>> objective = OBJECTIVES["lagrangian"](diagonal=0.5)
            >>> loss = objective(fm, x1, label, generator=torch.Generator().manual_seed(0))
            >>> loss.value.backward()
        """
        x1, label, draws = self.prepare(fm, batch, label, generator, step)
        return self.loss(fm, x1, label, draws, teacher=teacher, weight=weight)

    def prepare(
        self, fm: FlowMap, batch: Tensor | Trajectory, label: Tensor | None, generator: torch.Generator, step: int = 0
    ) -> tuple[Tensor, Tensor | None, Draws | Segments]:
        """Return the arguments of ``loss``: data x1 [B, ...], their label, and the random part."""
        if isinstance(batch, Trajectory):
            raise UserError("this objective learns from data [B, ...], not from a Trajectory")
        label = condition_rows(label, fm.info.condition)
        return batch, label, self.draw(fm, batch, generator, step)

    def draw(self, fm: FlowMap, x1: Tensor, generator: torch.Generator, step: int = 0) -> Draws:
        """Draw noise and times for one batch. This is apart from the loss so that the loss can be compiled."""
        options: dict[str, Any] = {"generator": generator, "device": x1.device, "dtype": x1.dtype}
        x0 = fm.base_std * torch.randn(x1.shape, **options)
        uniform = torch.rand(2, len(x1), **options)
        rows = self.diagonal_rows(len(x1))
        u = self.diagonal_times(uniform[:, :rows])
        s, t = self.off_diagonal_times(uniform[:, rows:], fm, step)
        return Draws(x0, torch.cat([u, s]), torch.cat([u, t]), gamma=torch.rand(len(x1), **options))

    def diagonal_times(self, uniform: Tensor) -> Tensor:
        """Return the times [n] of diagonal rows from uniform numbers [2, n]."""
        return uniform[0]

    def off_diagonal_times(self, uniform: Tensor, fm: FlowMap, step: int) -> tuple[Tensor, Tensor]:
        """Return (s, t) of the off-diagonal rows of training step ``step`` from uniform numbers [2, n]."""
        return uniform.amin(dim=0), uniform.amax(dim=0)  # uniform on the triangle s < t

    def loss(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws | Segments,
        teacher: Drift | None = None,
        weight: nn.Module | None = None,
    ) -> Loss:
        """Compute the loss for given draws. Only dropout is random here."""
        per_sample, _, terms = self.per_sample(fm, x1, label, draws, teacher, weight)
        return Loss(per_sample.mean(), terms)

    def per_sample(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws | Segments,
        teacher: Drift | None,
        weight: nn.Module | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the weighted loss of each row [B], the unweighted one, detached, and the terms of ``Loss``.

        Diagonal rows are first.
        """
        terms: dict[str, Tensor] = {}
        losses = self.row_losses(fm, x1, label, draws, teacher, terms)
        residuals = terms.pop("residuals", losses).detach()
        losses = self.adapted(losses, draws, x1[0].numel())
        residuals, losses = (residuals, losses) if losses.ndim == 1 else (residuals[0], losses.sum(dim=0))  # several
        if weight is not None:  # exp(-w) |r|^2 + w: w learns the log of the residual's variance
            w = weight(draws.s, draws.t)
            c = getattr(weight, "log_floor", 0.0)
            losses = torch.log(losses + c * torch.exp(w)) if c else torch.exp(-w) * losses + w
            terms["weight_min"], terms["weight_max"] = w.detach().amin(), w.detach().amax()
        return losses, residuals, terms

    def adapted(self, losses: Tensor, draws: Draws | Segments, dimensions: int) -> Tensor:
        """Return the losses [B] times the weights that the method itself defines, which are constants.

        Here the adaptive weight of Geng et al. 2025 (arXiv 2505.13447), on sums over a sample's ``dimensions``.
        """
        if not self.adaptive:
            return losses
        return losses * (losses.detach() * dimensions + self.adaptive_floor).pow(-self.adaptive)

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Any,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """Return the unweighted loss of each row [B], and put what to log into ``terms``.

        [n, B] if a row has n losses, each with its own weight; the log shows residuals of the first. Where the loss is
        more than the mean squared residual, ``terms["residuals"]`` [B] is that. ``draws`` is what ``prepare``
        returned: ``Draws`` for data, ``Segments`` for trajectories.
        """
        raise NotImplementedError


def rms(value: Tensor) -> Tensor:
    """Return the root mean square of a tensor, detached, for the log."""
    return mean_square(value.detach()).mean().sqrt()


def mean_square(residual: Tensor) -> Tensor:
    """Average the squared residual over a sample's dimensions, in at least float32: [B, ...] -> [B]."""
    r = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return r.square().flatten(1).mean(dim=1)
