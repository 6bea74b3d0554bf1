"""Guidance baked into a map of digits: how many samples show the digit asked for, and their distance to real ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flowmaps import FlowMap, UserError
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.evaluation.samples import sample_batches
from flowmaps.images import from_uint8, to_uint8
from flowmaps.metrics.classifier import CLASSIFIERS
from flowmaps.metrics.extractors import extractor_file, read_classifier
from samplers import uniform_times
from training.config_rows import load_row
from training.trainer import Trainer

TARGETS: Mapping[str, dict[str, float]] = {  # objective options by the name of a target
    "mixed": {},
    "unmixed": {"guidance_mix": 0.0, "guidance_power": 0.0},  # MeanFlow's appendix, with uniform weights
}
ROW = "lagrangian_guided"
WEIGHTS, STEPS = (1.0, 2.0, 4.0), (1, 4)


def guidance_scores(fm: FlowMap, num: int) -> dict[str, float]:
    """Return FD-digits and the share of the asked digit, in %, of ``num`` samples for each weight and step count."""
    network = read_classifier("digits", CLASSIFIERS["digits"], extractor_file("digits"))
    heldout = open_reference("digits:heldout", device=torch.device("cpu"))
    scores = {}
    for weight in WEIGHTS:
        for steps in STEPS:
            made = list(sample_batches(fm, uniform_times(steps), range(num), seed=1, guidance=weight))
            images = torch.cat([to_uint8(x) for x, _ in made])
            label = torch.cat([label for _, label in made if label is not None])
            with torch.no_grad():
                hit = network(from_uint8(images)).argmax(dim=1) == label
            record = evaluate(images, heldout)
            scores[f"FD, w={weight:g}@{steps}"] = record["results"][0][record["metric"]]
            scores[f"asked %, w={weight:g}@{steps}"] = 100 * hit.double().mean().item()
    return scores


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the targets named by --rows."""
    if unknown := [row for row in rows if row not in TARGETS]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=guidance they are {', '.join(TARGETS)}")
    return list(rows)


def records(target: str, seed: int, train_steps: int | None, num: int | None) -> Iterator[dict[str, Any]]:
    """Train the row with a target of ``TARGETS`` and yield its record."""
    config = load_row("configs/digits.py", ROW)
    config.seed, config.steps = seed, train_steps or config.steps
    for name, value in TARGETS[target].items():
        setattr(config.objective, name, value)
    trainer = Trainer.build(config)
    for step in range(config.steps):
        trainer.step(step)
    scores = guidance_scores(trainer.averaged(config.steps), num or 2000)
    yield {"row": target, "seed": seed, "train_steps": config.steps, "scores": scores}
