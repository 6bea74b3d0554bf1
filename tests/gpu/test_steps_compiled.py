"""Compiled steps against eager ones: by inductor on a GPU, by the tracing alone on a CPU, where that takes minutes."""

from dataclasses import replace

import pytest
import torch
from gpu.made_up import build
from helpers.small_runs import small_run

from training.config_sections import CompileMode

pytestmark = pytest.mark.gpu

RUNS = [
    ("lagrangian", "DiT", CompileMode.default),
    ("flow_matching", "DiT", CompileMode.default),
    ("lagrangian", "DiT", CompileMode.reduce_overhead),
    ("mean_flow", "UNet", CompileMode.default),
    ("improved_mean_flow", "IMFDiT", CompileMode.default),
    ("lagrangian", "EDM2UNet", CompileMode.default),
]


def losses(config, steps=4):
    trainer = build(config)
    return torch.stack([trainer.step(k)["loss"].clone() for k in range(steps)]).cpu()


@pytest.mark.parametrize(("objective", "name", "mode"), RUNS, ids=[f"{o}-{n}-{m.name}" for o, n, m in RUNS])
def test_compiled_steps_equal_eager_ones(objective, name, mode, device, monkeypatch, record_property):
    config = small_run(objective, name, tf32=False)
    torch._dynamo.reset()
    if device.type == "cpu":
        if (objective, name, mode) != RUNS[0]:
            pytest.skip("one of them proves the code")
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, mode: compiler(model, backend="aot_eager"))
    eager, compiled = losses(config), losses(replace(config, compile=True, compile_mode=mode))
    error = float(((compiled - eager) / eager).abs().max())
    record_property("largest_error", error)
    assert error < 1e-3
