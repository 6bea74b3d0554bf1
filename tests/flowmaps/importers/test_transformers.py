"""DiT and SiT: the file's own arguments decide, then the options; nothing is taken for something else in silence."""

import argparse
import math

import pytest
import torch
from helpers.released_state_dicts import Transformer

from flowmaps import UserError
from flowmaps.importers import import_checkpoint

TABLE = "y_embedder.embedding_table.weight"
T = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99]).double()


def stored(path, weights, **args):
    torch.save({"ema": weights, "args": argparse.Namespace(**args)}, path)
    return path


def largest_error(fm, theirs, x, label=None):
    with torch.no_grad():
        return ((fm.double().drift(x, T, label) - theirs).abs().max() / theirs.abs().max()).item()


def latents():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()


LABEL = torch.tensor([0, 1, 2, 4, 5])


@pytest.mark.parametrize("said", ["Linear", "GVP"])
def test_a_velocity_on_either_path_is_the_drift_of_that_path(said, tmp_path):
    model = Transformer()
    fm = import_checkpoint("sit", stored(tmp_path / "net", model.w, path_type=said, prediction="velocity"))
    assert fm.interpolant_name == {"Linear": "linear", "GVP": "trigonometric"}[said]
    assert largest_error(fm, model(latents(), T, LABEL), latents(), LABEL) < 1e-5
    assert "path" not in fm.info.origin.get("assumed", "")
    fm.float().save_pretrained(tmp_path / "out")
    assert type(fm).from_pretrained(tmp_path / "out").interpolant_name == fm.interpolant_name


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"path_type": "VP"}, "path is vp"),
        ({"path_type": "VE"}, r"args\.path_type is 'VE'"),
        ({"path_type": ["Linear"]}, r"args\.path_type is list"),
        ({"prediction": "noise"}, "prediction is noise"),
        ({"prediction": "score"}, "prediction is score"),
        ({"prediction": "x"}, r"args\.prediction is 'x'"),
        ({"vae": "sdxl"}, r"args\.vae is 'sdxl'"),
        ({"num_classes": 9}, r"6 rows, and its args\.num_classes is 9"),
        ({"class_dropout_prob": 2}, r"class_dropout_prob is 2"),
    ],
)
def test_what_sit_says_and_this_package_does_not_have(args, reason, tmp_path):
    with pytest.raises(UserError, match=rf"^src=\S+: cannot be imported: .*{reason}"):
        import_checkpoint("sit", stored(tmp_path / "net", Transformer().w, **args))


@pytest.mark.parametrize(
    "args", [{"noise_schedule": "cosine"}, {"predict_xstart": True}, {"diffusion_steps": 4000}, {"path_type": "Linear"}]
)
def test_what_dit_says_and_this_package_does_not_have(args, tmp_path):
    with pytest.raises(UserError, match=next(iter(args))):
        import_checkpoint("dit", stored(tmp_path / "net", Transformer().w, **args))


@pytest.mark.parametrize("said", ["linear", "cosine", None])
def test_repa_has_the_other_direction_of_time(said, tmp_path):
    """Its network predicts d/dtau (alpha x1 + sigma x0) with the data at tau = 0: the drift is -F(x, 1 - t)."""
    model = Transformer()
    weights = model.w | {"projectors.0.0.weight": torch.zeros(8, 128)}
    args = {} if said is None else {"path_type": said, "prediction": "v", "cfg_prob": 0.2, "num_classes": 5}
    fm = import_checkpoint("sit", stored(tmp_path / "net", weights, **args))
    assert largest_error(fm, -model(latents(), 1 - T, LABEL), latents(), LABEL) < 1e-5
    assert fm.interpolant_name == ("trigonometric" if said == "cosine" else "linear")
    assert fm.info.label_dropout == (0.1 if said is None else 0.2)
    assert ("time as REPA" in fm.info.origin.get("assumed", "")) == (said is None)


def test_the_arguments_decide_about_the_row_for_no_label(tmp_path):
    model = Transformer()
    fm = import_checkpoint("sit", stored(tmp_path / "a", model.w, num_classes=6, vae="mse"))
    assert (fm.info.num_classes, fm.info.label_dropout) == (6, 0) and fm.info.vae.endswith("ft-mse")
    assert largest_error(fm, model(latents(), T, LABEL), latents(), LABEL) < 1e-5
    fm = import_checkpoint("sit", stored(tmp_path / "b", model.w, num_classes=5))
    assert (fm.info.num_classes, fm.info.label_dropout) == (5, 0.1)
    fm = import_checkpoint("sit", stored(tmp_path / "c", model.w))
    assert "classes 5 and a row for no label" in fm.info.origin["assumed"]


def test_a_table_of_one_row_is_an_unconditional_network(tmp_path):
    model = Transformer(classes=0)
    fm = import_checkpoint("sit", stored(tmp_path / "net", model.w))
    assert (fm.info.num_classes, fm.info.label_dropout) == (0, 0)
    assert largest_error(fm, model(latents(), T, torch.zeros(5, dtype=int)), latents()) < 1e-5
    with pytest.raises(UserError, match=r"one row, and its args\.num_classes is 1000"):
        import_checkpoint("sit", stored(tmp_path / "net", model.w, num_classes=1000))


def test_heads(tmp_path):
    """Weights do not show them: published sizes have theirs, others one per 64 channels, said aloud, or by option."""
    model = Transformer(heads=4)
    torch.save(model.w, tmp_path / "net")
    fm = import_checkpoint("sit", tmp_path / "net", heads=4)
    assert largest_error(fm, model(latents(), T, LABEL), latents(), LABEL) < 1e-5
    assert "heads 2" in import_checkpoint("sit", tmp_path / "net").info.origin["assumed"]
    assert import_checkpoint("sit", stored(tmp_path / "said", model.w, num_heads=4)).network.config.heads == 4
    with pytest.raises(UserError, match=r"^heads=5: must divide the width, 128"):
        import_checkpoint("sit", tmp_path / "net", heads=5)
    torch.save(Transformer(width=96, heads=3).w, tmp_path / "narrow")
    with pytest.raises(UserError, match=r"^heads: is needed"):
        import_checkpoint("dit", tmp_path / "narrow")
    assert import_checkpoint("dit", tmp_path / "narrow", heads=3).network.config.heads == 3


def test_the_path_of_bare_weights(tmp_path):
    torch.save(Transformer().w, tmp_path / "net")
    fm = import_checkpoint("sit", tmp_path / "net")
    assert "path linear" in fm.info.origin["assumed"] and "prediction velocity" in fm.info.origin["assumed"]
    fm = import_checkpoint("sit", tmp_path / "net", path="GVP", prediction="velocity")
    assert fm.interpolant_name == "trigonometric" and "path" not in fm.info.origin["assumed"]
    with pytest.raises(UserError, match="prediction is score"):
        import_checkpoint("sit", tmp_path / "net", prediction="score")
    with pytest.raises(UserError, match=r"^path=linear: but the file says trigonometric"):
        import_checkpoint("sit", stored(tmp_path / "said", Transformer().w, path_type="GVP"), path="linear")


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrapped_names_and_short_floats(wrap, dtype, tmp_path):
    model = Transformer()
    model.w = {name: tensor.to(dtype) for name, tensor in model.w.items()}

    def wrapped(name):
        return name.replace("attn", "_orig_mod.attn") if wrap == "inside" else wrap.format(name)

    torch.save({"ema": {wrapped(name): tensor for name, tensor in model.w.items()}}, tmp_path / "net")
    fm = import_checkpoint("sit", tmp_path / "net")
    bound = 1e-5 if dtype == torch.float32 else 0.02  # our table of positions is not rounded
    assert largest_error(fm, model(latents(), T, LABEL), latents(), LABEL) < bound


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"module.pos_embed": torch.ones(1)}, "pos_embed twice"),
        ({"blocks.1000000000.attn.qkv.weight": torch.ones(1)}, "structure differs|missing"),
        ({"final_layer.linear.bias": torch.full((32,), math.nan)}, "head.bias has NaN"),
        ({"final_layer.linear.bias": torch.ones(32, dtype=torch.int64)}, "head.bias is not a plain tensor of floats"),
        ({"final_layer.linear.bias": torch.ones(32).to_sparse()}, "not a plain tensor|not a checkpoint"),
        ({"extra": "text"}, "'extra' among its weights is not a tensor"),
    ],
)
def test_strange_weights(change, reason, tmp_path):
    torch.save({"ema": Transformer().w | change}, tmp_path / "net")
    with pytest.raises(UserError, match=reason):
        import_checkpoint("dit", tmp_path / "net")
