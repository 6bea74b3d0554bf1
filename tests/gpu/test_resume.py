"""A run on the GPU that is stopped and resumed ends with the weights of one that was left alone."""

import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from gpu.made_up import data_for
from helpers.runs import weights

from configs.digits import get_config
from flowmaps.errors import Stopped
from training.config import Precision
from training.loop import train
from training.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", Precision, ids=lambda precision: precision.name)
def test_a_stopped_run_resumes_to_the_same_weights(precision, tmp_path, device, monkeypatch, record_property):
    """Bit for bit where the kernels are deterministic; the largest difference is recorded."""
    AcceleratorState._reset_state()
    config = get_config("lagrangian,smoke")
    config.precision, config.steps, config.network.dropout, config.sample_every = precision, 6, 0.1, 100
    train(config, tmp_path / "whole", data_for(config))
    step = Trainer.step

    def stopping(self, k):
        if k == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, k)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Stopped):
            train(config, tmp_path / "stopped", data_for(config))
    train(config, tmp_path / "stopped", data_for(config))
    AcceleratorState._reset_state()
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "stopped"))
    scale = max(float(value.abs().max()) for value in whole.values())
    difference = max(float((whole[name] - resumed[name]).abs().max()) for name in whole) / scale
    record_property("largest_difference", difference)
    assert whole.keys() == resumed.keys()
    assert difference == 0 if device.type == "cpu" else difference < 1e-3
    assert all(torch.isfinite(value).all() for value in resumed.values())
