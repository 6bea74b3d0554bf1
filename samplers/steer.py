"""Steer a flow map towards a reward at sampling time: sequential Monte Carlo over the chain of ``stochastic``.

The target is q(x) = p_1(x) exp(r(x)) / Z. The look-ahead X_{t,1}(x) is a sample, not a mean, so that the reward of the
result is known at every step; with gamma = 1 it is also the jump, and K steps cost K network evaluations per particle
and no backward pass through the network. Weights correct what proposals and intermediate potentials distort, at any
number of steps: for the exact map only an error of order 1 / particles is left (docs/steering.md). The nearest relative
is TDS, Wu et al. 2023 (arXiv 2306.17775).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.callables import Map, expand, rounded
from samplers.grids import Times
from samplers.map_samplers import Path

TRIES = 6  # step lengths of a gradient ascent, each a quarter of the one before


@dataclass(frozen=True)
class Stage:
    """The numbers of a grid time t that a reward needs, as if the data were Gaussian of standard deviation sigma1.

    With Q_t = alpha_t^2 sigma0^2 + beta_t^2 sigma1^2, the look-ahead X_{t,1} has the slope J_t = sigma1 / sqrt(Q_t),
    and its correlation before and after re-noising to t is rho_t = sqrt(1 - gamma^2 alpha_t^2 sigma0^2 / Q_t).
    """

    exponent: float  # lam: the product of rho over the re-noisings still to come
    rho: float
    width: float  # standard deviation of the noise that re-noising adds: gamma alpha_t sigma0
    reach: float  # variance of the look-ahead that it adds: sigma1^2 (1 - rho^2)
    lever: float  # shift of x_t by which the look-ahead shifts by 1: 1 / J_t
    data_std: float  # sigma1


class Reward(Protocol):
    """A reward r, through its potentials and proposals; see ``Score`` and ``samplers.measurement.Measurement``."""

    def potential(self, guess: Tensor, stage: Stage) -> Tensor:
        """Return the log weight float64 [B] of look-aheads ``guess`` [B, ...]; at exponent 1 it must be r itself."""
        ...

    def propose(self, guess: Tensor, z: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return what to add to the kernel's mean for x_t, and log(kernel / proposal) float64 [B].

        ``guess`` are the look-aheads before the step, ``z`` is standard normal; without steering, ``stage.width * z``.
        """
        ...


@dataclass(frozen=True)
class Score:
    """The reward r(x) = scale * function(x), any function of samples [B, ...] that returns [B].

    Proposals shift the look-ahead to the argmax of exponent * r(x) - |x - guess|^2 / (2 reach), found by ``ascents``
    gradient steps with backtracking: a reward and its gradient each. A function without a gradient needs
    ``ascents=0``: it is only weighed.

    Raises (when used):
        ValueError: The function does not return one finite number per sample, or has no gradient.
    """

    function: Callable[[Tensor], Tensor]
    scale: float = 1.0
    ascents: int = 5

    def __call__(self, x: Tensor) -> Tensor:
        """Return r(x) [B]."""
        value = self.function(x)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"a reward must return one number for each sample, [{len(x)}], got {found}")
        return self.scale * value

    def potential(self, guess: Tensor, stage: Stage) -> Tensor:
        """Return exponent * r(guess) [B]."""
        return stage.exponent * self(guess).detach().double()

    def propose(self, guess: Tensor, z: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Shift x_t by what moves the look-ahead to its best place."""
        shift = stage.lever * (self._ascended(guess, stage) - guess) if self.ascents else torch.zeros_like(guess)
        ratio = z.new_zeros(len(z), dtype=torch.float64)
        if stage.width:
            d = shift.double() / stage.width
            ratio = -(d * (z.double() + d / 2)).flatten(1).sum(dim=1)
        return shift + stage.width * z, ratio

    def _ascended(self, guess: Tensor, stage: Stage) -> Tensor:
        """Return the argmax of ``exponent * r(x) - |x - guess|^2 / (2 reach)``; for a linear r after one ascent."""

        def objective(value: Tensor, x: Tensor) -> Tensor:
            return stage.exponent * value - (x - guess).square().flatten(1).sum(dim=1) / (2 * stage.reach)

        x, length = guess, guess.new_full((len(guess),), stage.reach)
        for _ in range(self.ascents):
            value, slope = self._gradient(x)
            direction = stage.exponent * slope - (x - guess) / stage.reach
            before, left = objective(value, x), torch.ones_like(length, dtype=torch.bool)
            for _ in range(TRIES):
                trial = x + expand(length, x) * direction
                better = left & (objective(self(trial), trial) >= before)
                x, left = torch.where(expand(better, x), trial, x), left & ~better
                if not bool(left.any()):
                    break
                length = torch.where(left, length / 4, length)
        return x

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self(leaf)
            slope = None
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if slope is None:
            raise ValueError("the reward has no gradient: compute it with torch alone, or use Score(..., ascents=0)")
        return value.detach(), slope


@dataclass(frozen=True)
class Steered:
    """Weighted particles of n samples, P each: rows i P .. i P + P - 1 belong to sample i."""

    x: Tensor  # [n P, ...]
    log_weights: Tensor  # float64 [n, P], since the latest resampling
    log_z: Tensor  # float64 [n]: the estimate of log Z
    ess: Tensor  # float64 [k]: effective number of particles / P after each look-ahead, the mean over samples
    origin: Tensor  # int64 [n P]: the row of the start, and of its label, from which each particle descends

    def pick(self, u: Tensor) -> Tensor:
        """Return one row of each sample, drawn by weight with uniform numbers ``u`` [n]: int64 [n]."""
        particles = self.log_weights.shape[1]
        ends = self.log_weights.softmax(dim=1).cumsum(dim=1)
        chosen = torch.searchsorted(ends, u.double()[:, None].to(ends.device), right=True).clamp(max=particles - 1)
        return chosen[:, 0] + particles * torch.arange(len(ends), device=ends.device)


Watch = Callable[[int, Tensor, Steered], None]  # called as watch(k, t_k, particles) for k = 0 .. N


@torch.no_grad()
def steer(
    fm: Map,
    x: Tensor,
    times: Times,
    reward: Reward,
    label: Tensor | None = None,
    callback: Watch | None = None,
    *,
    path: Path,
    noise: Callable[[int], Tensor],
    uniform: Callable[[int], Tensor],
    base_std: float,
    data_std: float,
    gamma: float = 1.0,
    particles: int = 1,
    resample: float = 0.5,
) -> Steered:
    """Sample p_1(x) exp(r(x)) / Z by weighted particles: one network evaluation per step and particle.

    At each step from s to t the particles of a sample are resampled if their effective number has fallen; then
    x_t = beta_t X_{s,1}(x_s) + alpha_t x0 is drawn from the reward's proposal, and log w grows by the change of the
    potential and by log(kernel / proposal). A step with ``gamma`` < 1 re-noises less, X_{s,1} is then only the
    look-ahead, and the step costs two evaluations. ``gamma`` = 0 is deterministic guidance of one particle, without
    weights: exact for Gaussian data and linear rewards, a search otherwise.

    Args:
        fm: A map X(x, s, t, label); with gamma = 1 only X_{s,1} is called.
        x: Starts [n P, ...] at ``times[0]``, the P particles of each sample side by side; noise if that time is 0.
        times: Increasing times up to 1, one more than there are steps.
        reward: ``Score``, ``Measurement``, or another object with the methods of ``Reward``.
        label: Class labels [n P, ...], or None. They move with the particles, whose weights choose among classes.
        callback: Called as ``callback(k, t_k, particles)`` for k = 0 .. N with the weighted particles at t_k.
        path: The interpolant, e.g. ``fm.interpolant``.
        noise: ``noise(k)`` is the noise of step k, of the shape and standard deviation of x0.
        uniform: ``uniform(k)`` [n] are numbers in [0, 1) by which step k resamples.
        base_std: The standard deviation of x0.
        data_std: The standard deviation of the data about their mean: it shapes proposals and potentials, and need
            only be about right.
        gamma: The share of noise that a step renews.
        particles: P.
        resample: The share of P below which the effective number of particles makes a sample resample.

    Returns:
        The particles at time 1 and their weights; ``result.x[result.pick(u)]`` are the samples.

    Raises:
        ValueError: The grid does not end at 1, the rows are not a multiple of ``particles``, or the reward is not one
            finite number per row.

    Example:
        >>> reward = Score(lambda x: x.mean(dim=(1, 2, 3)), scale=30)
        >>> options = {"path": fm.interpolant, "base_std": fm.base_std, "data_std": 0.5, "particles": 4}
        >>> found = steer(fm, fm.noise(64, 0), uniform_times(8), reward, noise=lambda k: fm.noise(64, 0, draw=k + 1),
        ...               uniform=lambda k: torch.rand(16), label=torch.full((64,), 3), **options)
        >>> samples = found.x[found.pick(torch.rand(16))]
    """
    grid, rows = rounded(times, x), len(x)
    if float(grid[-1]) != 1:
        raise ValueError(f"steering needs a grid that ends at time 1, got {grid.tolist()}")
    if particles < 1 or rows % particles or not 0 <= gamma <= 1 or not base_std > 0 or not data_std > 0:
        raise ValueError(
            f"steering needs rows in groups of particles, gamma in [0, 1] and positive base_std and data_std, got "
            f"{rows} rows, particles={particles}, gamma={gamma}, base_std={base_std} and data_std={data_std}"
        )
    if not gamma and particles > 1:
        raise ValueError(f"gamma = 0 gives no weights to choose by: use one particle, got {particles}")
    stages = _stages(path, grid.double().cpu(), gamma, base_std, data_std)
    at = [t.expand(rows) for t in grid.to(x.device)]
    origin = torch.arange(rows, device=x.device)
    log_z = torch.zeros(rows // particles, dtype=torch.float64, device=x.device)
    guess = fm(x, at[0], at[-1], label)
    psi = _finite(reward.potential(guess, stages[0]), rows)
    log_w = psi.view(-1, particles)
    shares = [_share(log_w)]
    for k in range(len(stages) - 2):
        s, t = at[k], at[k + 1]
        if callback is not None:
            callback(k, s[0], _particles(x, log_w, log_z, shares, origin))
        if particles > 1:
            falls = _share(log_w) < resample
            index = _systematic(log_w, uniform(k), falls)
            log_z = log_z + torch.where(falls, _log_mean(log_w), 0.0)
            log_w = torch.where(falls[:, None], 0.0, log_w)
            x, guess, psi, origin = x[index], guess[index], psi[index], origin[index]
            label = None if label is None else label[index]
        mean = expand(path.beta(t), x).to(x.dtype) * guess
        if gamma < 1:
            u = path.time((1 - gamma**2) ** 0.5 * path.alpha(t) / path.beta(t))
            mean = expand(path.beta(t) / path.beta(u), x).to(x.dtype) * fm(x, s, u, label)
        moved, ratio = reward.propose(guess, noise(k) / base_std, stages[k + 1])
        x = mean + moved.to(mean.dtype)
        guess, before = fm(x, t, at[-1], label), psi
        psi = _finite(reward.potential(guess, stages[k + 1]), rows)
        if gamma:
            log_w = log_w + (psi - before + ratio).view(-1, particles)
        shares.append(_share(log_w))
    k = len(stages) - 1
    if callback is not None:
        callback(k - 1, grid[-2], _particles(x, log_w, log_z, shares, origin))
    if not gamma:
        guess = guess + reward.propose(guess, torch.zeros_like(guess), stages[k])[0]
    found = _particles(guess, log_w, log_z + _log_mean(log_w), shares, origin)
    if callback is not None:
        callback(k, grid[-1], found)
    return found


def _stages(path: Path, times: Tensor, gamma: float, base_std: float, data_std: float) -> list[Stage]:
    """Return the numbers of all grid times."""
    alpha, beta = path.alpha(times), path.beta(times)
    q = (alpha * base_std) ** 2 + (beta * data_std) ** 2
    rho = (1 - (gamma * alpha * base_std) ** 2 / q).clamp(min=0).sqrt()
    rho[-1] = 1.0  # data has no noise to renew
    exponent = torch.cat([rho[1:], rho[-1:]]).flip(0).cumprod(dim=0).flip(0)
    reach, lever = data_std**2 * (1 - rho**2), q.sqrt() / data_std
    if not gamma:  # the look-ahead moves to its best place, and x_t by what the flow from s to t leaves of that
        before = torch.cat([beta[:1], beta[:-1]]) * (q / torch.cat([q[:1], q[:-1]])).sqrt()
        reach, lever = torch.full_like(reach, data_std**2), beta - before
    columns = (exponent, rho, gamma * alpha * base_std, reach, lever, torch.full_like(rho, data_std))
    return [Stage(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _particles(x: Tensor, log_w: Tensor, log_z: Tensor, shares: list[Tensor], origin: Tensor) -> Steered:
    return Steered(x, log_w, log_z, torch.stack([share.mean() for share in shares]), origin)


def _finite(psi: Tensor, rows: int) -> Tensor:
    if psi.shape != (rows,) or not bool(torch.isfinite(psi).all()):
        raise ValueError("the reward must be one finite number for each sample: it has another shape, NaN or infinity")
    return psi


def _share(log_w: Tensor) -> Tensor:
    """Return the effective number of particles / P [n] of log weights [n, P]."""
    return 1 / (log_w.softmax(dim=1).square().sum(dim=1) * log_w.shape[1])


def _log_mean(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(dim=1) - math.log(log_w.shape[1])


def _systematic(log_w: Tensor, u: Tensor, chosen: Tensor) -> Tensor:
    """Return rows int64 [n P]: systematic resampling of the samples ``chosen`` [n], the others as they are."""
    n, particles = log_w.shape
    own = torch.arange(particles, device=log_w.device).expand(n, particles)
    ends = log_w.softmax(dim=1).cumsum(dim=1)
    points = (own + u.to(ends.device, torch.float64)[:, None]) / particles
    index = torch.searchsorted(ends, points, right=True).clamp(max=particles - 1)
    index = torch.where(chosen[:, None], index, own)
    return (index + particles * torch.arange(n, device=log_w.device)[:, None]).flatten()


__all__ = ["Reward", "Score", "Stage", "Steered", "steer"]
