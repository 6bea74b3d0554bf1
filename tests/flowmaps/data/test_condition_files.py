"""Conditions from files: arrays, pictures and folders, what does not fit, and runs that read them."""

import json

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.runs import assert_same, weights
from PIL import Image

from flowmaps import FlowMap, UserError
from flowmaps.data.conditions import open_conditions
from flowmaps.images import to_uint8
from flowmaps.networks import UNet
from flowmaps.objectives import Lagrangian
from flowmaps.pipeline import FlowMapPipeline
from training import Config, train
from training.config import Data, network

UNET = {"image_size": 8, "channels": 1, "width": 8, "channel_mult": (1,), "blocks": 1, "attention_resolutions": ()}


def picture(path, value, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, dtype=np.uint8)).save(path)


def test_an_array_is_read_where_it_is_asked_for(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "c.npy", rows)
    conditions = open_conditions(tmp_path / "c.npy", (3,))
    index = torch.tensor([4, 19, 4])
    assert torch.equal(conditions.fetch(index), torch.from_numpy(rows[[4, 19, 4]]).float()) and len(conditions) == 20
    before = conditions.digest()
    rows[3, 0] += 1
    np.save(tmp_path / "d.npy", rows)
    assert open_conditions(tmp_path / "d.npy", (3,)).digest() != before


@pytest.mark.parametrize("kind", ["npy", "folder", "png"])
def test_images_are_in_minus_one_to_one_and_enlarged_by_repetition(kind, tmp_path):
    if kind == "npy":
        np.save(tmp_path / "c.npy", np.full((1, 1, 4, 4), 51, dtype=np.uint8))
    picture(tmp_path / "folder" / "a.png", 51)
    picture(tmp_path / "c.png", 51)
    found = open_conditions(tmp_path / ("folder" if kind == "folder" else f"c.{kind}"), (1, 8, 8)).fetch(
        torch.tensor([0])
    )
    torch.testing.assert_close(found, torch.full((1, 1, 8, 8), 51 / 127.5 - 1))


def test_a_column_of_a_table_is_read(tmp_path):
    import datasets

    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    columns = {"vector": vectors.tolist(), "name": ["a", "b", "c"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    found = open_conditions(f"hf:{tmp_path}#vector", (2,))
    assert torch.equal(found.fetch(torch.tensor([2, 0])), torch.from_numpy(vectors[[2, 0]])) and len(found) == 3
    for column, said in (
        ("name", "does not hold numbers of one shape"),
        ("vectr", "no column vectr: did you mean"),
    ):
        with pytest.raises(UserError, match=said):
            open_conditions(f"hf:{tmp_path}#{column}", (2,))


def test_what_does_not_fit_is_one_line(tmp_path):
    np.save(tmp_path / "int.npy", np.zeros((4, 3), dtype=np.int64))
    np.save(tmp_path / "wide.npy", np.zeros((4, 5), dtype=np.float32))
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:-8])
    picture(tmp_path / "c.png", 0, size=3)
    for name, shape, said in (
        ("int.npy", (3,), "must hold floats"),
        ("wide.npy", (3,), r"has conditions of shape \(5,\), the model takes \(3,\)"),
        ("cut.npy", (5,), "is not a readable .npy file"),
        ("c.png", (1, 8, 8), r"has conditions of shape \(1, 3, 3\), the model takes \(1, 8, 8\)"),
        ("none.npy", (3,), "none.npy"),
    ):
        with pytest.raises(UserError, match=said):
            open_conditions(tmp_path / name, shape)
    with pytest.raises(UserError, match="a condition is not finite"):
        open_conditions(tmp_path / "nan.npy", (3,)).fetch(torch.arange(2))


def config(folder, source, shape):
    made = Config(network(UNet, **UNET, condition=shape), Lagrangian())
    made.data = Data(name="folder", root=str(folder), condition=str(source))
    made.steps, made.batch, made.ema, made.base_std, made.checkpoint_every = 4, 16, (0.9,), 0.5, 2
    return made


def sampled_with_conditions(folder, model):
    """By the script and the pipeline, the same; and the mistakes."""
    flags = [f"--checkpoint={model}", "--steps=1", "--num=4", f"--out={folder / 'out'}"]
    run_script("scripts/sample.py", *flags, f"--condition={folder / 'small'}", check=True)
    found = np.load(folder / "out" / "samples-1.npz")
    assert found["arr_0"].shape == (4, 8, 8, 1) and found["label"].shape == (4, 1, 8, 8)
    pipe = FlowMapPipeline.from_pretrained(model)
    pictures = [
        Image.open(folder / "small" / f"{i:02d}.png").resize((8, 8), Image.Resampling.NEAREST) for i in range(4)
    ]
    x = FlowMap.from_pretrained(model).noise(4, seed=0)
    ours = pipe(condition=pictures, latents=x, output_type="pt").images
    torch.testing.assert_close((255 * ours).round().permute(0, 2, 3, 1), torch.from_numpy(found["arr_0"]).float())
    for given, said in (((), "--condition: missing"), ((f"--condition={folder / 'none'}",), "no such file or folder")):
        done = run_script("scripts/sample.py", *flags, *given)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    command = ["scripts/fid.py", f"--checkpoint={model}", "--steps=1", "--num=16", "--extractor=digits"]
    given = [f"--condition={folder / 'small'}", f"--reference={folder / 'large'}", f"--pairs={folder / 'large'}"]
    done = run_script(*command, *given, f"--json={folder / 'record.json'}", check=True)
    (row,) = json.loads((folder / "record.json").read_text())["results"]
    with torch.no_grad():
        fm = FlowMap.from_pretrained(model)
        given = open_conditions(folder / "small", (1, 8, 8)).fetch(torch.arange(16))
        made = to_uint8(fm(fm.noise(16, seed=0), 0.0, 1.0, given))
    error = (made.double() - (torch.arange(16) * 16)[:, None, None, None]).square().mean(dim=(1, 2, 3)) / 255**2
    assert row["PSNR"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-4) and "PSNR" in done.stdout
    steering = {"num_inference_steps": 2, "reward": lambda x: x.mean(dim=(1, 2, 3)), "particles": 3}
    assert len(pipe(condition=pictures, **steering).images) == 4  # whose particles share their condition
    assert len(pipe(num_images=2, condition=pictures[0], **steering).images) == 2
    with pytest.raises(UserError, match=r"condition: must be floats of shape \[n, 1, 8, 8\], not int"):
        pipe(condition=3)
    with pytest.raises(UserError, match="condition: this model takes no condition"):
        FlowMapPipeline.from_pretrained("digits")(class_labels=3, condition=x)


def test_a_run_reads_pairs_and_resumes_bit_for_bit(tmp_path):
    for i in range(16):
        picture(tmp_path / "large" / f"{i:02d}.png", 16 * i, size=8)
        picture(tmp_path / "small" / f"{i:02d}.png", 16 * i, size=4)
    for steps, run in ((4, "whole"), (2, "parts"), (4, "parts")):
        made = config(tmp_path / "large", tmp_path / "small", (1, 8, 8))
        made.steps = steps
        fm = train(made, tmp_path / run)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert torch.equal(fm.conditions[:, 0, 0, 0], torch.arange(16) * 16 / 127.5 - 1)
    sampled_with_conditions(tmp_path, tmp_path / "whole" / "model")
    picture(tmp_path / "small" / "03.png", 255)
    made.steps = 6
    with pytest.raises(UserError, match=r"config\.data\.condition: has changed"):
        train(made, tmp_path / "parts")
    (tmp_path / "small" / "03.png").rename(tmp_path / "small" / "3.png")
    with pytest.raises(UserError, match=r"give pairs the same names"):
        train(config(tmp_path / "large", tmp_path / "small", (1, 8, 8)), tmp_path / "other")
    np.save(tmp_path / "few.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(UserError, match=r"data\.condition=.*few.npy: has 3 conditions for 16 images"):
        train(config(tmp_path / "large", tmp_path / "few.npy", (2,)), tmp_path / "other")
