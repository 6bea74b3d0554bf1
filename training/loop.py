"""The training loop."""

import json
import math
import signal
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.files import writable_directory, write_file
from flowmaps.objectives import LogVariance
from flowmaps.rng import generator
from training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from training.config import Config, Decay, build_flow_map, build_objective
from training.data import ArrayData, Order, load_data
from training.ema import EMA
from training.evaluation import grid_image
from training.log import Log
from training.loss_module import LossModule
from training.optim import build_optimizer, learning_rate

# What may differ between a run's config.json and the config that resumes it: nothing that changes the steps done
# (and ``steps`` itself, unless the learning rate follows it).
MAY_CHANGE = {"log_every", "sample_every", "sample_steps", "checkpoint_every", "keep"}


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

    @classmethod
    def build(cls, config: Config) -> "Trainer":
        """Data, network, optimiser and averages at step 0; a function of the config alone."""
        config.validate()
        data = load_data(config.data.name, root=config.data.root)
        accelerator = Accelerator()
        if config.batch % accelerator.num_processes:
            raise UserError(f"--config.batch={config.batch} is not divisible by {accelerator.num_processes} processes")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fm = build_flow_map(config, data.shape, data.num_classes)
            weight = LogVariance(limit=config.weight.limit) if config.weight.learned else None
        module = LossModule(fm, build_objective(config), weight).to(accelerator.device)
        optimizer = build_optimizer(config.optim, module.parameters())
        wrapped, prepared = accelerator.prepare(module, optimizer)
        ema = EMA(fm.network, config.ema)
        return cls(
            config,
            data,
            accelerator,
            module,
            wrapped,
            optimizer,
            prepared,
            ema,
            Order(len(data), config.seed),
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """Optimiser step ``step`` = 0, 1, ...; returns what to log, still on the device."""
        config, fm, shard = self.config, self.module.fm, self.accelerator.process_index
        size = config.batch // self.accelerator.num_processes
        x1, label = self.data.fetch(self.order.indices(step * config.batch + shard * size, size))
        x1 = x1.to(self.accelerator.device)
        label = label.to(x1.device) if label is not None and fm.info.num_classes else None
        draws = self.module.objective.draw(fm, x1, generator(config.seed, "draws", step, shard, x1.device))
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(generator(config.seed, "dropout", step, shard).initial_seed())
            loss = self.wrapped(x1, label, draws)
        self.accelerator.backward(loss.value)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.steps)
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        self.ema.update(step + 1)
        return {"loss": loss.value.detach(), **loss.terms, "grad_norm": norm}

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
    from it and ends with bit for bit the weights of a run that never stopped. SIGTERM or Ctrl-C writes a checkpoint.
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
        if done:
            log.event("resume", step=done)
        last = done >= config.steps
        while not last:
            log.add(trainer.step(done))
            done += 1
            last = done == config.steps or bool(stop.asked)  # asked once a step: the last one saves
            if last or done % config.log_every == 0:
                values = log.interval(done, config.batch, lr=trainer.optimizer.param_groups[0]["lr"])
                if not math.isfinite(values["loss"]):
                    raise UserError(f"the loss is {values['loss']} at step {done}: lower --config.optim.lr")
            draw = done == config.steps or done % config.sample_every == 0
            save = last or done % config.checkpoint_every == 0
            if main and draw:
                trainer.draw(workdir, done)
            if main and save:
                trainer.save(workdir, done)
            if draw or save:
                log.clear()  # writing is not training time
        if stop.asked:
            log.event("stopped", step=done, signal=stop.asked)
    return trainer.averaged(done)


def dry_run(config: Config, batch: int = 16) -> tuple[dict[str, Any], Any]:
    """Build everything, do two steps on at most ``batch`` images and draw a grid; returns (facts, picture)."""
    config = replace(config, batch=min(config.batch, batch))
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
