"""A forecast in words and as a record, with the time that a step takes on known cards."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flowmaps.errors import UserError, within
from training.config import Config
from training.config_rows import Chain
from training.forecast.forecast import MARGIN, PARTS, Fit, Forecast, fit, forecast

# Dense peaks of data sheets in TFLOP/s, not measured: A100 80 GB, H100 SXM, GeForce RTX 4090.
CARDS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312, "TF32": 156, "fp32": 19.5},
    "H100": {"bf16": 989, "TF32": 495, "fp32": 67},
    "RTX 4090": {"bf16": 165, "TF32": 83, "fp32": 83},
}
GIB = 2**30


def forecasts(made: Config | Chain, memory: float, gpus: int, mfu: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forecast a run, or each stage of a chain, and yield (stage, record); the stage of a single run is "".

    Args:
        made: The run.
        memory: GiB of a GPU, for the largest micro-batch.
        gpus: Number of processes, one on each GPU.
        mfu: Assumed share of a card's peak.

    Raises:
        UserError: A number is out of range, or what ``train`` refuses without a look at files.
    """
    for field, value in (("forecast", memory), ("gpus", gpus)):
        if not value > 0:
            raise UserError("must be positive", field=field, value=value)
    if not 0 < mfu <= 1:
        raise UserError("a share must lie in (0, 1]", field="mfu", value=mfu)
    stages = made.stages() if isinstance(made, Chain) else {"": made}
    for name, config in stages.items():
        with within(f"config.{name}" if name else "config"):
            one = forecast(config, gpus, stages)
            two = forecast(config, gpus, stages, 2 * one.micro_batch)
            unread = config.teacher if config.teacher not in stages else ""
            yield name, record(config, one, fit(config, memory, one, two), mfu, unread)


def record(config: Config, found: Forecast, fits: Fit, mfu: float, teacher: str = "") -> dict[str, Any]:
    """Return a forecast as plain values: bytes per GPU, FLOPs of a step on all GPUs, seconds of a step by card.

    ``teacher`` is the checkpoint whose network was guessed, if any.
    """
    times = {card: seconds(found, peaks, mfu) for card, peaks in CARDS.items()}
    return {
        **asdict(found),
        "peak": found.peak,
        "phase": found.phase,
        "precision": config.precision.name,
        "accumulate": config.accumulate,
        "shard": config.shard,
        "compile": config.compile,
        "gradient_checkpointing": config.gradient_checkpointing,
        "steps": config.steps,
        "mfu": mfu,
        "seconds": times,
        "gpu_hours": {card: value * config.steps * found.gpus / 3600 for card, value in times.items()},
        "fit": fits._asdict(),
        "teacher": teacher,
    }


def seconds(found: Forecast, peaks: dict[str, float], mfu: float) -> float:
    """Return the time of a step's products at the share ``mfu`` of ``peaks`` in TFLOP/s."""
    return sum(flops / (peaks[kind] * 1e12) for kind, flops in found.flops.items()) / (mfu * found.gpus)


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that the command prints for a record."""
    trained = "" if facts["trained"] >= facts["parameters"] else f", {facts['trained'] / 1e6:.1f} M of them trained"
    yield f"parameters {facts['parameters'] / 1e6:.1f} M{trained}"
    gpus, micro = facts["gpus"], facts["micro_batch"]
    sharded = " with shards" if facts["shard"] else ""
    recomputed = ", gradient checkpointing" if facts["gradient_checkpointing"] else ""
    yield (
        f"step of {facts['batch']} images on {_plural(gpus, 'GPU')}{sharded}: "
        f"{_plural(facts['accumulate'], 'micro-step')} of {micro}, {facts['precision']}{recomputed}"
    )
    if facts["compile"]:
        yield "the memory is that of the eager step: a compiled one keeps less"
    if facts["teacher"]:
        yield f"teacher {facts['teacher']}: not read, taken to have this run's network"
    parts = ", ".join(f"{name} {facts['parts'][name] / GIB:.2f}" for name in PARTS)
    yield f"peak memory {facts['peak'] / GIB:.4g} GiB per GPU, in the {facts['phase']}: {parts}"
    yield f"not counted: library workspaces, fragmentation, buffers of NCCL, the CUDA context: add {MARGIN - 1:.0%}"
    total = sum(facts["flops"].values())
    kinds = ", ".join(f"{kind} {value / 1e12:.4g}" for kind, value in facts["flops"].items())
    yield f"TFLOP per step {total / 1e12:.4g} ({kinds}), per image {total / facts['batch'] / 1e12:.4g}"
    times = ", ".join(f"{card} {value:.3g}" for card, value in facts["seconds"].items())
    hours = ", ".join(f"{card} {value:.4g}" for card, value in facts["gpu_hours"].items())
    yield f"seconds per step at {facts['mfu']:.0%} of the peak on the data sheet: {times}"
    yield f"GPU hours for {facts['steps']:,} steps at that rate: {hours}"
    most, memory = facts["fit"]["micro_batch"], f"{facts['fit']['memory']:g} GiB with {MARGIN - 1:.0%} added"
    if not facts["fit"]["accumulate"]:
        yield f"does not fit {memory}: {_largest(most)}"
    else:
        yield f"fits {memory}: {_largest(most)}, so accumulate={facts['fit']['accumulate']}"


def _largest(images: int) -> str:
    return f"at most {_plural(images, 'image')} per micro-step" if images else "not a single image per micro-step"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
