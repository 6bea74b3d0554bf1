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
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, Latents, Loader, Order, as_samples, download, load_data
from flowmaps.data.augment import PARAMETERS, augmented, mirrored
from flowmaps.distributed import ON_CPU, AnyProcess
from flowmaps.errors import within
from flowmaps.networks.conditioning import soft_label
from flowmaps.networks.magnitude import normalise_weights
from flowmaps.objectives import LogVariance, Loss, PathObjective
from flowmaps.posthoc_ema import write_snapshot
from flowmaps.rng import generator
from samplers import Trajectory
from training.best import check_best
from training.build import build_flow_map, open_decoder, scaled
from training.checkpoint import prune_checkpoints, save_checkpoint
from training.config import Config, Precision, build_objective
from training.ema import EMA, hollowed
from training.fsdp import collected, shard, whole
from training.initialise import build_teacher, start_from
from training.lora import add_lora, merge_lora
from training.loss_module import LossModule
from training.optim import Spikes, build_optimizer, learning_rate
from training.teacher_trajectories import Paths, build_paths

CHANNELS_LAST = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


@dataclass
class Trainer:
    """Everything that one optimiser step touches."""

    config: Config
    data: DataSet
    loader: Loader
    accelerator: Accelerator
    module: LossModule  # bare; checkpoints read and write this
    wrapped: torch.nn.Module  # as accelerate wants it called
    optimizer: torch.optim.Optimizer  # bare
    prepared: Any  # as accelerate wants it called
    ema: EMA
    started: str = ""  # fingerprint of config.init_from
    paths: Paths | None = None  # where the trajectories of a PathObjective come from
    latest: Any = None  # ((x1, label, draws), seed of dropout) of the latest shard
    skipped: int = 0  # steps with a non-finite gradient since the start or resume
    spikes: Spikes = field(default_factory=Spikes)
    any_process: AnyProcess = field(default_factory=AnyProcess)

    @classmethod
    def build(cls, config: Config) -> "Trainer":
        """Data, network, optimiser and averages at step 0; a function of the config alone."""
        config.validate()
        accelerator = Accelerator(  # nothing is left to the environment: no fp16, no other accumulation
            cpu=ON_CPU,
            mixed_precision="bf16" if config.precision is Precision.bf16 else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        _check_sharding(config, accelerator)
        pixels = getattr(config.network, "image_size", None)
        with accelerator.local_main_process_first():  # it downloads, or checks a folder; the others find that done
            if config.data.download:
                download(config.data.name, config.data.root)
            data = scaled(config, load_data(config.data.name, config.data.root, pixels, config.data.skip_corrupt))
        _check_augmentation(config, data)
        if config.best.metric:
            with within("config"):
                check_best(config.best, data.shape)
        size = micro_batch_size(config, accelerator.num_processes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            latents = data.info if isinstance(data, Latents) else {}
            fm = build_flow_map(config, data.shape, data.num_classes, **latents)
            started = start_from(config, fm) if config.init_from else ""
            weight = LogVariance(limit=config.weight.limit) if config.weight.learned else None
            if config.lora:
                add_lora(fm.network, config.lora)
        objective = build_objective(config)
        if objective.diagonal and not objective.diagonal_rows(size):
            raise UserError(
                f"--config.objective.diagonal={objective.diagonal:g} of a micro-step of {size} is no row: raise "
                "--config.batch or lower --config.accumulate"
            )
        fm.to(accelerator.device)
        if isinstance(data, Latents) and (accelerator.is_main_process or config.best.metric):  # to draw, export, judge
            fm.decoder = open_decoder(config, data)
        module = LossModule(fm, objective, weight, build_teacher(config, fm, objective))
        module.to(accelerator.device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            _checkpoint_gradients(fm.network, config.network.name)
        if config.compile:
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]  # inside what gathers shards
        hollow = hollowed(fm.network)
        if config.shard:
            shard(module, accelerator.device, by_block=not config.compile)
        optimizer = build_optimizer(config.optim, [p for p in module.parameters() if p.requires_grad])
        wrapped = accelerator.prepare_model(module, evaluation_mode=config.shard)  # which is: without DDP round it
        prepared = accelerator.prepare_optimizer(optimizer)
        teaching = (objective.teacher_ema,) if objective.teacher_ema else ()
        ema = EMA(fm.network, tuple(dict.fromkeys((*config.ema, *teaching))), config.ema_widths, hollow)
        paths = None
        if isinstance(objective, PathObjective):
            paths = build_paths(config, objective, fm, module.teacher, data)
            objective.check(data.shape, paths.times, accelerator.device)
        items, rows = (paths.data, paths.rows) if paths else (data, 1)  # an item of the data gives so many rows
        if size % rows:
            raise UserError(
                f"--config.batch={config.batch}: a micro-step of {size} rows is not a whole number of trajectories of "
                f"{rows} rows, choose a multiple"
            )
        order = Order(len(items), config.seed)

        def indices(k: int) -> Tensor:
            """Items of micro-step k of this process, counted from the start of the run."""
            step, micro = divmod(k, config.accumulate)
            shard = accelerator.process_index * config.accumulate + micro
            return order.indices((step * config.batch + shard * size) // rows, size // rows)

        loader = Loader(items, indices, config.data.workers, pin=accelerator.device.type == "cuda")
        return cls(config, data, loader, accelerator, module, wrapped, optimizer, prepared, ema, started, paths)

    def step(self, step: int) -> dict[str, Tensor]:
        """Optimiser step ``step`` = 0, 1, ...; returns what to log, still on the device.

        Shard i = rank * accumulate + micro-step of the global batch has the same samples and draws however the shards
        are spread over processes and micro-steps.
        """
        config, micro_steps = self.config, self.config.accumulate
        logged: dict[str, Tensor] = {}
        for micro in range(micro_steps):
            with self._reduced(micro == micro_steps - 1):
                loss = self.shard_loss(step, micro)
                self.accelerator.backward(loss.value / micro_steps)
            for name, value in {"loss": loss.value.detach(), **loss.terms}.items():
                logged[name] = logged.get(name, 0) + value / micro_steps
        norm = whole(self.accelerator.clip_grad_norm_(self.module.parameters(), config.optim.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.steps)
        length = float(norm)  # the one time in a step that the host waits for the device
        if not math.isfinite(length):
            self._skip(step, length)
        elif not self.spikes.is_one(length, config.optim.spike):
            self.prepared.step()
            normalise_weights(self.module)
            self.ema.update(step + 1)
            self.refresh_teacher()
        self.prepared.zero_grad(set_to_none=True)
        clipped = (norm > config.optim.clip).float()  # its mean over an interval is the share of clipped steps
        return {**logged, "grad_norm": norm, "clipped": clipped}

    @contextmanager
    def _reduced(self, last: bool) -> Iterator[None]:
        """Gradients of the block are summed over processes if it is the ``last`` micro-step, else kept for that."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped):
                yield

    def shard_loss(self, step: int, micro: int) -> Loss:
        """The loss of one shard of step ``step``'s global batch: this process's micro-step ``micro``."""
        config, fm, device = self.config, self.module.fm, self.accelerator.device
        shard = self.accelerator.process_index * config.accumulate + micro
        x1, label = self.loader.shard(step * config.accumulate + micro)
        x1 = x1.to(device, non_blocking=True)
        label = label.to(device, non_blocking=True) if label is not None and fm.info.num_classes else None
        if not (self.paths and self.paths.walk is None):  # whose items are trajectories
            drawing = generator(config.seed, "latents", step, shard, device)
            x1 = as_samples(self.data, x1, lambda shape: torch.randn(shape, generator=drawing, device=device))
        if label is not None and config.data.label_dropout:
            drawn = torch.rand(
                len(label), generator=generator(config.seed, "labels", step, shard, device), device=device
            )
            label = torch.where(drawn < config.data.label_dropout, fm.info.num_classes, label)
        if config.data.flip:
            x1 = mirrored(x1, generator(config.seed, "flip", step, shard, device))
        if config.data.augment:
            x1, done = augmented(x1, config.data.augment, generator(config.seed, "augment", step, shard, device))
            label = soft_label(label, done, fm.info.num_classes)
        batch: Tensor | Trajectory = x1
        if self.paths:
            batch = self.paths(x1, label, generator(config.seed, "paths", step, shard, device))
        drawing = generator(config.seed, "draws", step, shard, device)
        x1, label, draws = self.module.objective.prepare(fm, batch, label, drawing, step)
        if config.channels_last:
            x1 = x1.contiguous(memory_format=torch.channels_last)
        self.latest = (x1, label, draws), generator(config.seed, "dropout", step, shard).initial_seed()
        with self._dropout():
            loss: Loss = self.wrapped(x1, label, draws)
        return loss

    def gradient_norms(self) -> dict[str, float]:
        """Gradient norm of each term on this process's latest shard, at the weights as they are now.

        None of a sharded run, whose weights are gathered only for the step's own passes.
        """
        if self.config.shard:
            return {}
        with self._dropout(), self.accelerator.autocast():
            norms = self.module.gradient_norms(*self.latest[0])
        return {name: float(norm) for name, norm in norms.items()}

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Dropout inside the block is that of the latest shard; torch's own generators are as before after it."""
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.latest[1])
            yield

    def refresh_teacher(self) -> None:
        """Give the teacher, if there is one, the weights of its average: after each step and after a resume."""
        decay = self.module.objective.teacher_ema
        if self.module.teacher is not None and decay:
            self.module.teacher.network.load_state_dict(self.ema.state(decay))

    def _skip(self, step: int, norm: float) -> None:
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise UserError(
                f"the gradient norm is {norm} at step {step + 1}, the {self.skipped}th time: lower "
                f"--config.optim.lr, or raise --config.max_skipped_steps={self.config.max_skipped_steps}"
            )

    def averaged(self, done: int) -> FlowMap:
        """A copy of the flow map with the first moving average of the weights after ``done`` steps, in eval mode."""
        fm, decay = self.module.fm, self.config.ema[0]
        info = replace(fm.info, images_seen=done * self.config.batch)
        network = self.ema.network(decay)
        if self.config.lora:
            merge_lora(network)
        averaged = FlowMap(network, fm.interpolant_name, fm.base_std, info).eval()
        averaged.decoder = fm.decoder
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
        """Keep the power-function averages of ``done`` steps, from which those of any width are made."""
        main = self.accelerator.is_main_process
        shadows = {width: self.ema.shadows[f"width-{width}"] for width in self.config.ema_widths}
        averages = {width: collected(shadow, keep=main) for width, shadow in shadows.items()}
        if main:
            write_snapshot(workdir, done, averages)

    def checkpoint(self, path: Path, done: int, model: FlowMap | None = None, **facts: Any) -> None:
        """Write the state after ``done`` steps to ``path``, with the exported ``model`` in it if there is one."""
        images_seen = done * self.config.batch
        facts |= {**self.origin(), "norms": self.spikes.norms, "shards": self.shards()}
        save_checkpoint(
            path,
            done,
            images_seen,
            self.module,
            self.optimizer,
            self.ema,
            model,
            writes=self.accelerator.is_main_process,
            **facts,
        )

    def shards(self) -> int:
        """In how many parts, with draws of their own, a global batch falls."""
        return int(self.accelerator.num_processes) * self.config.accumulate

    def origin(self) -> dict[str, str]:
        """What the run rests on beside its config, by flag: a resume must find the same."""
        teacher = self.module.teacher if self.config.teacher else None
        taught = teacher.fingerprint() if teacher else ""
        walked = self.paths.data.digest() if self.paths and not self.paths.walk else ""
        origin = {"data.root": self.data.digest(), "teacher": taught, "init_from": self.started}
        grids = "".join(schedule.to_json() for schedule in self.module.objective.schedules.values())
        fitted = hashlib.sha256(grids.encode()).hexdigest() if grids else ""
        return {**origin, "trajectories.files": walked, "objective.schedule": fitted}


def _check_sharding(config: Config, accelerator: Accelerator) -> None:
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"accelerate was told to use {accelerator.distributed_type.value}: leave that to --config.shard, which "
            "shards by FSDP2"
        )
    if config.shard and accelerator.num_processes == 1:
        raise UserError("--config.shard spreads the weights over processes and there is one: start it by torchrun")


def micro_batch_size(config: Config, processes: int) -> int:
    """Images of one process's micro-step."""
    if config.batch % (processes * config.accumulate):
        raise UserError(
            f"--config.batch={config.batch} is not divisible by {processes} processes x "
            f"--config.accumulate={config.accumulate}"
        )
    return config.batch // (processes * config.accumulate)


def _checkpoint_gradients(network: Any, name: str) -> None:
    if not network._supports_gradient_checkpointing:
        raise UserError(f"--config.gradient_checkpointing: {name} has no blocks to compute again")
    network.enable_gradient_checkpointing()


def _check_augmentation(config: Config, made: DataSet) -> None:
    """Refuse what the data or the network cannot take."""
    data = config.data
    if (data.flip or data.augment) and (len(made.shape) != 3 or isinstance(made, Latents)):
        raise UserError(
            f"--config.data.flip and --config.data.augment are for images, {data.name} has "
            + (
                "latents (of mirror images too, if made by prepare_data.py --flip)"
                if len(made.shape) == 3
                else "points"
            )
        )
    wanted, room = (PARAMETERS if data.augment else 0), getattr(config.network, "augment_dim", 0)
    if wanted != room and (wanted or not config.init_from):  # weights may know augmentation that this run leaves out
        raise UserError(
            f"--config.data.augment={data.augment:g} needs --config.network.augment_dim={wanted}, got {room}: "
            "the network is told what was done to an image"
        )
    if config.channels_last and not CHANNELS_LAST:
        raise UserError(
            f"--config.channels_last needs torch 2.15, this is {torch.__version__}: older ones have no forward "
            "derivative of group_norm in that layout"
        )
