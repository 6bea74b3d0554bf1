"""One optimiser step, and everything it touches."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, Latents, Loader, as_samples
from flowmaps.data.augment import drop_labels, edm_augment, random_hflip
from flowmaps.data.conditions import Conditions
from flowmaps.derivatives import derivative_dtype, tf32_products
from flowmaps.distributed import AnyProcess
from flowmaps.networks.conditioning import soft_label, without_label
from flowmaps.networks.conditions import condition_rows
from flowmaps.networks.magnitude import normalise_weights
from flowmaps.objectives import Loss, TrajectoryObjective
from flowmaps.posthoc_ema import write_snapshot
from flowmaps.rng import generator
from samplers import Trajectory
from training.best import check_best
from training.build import (
    build_accelerator,
    build_conditions,
    build_data,
    build_ema,
    build_loader,
    build_loss_module,
    build_model,
    check_diagonal,
    micro_batch_size,
    open_decoder,
)
from training.checkpoint import save_checkpoint
from training.config import Config, DropoutRows, build_objective
from training.ema import EMA, meta_copy
from training.fsdp import full_tensor, gather_to_cpu, shard
from training.lora import merge_lora
from training.loss_module import LossModule, add_terms
from training.network_section import fitted
from training.optim import Spikes, build_optimizer, learning_rate
from training.precision import StepPrecision, derivative_error, step_precision
from training.run_directory import prune_checkpoints
from training.teacher_trajectories import TrajectorySource, build_trajectory_source


@dataclass
class Trainer:
    """Everything that one optimiser step touches.

    The loss exists twice. ``module`` is the plain module: its parameters are what the optimiser, the averages and
    the checkpoints read and write. ``wrapped`` is the same module as accelerate returns it, with DDP around it in a
    run of several processes, and the one to call: a call of ``module`` would not average gradients over processes.
    """

    config: Config
    data: DataSet
    loader: Loader
    accelerator: Accelerator
    module: LossModule
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    precision: StepPrecision
    init_fingerprint: str = ""  # of what config.init_from held
    paths: TrajectorySource | None = None  # source of trajectories, of a TrajectoryObjective
    conditions: Conditions | None = None  # of the data's items, read from files of their own
    latest: Any = None  # ((x1, label, draws), seed of dropout) of the latest micro-step
    skipped: int = 0  # steps with a non-finite gradient since the start or resume
    spikes: Spikes = field(default_factory=Spikes)
    any_process: AnyProcess = field(default_factory=AnyProcess)

    @classmethod
    def build(cls, config: Config, data: Any = None) -> "Trainer":
        """Build the trainer at step 0, a function of the config and the data alone.

        Args:
            config: The run.
            data: A ``DataSet`` or a map-style dataset of (image, label) in place of the one that ``config.data`` names.

        Raises:
            UserError: The config is inconsistent or does not fit the data; its field is relative to ``config``.
        """
        config.validate()
        accelerator = build_accelerator(config)
        data = build_data(config, accelerator, data)
        conditions = build_conditions(config, data)
        config = replace(config, network=fitted(config.network, data.shape, data.num_classes))
        config.validate()
        if config.best.metric:
            check_best(config.best, data.shape, config.data.root)
        size = micro_batch_size(config, accelerator.num_processes)
        objective = build_objective(config)
        check_diagonal(objective, size)
        fm, weight, init_fingerprint = build_model(config, data, conditions)
        if isinstance(data, Latents) and (accelerator.is_main_process or config.best.metric):  # to draw, export, score
            fm.decoder = open_decoder(config, data)
        module = build_loss_module(config, fm, objective, weight, accelerator.device)
        meta = meta_copy(fm.network)  # before sharding: a sharded network cannot be copied
        if config.shard:
            shard(module, accelerator.device, by_block=not config.compile)
        # After sharding, which replaces the parameters: the optimiser, the wrapper and the averages.
        optimizer = build_optimizer(config.optim, module)
        wrapped = accelerator.prepare_model(module, evaluation_mode=config.shard)  # i.e. no DDP around FSDP
        ema = build_ema(config, objective, fm.network, meta)
        objective.check_samples(data.shape, accelerator.device)
        paths = None
        if isinstance(objective, TrajectoryObjective):
            paths = build_trajectory_source(config, objective, fm, module.teacher, data)
            objective.check_times(paths.times)
        loader = build_loader(config, accelerator, data, paths, size, conditions)
        precision = step_precision(config, objective, accelerator.device)
        made = (loader, accelerator, module, wrapped, optimizer, ema, precision, init_fingerprint, paths, conditions)
        return cls(config, data, *made)

    def step(self, step: int, term_norms: bool = False) -> dict[str, Tensor]:
        """Take optimiser step ``step`` = 0, 1, ... and return what to log, still on the device.

        Part i = rank * accumulate + micro-step of the global batch has the same samples and draws however the parts
        are spread over processes and micro-steps.

        ``term_norms`` adds the norms of the parts that diagonal and off-diagonal rows have in the step's gradient, if
        there are both, at the cost of one more forward and backward pass. Not in a sharded run, whose weights are
        gathered only for the step's own passes.
        """
        config, micro_steps = self.config, self.config.accumulate
        logged: dict[str, Tensor] = {}
        diagonal: list[Tensor] = []
        for micro in range(micro_steps):
            with self._reduced(micro == micro_steps - 1), tf32_products(self.precision.tf32):
                loss = self.micro_step_loss(step, micro)
                self.accelerator.backward(loss.value / micro_steps)
            if term_norms and not config.shard:
                added = self._diagonal_gradient()
                diagonal = [a + b for a, b in zip(diagonal, added, strict=True)] if diagonal else added
            add_terms(logged, {"loss": loss.value.detach(), **loss.terms}, micro_steps)
        if diagonal:
            logged |= self._term_norms(diagonal)
        limit = config.optim.clip or math.inf
        norm = full_tensor(self.accelerator.clip_grad_norm_(self.module.parameters(), limit))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.steps)
        length = float(norm)  # the only host-device synchronisation in a step
        if not math.isfinite(length):
            self._skip(step, length)
        elif not self.spikes.is_spike(length, config.optim.spike):
            self.optimizer.step()
            normalise_weights(self.module)
            self.ema.update(step + 1)
            self.refresh_teacher()
        self.optimizer.zero_grad(set_to_none=True)
        clipped = (norm > limit).float()  # averaged over an interval: the share of clipped steps
        return {**logged, "grad_norm": norm, "clipped": clipped}

    @contextmanager
    def _reduced(self, last: bool) -> Iterator[None]:
        """Average the block's gradients over processes if it is the ``last`` micro-step, else only accumulate them."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped):
                yield

    def micro_step_loss(self, step: int, micro: int) -> Loss:
        """Return the loss of this process's micro-step ``micro`` of step ``step``, one part of the global batch."""
        config, fm, device = self.config, self.module.fm, self.accelerator.device
        part = self.accelerator.process_index * config.accumulate + micro
        x1, label = self.loader.batch(step * config.accumulate + micro)
        x1 = x1.to(device, non_blocking=True)
        label = label.to(device, non_blocking=True) if label is not None and fm.info.label_size else None
        if not (self.paths and self.paths.solver is None):  # whose items are trajectories
            drawing = generator(config.seed, "latents", step, part, device)
            x1 = as_samples(self.data, x1, lambda shape: torch.randn(shape, generator=drawing, device=device))
        if config.data.flip:
            x1, label = random_hflip(x1, label, generator(config.seed, "flip", step, part, device))
        label = condition_rows(label, fm.info.condition)
        if label is not None and config.data.label_dropout:
            nothing, _ = without_label(label, fm.info.label_size)
            diagonal = config.data.dropout_rows is DropoutRows.diagonal
            first = self.module.objective.diagonal_rows(len(label)) if diagonal else len(label)
            drawing = generator(config.seed, "labels", step, part, device)
            label = drop_labels(label, nothing, config.data.label_dropout, first, drawing)
        if config.data.augment:
            x1, done = edm_augment(x1, config.data.augment, generator(config.seed, "augment", step, part, device))
            label = soft_label(label, done, fm.info.label_size)
        batch: Tensor | Trajectory = x1
        if self.paths:
            batch = self.paths(x1, label, generator(config.seed, "paths", step, part, device))
        drawing = generator(config.seed, "draws", step, part, device)
        x1, label, draws = self.module.objective.prepare(fm, batch, label, drawing, step)
        if config.channels_last:
            x1 = x1.contiguous(memory_format=torch.channels_last)
        self.latest = (x1, label, draws), generator(config.seed, "dropout", step, part).initial_seed()
        if config.compile:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self._forward():
            loss: Loss = self.wrapped(x1, label, draws, torch.ones(len(x1), device=device))
        return loss

    def _diagonal_gradient(self) -> list[Tensor]:
        """Return what the diagonal rows of the latest micro-step add to the gradient of each trained parameter.

        By a second pass through the step's own graph, with the other rows weighted by 0. Empty if all rows or none
        are diagonal.
        """
        x1, label, draws = self.latest[0]
        rows = self.module.objective.diagonal_rows(len(x1))
        if rows in (0, len(x1)):
            return []
        share = (torch.arange(len(x1), device=x1.device) < rows).float()
        with tf32_products(self.precision.tf32):
            with self._forward():
                value = self.module(x1, label, draws, share).value / self.config.accumulate
            return list(torch.autograd.grad(value, self._trained_parameters(), materialize_grads=True))

    def _term_norms(self, diagonal: list[Tensor]) -> dict[str, Tensor]:
        """Return the norms of the two terms' gradients: ``diagonal``, of all processes, and the rest of the step's."""
        diagonal = [self.accelerator.reduce(gradient, "mean") for gradient in diagonal]
        pairs = zip(self._trained_parameters(), diagonal, strict=True)
        rest = [-part if p.grad is None else p.grad - part for p, part in pairs]
        return {"grad_norm_diagonal": get_total_norm(diagonal), "grad_norm_off_diagonal": get_total_norm(rest)}

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def derivative_error(self) -> float | None:
        """Return ``precision.derivative_error`` of the latest micro-step; None for a sharded run too."""
        return None if self.config.shard else derivative_error(self.module, self.precision, *self.latest[0])

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Set the precision of derivatives inside the block, and seed dropout for the latest micro-step.

        Torch's own generators are restored afterwards.
        """
        device = self.accelerator.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            derivative_dtype(self.precision.derivative),
        ):
            torch.manual_seed(self.latest[1])
            yield

    def refresh_teacher(self) -> None:
        """Load the average into the teacher that follows one: after each step and after a resume."""
        decay = self.module.objective.teacher_ema
        if self.module.teacher is not None and decay:
            self.module.teacher.network.load_state_dict(self.ema.state(decay))

    def _skip(self, step: int, norm: float) -> None:
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise UserError(
                f"the gradient norm is {norm} at step {step + 1}, non-finite for the {self.skipped}th time: lower "
                "optim.lr or raise this limit",
                field="max_skipped_steps",
                value=self.config.max_skipped_steps,
            )

    def averaged(self, done: int) -> FlowMap:
        """Return a copy of the flow map with the first average of the weights after ``done`` steps, in eval mode."""
        fm, decay = self.module.fm, self.config.ema[0]
        info = replace(fm.info, images_seen=done * self.config.batch)
        network = self.ema.network(decay)
        if self.config.lora:
            merge_lora(network)
        averaged = FlowMap(network, fm.interpolant_name, fm.base_std, info).eval()
        averaged.decoder, averaged.conditions = fm.decoder, fm.conditions
        return averaged

    def save(self, workdir: Path, done: int) -> None:
        """Export the averaged model after ``done`` steps, then write the checkpoint, which makes the step final.

        Sharded weights are gathered by all processes, and the first one writes.
        """
        model = self.averaged(done)
        if self.accelerator.is_main_process:
            model.save_pretrained(workdir / "model")
        self.checkpoint(workdir / "checkpoints" / f"step-{done:08d}", done)
        if self.accelerator.is_main_process:
            prune_checkpoints(workdir, self.config.keep)

    def snapshot(self, workdir: Path, done: int) -> None:
        """Write the power-function averages after ``done`` steps, from which averages of any width are made."""
        main = self.accelerator.is_main_process
        shadows = {width: self.ema.shadows[f"width-{width}"] for width in self.config.ema_widths}
        averages = {width: gather_to_cpu(shadow, keep=main) for width, shadow in shadows.items()}
        if main:
            write_snapshot(workdir, done, averages)

    def checkpoint(self, path: Path, done: int, model: FlowMap | None = None, **facts: Any) -> None:
        """Write the state after ``done`` steps to ``path``, together with the export of ``model`` if given."""
        state = {"step": done, "images_seen": done * self.config.batch, "norms": self.spikes.norms, **facts}
        state |= {"shards": self.parts(), "threads": torch.get_num_threads(), **self.origin()}
        writes = self.accelerator.is_main_process
        save_checkpoint(path, state, self.module, self.optimizer, self.ema, model, writes)

    def parts(self) -> int:
        """Return the number of parts of a global batch, each with its own draws; "shards" in a checkpoint."""
        return int(self.accelerator.num_processes) * self.config.accumulate

    def origin(self) -> dict[str, str]:
        """Return digests of what the run depends on besides its config, by field; a resumed run must find the same."""
        teacher = self.module.teacher if self.config.teacher else None
        teacher_digest = teacher.fingerprint() if teacher else ""
        walked = self.paths.data.digest() if self.paths and not self.paths.solver else ""
        origin = {"data.root": self.data.digest(), "teacher": teacher_digest, "init_from": self.init_fingerprint}
        grids = "".join(schedule.to_json() for schedule in self.module.objective.schedules.values())
        fitted = hashlib.sha256(grids.encode()).hexdigest() if grids else ""
        given = {"data.condition": self.conditions.digest()} if self.conditions else {}
        return {**origin, "trajectories.files": walked, "objective.schedule": fitted, **given}
