"""Drifts b_t(x) to integrate or to learn from: models of any convention, and guidance.

Each is a callable drift(x, t, label), as the samplers and the objectives' ``teacher`` take it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.conventions import CONVENTIONS, Convention
from flowmaps.networks.conditioning import without_label
from samplers.callables import Drift, expand


@dataclass(frozen=True)
class ConvertedDrift:
    """b_t(x) = skip x + out F(entry x, level, label) of a model F in another convention (``flowmaps.conventions``).

    Outside ``t_range`` the drift is that of the nearest time inside. A model with twice the channels of x also predicts
    its variance: that half is left out.
    """

    model: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    convention: Convention
    base_std: float = 1.0
    data_std: float = 1.0

    @property
    def t_range(self) -> tuple[float, float]:
        """Times on which the model was trained."""
        return self.convention.t_range(self.base_std)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """b_t(x) for x [B, ...] and t [B]."""
        reading = self.convention(t, self.base_std, self.data_std)
        entry, skip, out = (expand(value, x).to(x.dtype) for value in (reading.entry, reading.skip, reading.out))
        return skip * x + out * self.model(entry * x, reading.level, label)[:, : x.shape[1]]


def denoiser_drift(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    base_std: float = 0.5,
    noise: tuple[float, float] = (0.002, 80.0),
) -> ConvertedDrift:
    """The drift of a denoiser ``denoise(y, sigma, label)`` = E[x1 | x1 + sigma e = y], trained on ``noise`` levels.

    b_t(x) = (D(x / t, sigma) - x) / (1 - t): loses digits as 1 - t gets small, so the lower noise level should not be
    far below 1e-3 in float32.
    """
    return ConvertedDrift(denoise, Convention(CONVENTIONS["denoiser"].read, noise), base_std)


def noise_drift(predict: Callable[[Tensor, Tensor, Tensor | None], Tensor], base_std: float = 1.0) -> ConvertedDrift:
    """The drift of ``predict(z, k, label)``, the noise in z at DDPM's time k in [0, 999] (linear variances)."""
    return ConvertedDrift(predict, CONVENTIONS["ddpm"], base_std)


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: b(x; no label) + weight (b(x; label) - b(x; no label)), two evaluations.

    Ho and Salimans 2022 (arXiv 2207.12598). Guidance of a denoiser, of a noise prediction and of the drift are the same
    thing, since each is affine in the others with coefficients that depend on t alone.
    """

    drift: Drift
    weight: float
    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The guided drift for x [B, ...], t [B]; rows without a label are not guided."""
        if label is None or self.weight == 1:
            return self.drift(x, t, label)
        nothing, _ = without_label(label, self.num_classes)
        return torch.lerp(self.drift(x, t, nothing), self.drift(x, t, label), self.weight)


@dataclass(frozen=True)
class Autoguided:
    """Autoguidance: b_weak(x) + weight (b(x) - b_weak(x)) with a smaller or less trained model.

    Karras et al. 2024 (arXiv 2406.02507); both models see the label.
    """

    drift: Drift
    weak: Drift
    weight: float

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The guided drift for x [B, ...], t [B]."""
        return torch.lerp(self.weak(x, t, label), self.drift(x, t, label), self.weight)
