"""Checkpoints and runs of earlier versions load, sample and resume to the same numbers (tests/golden/README.md)."""

import dataclasses
import enum
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT

from configs.digits import get_config
from flowmaps import FlowMap
from flowmaps.generate import generate
from flowmaps.pipeline import FlowMapPipeline
from samplers import uniform_times
from training.loop import train

GOLDEN = ROOT / "tests" / "golden"
SAMPLES = np.load(GOLDEN / "samples.npz")


def samples(fm, sampler, steps):
    stored = fm.info.times(sampler, steps)
    times = uniform_times(steps) if stored is None else stored
    return torch.cat([x for x, _ in generate(fm, times, 4, 3, sampler=sampler)])


def test_the_checkpoint_has_its_facts():
    info = FlowMap.from_pretrained(GOLDEN / "checkpoint").info
    assert (info.kind, info.shape, info.num_classes, info.ema, info.images_seen) == ("map", (1, 8, 8), 10, 0.99, 6400)
    assert info.schedules["map"][2].tolist() == [0, 0.375, 1] and sorted(info.schedules) == ["euler", "map"]


@pytest.mark.parametrize("case", SAMPLES.files)
def test_the_checkpoint_gives_the_same_samples(case):
    sampler, _, steps = case.partition("-")
    fm = FlowMap.from_pretrained(GOLDEN / "checkpoint")
    torch.testing.assert_close(samples(fm, sampler, int(steps)), torch.from_numpy(SAMPLES[case]))


def test_the_pipeline_gives_the_same_samples():
    pipeline = FlowMapPipeline.from_pretrained(GOLDEN / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    noise = pipeline.flow_map.noise(4, 3)
    found = pipeline(latents=noise, num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(found, torch.from_numpy(SAMPLES["map-4"]), rtol=1e-4, atol=1e-5)


def fill(config, stored):
    """Set the fields of ``config`` to the values of a config.json; fields that it lacks keep their defaults."""
    for field in dataclasses.fields(config):
        if field.name in stored:
            value, now = stored[field.name], getattr(config, field.name)
            if dataclasses.is_dataclass(now):
                fill(now, value)
            elif isinstance(now, enum.Enum):
                setattr(config, field.name, type(now)[value])
            else:
                setattr(config, field.name, tuple(value) if isinstance(value, list) else value)
    return config


def test_the_run_resumes_to_the_same_losses_and_samples(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    stored = json.loads((run / "config.json").read_text())
    fm = train(fill(get_config("lagrangian,smoke"), stored), run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"event": "resume", "step": 15} in rows
    found = {row["step"]: row for row in rows if "loss" in row}
    for expected in json.loads((GOLDEN / "resumed.json").read_text()):
        row = found[expected["step"]]
        for name, value in expected.items():
            if name in ("grad_norm_diagonal", "grad_norm_off_diagonal"):
                continue  # now of the step's gradient; then of the weights after the step
            torch.testing.assert_close(float(row[name]), float(value), rtol=1e-4, atol=1e-7)
    made = torch.cat([x for x, _ in generate(fm, uniform_times(2), 4, 3)])
    torch.testing.assert_close(made, torch.from_numpy(np.load(GOLDEN / "resumed.npz")["samples"]))
