"""Optimiser, learning-rate schedule, and detection of gradient spikes."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from training.config import Decay, Optim, Optimizer


def build_optimizer(config: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Create RAdam (the paper's choice) or AdamW over ``parameters``.

    AdamW is fused, one kernel per step, on the devices where torch has that; it has no fused RAdam.
    """
    parameters = list(parameters)
    options: Any = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.name is Optimizer.radam:
        return torch.optim.RAdam(parameters, **options)
    return torch.optim.AdamW(parameters, fused={p.device.type for p in parameters} <= {"cpu", "cuda"}, **options)


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Return the rate of step ``step`` = 0 .. ``steps - 1``: linear warm-up, then the chosen decay."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay is Decay.cosine:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    elif config.decay is Decay.linear:
        decay = 1 - step / steps
    elif config.decay is Decay.inverse_sqrt:
        decay = 1 / math.sqrt(max(step / config.decay_start, 1))
    else:
        decay = 1.0
    return config.lr * warm * decay


WINDOW = 128  # steps whose gradient norms define the usual one


class Spikes:
    """Detector of outliers among gradient norms, for objectives whose gradient has rare large ones.

    The window is that of OLMo's optimiser (Walsh et al. 2025, arXiv 2501.00656, section 3.4), with the median in place
    of mean and deviation, which outliers would move. Outliers enter the window too, so that a lasting change becomes
    the new normal after half a window.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.norms = list(norms)  # latest last
        self.count = 0  # spikes since the start or resume

    def is_spike(self, norm: float, factor: float) -> bool:
        """Return whether ``norm`` exceeds ``factor`` times the median of the full window before it, and record it.

        Factor 0 disables the detector.
        """
        if not factor:
            return False
        found = len(self.norms) == WINDOW and norm > factor * statistics.median(self.norms)
        self.norms = [*self.norms, norm][-WINDOW:]
        self.count += found
        return found
