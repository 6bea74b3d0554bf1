"""sample.py with a reward, a measurement or a picture to invert: files, record, and one-line refusals."""

import json

import numpy as np
import pytest
from helpers import run_script
from helpers.pictures import save
from PIL import Image

DIGITS = ["scripts/sample.py", "--checkpoint=assets/digits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pictures"))


def record(out, steps):
    return json.loads(str(np.load(out / f"samples-{steps}.npz")["record"]))


def test_a_measurement(tmp_path, folder):
    given = [f"--measurement={folder}/digit.png", f"--mask={folder}/mask.png", "--label=3", "--num=3", "--particles=2"]
    said = run_script(*DIGITS, *given, "--steps=4,8", f"--out={tmp_path}/a", check=True).stdout
    assert "samples  8 steps, stochastic, uniform steps, label 3: 3 images, " in said
    assert "record   16 network evaluations per sample, effective particles " in said and "next" not in said
    found = record(tmp_path / "a", 8)
    assert found["nfe"] == 16 and found["particles"] == 2 and len(found["ess"]) == 8 and found["seen_rms"] < 0.08
    assert found["measurement"].endswith("digit.png") and found["mask"].endswith("mask.png")
    assert found["measurement_std"] == 0.05 and found["seed"] == 0 and "reward" not in found
    archive = np.load(tmp_path / "a" / "samples-8.npz")
    assert archive["arr_0"].shape == (3, 8, 8, 1) and archive["label"].tolist() == [3, 3, 3]
    assert len(list((tmp_path / "a" / "steps-8").iterdir())) == 3 and (tmp_path / "a" / "grid.png").is_file()


def test_such_samples_are_not_scored_as_a_model(tmp_path, folder):
    given = [f"--measurement={folder}/small.png", "--downsample=2", "--num=4", "--steps=2"]
    run_script(*DIGITS, *given, f"--out={tmp_path}/a", check=True)
    done = run_script("scripts/fid.py", f"--samples={tmp_path}/a/samples-2.npz", "--reference=digits:heldout")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "were steered" in done.stderr
    plain = [*DIGITS, "--steps=1", "--num=4", f"--out={tmp_path}/b"]
    run_script(*plain, check=True)
    assert "record" not in np.load(tmp_path / "b" / "samples-1.npz").files


@pytest.mark.parametrize("reward", ["class:8", "helpers.pictures:weighed"])
def test_a_reward(tmp_path, reward):
    given = [f"--reward={reward}", "--reward_scale=3", "--num=4", "--steps=2", "--seed=5"]
    run_script(*DIGITS, *given, f"--out={tmp_path}/a", check=True)
    found = record(tmp_path / "a", 2)
    assert (found["reward"], found["reward_scale"], found["nfe"], found["seed"]) == (reward, 3.0, 8, 5)


def test_inversion_and_an_edit(tmp_path, folder):
    given = [f"--invert={folder}/digit.png", "--label=3", "--steps=4"]
    said = run_script(*DIGITS, *given, f"--out={tmp_path}/a", check=True).stdout
    assert "record   36 network evaluations per sample, rms of the picture rebuilt 0.00" in said
    found = record(tmp_path / "a", 4)
    assert found["rms"] < 0.01 and found["label"] == "3" and found["sampler"] == "map" and found["iterations"] == 8
    image = np.load(tmp_path / "a" / "samples-4.npz")["arr_0"][0, :, :, 0].astype(int)
    assert np.abs(image - np.asarray(Image.open(folder / "digit.png"))).max() <= 4
    run_script(*DIGITS, *given, "--edit_label=8", f"--out={tmp_path}/b", check=True)
    edited = np.load(tmp_path / "b" / "samples-4.npz")
    assert edited["label"].tolist() == [8] and record(tmp_path / "b", 4)["nfe"] == 40
    assert record(tmp_path / "b", 4)["rms"] == pytest.approx(found["rms"])


MISTAKES = {
    "mask alone": (["--mask={f}/mask.png"], "--mask"),
    "scale alone": (["--reward_scale=2"], "--reward_scale"),
    "particles alone": (["--particles=2"], "--particles"),
    "edit alone": (["--edit_label=2"], "--edit_label"),
    "two": (["--reward=class:3", "--measurement={f}/small.png"], "use one of --reward and --measurement"),
    "mask of another size": (["--measurement={f}/digit.png", "--mask={f}/wide.png"], "--mask: is 8 x 9 pixels"),
    "no mask": (["--measurement={f}/digit.png"], "--measurement: give a mask"),
    "broken picture": (["--invert={f}/broken.png", "--label=3"], "--invert="),
    "no gradient": (["--reward=helpers.pictures:counted"], "--reward: the reward has no gradient"),
    "shape": (["--reward=helpers.pictures:wrong_shape"], "--reward: a reward must return one number for each sample"),
    "no module": (["--reward=nowhere:f"], "--reward=nowhere:f: cannot be imported"),
    "no class": (["--reward=class:12"], "--reward=class:12: must be 0 .. 9"),
    "another sampler": (["--reward=class:3", "--sampler=heun"], "--sampler=heun"),
    "half the noise": (["--reward=class:3", "--gamma=0.5"], "--gamma=0.5"),
    "no label": (["--invert={f}/digit.png"], "--label: missing"),
    "invert by a solver": (["--invert={f}/digit.png", "--label=3", "--sampler=heun"], "--sampler=heun"),
    "many inverted": (["--invert={f}/digit.png", "--label=3", "--num=3"], "--num=3"),
    "unknown class": (["--invert={f}/digit.png", "--label=3", "--edit_label=cat"], "--edit_label=cat"),
    "beside": (["--reward=class:3", "--beside=euler"], "--beside=euler"),
    "written and read": (["--invert={out}", "--label=3"], "is also --invert"),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, folder, arguments, named):
    out = tmp_path / "out"
    given = [a.format(f=folder, out=out) for a in arguments]
    done = run_script(*DIGITS, "--steps=1,2", f"--out={out}", *given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert named in done.stderr and not out.exists()
