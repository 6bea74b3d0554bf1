"""The checkpoints in assets/ agree with their cards, records and reference statistics."""

import json
import re

import pytest
import torch
from helpers import ROOT, run_script
from huggingface_hub import ModelCard

from flowmaps import FlowMap
from flowmaps.metrics import FeatureStats
from flowmaps.pipeline import FlowMapPipeline
from samplers import rollout, uniform_times

ASSETS = ROOT / "assets"
FITTED = {  # with stored step sizes, of these samplers
    "checkerboard": {"map", "euler"},
    "digits": {"map", "euler"},
    "fashion_mnist": {"map"},
}
NAMES = [*FITTED, "emoji"]


def records(name):
    files = (ASSETS / "results").glob(f"{name}-*.json")
    found = {file.stem.removeprefix(f"{name}-"): json.loads(file.read_text()) for file in files}
    assert found.keys() >= {"map", "euler"} | ({"stored"} if name in FITTED else set())
    return found


def distances(name, way, sampler, metric):
    return {row["steps"]: row[metric] for row in records(name)[way]["results"] if row["sampler"] == sampler}


@pytest.mark.parametrize("name", NAMES)
def test_card_records_and_reference_belong_to_the_weights(name):
    directory = ASSETS / name
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md", ".png"}
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    fm, card = FlowMap.from_pretrained(directory), ModelCard.load(directory / "README.md")
    if name == "emoji":  # a folder of the user's
        assert fm.info.data == "folder" and len(fm.info.class_names) == 9 and card.data.license == "ofl-1.1"
    else:
        assert fm.info.data == name and fm.info.schedules.keys() == FITTED[name]
        assert card.data.license == "apache-2.0" and card.data.datasets == [name]
    weights, measured = fm.fingerprint(), []
    for record in records(name).values():
        assert {row["weights"] for row in record["results"]} == {weights}
        assert record["reference"]["sha256"] == FeatureStats.load(ASSETS / "references" / f"{name}.npz").sha256()
        measured += [round(row[record["metric"]], 4) for row in record["results"]]
    assert sorted(result.metric_value for result in card.data.eval_results) == sorted(measured)
    assert weights in card.text and "scripts/train.py" in card.text and f'from_pretrained("assets/{name}")' in card.text
    assert "![samples](samples.png)" in card.text and "1 steps" not in card.content


@pytest.mark.parametrize("name", FITTED)
def test_stored_step_sizes_score_better_than_equal_ones(name):
    fm, metric = FlowMap.from_pretrained(ASSETS / name), records(name)["stored"]["metric"]
    for sampler, schedule in fm.info.schedules.items():
        stored, equal = distances(name, "stored", sampler, metric), distances(name, sampler, sampler, metric)
        assert stored.keys() == set(schedule) and all(stored[steps] < equal[steps] for steps in schedule)


@pytest.mark.parametrize("name", NAMES)
def test_results_repeat_the_table_of_the_card(name):
    [table] = re.findall(r"\n(\| steps \|.*?)\n\n", (ASSETS / name / "README.md").read_text(), re.DOTALL)
    assert table in (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_makes_the_samples_of_rollout(name):
    """On equal steps and on the stored ones, which the pipeline uses by default."""
    fm, pipeline = FlowMap.from_pretrained(ASSETS / name), FlowMapPipeline.from_pretrained(ASSETS / name)
    pipeline.set_progress_bar_config(disable=True)
    x, label = fm.noise(4, seed=0), torch.arange(4) if fm.info.num_classes else None
    for steps in (1, 2, 4, 8):
        stored, uniform = fm.info.times("map", steps), uniform_times(steps)
        for times, how in (
            (uniform, {"sigmas": (1 - uniform[:-1]).tolist()}),
            (stored, {"num_inference_steps": steps}),
        ):
            times = uniform if times is None else times
            made = pipeline(latents=x, class_labels=label, output_type="latent", **how).images
            with torch.no_grad():
                torch.testing.assert_close(made, rollout(fm, x, times, label), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["checkerboard", "digits"])
def test_scores_reproduce_the_record_and_a_low_limit_fails_the_gate(name):
    record, reference = ASSETS / f"results/{name}-map.json", ASSETS / f"references/{name}.npz"
    known = json.loads(record.read_text())
    score = ["scripts/fid.py", f"--checkpoint={ASSETS / name}", f"--reference={reference}", "--schedule=uniform"]
    score += [f"--num={known['num']}", f"--seed={known['seeds'][0]}", f"--repeats={len(known['seeds'])}", "--steps=1"]
    run_script(*score, f"--max_regression={record}", "--tolerance=0.01", check=True)
    assert run_script(*score, "--max_fid=0.05").returncode == 1
