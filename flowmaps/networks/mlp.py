"""A multi-layer perceptron for points."""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from flowmaps.networks.interface import registered
from flowmaps.networks.layers import check_sizes


class MLP(ModelMixin, ConfigMixin):
    """v(x, s, t) for points x [B, dim]: the checkerboard network of Boffi et al. 2025 (arXiv 2505.18825, appendix).

    Input (s, t, x / data_std), ``depth`` hidden layers of ``width`` with GELU, output times ``data_std``; no time
    embedding, no residuals. ``fourier_features`` > 0 adds cos and sin of as many random projections of
    x / data_std with standard deviation ``fourier_scale``. With few steps raw coordinates are the bottleneck.
    """

    @registered
    def __init__(
        self,
        dim: int = 2,
        width: int = 512,
        depth: int = 5,
        data_std: float = 1.0,
        fourier_features: int = 0,
        fourier_scale: float = 2.5,
    ) -> None:
        super().__init__()
        check_sizes(self.config)
        if not (0 < data_std < math.inf and 0 < fourier_scale < math.inf):
            raise ValueError(f"data_std and fourier_scale must be positive, got {data_std} and {fourier_scale}")
        self.data_std = data_std
        self.projection: Tensor | None
        projection = torch.randn(fourier_features, dim) * fourier_scale if fourier_features else None
        self.register_buffer("projection", projection)
        inputs = 2 + dim + 2 * fourier_features
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.GELU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, dim))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if label is not None:
            raise ValueError("MLP is unconditional: label must be None")
        x = x / self.data_std
        features = [torch.stack([s, t], dim=1).to(x.dtype), x]
        if self.projection is not None:
            phase = x @ self.projection.to(x.dtype).T  # [B, fourier_features]
            features += [math.sqrt(2) * phase.cos(), math.sqrt(2) * phase.sin()]
        v: Tensor = self.data_std * self.layers(torch.cat(features, dim=1))
        return v
