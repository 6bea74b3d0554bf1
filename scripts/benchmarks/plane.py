"""A toy in the plane whose flow map is known: two independent mixtures of Gaussians, on the linear path.

In one dimension the flow map is the monotone one, X_{s,t} = F_t^-1 o F_s, so that map, drift and score of a product of
mixtures are exact. So is p_1 exp(r) / Z for rewards that are linear, or a measurement of a linear function: again a
mixture.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from samplers.measurement import Measurement
from samplers.steer import Score

SIGMA0 = 1.0
WEIGHTS = torch.tensor([[0.5, 0.2, 0.3], [0.35, 0.35, 0.3]], dtype=torch.float64)  # [coordinate, component]
MEANS = torch.tensor([[-1.1, 0.1, 1.0], [-0.8, 0.3, 1.2]], dtype=torch.float64)
STDS = torch.tensor([[0.2, 0.15, 0.3], [0.25, 0.12, 0.2]], dtype=torch.float64)
TABLE = 4001  # nodes from which Newton's method starts


def _stds(t: float) -> Tensor:
    return ((1 - t) ** 2 * SIGMA0**2 + t**2 * STDS**2).sqrt()


def _parts(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return the standardised x [n, 2, 3] of each component, and its weighted density."""
    std = _stds(t)
    u = (x[:, :, None] - t * MEANS) / std
    return u, WEIGHTS * (-u.square() / 2).exp() / (std * math.sqrt(2 * math.pi))


def cdf(x: Tensor, t: float) -> Tensor:
    """Return F_t of each coordinate of x [n, 2]."""
    found: Tensor = (WEIGHTS * torch.special.ndtr(_parts(x, t)[0])).sum(dim=2)
    return found


def density(x: Tensor, t: float) -> Tensor:
    """Return the density of each coordinate at time t: [n, 2]."""
    return _parts(x, t)[1].sum(dim=2)


def score(x: Tensor, t: float) -> Tensor:
    """Return grad log p_t [n, 2]."""
    u, p = _parts(x, t)
    return -(p * u / _stds(t)).sum(dim=2) / p.sum(dim=2)


@lru_cache(maxsize=256)
def _table(t: float) -> tuple[Tensor, Tensor]:
    nodes = torch.linspace(-8, 8, TABLE, dtype=torch.float64)[:, None].expand(-1, 2)
    return nodes, cdf(nodes, t)


def inverse(p: Tensor, t: float) -> Tensor:
    """Return F_t^-1 of each coordinate: a table, then Newton's method inside the bracket that it gives."""
    nodes, values = _table(t)
    index = torch.stack([torch.searchsorted(values[:, i].contiguous(), p[:, i].contiguous()) for i in (0, 1)], dim=1)
    index = index.clamp(1, TABLE - 1)
    low, high = nodes[index, 0], nodes[index - 1, 0]
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    x = (low + high) / 2
    for _ in range(6):
        x = (x - (cdf(x, t) - p) / density(x, t).clamp(min=1e-300)).clamp(low, high)
    return x


def plane_map(x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """Return X_{s,t}(x) for x [n, 2]; all rows have the same times."""
    return inverse(cdf(x, float(s[0])), float(t[0]))


def denoiser(x: Tensor, s: Tensor, t: Tensor | None = None, label: Tensor | None = None) -> Tensor:
    """Return E[x_1 given x_s = x], in the place of X_{s,1}."""
    time = float(s[0])
    u, p = _parts(x, time)
    std = _stds(time)
    mean = MEANS + time * STDS**2 / std * u
    return (p * mean).sum(dim=2) / p.sum(dim=2)


def drift(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """Return b_t(x) = (E[x_1 given x] - x) / (1 - t)."""
    return (denoiser(x, t) - x) / (1 - t[:, None])


def slope(x: Tensor, s: float) -> Tensor:
    """Return dX_{s,1}/dx of each coordinate at x, by conservation of probability."""
    one = torch.ones(1, dtype=x.dtype)
    return density(x, s) / density(plane_map(x, s * one, one), 1.0)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in the plane, and log Z of the tilt that made it."""

    weights: Tensor  # [m]
    means: Tensor  # [m, 2]
    covs: Tensor  # [m, 2, 2]
    log_z: float = 0.0

    def sample(self, n: int, g: torch.Generator) -> Tensor:
        """Draw n points."""
        index = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, 2, generator=g, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covs)
        moved: Tensor = (root[index] @ z[:, :, None])[:, :, 0]
        return self.means[index] + moved


def data() -> Mixture:
    """Return the data's law as one mixture of nine components."""
    pairs = [(i, j) for i in range(3) for j in range(3)]
    weights = torch.stack([WEIGHTS[0, i] * WEIGHTS[1, j] for i, j in pairs])
    means = torch.stack([torch.stack([MEANS[0, i], MEANS[1, j]]) for i, j in pairs])
    covs = torch.stack([torch.diag(torch.stack([STDS[0, i], STDS[1, j]]) ** 2) for i, j in pairs])
    return Mixture(weights, means, covs)


def _tilted(prior: Mixture, log_w: Tensor, means: Tensor, covs: Tensor) -> Mixture:
    log_w = prior.weights.log() + log_w
    return Mixture(log_w.softmax(dim=0), means, covs, float(log_w.logsumexp(dim=0)))


@dataclass(frozen=True)
class Target:
    """A reward in the plane with its exact tilt."""

    reward: Score | Measurement
    exact: Mixture


def linear(a: tuple[float, float]) -> Target:
    """Return the tilt by r(x) = a . x."""
    v, prior = torch.tensor(a, dtype=torch.float64), data()
    moved = prior.covs @ v
    exact = _tilted(prior, prior.means @ v + moved @ v / 2, prior.means + moved, prior.covs)
    return Target(Score(lambda x: x @ v, ascents=1), exact)


def measured(y: float, std: float, h: tuple[float, float] = (0.8, 0.6)) -> Target:
    """Return the tilt by r(x) = -(y - h . x)^2 / (2 std^2)."""
    v, prior = torch.tensor(h, dtype=torch.float64), data()
    moved = prior.covs @ v
    s, e = moved @ v + std**2, y - prior.means @ v
    log_w = -e.square() / (2 * s) + (std**2 / s).log() / 2
    covs = prior.covs - moved[:, :, None] * moved[:, None, :] / s[:, None, None]
    exact = _tilted(prior, log_w, prior.means + moved * (e / s)[:, None], covs)
    given = torch.full((1, 1), y, dtype=torch.float64)
    mean = (WEIGHTS * MEANS).sum(dim=1)
    reward = Measurement(lambda x: x @ v[:, None], lambda one: one * v, float(v @ v), given, std, mean)
    return Target(reward, exact)


TARGETS = {
    "linear, mild": linear((1.2, 0.6)),
    "linear, rare": linear((3.0, -2.5)),
    "measurement, mild": measured(0.5, 0.25),
    "measurement, rare": measured(1.9, 0.1),
}
DATA_STD = float(((WEIGHTS * (STDS**2 + MEANS**2)).sum(1) - (WEIGHTS * MEANS).sum(1) ** 2).mean().sqrt())
