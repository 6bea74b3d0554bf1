"""Training on Hugging Face datasets and WebDataset shards: killed, resumed, labelled, scored."""

import json
import signal

import pytest
from helpers import run_script, run_two
from helpers.image_sets import NAMES, pictures, write_parquet, write_shards
from helpers.makers import write_folder
from helpers.runs import assert_same, weights

from flowmaps import FlowMap
from flowmaps.pipeline import FlowMapPipeline

SIZE = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("sets"), 48)


def write_all(base, n):
    images = pictures(min(n, 500), 24, 20) * (-(-n // 500))
    write_parquet(base / "parquet", images[:n])
    write_shards(base / "shards", images[:n], each=-(-n // 3))
    return base


def command(root, workdir, steps, workers=0):
    """Return train.py on hf:PARQUET or wds:SHARDS, with a checkpoint at every second step."""
    name, _, root = root.partition(":")
    config = {"data.name": name, "data.root": root, "data.workers": workers, "steps": steps, "batch": 8}
    config |= {"network.image_size": SIZE, "network.width": 8, "checkpoint_every": 2, "sample_every": 1000}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    return ["scripts/train.py", "--config=configs/folder.py:lagrangian,smoke", f"--workdir={workdir}", *flags]


def killed_and_resumed(source, tmp_path, steps, after):
    """Compare a run that is killed once ``after`` steps are in a checkpoint, and resumed, with one that is not."""
    run_script(*command(source, tmp_path / "a", steps), check=True)
    checkpoint = tmp_path / "b" / "checkpoints" / f"step-{after:08d}"
    killed = run_script(*command(source, tmp_path / "b", steps, workers=1), kill=checkpoint.is_dir)
    log = tmp_path / "b" / "log.jsonl"
    assert killed.returncode == -signal.SIGKILL
    run_script(*command(source, tmp_path / "b", steps), check=True)
    (resumed,) = [row["step"] for row in map(json.loads, log.read_text().splitlines()) if row.get("event") == "resume"]
    assert after <= resumed < steps
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert_same(weights(tmp_path / "a", "optimizer"), weights(tmp_path / "b", "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hf:{}/parquet", "wds:{}/shards"])
def test_a_killed_run_resumes_bit_for_bit(source, place, tmp_path):
    killed_and_resumed(source.format(place), tmp_path, steps=6, after=2)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hf:{}/parquet", "wds:{}/shards"])
def test_a_killed_run_on_ten_thousand_pictures_resumes_bit_for_bit(source, tmp_path):
    killed_and_resumed(source.format(write_all(tmp_path / "sets", 10_000)), tmp_path, steps=12, after=4)


def test_both_make_the_run_that_their_pictures_in_a_folder_make(place, tmp_path):
    """A source changes nothing but the names: the order is a function of the seed."""
    for name, source in (("hf", f"hf:{place / 'parquet'}"), ("wds", f"wds:{place / 'shards'}")):
        run_script(*command(source, tmp_path / name, 4), check=True)
    files = {f"{i:06d}.png": image for i, image in enumerate(pictures(48, 24, 20))}
    labels = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(files)]}).encode()
    write_folder(tmp_path / "files", files | {"dataset.json": labels})
    run_script(*command(f"folder:{tmp_path / 'files'}", tmp_path / "folder", 4), check=True)
    for name in ("hf", "wds"):
        assert_same(weights(tmp_path / name), weights(tmp_path / "folder"))


@pytest.mark.slow
def test_two_processes_share_a_parquet_file(place, tmp_path):
    run_two(*command(f"hf:{place / 'parquet'}", tmp_path / "two", 4), check=True)
    run_script(*command(f"hf:{place / 'parquet'}", tmp_path / "one", 4), "--config.accumulate=2", check=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def test_class_names_of_a_column_reach_labels_card_and_pipeline(place, tmp_path):
    run, out = tmp_path / "run", tmp_path / "exported"
    done = run_script(*command(f"hf:{place / 'parquet'}", run, 2), check=True)
    assert f"data     hf:{place / 'parquet'}: 48 images of 3 x 8 x 8, 3 classes" in done.stderr
    assert f"--reference=hf:{place / 'parquet'}" in done.stderr
    assert FlowMap.from_pretrained(run).info.class_names == NAMES
    sampling = ("--steps=1", "--num=2", f"--out={tmp_path / 's'}")
    assert "label dog" in run_script("scripts/sample.py", f"--checkpoint={run}", "--label=dog", *sampling).stdout
    run_script("scripts/export.py", f"--checkpoint={run}", f"--out={out}", check=True)
    assert all(name in (out / "README.md").read_text() for name in NAMES)
    pipeline = FlowMapPipeline.from_pretrained(out)
    assert len(pipeline(class_labels=["emu", "cat"], num_inference_steps=1).images) == 2


@pytest.mark.slow
def test_statistics_and_scores_of_both_are_those_of_their_pictures(place, tmp_path):
    own = tmp_path / "own.extractor.safetensors"
    source = f"hf:{place / 'parquet'}"
    run_script(
        "scripts/train_extractor.py", f"--data={source}", f"--size={SIZE}", "--epochs=1", f"--out={own}", check=True
    )
    for name, data in (("hf", source), ("wds", f"wds:{place / 'shards'}")):
        flags = (f"--size={SIZE}", f"--extractor={own}", f"--out={tmp_path / name}.npz")
        run_script("scripts/stats.py", f"--data={data}", *flags, check=True)
    run_script(*command(source, tmp_path / "run", 2), check=True)
    scored = ("--steps=1", "--num=16", f"--checkpoint={tmp_path / 'run'}", f"--extractor={own}")
    rows = []
    for reference in (f"{tmp_path}/hf.npz", f"{tmp_path}/wds.npz", source, f"wds:{place / 'shards'}"):
        done = run_script("scripts/fid.py", f"--reference={reference}", *scored, check=True)
        rows.append(done.stdout.splitlines()[2])  # of the table
    assert len(set(rows)) == 1, rows
