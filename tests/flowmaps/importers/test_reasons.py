"""Sound files in other clothes are read, and a refusal says what a file is; only a damaged one is worth a download."""

import pickle
import zipfile

import pytest
import torch
from helpers import released, released_ect, released_edm2
from helpers.released_state_dicts import NCSNpp, Transformer
from safetensors.torch import save_file

from flowmaps import UserError
from flowmaps.importers import import_checkpoint

W = Transformer().w


def prefixed(prefix, weights=W):
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


ZERO = {name: torch.zeros_like(weight) for name, weight in W.items()}
SOUND = {
    "model.": prefixed("model."),
    "module.": prefixed("module."),
    "compiled": prefixed("model._orig_mod."),
    "ema. beside model.": prefixed("model.", ZERO) | prefixed("ema."),
    "ema_model. with counters": prefixed("online_model.", ZERO)
    | prefixed("ema_model.")
    | {"initted": torch.tensor(True), "step": torch.tensor(9)},
    "averaged by torch": prefixed("module.") | {"n_averaged": torch.tensor(3)},
    "in state_dict": {"state_dict": prefixed("net."), "epoch": 3, "hparams": {"lr": 0.1}},
    "in ema.state_dict": {"ema": {"state_dict": W, "decay": 0.99}, "model": ZERO},
    "an average before the model": {"model": ZERO, "model_ema": W, "optimizer": {"state": {}}},
    "ema with its decay": {"ema": {"decay": 0.999, **W}, "opt": {}},
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_names_and_types_of_sound_files(kind, dtype, tmp_path):
    def cast(part):
        return {k: cast(v) if isinstance(v, dict) else floats(v) for k, v in part.items()}

    def floats(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    torch.save(cast(SOUND[kind]), tmp_path / "net")
    stem = import_checkpoint("sit", tmp_path / "net").network.stem.weight
    assert torch.equal(stem, W["x_embedder.proj.weight"].flatten(1).to(dtype).float())
    if all(isinstance(value, torch.Tensor) for value in SOUND[kind].values()):
        save_file({name: weight.clone() for name, weight in cast(SOUND[kind]).items()}, tmp_path / "net")
        assert torch.equal(import_checkpoint("sit", tmp_path / "net").network.stem.weight, stem)


def test_a_rectified_flow_in_safetensors_of_half_precision(tmp_path):
    save_file({f"module.{name}": weight.half() for name, weight in NCSNpp().w.items()}, tmp_path / "net")
    fm = import_checkpoint("rectified_flow", tmp_path / "net", image_size=32)
    assert fm.info.kind == "drift" and "an average" in fm.info.origin["assumed"]


def test_weights_of_another_network_are_not_left_out(tmp_path):
    torch.save(prefixed("model.") | {"discriminator.weight": torch.ones(2)}, tmp_path / "net")
    with pytest.raises(UserError, match=r"discriminator\.weight is new"):
        import_checkpoint("sit", tmp_path / "net")


def archive(path):
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("readme", "hello")


OTHERS = {
    "safetensors": (lambda path: save_file({"w": torch.ones(2)}, path), "a safetensors file|has no "),
    "another network": (lambda path: torch.save({"down_blocks.0.weight": torch.ones(2)}, path), "a zip archive|unet"),
    "a whole module": (lambda path: torch.save(torch.nn.Linear(1, 1), path), "a zip archive|torch.nn.modules"),
    "zip": (archive, "a zip archive|no data.pkl"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "NumPy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + b"\xff" * 99), "a NumPy array"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "compressed by gzip"),
    "ONNX": (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99)), "not a pickle"),
    "JSON": (lambda path: path.write_bytes(b'{"a": 1}'), "a JSON file"),
    "Python 2": (
        lambda path: path.write_bytes(b"(dp0\nS'\\xe9\\xff'\np1\nI1\ns."),
        "nothing of that kind|not a pickle",
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "nothing of that kind|another kind"),
}


@pytest.mark.parametrize("form", ["edm", "edm2", "ect", "dit", "sit", "rectified_flow"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_sound_file_of_another_kind(kind, form, tmp_path):
    write, reason = OTHERS[kind]
    write(tmp_path / "net")
    with pytest.raises(
        UserError, match=rf"is not a checkpoint of this format, and was not run: .*({reason})"
    ) as refused:
        import_checkpoint(form, tmp_path / "net", **({"image_size": 32} if form == "rectified_flow" else {}))
    assert "download" not in str(refused.value) and "codec" not in str(refused.value)


@pytest.mark.parametrize(
    ("write", "form", "hint"),
    [
        (lambda path: released_edm2.edm2(path), "edm", "Precond, which is read by format edm2"),
        (lambda path: released.edm("ddpm++", path), "edm2", "EDMPrecond, which is read by format edm"),
        (lambda path: released_ect.ect(path), "edm2", "ECMPrecond, which is read by format ect"),
        (lambda path: NCSNpp().save(path), "dit", "seems to be of format rectified_flow"),
        (lambda path: torch.save(W, path), "rectified_flow", "seems to be of format dit or sit"),
        (lambda path: released.edm("ddpm++", path), "sit", "another kind, as formats edm, edm2 and ect read"),
    ],
)
def test_the_format_that_a_file_is_of(write, form, hint, tmp_path):
    write(tmp_path / "net")
    with pytest.raises(UserError, match=hint) as refused:
        import_checkpoint(form, tmp_path / "net", **({"image_size": 32} if form == "rectified_flow" else {}))
    assert "download" not in str(refused.value)


def cut(write):
    def written(path):
        write(path)
        path.write_bytes(path.read_bytes()[:-5000])

    return written


DAMAGED = {
    "nothing": (lambda path: path.write_bytes(b""), "it is empty"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "Git LFS"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html>"), "a web page"),
    "cut pickle": (cut(lambda path: released.edm("ddpm++", path)), "ends before|another kind"),
    "cut archive": (cut(lambda path: torch.save(W, path)), "zip"),
    "cut safetensors": (cut(lambda path: save_file(W, path)), "ncomplete|safetensors"),
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, "edm") for kind in list(DAMAGED)[:4]), *((kind, "dit") for kind in DAMAGED if kind != "cut pickle")],
)
def test_a_damaged_file(kind, form, tmp_path):
    write, reason = DAMAGED[kind]
    write(tmp_path / "net")
    with pytest.raises(UserError, match=rf"or damaged, and was not run: .*({reason}).*; download it again"):
        import_checkpoint(form, tmp_path / "net")


def test_an_ncsn_of_rectified_flow_is_refused_by_its_name(tmp_path):
    weights = NCSNpp().w
    weights = {"all_modules.0.W": torch.ones(8)} | {k: w for k, w in weights.items() if k[:14] != "all_modules.0."}
    torch.save(weights, tmp_path / "net")
    with pytest.raises(UserError, match=r"cannot be imported: it is an NCSN\+\+ with Fourier features, as at 256"):
        import_checkpoint("rectified_flow", tmp_path / "net", image_size=256)
