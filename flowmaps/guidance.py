"""Guidance: drifts that combine two predictions, as callables b(x, t, label)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmaps.networks.conditioning import without_label
from samplers.callables import Drift


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: b(x; no label) + weight (b(x; label) - b(x; no label)), two evaluations.

    Ho and Salimans 2022 (arXiv 2207.12598). Guiding a denoiser, a noise prediction or the drift is equivalent:
    each is affine in the others, with coefficients that depend on t alone.
    """

    drift: Drift
    weight: float
    label_size: int

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the guided drift for x [B, ...], t [B]; rows without a label are not guided."""
        if label is None or self.weight == 1:
            return self.drift(x, t, label)
        nothing, _ = without_label(label, self.label_size)
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
        """Return the guided drift for x [B, ...], t [B]."""
        return torch.lerp(self.weak(x, t, label), self.drift(x, t, label), self.weight)
