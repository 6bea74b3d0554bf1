"""The training loop."""

import json
import shutil
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType
from typing import Any

from flowmaps import FlowMap, UserError
from flowmaps.distributed import team
from flowmaps.errors import Stopped, within
from flowmaps.evaluation.samples import grid_image
from flowmaps.files import writable_directory, write_file
from flowmaps.run_weights import list_checkpoints
from training.best import BestModel
from training.checkpoint import load_checkpoint
from training.config import Config, Decay
from training.log import Log
from training.optim import Spikes
from training.run_directory import disk_errors, locked
from training.trainer import Trainer

# What may differ between a run's config.json and the config that resumes it: nothing that changes the steps done
# (and ``steps`` itself, unless the learning rate follows it).
MAY_CHANGE = {"log_every", "sample_every", "sample_steps", "checkpoint_every", "keep", "max_skipped_steps"}
MAY_CHANGE |= {"shard", "accumulate", "snapshot_every"}  # with the processes: how the work is spread
MAY_CHANGE |= {"data.root", "data.download", "data.workers", "teacher", "init_from", "trajectories.files"}
MAY_CHANGE |= {f"best.{name}" for name in ("metric", "steps", "num", "every", "reference", "weights")}


def train(config: Config, workdir: str | Path) -> FlowMap:
    """Train, or go on training, the run in ``workdir``; returns the flow map with averaged weights.

    Writes config.json, log.jsonl, samples/, checkpoints/ and model/. If ``workdir`` has a checkpoint, the run resumes
    from it and ends with bit for bit the weights of a run that never stopped (on a GPU: to the determinism of its
    kernels). SIGTERM or Ctrl-C writes a checkpoint and raises ``Stopped``. Several processes, as torchrun starts them,
    share each step; a checkpoint does not know how many they were.
    """
    trainer, workdir = Trainer.build(config), Path(workdir)
    main = trainer.accelerator.is_main_process
    judge = None
    if config.best.metric:
        with within("config"):
            judge = BestModel(config.best, trainer.data, config.seed, trainer.accelerator.device, team())
    with ExitStack() as stack:
        if main:
            stack.enter_context(disk_errors(workdir))
            stack.enter_context(locked(writable_directory(workdir, "--workdir")))
        stack.enter_context(trainer.loader.watched())
        done = _train(config, workdir, trainer, judge, main)
    return trainer.averaged(done)


def _train(config: Config, workdir: Path, trainer: Trainer, judge: BestModel | None, main: bool) -> int:
    """The loop of ``train``; returns how many steps are done."""
    done, state = 0, {}
    if checkpoints := list_checkpoints(workdir):
        _same_run(config, workdir / "config.json")
        state = load_checkpoint(checkpoints[-1], trainer.module, trainer.optimizer, trainer.ema)
        trainer.refresh_teacher()
        done, trainer.spikes = state["step"], Spikes(state.get("norms", ()))
        for name, digest in trainer.origin().items():
            if state.get(name, "") != digest:
                raise UserError(
                    f"--config.{name} has other contents than when the run in {workdir} began: "
                    "bring them back or use a new --workdir"
                )
    elif main:
        for stale in ("checkpoints/best", "snapshots"):  # of a run that left no checkpoint
            shutil.rmtree(workdir / stale, ignore_errors=True)
    if main:
        facts = {**config.to_dict(), "origin": trainer.origin()}
        write_file(workdir / "config.json", json.dumps(facts, indent=2).encode())
    with _Stop() as stop, closing(Log(workdir, config.steps, done, enabled=main)) as log:
        last = done >= config.steps
        if done and not last:
            log.event("resume", step=done)
            if state.get("shards") != trainer.shards():
                log.event("shards", step=done, before=state.get("shards"), now=trainer.shards())
        while not last:
            log.add(trainer.step(done))
            done += 1
            last = done == config.steps or trainer.any_process(bool(stop.asked))  # asked once a step
            if last or done % config.log_every == 0:
                with log.paused():
                    norms = trainer.gradient_norms()
                rate = trainer.optimizer.param_groups[0]["lr"]
                spikes = {"spikes": trainer.spikes.count} if config.optim.spike else {}
                log.interval(done, config.batch, lr=rate, skipped=trainer.skipped, **spikes, **norms)
            with log.paused():
                if done == config.steps or done % config.sample_every == 0:
                    model = trainer.averaged(done)
                    if main:
                        picture = grid_image(model, config.sample_steps, config.seed)
                        (workdir / "samples").mkdir(exist_ok=True)
                        picture.save(workdir / "samples" / f"step-{done:08d}.png")
                        log.picture(done, picture)
                if config.ema_widths and (done == config.steps or done % config.snapshot_every == 0):
                    trainer.snapshot(workdir, done)
                if judge and (done == config.steps or done % config.best.every == 0):
                    _keep_best(trainer, judge, workdir, done, log)
                if last or done % config.checkpoint_every == 0:
                    trainer.save(workdir, done)
        if done < config.steps:
            log.event("stopped", step=done, signal=stop.asked)
            raise Stopped(f"stopped by {stop.asked or 'a signal to another process'} at step {done}; resume any time")
    return done


def _keep_best(trainer: Trainer, judge: BestModel, workdir: Path, done: int, log: Log) -> None:
    """Score the averaged model; keep it in checkpoints/best if none of the run scored lower."""
    model = trainer.averaged(done)
    score = judge.score(model)
    log.score(done, judge.name, score)
    if judge.team.broadcast(score < judge.best_score(workdir)):  # what the first process finds there
        trainer.checkpoint(workdir / "checkpoints" / "best", done, model, score=score, judge=judge.facts)


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
        stored.pop("origin", None)  # compared with the checkpoint's
        stored = _filled(stored, _defaults(config))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): cannot tell whether the run is the same") from None
    allowed = MAY_CHANGE | ({"steps"} if config.optim.decay in (Decay.constant, Decay.inverse_sqrt) else set())
    changed = [key for key in _differences(stored, config.to_dict()) if key not in allowed]
    if changed:
        raise UserError(
            f"--config.{changed[0]} differs from the run in {path.parent}: use its value or a new --workdir"
        )


def _defaults(config: Config) -> dict[str, Any]:
    """The values of fields that a config.json from before they were made does not have."""
    network, objective = (type(section)(section.name) for section in (config.network, config.objective))
    return Config(network=network, objective=objective).to_dict()


def _filled(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _filled(stored[k], v) if isinstance(v, dict) and k in stored else stored.get(k, v)
        for k, v in defaults.items()
    } | {k: v for k, v in stored.items() if k not in defaults}


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}".strip("."))
        ]
    return [] if a == b else [prefix]
