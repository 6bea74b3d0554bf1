"""Forecast of a run from its config alone, by its real trainer on tensors without memory."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from flowmaps.derivatives import tf32_products
from flowmaps.errors import UserError
from training.build import micro_batch_size
from training.config import Best, CompileMode, Config, build_objective
from training.forecast.ledger import Peak, pretend
from training.forecast.stand_ins import data_of, stand_ins
from training.forecast.step import cuda_dropout, first_of, measure
from training.fsdp import local
from training.precision import step_precision
from training.trainer import Trainer

PARTS = ("weights", "gradients", "optimiser", "averages", "teacher", "activations")
MARGIN = 1.1  # for what is not counted: library workspaces, fragmentation, buffers of NCCL, the CUDA context


@dataclass(frozen=True)
class Forecast:
    """Memory in bytes per GPU, and arithmetic in FLOPs of one optimiser step on all GPUs."""

    gpus: int
    batch: int  # images per optimiser step on all GPUs
    micro_batch: int  # images per micro-step and GPU
    multiple: int  # of which a micro-batch is made up: the rows of a trajectory, else 1
    parameters: int
    trained: int  # parameters that the optimiser changes
    phases: dict[str, int]  # highest total in the forward pass, the backward pass and the update
    parts: dict[str, int]  # of the highest of them, by PARTS
    gradients: int
    flops: dict[str, float]  # by precision: bf16, TF32, fp32

    @property
    def phase(self) -> str:
        """The phase in which memory is highest."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """The highest total, without MARGIN."""
        return self.phases[self.phase]


def forecast(config: Config, gpus: int = 1, runs: Mapping[str, Config] | None = None, micro_batch: int = 0) -> Forecast:
    """Forecast the memory and arithmetic of a step on CUDA; of a compiled run as if it were eager.

    ``Trainer.build`` and ``Trainer.step`` run on tensors that have shapes only, with stand-ins for files and, with
    ``config.shard``, in the first of ``gpus`` processes that do not exist. Of many micro-steps two are taken.

    Args:
        config: The run.
        gpus: Number of processes, one on each GPU.
        runs: Configs of the runs that ``init_from`` and ``teacher`` may name; other names are checkpoints of the run's
            own network.
        micro_batch: Images per micro-step and GPU, 0 for those of ``config``.

    Raises:
        UserError: Whatever ``train`` refuses without a look at a file.
    """
    config.validate()
    if config.shard and gpus == 1:
        raise UserError("needs several processes: set gpus", field="shard")
    size = micro_batch or micro_batch_size(config, gpus)
    processes, micro_steps = gpus if config.shard else 1, min(config.accumulate, 2)
    small = replace(
        config,
        batch=size * processes * micro_steps,
        accumulate=micro_steps,
        compile=False,
        compile_mode=CompileMode.default,
        best=Best(),
        data=replace(config.data, workers=0),
    )
    data = data_of(small)
    with first_of(processes), stand_ins(small, data, runs or {}), pretend() as ledger, cuda_dropout():
        trainer = Trainer.build(small, data)
        trainer.precision = step_precision(small, trainer.module.objective, torch.device("cuda"))
        with tf32_products(small.tf32):
            measure(trainer, ledger)
        trained = [p for p in trainer.module.parameters() if p.requires_grad]
        gradients = sum(local(p).nbytes for p in trained)
        if gpus > processes:  # DDP keeps the gradients of all parameters allocated
            for phase, peak in ledger.peaks.items():
                absent = gradients - peak.parts.get("gradients", 0)
                ledger.peaks[phase] = Peak(peak.total + absent, peak.parts | {"gradients": gradients})
        flops: Counter[str] = Counter()
        for phase, products in ledger.products.items():  # each process does the complete update, once per step
            times = gpus if phase == "update" else gpus * config.accumulate / micro_steps
            flops.update({kind: value * times for kind, value in products.items()})
        highest = max(ledger.peaks.values(), key=lambda peak: peak.total)
        return Forecast(
            gpus=gpus,
            batch=size * gpus * config.accumulate,
            micro_batch=size,
            multiple=trainer.paths.rows if trainer.paths else 1,
            parameters=sum(p.numel() for p in trainer.module.fm.network.parameters()),
            trained=sum(p.numel() for p in trained),
            phases={name: peak.total for name, peak in ledger.peaks.items()},
            parts={name: highest.parts.get(name, 0) for name in PARTS},
            gradients=gradients,
            flops=dict(sorted(flops.items())),
        )


class Fit(NamedTuple):
    """The largest micro-batch that fits a memory, 0 if none does, and the ``accumulate`` that it asks for."""

    memory: float  # GiB
    micro_batch: int
    accumulate: int


def fit(config: Config, memory: float, one: Forecast, two: Forecast) -> Fit:
    """Find what fits ``memory`` GiB per GPU, with MARGIN, from forecasts of two micro-batches.

    In each phase memory is a straight line in the micro-batch. With several micro-steps the gradients of the earlier
    ones are there from the start; with DDP they always are.
    """
    room = memory * 2**30 / MARGIN
    kept = config.accumulate > 1 or (one.gpus > 1 and not config.shard)

    def largest(earlier: int) -> int:
        """Return the largest micro-batch next to so many bytes of gradients of earlier micro-steps."""
        most = []
        for phase, total in one.phases.items():
            per_image = (two.phases[phase] - total) / (two.micro_batch - one.micro_batch)
            left = room - total + per_image * one.micro_batch - earlier * (phase != "update")
            most.append(left / per_image if per_image > 0 else math.copysign(math.inf, left))
        return int(max(0.0, min(most)) // one.multiple) * one.multiple

    objective = build_objective(config)
    for accumulate in range(1, one.batch // one.gpus + 1):
        size, rest = divmod(one.batch, one.gpus * accumulate)
        most = largest(one.gradients if accumulate > 1 and not kept else 0)
        divides = not rest and size % one.multiple == 0
        if divides and size <= most and (not objective.diagonal or objective.diagonal_rows(size)):
            return Fit(memory, most, accumulate)
    return Fit(memory, most, 0)
