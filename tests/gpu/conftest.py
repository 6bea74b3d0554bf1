"""Tests for a machine with a CUDA GPU: ``make gpu``, or ``pytest -m gpu tests/gpu``."""

import pytest
import torch
from gpu.order import Order

from flowmaps.distributed import pick_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; in a smoke run of gpu_check.py the CPU, on which the same tests prove their code."""
    device, order = pick_device(), Order.received()
    if device.type != "cuda" and not (order and order.smoke):
        pytest.skip("no CUDA GPU")
    return device
