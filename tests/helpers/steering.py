"""Runs of ``samplers.steer`` on maps in closed form, and an oracle that needs no chain."""

import torch

from flowmaps.interpolants import INTERPOLANTS
from samplers import uniform_times
from samplers.steer import steer

LINEAR = INTERPOLANTS["linear"]


def run(fm, reward, steps, n, *, dim, base_std=1.0, data_std=1.0, particles=1, seed=0, label=None, **options):
    """Steer n samples of ``dim`` numbers in float64; the noise depends on (seed, n, particles) alone."""
    g = torch.Generator().manual_seed(seed)

    def noise(k):
        return base_std * torch.randn(n * particles, dim, generator=g, dtype=torch.float64)

    def uniform(k):
        return torch.rand(n, generator=g, dtype=torch.float64)

    facts = {"path": LINEAR, "base_std": base_std, "data_std": data_std, "particles": particles}
    options = {"noise": noise, "uniform": uniform, **facts, **options}
    return steer(fm, noise(0), uniform_times(steps), reward, label, **options)


def picked(found, seed=1):
    """One particle of each sample, by weight."""
    u = torch.rand(len(found.log_weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.x[found.pick(u)]


def elliptical_slice(fm, reward, n, moves, *, dim, base_std=1.0, seed=0):
    """Samples of exp(r(X_{0,1}(x0))) over the noise x0, by elliptical slice sampling: exact in the limit of moves.

    A move draws another noise and a level, and shrinks an angle between the two until the level is met.
    """
    g = torch.Generator().manual_seed(seed)
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)

    def draw(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    x = base_std * torch.randn(n, dim, generator=g, dtype=torch.float64)
    r = reward(fm(x, zero, one))
    for _ in range(moves):
        other = base_std * torch.randn(n, dim, generator=g, dtype=torch.float64)
        level, angle = r + draw(n).log(), 2 * torch.pi * draw(n)
        low, high, left = angle - 2 * torch.pi, angle.clone(), torch.ones(n, dtype=torch.bool)
        new, value = x.clone(), r.clone()
        while left.any():
            trial = x * angle.cos()[:, None] + other * angle.sin()[:, None]
            found = reward(fm(trial, zero, one))
            met = left & (found >= level)
            new[met], value[met] = trial[met], found[met]
            left &= ~met
            low, high = torch.where(angle < 0, angle, low), torch.where(angle >= 0, angle, high)
            angle = torch.where(left, low + (high - low) * draw(n), angle)
        x, r = new, value
    return fm(x, zero, one)
