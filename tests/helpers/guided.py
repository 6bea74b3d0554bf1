"""The closed-form map of Gaussian data whose network is conditioned on guidance."""

import torch
from torch import nn

from flowmaps.networks.conditioning import split_label
from samplers.callables import expand

CLASSES = 2  # and "no label", whose data are Gaussian too, so that guidance shifts a mean and the map stays affine
DRAWN = {"guidance_max": 8.0, "guidance_interval": True}


class Guided(nn.Module):
    """Exact v_{s,t} of data N(mean of the label, std^2) under a weight w that is 1 outside [low, high], plus errors."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([[0.3, -0.5, 1.0], [-1.0, 0.2, 0.4], [0.5, 0.5, -0.5]], dtype=torch.float64)
        self.std = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
        self.wrong = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.bent = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, s, t, label=None):
        given = split_label(label, s, CLASSES, guidance=True, interval=True)
        plain, nothing, w = given.rows @ self.mean, self.mean[CLASSES], given.guidance[:, None]
        guided = w * plain + (1 - w) * nothing

        def variance(u):
            return (1 - u) ** 2 + u**2 * self.std**2

        def carried(x, a, b, mean):
            a, b = a[:, None], b[:, None]
            return b * mean + (variance(b) / variance(a)).sqrt() * (x - a * mean)

        same = (s == t)[:, None]
        a, b = torch.minimum(given.low.clamp(min=s), t), torch.minimum(given.high.clamp(min=s), t)
        end = carried(carried(carried(x, s, a, plain), a, b, guided), b, t, plain)
        u = s[:, None]
        mean = torch.where((given.low <= s)[:, None] & (s <= given.high)[:, None], guided, plain)
        drift = mean + ((u - 1) + u * self.std**2) / variance(u) * (x - u * mean)
        average = (end - x) / torch.where(same, 1.0, expand(t - s, x))
        return torch.where(same, drift, average) + self.wrong + self.bent * expand(t - s, x) * x
