"""A trainer's step under a ledger, as it runs on CUDA in the middle of a run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from training.forecast.ledger import Ledger
from training.fsdp import local
from training.trainer import Trainer

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def cuda_dropout() -> Iterator[None]:
    """Use CUDA's operator for dropout inside the block, whose mask has one byte per number; a CPU's is of floats."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    with patch.object(F, "dropout", dropout):
        yield


@contextmanager
def first_of(processes: int) -> Iterator[None]:
    """Be the first of so many processes on CPUs inside the block, whatever launched this one.

    The others do not exist: collective calls return at once and nothing is sent.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        number = str(processes)
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # or accelerate would set the threads
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment, clear=True))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            if processes > 1:
                torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
                stack.enter_context(patch("training.fsdp.init_device_mesh", _real_mesh))
            PartialState(cpu=True).device = torch.device("cpu")  # not cpu:0, which a fake tensor takes for another
            yield
        finally:
            if processes > 1:
                torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def _real_mesh(*args: Any, **options: Any) -> DeviceMesh:
    """Make a device mesh whose ranks are real numbers, also among fake tensors."""
    with _disable_current_modes():
        return init_device_mesh(*args, **options)


def measure(trainer: Trainer, ledger: Ledger) -> None:
    """Let ``trainer``, which was built under ``ledger``, take a step, and name its parts and phases.

    The optimiser gets the state that it has from the second step on, and works on all parameters at once, as torch
    makes it on CUDA: that takes a copy of the weights.
    """
    weights = [p for p in trainer.module.parameters() if p.requires_grad]
    for group in trainer.optimizer.param_groups:
        group["foreach"] = not group.get("fused")
    for p in weights:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    _label_parts(trainer, ledger)

    def label_gradient(p: Tensor) -> None:
        if p.grad is not None:
            ledger.label(local(p.grad), "gradients")

    for p in weights:
        p.register_post_accumulate_grad_hook(label_gradient)  # type: ignore[no-untyped-call]
    micro_step_loss, backward = trainer.micro_step_loss, trainer.accelerator.backward

    def forward_phase(step: int, micro: int) -> Any:
        ledger.phase = "forward pass"
        return micro_step_loss(step, micro)

    def backward_phase(loss: Tensor) -> None:
        ledger.phase = "backward pass"
        backward(loss)
        for p in weights:  # a sharded one has no hook
            label_gradient(p)
        ledger.phase = "update"

    ledger.peaks.clear()
    ledger.products.clear()
    with (
        patch.object(trainer, "micro_step_loss", forward_phase),
        patch.object(trainer.accelerator, "backward", backward_phase),
    ):
        trainer.step(trainer.config.steps - 1)  # the last, in which alpha_flow takes a derivative


def _label_parts(trainer: Trainer, ledger: Ledger) -> None:
    module, teacher = trainer.module, trainer.module.teacher
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    parts: dict[str, list[Any]] = {
        "weights": [*module.parameters(), *module.buffers()],
        "optimiser": [value for value in state if isinstance(value, Tensor)],
        "averages": [value for shadow in trainer.ema.shadows.values() for value in shadow.values()],
        "teacher": [*teacher.parameters(), *teacher.buffers()] if teacher else [],
    }
    for name, tensors in parts.items():
        for tensor in tensors:
            ledger.label(local(tensor.detach()), name)
