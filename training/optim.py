"""Optimiser and learning-rate schedule."""

import math
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
