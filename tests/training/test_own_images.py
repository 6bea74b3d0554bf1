"""From a folder of one's own images to a score: configs/folder.py, the extractor of a folder, the folder's own size."""

import json

import pytest
import torch
from helpers import run_script
from helpers.makers import encoded, photograph, write_folder, write_zip

from configs.folder import ROWS, get_config
from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.evaluation import evaluate
from flowmaps.evaluation.references import default_extractor
from flowmaps.labels import labels_for
from flowmaps.metrics.classifier import own_file, read_own
from training.config_rows import Chain
from training.loop import train
from training.trainer import Trainer

OWN = [row for row in ROWS if "edm2" not in row]  # rows that need nothing but a folder


def pictures(n=30):
    return {f"{'aab'[i % 3]}/{i:02d}.png": encoded(photograph(i), "png") for i in range(n)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of 40 x 30, two thirds of them in class a, and a drift of two steps made from them."""
    base = tmp_path_factory.mktemp("own")
    write_folder(base / "mine", pictures())
    write_folder(base / "bare", {name.replace("/", "-"): content for name, content in pictures().items()})
    train(shrunk(get_config("flow_matching,small"), base), base / "flow")
    return base


def shrunk(config, base, folder="mine"):
    config.data.root = str(base / folder)
    config.network.image_size, config.network.width, config.steps, config.batch = 16, 8, 2, 8
    for name in ("init_from", "teacher"):
        if getattr(config, name) == "runs/flow":
            setattr(config, name, str(base / "flow"))
    config.trajectories.steps = min(config.trajectories.steps, 4)
    return config


@pytest.mark.parametrize("row", [row for row in OWN if row != "pipeline"])
def test_every_row_for_small_machines_takes_a_step_on_a_folder_of_two_classes(row, place):
    config = get_config(f"{row},small")
    assert config.network.num_classes is None
    trainer = Trainer.build(shrunk(config, place))
    assert torch.isfinite(trainer.step(0)["loss"])
    info = trainer.module.fm.info
    assert info.num_classes == 2 and info.class_shares == (2 / 3, 1 / 3) and info.shape == (3, 16, 16)


def test_pipeline_is_three_stages_that_start_from_each_other():
    chain = get_config("pipeline,small")
    assert isinstance(chain, Chain)
    stages = chain.stages()
    assert [config.init_from for config in stages.values()] == ["", "pre_training", "mid_training"]
    assert all(config.network.image_size == 32 and config.batch == 32 for config in stages.values())
    assert sum(config.steps for config in stages.values()) < 10_000


def test_the_config_of_a_run_has_what_the_data_decided(place):
    network = json.loads((place / "flow" / "config.json").read_text())["network"]
    assert (network["channels"], network["num_classes"], network["attention_resolutions"]) == (3, 2, [4, 2])
    train(shrunk(get_config("flow_matching,small"), place), place / "flow")  # the same run, finished
    other = shrunk(get_config("flow_matching,small"), place, "bare")
    with pytest.raises(UserError, match=r"config\.network\.num_classes: differs"):
        train(other, place / "flow")


def test_without_labels_or_with_none_asked_for_a_run_is_unconditional(place):
    assert not Trainer.build(shrunk(get_config("lagrangian,small"), place, "bare")).module.fm.info.num_classes
    config = shrunk(get_config("lagrangian,small"), place)
    config.network.num_classes = 0
    info = Trainer.build(config).module.fm.info
    assert info.num_classes == 0 and info.class_shares == ()


def test_samples_have_classes_in_the_shares_of_the_data(place):
    info = FlowMap.from_pretrained(place / "flow").info
    assert info.class_shares == (2 / 3, 1 / 3)
    whole = labels_for(info, 3000)
    for part in (whole, whole[:60], whole[1000:1090]):  # any stretch
        assert abs((part == 0).double().mean() - 2 / 3) < 0.03
    assert torch.equal(torch.cat([labels_for(info, 7, start=i) for i in range(0, 70, 7)]), whole[:70])
    assert labels_for(info, 2, 1).tolist() == [1, 1]


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_a_folder_is_scored_at_the_size_of_the_model(source, place):
    reference = place / "mine" if source == "folder" else write_zip(place / "mine.zip", pictures())
    fm = FlowMap.from_pretrained(place / "flow")
    fm.info = fm.info.__class__(**{**vars(fm.info), "kind": "map"})
    file = place / "any.extractor.safetensors"
    run_extractor(place, reference, file)
    record = evaluate(fm, reference, num=20, extractor=str(file))
    assert record["reference"]["size"] == "16x16" and record["reference"]["n"] == 30
    assert record["reference"]["crop"] == open_dataset(reference, size=16).crop != "none"
    with pytest.raises(UserError, match=r"stats\.py --size"):  # images have no size that is the model's
        evaluate(open_dataset(place / "mine", size=8), make_stats(reference, file), extractor=str(file))


def make_stats(reference, file):
    from flowmaps.evaluation import open_reference

    return open_reference(reference, str(file), size=16).stats


def run_extractor(place, source, file=None):
    out = [f"--out={file}"] if file else []
    flags = ["--size=16", "--epochs=2", *out]
    return run_script("scripts/train_extractor.py", f"--data={source}", *flags, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "task"), [("mine", "classes"), ("bare", "rotations")])
def test_an_extractor_becomes_the_default_of_its_folder(folder, task, place):
    source = place / folder
    assert default_extractor(str(source)) == "inception"
    shown = run_extractor(place, source)
    file = own_file(source)
    assert file.parent == place and read_own(file).task == task and f"gives FD-{folder}" in shown
    assert default_extractor(str(source)) == str(file)
    assert default_extractor(str(source), weights="inception.pth") == "inception"
    fid = ["--sampler=euler", "--steps=2", "--num=20", f"--json={place}/{folder}.json"]
    run_script("scripts/fid.py", f"--checkpoint={place}/flow", f"--reference={source}", *fid, check=True)
    assert json.loads((place / f"{folder}.json").read_text())["metric"] == f"FD-{folder}"
    stats = ["--size=16", f"--out={place}/{folder}.npz"]
    run_script("scripts/stats.py", f"--data={source}", *stats, check=True)
    done = run_script(
        "scripts/fid.py", f"--checkpoint={place}/flow", f"--reference={place}/{folder}.npz", "--sampler=euler"
    )
    assert done.returncode == 2 and f"was made with the extractor '{folder}': give its file" in done.stderr
    config = shrunk(get_config("flow_matching,small"), place, folder)
    config.best.metric, config.best.num = f"FD-{folder}", 20
    train(config, place / f"best-{folder}")
    state = json.loads((place / f"best-{folder}" / "checkpoints" / "best" / "state.json").read_text())
    assert state["judge"]["metric"] == f"FD-{folder}"


REFUSED = {
    "a name without a file": (["--data=digits"], "--out: missing"),
    "another kind of file": (["--data={base}/mine", "--out={base}/a.pth"], "must end in .safetensors"),
    "few images": (["--data={base}/few", "--size=16"], "has 3 images, at least 20 are needed"),
    "no squares": (["--data={base}/mine"], "squares are needed, e.g. --size=32"),
    "points": (["--data=checkerboard", "--out={base}/a.safetensors"], "has points"),
    "nothing there": (["--data={base}/none"], "no such file or folder"),
    "the images' own folder": (["--data={base}/mine", "--size=16", "--out={base}/mine"], "would be lost"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_an_extractor_is_refused(case, place):
    flags, reason = REFUSED[case]
    write_folder(place / "few", pictures(3))
    done = run_script("scripts/train_extractor.py", *(flag.format(base=place) for flag in flags))
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
