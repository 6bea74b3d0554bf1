"""The precision of the products in one optimiser step, and what is said about it when a run starts.

A step has two kinds of matrix products and convolutions: those of the derivatives, forward and backward, with the drift
that they are compared with (``config.derivative_precision``), and the others (``config.precision`` and
``config.tf32``). Everything is float32 or bfloat16 by autocast; TF32 is a switch for float32 products on CUDA. It is
process-wide, and the backward pass of a step runs under one setting of it.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from flowmaps.derivatives import derivative_dtype, recorded_derivatives, tf32_products
from flowmaps.objectives import Draws, Objective, SelfDistillation
from flowmaps.objectives.base import DerivativeRole
from training.config import Config
from training.config_sections import DerivativePrecision, Precision
from training.loss_module import LossModule

DIFFERENTIATED = (DerivativeRole.constant, DerivativeRole.trained)  # by forward-mode differentiation


class StepPrecision(NamedTuple):
    """``derivative``: float32 or bfloat16; ``tf32``: the step's float32 products, forward and backward, may be TF32."""

    derivative: torch.dtype
    tf32: bool

    @property
    def is_exact(self) -> bool:
        """True if derivatives are in IEEE float32."""
        return self.derivative is torch.float32 and not self.tf32

    @property
    def name(self) -> str:
        """That of the derivatives' precision in a config."""
        return "bf16" if self.derivative is torch.bfloat16 else "tf32" if self.tf32 else "fp32"


def step_precision(config: Config, objective: Objective, device: torch.device) -> StepPrecision:
    """Resolve ``config.derivative_precision`` and ``config.tf32`` for a step on ``device``.

    Under ``precision=bf16`` all float32 products belong to the derivative, which decides about TF32. Under
    ``precision=fp32`` a step has TF32 if both settings allow it. Finite differences are in IEEE float32.
    """
    if device.type != "cuda":
        bf16 = config.derivative_precision is DerivativePrecision.bf16
        return StepPrecision(torch.bfloat16 if bf16 else torch.float32, tf32=False)
    asked, role = config.derivative_precision, objective.derivative_role
    if asked is DerivativePrecision.auto:
        asked = DerivativePrecision.tf32 if config.tf32 else DerivativePrecision.fp32
    if role is DerivativeRole.finite:
        return StepPrecision(torch.float32, tf32=False)
    if asked is DerivativePrecision.bf16:
        return StepPrecision(torch.bfloat16, config.tf32)
    if role is DerivativeRole.absent:
        return StepPrecision(torch.float32, config.tf32)
    allowed = config.precision is Precision.bf16 or config.tf32
    return StepPrecision(torch.float32, allowed and asked is DerivativePrecision.tf32)


def advice(config: Config, objective: Objective, device: torch.device) -> list[str]:
    """Return a line for each choice of the config that a user should know the price of."""
    found, role = [], objective.derivative_role
    if role is DerivativeRole.trained and config.derivative_precision is DerivativePrecision.bf16:
        found.append(
            "derivative_precision=bf16 biases the gradient of this objective, which flows through the derivative: "
            "watch derivative_error in the log, or set tf32"
        )
    if device.type == "cuda" and not config.compile and role in DIFFERENTIATED:
        found.append(
            "this step launches some ten thousand kernels and may wait for the host: compile=True fuses them, after "
            "minutes of compilation"
        )
    return found


def derivative_error(
    module: LossModule, precision: StepPrecision, x1: Tensor, label: Tensor | None, draws: Draws, rows: int = 4
) -> float | None:
    """Return |dv - dv'| / |dv'| of the step's derivatives dv on its last ``rows`` rows; dv' is in IEEE float32.

    Of all derivatives that the objective takes together; None if it takes none or if they are in IEEE float32 anyway.
    The last arguments are those of ``LossModule.forward``.
    """
    objective = module.objective
    if precision.is_exact or objective.derivative_role not in DIFFERENTIATED:
        return None
    assert isinstance(objective, SelfDistillation)
    alone = dataclasses.replace(objective, diagonal=0.0)
    x0, s, t, gamma, guidance = draws
    few = Draws(x0[-rows:], s[-rows:], t[-rows:], gamma[-rows:], None if guidance is None else guidance[-rows:])
    label = None if label is None else label[-rows:]
    teacher = None if module.teacher is None else module.teacher.drift
    found = []
    for dtype, tf32 in ((precision.derivative, precision.tf32), (torch.float32, False)):
        with derivative_dtype(dtype), tf32_products(tf32), recorded_derivatives() as taken, torch.no_grad():
            alone.row_losses(module.fm, x1[-rows:], label, few, teacher, {})
        found.append(torch.cat([dv.flatten() for dv in taken]))
    ours, exact = found
    return float((ours - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny))
