"""Time grids: 1-D tensors of increasing times in [0, 1]; N steps need N + 1 times."""

from collections.abc import Sequence

import torch
from torch import Tensor

Times = Tensor | Sequence[float]

MOST_STEPS = 100_000
STEP_COUNT = f"a whole number of at least 1 and at most {MOST_STEPS:,}"


def is_step_count(steps: object) -> bool:
    """Return whether ``steps`` is a number of steps: ``STEP_COUNT``; a bool or a float is not."""
    return isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= MOST_STEPS


def uniform_times(steps: int) -> Tensor:
    """Return ``steps`` equal intervals from 0 (noise) to 1 (data): float64 tensor [steps + 1]."""
    if not is_step_count(steps):
        raise ValueError(f"steps must be {STEP_COUNT}, got {steps}")
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


def log_snr_times(steps: int, low: float, high: float) -> Tensor:
    """Return ``steps`` equal intervals of ln(t / (1 - t)) from ``low`` to ``high``: float64 tensor [steps + 1].

    On the linear path ln(t / (1 - t)) is the log signal-to-noise ratio up to a constant; 0 < low < high < 1.
    """
    if not is_step_count(steps) or not 0 < low < high < 1:
        raise ValueError(
            f"log_snr_times needs {STEP_COUNT} for steps and 0 < low < high < 1, got {steps}, {low} and {high}"
        )
    ends = torch.tensor([low, high], dtype=torch.float64).logit()
    times = torch.lerp(ends[0], ends[1], torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)).sigmoid()
    times[0], times[-1] = low, high
    return times


def check_times(times: Times) -> Tensor:
    """Return ``times`` as a tensor if it is a valid grid: 1-D, at least two entries in [0, 1], strictly increasing.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(times, Tensor):
        times = torch.tensor(times, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be a 1-D tensor of at least 2 entries, got shape {tuple(times.shape)}")
    if not bool(((times >= 0) & (times <= 1)).all()):  # NaN fails this too
        raise ValueError(f"times must lie in [0, 1] (0 = noise, 1 = data), got {times.tolist()}")
    if not bool((times.diff() > 0).all()):
        raise ValueError(f"times must increase strictly, got {times.tolist()}")
    return times
