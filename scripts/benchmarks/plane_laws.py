"""Laws of steered samples in the plane: chains of ``samplers.steer``, best of N, a tilted SDE, and slice sampling."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.plane import DATA_STD, TARGETS, Target, drift, plane_map, score, slope
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.metrics import sliced_w2
from flowmaps.rng import generator
from samplers import Score, steer, uniform_times
from samplers.callables import Map
from samplers.steer import Reward

Scores = dict[str, float]


def chain(fm: Map, reward: Reward, start: Tensor, steps: int, particles: int, seed: int, **facts: Any) -> Tensor:
    """Return one particle of each sample, by weight; ``start`` gives the shape [n P, ...] and type."""
    g = generator(seed, "steering", steps, particles)
    n = len(start) // particles
    base_std: float = facts["base_std"]

    def noise(k: int) -> Tensor:
        return base_std * torch.randn(start.shape, generator=g, dtype=start.dtype)

    def uniform(k: int) -> Tensor:
        return torch.rand(n, generator=g, dtype=torch.float64)

    path = INTERPOLANTS["linear"]
    options = {"path": path, "noise": noise, "uniform": uniform, "particles": particles, **facts}
    found = steer(fm, noise(0), uniform_times(steps), reward, **options)
    picked: Tensor = found.x[found.pick(uniform(0))]
    return picked


def plane_rows(seed: int, num: int | None) -> dict[str, Callable[[], Scores]]:
    """Return, by name and network evaluations, the sliced W2 of ``num`` samples to exact ones, for each target."""
    n = num or 2000

    def row(law: Callable[[Target], Tensor]) -> Scores:
        found = {}
        for name, target in TARGETS.items():
            exact = target.exact.sample(n, generator(seed, "exact", 0))
            found[name] = sliced_w2(law(target), exact)
        return found

    def particles(steps: int, count: int, proposals: bool = True) -> Callable[[], Scores]:
        def law(target: Target) -> Tensor:
            reward = target.reward if proposals else Unproposed(target.reward)
            start = torch.empty(n * count, 2, dtype=torch.float64)
            return chain(plane_map, reward, start, steps, count, seed, base_std=1.0, data_std=DATA_STD)

        return partial(row, law)

    return {
        "exact samples, the floor": lambda: row(lambda target: target.exact.sample(n, generator(seed, "exact", 1))),
        "unsteered, 1 evaluation": lambda: row(lambda target: plane_map(*_starts(n, seed))),
        "one step, best of 16 by weight, 16": particles(1, 16),
        "one step, best of 64 by weight, 64": particles(1, 64),
        "chain of 4 steps, 1 particle, 4": particles(4, 1),
        "chain of 4 steps, 4 particles, 16": particles(4, 4),
        "chain of 4 steps, 16 particles, 64": particles(4, 16),
        "the same without proposals, 4 particles, 16": particles(4, 4, proposals=False),
        "SDE along the tilted path, 16 steps, 4 particles, 230": lambda: row(partial(tilted_sde, n, 16, 4, seed)),
        "SDE along the tilted path, 64 steps, 4 particles, 920": lambda: row(partial(tilted_sde, n, 64, 4, seed)),
        "elliptical slice, 16 moves, about 50": lambda: row(partial(elliptical_slice, n, 16, seed)),
    }


def _starts(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, 2, generator=generator(seed, "start", 0), dtype=torch.float64)
    return x, torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)


class Unproposed:
    """A reward that is weighed at every step, and proposes nothing."""

    def __init__(self, reward: Reward) -> None:
        self.potential = reward.potential

    def propose(self, guess: Tensor, z: Tensor, stage: Any) -> tuple[Tensor, Tensor]:
        return stage.width * z, torch.zeros(len(z), dtype=torch.float64)


def _value(target: Target, x: Tensor) -> Tensor:
    r = target.reward
    return r(x) if isinstance(r, Score) else -(r.y - r.forward(x))[:, 0].square() / (2 * r.std**2)


def tilted_sde(n: int, steps: int, particles: int, seed: int, target: Target) -> Tensor:
    """Trajectory tilting in the manner of FMTT (arXiv 2511.22688): p_t exp(t r(X_{t,1})) by Euler-Maruyama.

    dx = [b + eps (score + t grad r(X_{t,1}))] dt + sqrt(2 eps) dW with eps = 1 - t, log weights dA = r(X_{t,1}) dt,
    resampled below half. Drift and map are an evaluation each, and the gradient counts for 1.6. In the gaps between
    modes the map's slope is without bound: no step is pulled farther than 1, or the scheme diverges.
    """
    g = generator(seed, "sde", steps)
    x, dt = torch.randn(n * particles, 2, generator=g, dtype=torch.float64), 1 / steps
    log_w = torch.zeros(n, particles, dtype=torch.float64)
    one = torch.ones(len(x), dtype=torch.float64)
    for k in range(steps):
        t = k / steps
        guess = plane_map(x, t * one, one)
        with torch.enable_grad():
            leaf = guess.detach().requires_grad_()
            (pull,) = torch.autograd.grad(_value(target, leaf).sum(), leaf)
        log_w = log_w + dt * _value(target, guess).view(n, particles)
        eps, z = 1 - t, torch.randn(x.shape, generator=g, dtype=torch.float64)
        pulled = (dt * eps * t * pull * slope(x, t)).clamp(-1, 1)
        x = x + dt * (drift(x, t * one) + eps * score(x, t)) + pulled + math.sqrt(2 * eps * dt) * z
        weight = log_w.softmax(dim=1)
        if k < steps - 1:
            low = 1 / weight.square().sum(dim=1) < particles / 2
            index = torch.multinomial(weight, particles, replacement=True, generator=g)
            index = torch.where(low[:, None], index, torch.arange(particles))
            x = x.view(n, particles, 2).gather(1, index[:, :, None].expand(-1, -1, 2)).flatten(0, 1)
            log_w = torch.where(low[:, None], 0.0, log_w)
    pick = torch.multinomial(log_w.softmax(dim=1), 1, generator=g)
    return x.view(n, particles, 2)[torch.arange(n), pick[:, 0]]


def elliptical_slice(n: int, moves: int, seed: int, target: Target) -> Tensor:
    """Sample the noise by its tilt exp(r(X_{0,1}(x0))), with ESS-Flow's moves (arXiv 2510.05849)."""
    g = generator(seed, "slice", moves)

    def uniform() -> Tensor:
        return torch.rand(n, generator=g, dtype=torch.float64)

    x, zero, one = _starts(n, seed)
    r = _value(target, plane_map(x, zero, one))
    for _ in range(moves):
        other = torch.randn(n, 2, generator=g, dtype=torch.float64)
        level, angle = r + uniform().log(), 2 * math.pi * uniform()
        low, high, left = angle - 2 * math.pi, angle.clone(), torch.ones(n, dtype=torch.bool)
        new, value = x.clone(), r.clone()
        while bool(left.any()):
            trial = x * angle.cos()[:, None] + other * angle.sin()[:, None]
            found = _value(target, plane_map(trial, zero, one))
            met = left & (found >= level)
            new[met], value[met] = trial[met], found[met]
            left = left & ~met
            low, high = torch.where(angle < 0, angle, low), torch.where(angle >= 0, angle, high)
            angle = torch.where(left, low + (high - low) * uniform(), angle)
        x, r = new, value
    return plane_map(x, zero, one)
