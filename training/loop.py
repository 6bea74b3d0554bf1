"""The training loop."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from flowmaps import FlowMap, UserError, jvp_attention
from flowmaps.data import Latents
from flowmaps.data.registry import source_of
from flowmaps.derivatives import tf32_products
from flowmaps.distributed import join, processes, team
from flowmaps.errors import Stopped, blame, within
from flowmaps.evaluation.samples import grid_image
from flowmaps.files import to_json, write_file
from flowmaps.images import png
from flowmaps.run_weights import list_checkpoints
from training.best import BestModel
from training.checkpoint import State, load_checkpoint
from training.config import Config, Optimizer, class_name
from training.log import Log
from training.precision import DIFFERENTIATED, advice
from training.run_directory import check_run_directory, check_same_config, disk_errors, remove_stale, run_lock
from training.stop import Stop
from training.trainer import Trainer


def train(config: Config, workdir: str | Path, data: Any = None) -> FlowMap:
    """Train the run in ``workdir``, or resume it.

    The run writes config.json, log.jsonl, samples/, checkpoints/ and model/. If ``workdir`` has a checkpoint, the run
    resumes from it and ends with bit for bit the weights of an uninterrupted run (on a CPU with the same number of
    threads, on a GPU to the determinism of its kernels). Several processes, as torchrun starts them, share each step; a
    checkpoint does not depend on their number.

    Args:
        config: What to train; see ``Config``. A resumed run must have the same, up to fields such as ``log_every``.
        workdir: Directory of the run, created if need be.
        data: Any map-style dataset of (image, label) pairs, or a ``flowmaps.data.DataSet``, to train on in place of the
            data that ``config.data`` names; ``config.data.name`` is then only what the records call it.

    Returns:
        The flow map with averaged weights, in eval mode.

    Raises:
        UserError: The config is inconsistent or differs from that of the run in ``workdir``, ``workdir`` is not a run
            but has files that a run would replace, a file is missing or damaged, or another process trains there.
        Stopped: SIGTERM or Ctrl-C arrived; a checkpoint has been written.
        KeyboardInterrupt: Another one arrived meanwhile.

    Example:
        >>> unet = network(UNet, image_size=32, channels=3, num_classes=10)
        >>> fm = train(Config(unet, Lagrangian(), steps=10_000), "runs/mine", data=my_dataset)
        >>> fm.save_pretrained("mine")
    """
    team = join(config.timeout)
    team.check_same({"workdir": str(workdir), **named({"config": config.to_dict()})})
    with Stop() as stop:
        return train_section(config, Path(workdir), data, "config", stop)


def named(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= named(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def train_section(config: Config, workdir: Path, data: Any, section: str, stop: Stop, stage: str = "") -> FlowMap:
    """Train as ``train`` does; errors call the config ``section``, and progress is that of ``stage``.

    In a chain these are such as "config.mid_training" and "2/3 mid_training".
    """
    main = processes().is_main_process
    if main:
        with blame("workdir", workdir):
            check_run_directory(workdir)
    with within(section):
        trainer = Trainer.build(config, data)
        config = trainer.config  # with what the data decide
        team().check_same(trainer.origin())
        judge = None
        if config.best.metric:
            device = trainer.accelerator.device
            judge = BestModel(config.best, trainer.data, config.seed, device, team(), config.data.root)
    with ExitStack() as stack:
        if main:
            stack.enter_context(disk_errors(workdir))
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock(workdir))
        stack.enter_context(within(section))
        stack.enter_context(tf32_products(config.tf32))
        stack.enter_context(_timed_convolutions())
        stack.enter_context(trainer.loader.watched())
        done = _train(config, workdir, trainer, judge, stop, stage, main)
    return trainer.averaged(done)


def _train(
    config: Config, workdir: Path, trainer: Trainer, judge: BestModel | None, stop: Stop, stage: str, main: bool
) -> int:
    """Run the loop of ``train`` and return the number of steps done."""
    done, state = 0, State(0, 0)
    if checkpoints := list_checkpoints(workdir):
        check_same_config(config, workdir / "config.json")
        state = load_checkpoint(checkpoints[-1], trainer.module, trainer.optimizer, trainer.ema)
        done = state.step
        trainer.spikes.norms = list(state.norms)
        trainer.refresh_teacher()
        for name, digest in trainer.origin().items():
            if state.origin.get(name, "") != digest:
                raise UserError(
                    f"has changed since the run in {workdir} started: restore it or use a new workdir",
                    field=name,
                )
    elif main:
        remove_stale(workdir)
    if main:
        facts = {**config.to_dict(), "origin": trainer.origin()}
        write_file(workdir / "config.json", to_json(facts), check=False)
    last = done >= config.steps
    if main:
        title = [f"stage {stage}"] * bool(stage)
        about = [f"complete already: {workdir}"] if last else banner(trainer, workdir, done)
        print("\n".join([*title, *about]), file=sys.stderr, flush=True)
    if last:
        return done
    facts = named(config.to_dict())
    with closing(Log(workdir, config.steps, done, main, stage, config.log_with, facts)) as log:
        if done:
            log.event("resume", step=done)
            for name, before, now in (
                ("shards", state.shards, trainer.parts()),
                ("threads", state.threads, torch.get_num_threads()),
            ):
                if before is not None and before != now:
                    log.event(name, step=done, before=before, now=now)
                    log.progress.say(f"{name}: before={before} now={now}")
        for line in advice(config, trainer.module.objective, trainer.accelerator.device):
            log.progress.say(f"note: {line}")
        jvp_attention.notes.clear()
        begin = done
        while not last:
            done += 1
            at_interval = done == config.steps or done % config.log_every == 0
            skipped = trainer.skipped + trainer.spikes.count
            values = trainer.step(done - 1, term_norms=at_interval)
            log.add(values)
            if trainer.skipped + trainer.spikes.count > skipped:
                log.skipped(done, values)
            for line in jvp_attention.notes if done == begin + 1 else ():
                log.progress.say(f"note: {line}")
            last = done == config.steps or trainer.any_process(bool(stop.asked))  # once per step
            if last or at_interval:
                rate = trainer.optimizer.param_groups[0]["lr"]
                spikes = {"spikes": trainer.spikes.count} if config.optim.spike else {}
                log.interval(done, config.batch, lr=rate, skipped=trainer.skipped, **spikes)
            with log.paused():
                if done == config.steps or done % config.sample_every == 0:
                    error = trainer.derivative_error() if main else None
                    if error is not None:
                        log.score(done, "derivative_error", error)
                    model = trainer.averaged(done)
                    if main:
                        picture = grid_image(model, config.sample_steps, config.seed, data=trainer.data)
                        write_file(workdir / "samples" / f"step-{done:08d}.png", png(picture), check=False)
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
    if main:
        print("\n".join(results(workdir)), file=sys.stderr, flush=True)
    return done


def banner(trainer: Trainer, workdir: Path, done: int) -> list[str]:
    """Return lines on what is trained, on what and where, for whoever starts the run or reads its output later."""
    config, data, module = trainer.config, trainer.data, trainer.module
    device, number = trainer.accelerator.device, trainer.accelerator.num_processes
    name = source_of(config.data.name, config.data.root)
    kind = "points" if len(data.shape) == 1 else "latents" if isinstance(data, Latents) else "images"
    classes = f"{data.num_classes:,} classes" if data.num_classes else "no classes"
    if shape := module.fm.info.condition:
        classes = f"conditions {' x '.join(map(str, shape))}"
    classes += "" if module.fm.info.num_classes == data.num_classes else ", unused"
    parameters = sum(p.numel() for p in module.fm.network.parameters())
    teacher = f", teacher {config.teacher}" if config.teacher else ""
    start = f", from {config.init_from}" if config.init_from else ""
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    several = f"{number} processes on " if number > 1 else ""
    derivative = trainer.precision.name if module.objective.derivative_role in DIFFERENTIATED else ""
    groups = [sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups]
    muon = config.optim.name is Optimizer.muon
    return [
        f"data     {name}: {len(data):,} {kind} of {' x '.join(map(str, data.shape))}, {classes}",
        f"network  {class_name(config.network)}, {parameters:,} parameters{start}",
        f"learns   {class_name(module.objective)}, {config.steps:,} steps of {config.batch:,} {kind}{teacher}",
        *[f"muon     trains the matrices, {groups[0] / sum(groups):.0%} of the weights; adamw the rest"] * muon,
        f"on       {several}{device.type}{card}, {config.precision.value}"
        + (f", derivatives {derivative}" if derivative else ""),
        f"writes   {workdir}" + (f" (resumes at step {done:,})" if done else ""),
    ]


def results(workdir: Path) -> list[str]:
    """Return lines on what the run left in ``workdir``."""
    best = workdir / "checkpoints" / "best"
    found = {"model": workdir / "model", "best": best, "log": workdir / "log.jsonl", "samples": workdir / "samples"}
    return [f"{name:8} {path}" for name, path in found.items() if path.exists()]


def _keep_best(trainer: Trainer, judge: BestModel, workdir: Path, done: int, log: Log) -> None:
    """Score the averaged model, and write it to checkpoints/best if it is the best of the run so far."""
    config = trainer.config.best
    model = trainer.averaged(done)
    scores = judge.score(model)
    for name, score in scores.items():
        log.score(done, f"{name}@{config.steps}", score)  # metric at a number of sampling steps
    if judge.team.broadcast(judge.is_best(scores, workdir)):  # as the first process reads it
        score = scores[config.metric]
        trainer.checkpoint(workdir / "checkpoints" / "best", done, model, score=score, judge=judge.facts)


@contextmanager
def _timed_convolutions() -> Iterator[None]:
    """Let cuDNN choose the fastest algorithm for each shape of a convolution, of which a run has few.

    Not where the caller asked for deterministic ones, since the choice may differ when the run is resumed.
    """
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before
