"""Optimiser, learning-rate schedule, and the guard against outliers among gradients."""

import math
import statistics
from collections.abc import Iterable

import torch
from torch import nn

from training.config import Decay, Optim, Optimizer


def build_optimizer(config: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """RAdam (the paper's) or AdamW over ``parameters``."""
    cls: type[torch.optim.RAdam] | type[torch.optim.AdamW]
    cls = {Optimizer.radam: torch.optim.RAdam, Optimizer.adamw: torch.optim.AdamW}[config.name]
    return cls(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """The rate of step ``step`` = 0 .. ``steps - 1``: linear warm-up, then the chosen decay."""
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


WINDOW = 128  # steps whose gradients say what is usual


class Spikes:
    """Remembers the norms of the last gradients: a guard for objectives whose gradient has rare large outliers.

    The window is that of OLMo's optimiser (Walsh et al. 2025, arXiv 2501.00656, section 3.4), the median in the place
    of mean and deviation, which the outliers would move. Outliers are remembered too, so that a lasting change is
    usual after half a window.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.norms = list(norms)  # latest last; kept in a checkpoint
        self.count = 0  # since the start or resume

    def is_one(self, norm: float, factor: float) -> bool:
        """Whether ``norm`` is more than ``factor`` times the median of a full window before it; never at factor 0."""
        if not factor:
            return False
        found = len(self.norms) == WINDOW and norm > factor * statistics.median(self.norms)
        self.norms = [*self.norms, norm][-WINDOW:]
        self.count += found
        return found
