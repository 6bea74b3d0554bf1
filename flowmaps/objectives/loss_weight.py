"""A learned log-variance weight w(s, t)."""

import torch
from torch import Tensor, nn

from flowmaps.networks.conditioning import time_features
from flowmaps.networks.layers import zero


class LogVariance(nn.Module):
    r"""w(s, t), kept within [-limit, limit] by a tanh: a sample's loss is $e^{-w} |r|^2 + w$.

    Karras et al. 2024 (EDM2, arXiv 2312.02696), equation 21; in two times as Boffi et al. 2025. At its optimum w is
    the log of the mean squared residual at (s, t), so every (s, t) pulls equally hard, relative to its own size.
    On the diagonal that size is bounded below by the spread of dI_t/dt given I_t. Off the diagonal it goes to 0 as
    the map becomes consistent, w follows it down and the pull of the off-diagonal term grows without bound: hence the
    limit, and hence no weight by default (docs/maths.md, "The learned weight").

    With ``log_floor`` = c > 0 the loss is $\ln(e^{-w} |r|^2 + c) + w = \ln(|r|^2 + c e^w)$ instead (DMF, arXiv
    2510.24474): an adaptive weight of power 1 whose constant is learned. It falls to the limit, since a smaller
    constant always lowers the loss, and no pull grows without bound.
    """

    def __init__(self, channels: int = 128, limit: float = 2.0, log_floor: float = 0.0) -> None:
        super().__init__()
        self.limit, self.channels, self.log_floor = limit, channels, log_floor
        self.linear = zero(nn.Linear(2 * channels, 1))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        features = torch.cat([time_features(s.float(), self.channels), time_features(t.float(), self.channels)], dim=1)
        w: Tensor = self.linear(features)[:, 0]
        return self.limit * torch.tanh(w / self.limit)
