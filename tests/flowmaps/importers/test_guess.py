"""The format of a checkpoint without --format: guessed by something that no other format has, or asked for."""

import argparse
import json

import pytest
import torch
from helpers import released, released_ect, released_edm2, run_script
from helpers.released_maps import Map
from helpers.released_mean_flows import MeanFlow
from helpers.released_state_dicts import NCSNpp, Transformer
from helpers.released_tvm import save

from flowmaps import UserError
from flowmaps.importers import FORMATS, guess_format, import_checkpoint


def write(form, path):
    """Write a checkpoint of a format as published."""
    if form in ("soflow", "meanflow_sit", "dmf"):
        Map(form, width=64, depth=1).save(path)
    elif form in ("imf", "pmf"):
        MeanFlow(form, shared=0, head=1).save(path)
    elif form == "tvm":
        save(path, width=64, depth=1, heads=1)
    elif form == "edm":
        released.edm("ddpm++", path)
    elif form == "edm2":
        released_edm2.edm2(path)
    elif form == "ect":
        released_ect.ect(path)
    elif form == "rectified_flow":
        NCSNpp().save(path)
    elif form in ("dit", "sit"):
        args = argparse.Namespace(num_classes=5, **({"path_type": "Linear"} if form == "sit" else {}))
        torch.save({"ema": Transformer(width=64, depth=1).w, "args": args}, path)
    else:
        name = {"diffusers_unet": "UNet2DModel", "diffusers_dit": "DiTTransformer2DModel"}[form]
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"_class_name": name}))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_guessed(form, tmp_path):
    write(form, tmp_path / "net")
    assert guess_format(tmp_path / "net") == form


def test_dit_and_sit_are_asked_for_where_nothing_tells_them_apart(tmp_path):
    weights = Transformer(width=64, depth=1).w
    torch.save(weights, tmp_path / "net")
    with pytest.raises(UserError, match=r"^src=\S+net: DiT and SiT have weights of the same names"):
        guess_format(tmp_path / "net")
    torch.save(weights | {"projectors.0.0.weight": torch.zeros(8, 64)}, tmp_path / "net")
    assert guess_format(tmp_path / "net") == "sit"


@pytest.mark.parametrize(
    "content", [{"w": torch.ones(2)}, {"model": {"deep": {"w": torch.ones(2)}}}, torch.ones(2), []]
)
def test_files_of_no_format(content, tmp_path):
    torch.save(content, tmp_path / "net")
    with pytest.raises(UserError, match=r"^src=\S+net: is of no format that is known here"):
        guess_format(tmp_path / "net")
    (tmp_path / "net").write_bytes(b"")
    with pytest.raises(UserError, match=r"^src=\S+net: is not a checkpoint"):
        guess_format(tmp_path / "net")
    with pytest.raises(UserError, match=r"is of no format"):
        guess_format(tmp_path)


def test_the_script_says_what_it_took(tmp_path):
    Map("soflow").save(tmp_path / "net.pt")
    flags = [f"--src={tmp_path}/net.pt", f"--out={tmp_path}/made", "--heads=2"]
    done = run_script("scripts/import_checkpoint.py", *flags)
    assert done.returncode == 0 and "format   soflow, as its content shows" in done.stdout, done.stderr
    done = run_script("scripts/import_checkpoint.py", *flags, "--path=linear")
    assert done.returncode == 2 and "--path=linear: has no use in format soflow" in done.stderr


@pytest.mark.parametrize(
    ("form", "left"),
    [
        ("edm", "loss_fn, augment_pipe, dataset_kwargs"),
        ("edm2", "dataset_kwargs, loss_fn"),
        ("ect", "loss_fn, augment_pipe, dataset_kwargs"),
        ("rectified_flow", "optimizer, model, step"),
    ],
)
def test_what_an_import_leaves_out_of_a_file_is_named(form, left, tmp_path):
    write(form, tmp_path / "net")
    options = {"image_size": 32} if form == "rectified_flow" else {}
    found = import_checkpoint(form, tmp_path / "net", **options).info.origin.get("left out", "")
    assert found == left
