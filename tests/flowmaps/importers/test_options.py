"""Options for what weights do not show: asked for where they are needed, refused where they are of no use."""

import pytest
import torch
from helpers import released, run_script
from helpers.released_state_dicts import NCSNpp, Transformer

from flowmaps import UserError
from flowmaps.importers import FORMATS, import_checkpoint

VALUES = {"image_size": 32, "heads": 2, "prediction": "velocity", "path": "linear"}
VALUES |= {"guidance": 2.5, "decoupled": 3, "base_std": 2.0}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_that_a_format_cannot_use(form, option, tmp_path):
    """Refused before the file is looked for; one that it can use is not."""
    reason = "src=" if option in FORMATS[form].options else f"{option}={VALUES[option]}: has no use in format {form}"
    with pytest.raises(UserError, match=f"^{reason}"):
        import_checkpoint(form, tmp_path / "missing", **{option: VALUES[option]})


@pytest.mark.parametrize(
    ("form", "option", "value"),
    [
        *(("rectified_flow", "image_size", value) for value in (0, -32, 10**9)),
        *(("dit", "heads", value) for value in (0, -1, 10**9)),
        *(("sit", "prediction", value) for value in ("", "x0", "x" * 1000)),
        ("sit", "path", "straight"),
    ],
)
def test_values_out_of_range(form, option, value, tmp_path):
    with pytest.raises(UserError, match=rf"^{option}=.*: (must be from 1|choose one of)") as refused:
        import_checkpoint(form, tmp_path / "missing", **{option: value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(("size", "attention"), [(32, (16,)), (64, (32,))])
def test_the_size_of_a_rectified_flow_is_asked_for(size, attention, tmp_path):
    """Weights are the same at 32 and 64; the resolutions with attention follow."""
    model = NCSNpp(size=size, attention=attention)
    model.save(tmp_path / "net")
    with pytest.raises(UserError, match=r"^image_size: is needed"):
        import_checkpoint("rectified_flow", tmp_path / "net")
    with pytest.raises(UserError, match=r"^image_size=33: must be a multiple of 2"):
        import_checkpoint("rectified_flow", tmp_path / "net", image_size=33)
    fm = import_checkpoint("rectified_flow", tmp_path / "net", image_size=size).double()
    assert fm.info.shape == (3, size, size) and fm.network.config.attention_resolutions == attention
    x, t = torch.randn(2, 3, size, size).double(), torch.tensor([0.3, 0.8]).double()
    with torch.no_grad():
        theirs = model(x, 999 * t)
        assert (fm.drift(x, t) - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--format=edm", "--heads=3"], "--heads=3: has no use in format edm"),
        (["--format=rectified_flow", "--image_size=0"], "--image_size=0: must be from 1"),
        (["--format=sit", "--path=zigzag"], "--path=zigzag: choose one of linear, trigonometric"),
        (["--format=sit", "--prediction=x0"], "--prediction=x0: choose one of velocity"),
        (["--format=onnx"], "--format=onnx: choose one of"),
        ([], "--src={src}: is not a checkpoint of this format"),
        (["--src=nowhere.pkl"], "--src=nowhere.pkl: no such file"),
        (["--format=edm", "--src=nowhere.pkl"], "--src=nowhere.pkl: no such file"),
        (["--format=edm", "--out={src}"], "--out={src}: is also --src"),
        (["--format=edm", "--out=tests"], "--out=tests: tests has files that flowmaps did not write"),
    ],
)
def test_all_flags_are_checked_before_the_file_is_opened(flags, reason, tmp_path):
    """The file is damaged, or missing, which would be said otherwise."""
    (src := tmp_path / "net.pkl").write_bytes(b"damaged")
    usual = [f"--src={src}"] * ("--src" not in str(flags)) + [f"--out={tmp_path}/out"] * ("--out" not in str(flags))
    done = run_script("scripts/import_checkpoint.py", *usual, *(flag.format(src=src) for flag in flags))
    assert done.returncode == 2 and reason.format(src=src) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_what_is_assumed_is_printed_and_recorded(tmp_path):
    torch.save(Transformer().w, tmp_path / "net")
    done = run_script(
        "scripts/import_checkpoint.py", "--format=sit", f"--src={tmp_path}/net", f"--out={tmp_path}/out", "--heads=2"
    )
    said = "classes 5 and a row for no label"
    assert done.returncode == 0 and "assumed," in done.stdout and said in done.stdout and "heads" not in done.stdout
    assert said in (tmp_path / "out" / "README.md").read_text()
    released.edm("ddpm++", tmp_path / "edm")
    done = run_script(
        "scripts/import_checkpoint.py", "--format=edm", f"--src={tmp_path}/edm", f"--out={tmp_path}/edm-out"
    )
    assert done.returncode == 0 and "assumed," not in done.stdout
