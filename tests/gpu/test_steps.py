"""Loss and gradient of one step in each precision, against float64 on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from gpu.made_up import build
from helpers.small_runs import small_run
from torch.utils import _pytree as pytree

from flowmaps import FlowMap
from flowmaps.derivatives import tf32_products
from flowmaps.objectives import OBJECTIVES
from training.config import Precision
from training.config_sections import DerivativePrecision
from training.loss_module import LossModule

pytestmark = pytest.mark.gpu

# precision -> settings; largest relative error of the loss, and of the gradient as one vector. On a CPU they were up to
# 3e-6 and 1.2e-4 in fp32 (of consistency, whose target cancels digits), 0.033 and 0.06 in bf16. TF32 has 3 bits more.
PRECISIONS = {
    "fp32": ({"tf32": False, "derivative_precision": DerivativePrecision.fp32}, 1e-4, 1e-3),
    "tf32": ({"derivative_precision": DerivativePrecision.tf32}, 1e-2, 3e-2),
    "bf16": ({"precision": Precision.bf16}, 0.1, 0.2),
    "bf16_derivative": ({"precision": Precision.bf16, "derivative_precision": DerivativePrecision.bf16}, 0.1, 0.2),
}
NETWORKS = ["MLP", "UNet", "EDM2UNet", "DiT", "IMFDiT"]


def randomise(fm):
    """Set every weight, so that no branch that starts at zero hides an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in fm.network.parameters():
            value = torch.randn(p.shape) * (0.2 if p.ndim < 2 else min(0.2, p[0].numel() ** -0.5))
            p.copy_(value)


def exact(trainer):
    """Loss and gradient of the latest micro-step of ``trainer``, in float64 on the CPU."""

    def moved(fm):
        return FlowMap(copy.deepcopy(fm.network).cpu().double(), fm.interpolant_name, fm.base_std, fm.info)

    teacher = trainer.module.teacher and moved(trainer.module.teacher)
    module = LossModule(moved(trainer.module.fm), trainer.module.objective, None, teacher)
    x1, label, draws = pytree.tree_map_only(
        torch.Tensor, lambda x: x.cpu().double() if x.is_floating_point() else x.cpu(), trainer.latest[0]
    )
    loss = module(x1, label, draws, torch.ones(len(x1), dtype=torch.float64)).value
    loss.backward()
    return loss.item(), gradient(module)


def gradient(module):
    return torch.cat([p.grad.cpu().double().flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_agrees_with_float64_on_the_cpu(objective, name, precision, device, record_property):
    settings, loss_limit, gradient_limit = PRECISIONS[precision]
    trainer = build(replace(small_run(objective, name), **settings))
    assert trainer.accelerator.device.type == device.type
    for fm in (trainer.module.fm, trainer.module.teacher):
        if fm is not None:
            randomise(fm)
    with tf32_products(trainer.precision.tf32):
        loss = trainer.micro_step_loss(0, 0)
        trainer.accelerator.backward(loss.value)
    value, expected = exact(trainer)
    errors = (
        abs(loss.value.item() - value) / abs(value),
        float((gradient(trainer.module) - expected).norm() / expected.norm()),
    )
    record_property("loss_error", errors[0])
    record_property("gradient_error", errors[1])
    assert errors[0] < loss_limit and errors[1] < gradient_limit
