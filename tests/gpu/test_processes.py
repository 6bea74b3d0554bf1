"""Two processes on two GPUs, which exchange gradients by NCCL, train as one process with two micro-steps does."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.two_processes import MODES, config_of, run

pytestmark = pytest.mark.gpu


def test_two_processes_equal_two_micro_steps(device, tmp_path):
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "tests/helpers/two_processes.py"]
    subprocess.run([*command, str(tmp_path), "lagrangian_dit"], cwd=ROOT, env={**os.environ}, check=True, timeout=120)
    losses, weights, average = run(config_of("lagrangian_dit", tmp_path, accumulate=2))
    for mode in MODES:
        other = torch.load(tmp_path / f"{mode}-lagrangian_dit-0.pt", map_location=device)
        torch.testing.assert_close(other[0], losses, rtol=1e-3, atol=1e-5)
        for ours, theirs in ((weights, other[1]), (average, other[2])):
            for name, value in ours.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
