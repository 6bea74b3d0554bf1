"""The training loop."""

import json
import signal
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.errors import Stopped
from flowmaps.files import writable_directory, write_file
from flowmaps.objectives import LogVariance, Loss
from flowmaps.rng import generator
from training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from training.config import Config, Decay, Precision, build_flow_map, build_objective
from training.data import ArrayData, Order, load_data
from training.ema import EMA
from training.evaluation import grid_image
from training.log import Log
from training.loss_module import LossModule
from training.optim import build_optimizer, learning_rate

# What may differ between a run's config.json and the config that resumes it: nothing that changes the steps done
# (and ``steps`` itself, unless the learning rate follows it).
MAY_CHANGE = {"log_every", "sample_every", "sample_steps", "checkpoint_every", "keep", "max_skipped_steps", "data.root"}


@dataclass
class Trainer:
    """Everything that one optimiser step touches."""

    config: Config
    data: ArrayData
    accelerator: Accelerator
    module: LossModule  # bare; checkpoints read and write this
    wrapped: torch.nn.Module  # as accelerate wants it called
    optimizer: torch.optim.Optimizer  # bare
    prepared: Any  # as accelerate wants it called
    ema: EMA
    order: Order
    skipped: int = 0  # steps with a non-finite gradient since the start or resume

    @classmethod
    def build(cls, config: Config) -> "Trainer":
        """Data, network, optimiser and averages at step 0; a function of the config alone."""
        config.validate()
        data = load_data(config.data.name, root=config.data.root)
        accelerator = Accelerator(  # nothing is left to the environment: no fp16, no other accumulation
            mixed_precision="bf16" if config.precision is Precision.bf16 else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        shards = accelerator.num_processes * config.accumulate
        if config.batch % shards:
            raise UserError(
                f"--config.batch={config.batch} is not divisible by {accelerator.num_processes} processes x "
                f"--config.accumulate={config.accumulate}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fm = build_flow_map(config, data.shape, data.num_classes)
            weight = LogVariance(limit=config.weight.limit) if config.weight.learned else None
        module = LossModule(fm, build_objective(config), weight).to(accelerator.device)
        if config.compile:
            module.compile()  # in place: parameter names stay
        optimizer = build_optimizer(config.optim, module.parameters())
        wrapped, prepared = accelerator.prepare(module, optimizer)
        ema = EMA(fm.network, config.ema)
        order = Order(len(data), config.seed)
        return cls(config, data, accelerator, module, wrapped, optimizer, prepared, ema, order)

    def step(self, step: int) -> dict[str, Tensor]:
        """Optimiser step ``step`` = 0, 1, ...; returns what to log, still on the device.

        Shard i = rank * accumulate + micro-step of the global batch has the same samples and draws however the shards
        are spread over processes and micro-steps.
        """
        config, micro_steps = self.config, self.config.accumulate
        logged: dict[str, Tensor] = {}
        for micro in range(micro_steps):
            shard = self.accelerator.process_index * micro_steps + micro
            synchronise = nullcontext() if micro == micro_steps - 1 else self.accelerator.no_sync(self.wrapped)
            with synchronise:
                loss = self.shard_loss(step, shard)
                self.accelerator.backward(loss.value / micro_steps)
            for name, value in {"loss": loss.value.detach(), **loss.terms}.items():
                logged[name] = logged.get(name, 0) + value / micro_steps
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.steps)
        if bool(torch.isfinite(norm)):
            self.prepared.step()
            self.ema.update(step + 1)
        else:
            self._skip(step, norm)
        self.prepared.zero_grad(set_to_none=True)
        return {**logged, "grad_norm": norm, "skipped": torch.tensor(float(self.skipped))}

    def shard_loss(self, step: int, shard: int) -> Loss:
        """The loss of one shard of step ``step``'s global batch."""
        config, fm, device = self.config, self.module.fm, self.accelerator.device
        size = config.batch // (self.accelerator.num_processes * config.accumulate)
        x1, label = self.data.fetch(self.order.indices(step * config.batch + shard * size, size))
        x1 = x1.to(device)
        label = label.to(device) if label is not None and fm.info.num_classes else None
        draws = self.module.objective.draw(fm, x1, generator(config.seed, "draws", step, shard, device))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator(config.seed, "dropout", step, shard).initial_seed())
            loss: Loss = self.wrapped(x1, label, draws)
        return loss

    def _skip(self, step: int, norm: Tensor) -> None:
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise UserError(
                f"the gradient norm is {norm.item()} at step {step + 1}, the {self.skipped}th time: lower "
                f"--config.optim.lr, or raise --config.max_skipped_steps={self.config.max_skipped_steps}"
            )

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process, so that all leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())

    def averaged(self, done: int) -> FlowMap:
        """A copy of the flow map with the first moving average of the weights after ``done`` steps, in eval mode."""
        fm, decay = self.module.fm, self.config.ema[0]
        info = replace(fm.info, images_seen=done * self.config.batch)
        return FlowMap(self.ema.network(decay), fm.interpolant_name, fm.base_std, info).eval()

    def save(self, workdir: Path, done: int) -> None:
        """Export the averaged model after ``done`` steps, then write the checkpoint, which makes the step final."""
        self.averaged(done).save_pretrained(workdir / "model")
        images_seen = done * self.config.batch
        save_checkpoint(workdir, done, images_seen, self.module, self.optimizer, self.ema, self.config.keep)

    def draw(self, workdir: Path, done: int) -> None:
        """Write the sample grid of the averaged model."""
        (workdir / "samples").mkdir(exist_ok=True)
        image = grid_image(self.averaged(done), self.config.sample_steps, self.config.seed)
        image.save(workdir / "samples" / f"step-{done:08d}.png")


def train(config: Config, workdir: str | Path) -> FlowMap:
    """Train, or go on training, the run in ``workdir``; returns the flow map with averaged weights.

    Writes config.json, log.jsonl, samples/, checkpoints/ and model/. If ``workdir`` has a checkpoint, the run resumes
    from it and ends with bit for bit the weights of a run that never stopped (on a GPU: to the determinism of its
    kernels). SIGTERM or Ctrl-C writes a checkpoint and raises ``Stopped``.
    """
    trainer = Trainer.build(config)
    workdir = writable_directory(Path(workdir), "--workdir")
    main = trainer.accelerator.is_main_process
    done = 0
    if checkpoints := list_checkpoints(workdir):
        _same_run(config, workdir / "config.json")
        done = load_checkpoint(checkpoints[-1], trainer.module, trainer.optimizer, trainer.ema)["step"]
    if main:
        write_file(workdir / "config.json", json.dumps(config.to_dict(), indent=2).encode())
    with _Stop() as stop, closing(Log(workdir, config.steps, done, enabled=main)) as log:
        last = done >= config.steps
        if done and not last:
            log.event("resume", step=done)
        while not last:
            log.add(trainer.step(done))
            done += 1
            last = done == config.steps or trainer.any_process(bool(stop.asked))  # asked once a step
            if last or done % config.log_every == 0:
                log.interval(done, config.batch, lr=trainer.optimizer.param_groups[0]["lr"])
            with log.paused():
                if main and (done == config.steps or done % config.sample_every == 0):
                    trainer.draw(workdir, done)
                if main and (last or done % config.checkpoint_every == 0):
                    trainer.save(workdir, done)
        if done < config.steps:
            log.event("stopped", step=done, signal=stop.asked)
            raise Stopped(f"stopped by {stop.asked or 'a signal to another process'} at step {done}; resume any time")
    return trainer.averaged(done)


def dry_run(config: Config, batch: int = 16) -> tuple[dict[str, Any], Any]:
    """Build everything, do two steps on at most ``batch`` images and draw a grid; returns (facts, picture)."""
    micro_batch = max(1, min(config.batch, batch) // config.accumulate)
    config = replace(config, batch=micro_batch * config.accumulate)
    trainer = Trainer.build(config)
    losses = [float(trainer.step(step)["loss"]) for step in range(2)]
    parameters = sum(p.numel() for p in trainer.module.fm.network.parameters())
    facts = {
        "data": f"{config.data.name}, {len(trainer.data)} samples of shape {trainer.data.shape}",
        "parameters": parameters,
        "device": str(trainer.accelerator.device),
        "loss of two steps": losses,
    }
    return facts, grid_image(trainer.averaged(2), config.sample_steps, config.seed)


class _Stop:
    """Turns SIGTERM and SIGINT into a request, ``asked``, that the loop honours between two steps.

    Only the first signal: after it the handlers are what they were, so that a second Ctrl-C stops at once.
    """

    def __enter__(self) -> "_Stop":
        self.asked = ""
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _same_run(config: Config, path: Path) -> None:
    """Refuse to resume a run under a config that would have made other steps."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): cannot tell whether the run is the same") from None
    allowed = MAY_CHANGE | ({"steps"} if config.optim.decay is not Decay.cosine else set())
    changed = [key for key in _differences(stored, config.to_dict()) if key not in allowed]
    if changed:
        raise UserError(
            f"--config.{changed[0]} differs from the run in {path.parent}: use its value or a new --workdir"
        )


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}".strip("."))
        ]
    return [] if a == b else [prefix]
