"""Files of improved and pixel MeanFlow, of the true nesting, names and shapes, against the papers' formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.makers import write_vae
from helpers.released_mean_flows import MeanFlow

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import generate
from flowmaps.images import to_uint8
from flowmaps.importers import FORMATS, import_checkpoint
from flowmaps.importers.mean_flows import IMF_GUIDANCE, PMF, _network
from flowmaps.networks import NETWORKS, PRESETS
from flowmaps.networks.conditioning import with_guidance
from flowmaps.vae import Decoder
from samplers import rollout, uniform_times

OPTIONS = {"imf": {"image_size": 8}, "pmf": {"base_std": 2.0}}
LABEL = torch.tensor([0, 1, 2, 4, 5])  # the last: no label
TOLD = torch.tensor([[1.0, 8.0, 10.5, 2.0, 3.0], [0.0, 0.35, 0.4, 0.0, 0.2], [1.0, 0.6, 0.6, 0.9, 0.8]]).double()


def points(channels):
    g = torch.Generator().manual_seed(2)
    x, times = torch.randn(5, channels, 8, 8, generator=g, dtype=torch.float64), torch.rand(2, 5, generator=g).double()
    s, t = times.sort(dim=0).values
    s[-1], t[-1] = 0.97, 0.99  # nearer to data than pixel MeanFlow divides by
    return x, s, t


@pytest.mark.parametrize("form", OPTIONS)
def test_a_published_map(form, tmp_path):
    """Its velocity for any two times and guidance, its drift, and 1, 2 and 4 jumps as its authors make them."""
    theirs = MeanFlow(form)
    fm = import_checkpoint(form, theirs.save(tmp_path / "net"), **OPTIONS[form]).double()
    x, s, t = points(theirs.channels)
    rows = with_guidance(LABEL, TOLD.T, 5)
    with torch.no_grad():
        for start, end in ((s, t), (s, s), (torch.zeros_like(s), torch.ones_like(t))):
            for label, told in ((rows, TOLD), (LABEL, (1.0, 0.0, 1.0))):
                expected = theirs(x, start, end, LABEL, told)
                assert expected.std() > 0.1
                assert (fm.velocity(x, start, end, label) - expected).abs().max() <= 1e-5 * expected.abs().max()
        for steps in (1, 2, 4):
            expected = x
            for k in range(steps):
                start, end = torch.full_like(s, k / steps), torch.full_like(s, (k + 1) / steps)
                expected = expected + theirs(expected, start, end, LABEL, TOLD) / steps
            jumped = rollout(fm, x, uniform_times(steps), rows)
            assert (jumped - expected).abs().max() <= 1e-5 * expected.abs().max()
        data = fm(x, 0 * s, 1 + 0 * s, rows)
        image = x + theirs(x, 0 * s, 1 + 0 * s, LABEL, TOLD)
    assert (data - image).abs().max() <= 1e-5 * image.abs().max()
    assert (fm.info.kind, fm.info.t_range, fm.info.guidance, fm.info.guidance_max) == ("map", (0, 1), None, 12.0)
    assert (fm.info.num_classes, fm.info.label_dropout, fm.info.guidance_interval) == (5, 0.1, True)
    assert fm.info.shape == (theirs.channels, 8, 8) and fm.base_std == (1.0 if form == "imf" else 2.0)
    assert not fm.training and not fm.network.config.second_head
    with pytest.raises(UserError, match=r"^guidance=13: this model takes weights from 1 to 12"):
        fm.info.check_guidance(13)


@pytest.mark.parametrize("form", OPTIONS)
def test_facts_are_those_of_the_authors(form, tmp_path):
    fm = import_checkpoint(form, MeanFlow(form).save(tmp_path / "net"), **OPTIONS[form])
    if form == "imf":
        assert fm.info.vae == "stabilityai/sd-vae-ft-mse"
        assert fm.info.latent_shift == (0.86488, -0.27787343, 0.21616915, 0.3738409)
        assert fm.info.latent_scale == pytest.approx((1 / 4.85503674, 1 / 5.31922414, 1 / 3.93725398, 1 / 3.9870003))
        assert fm.info.origin["left out"] == "v_final_layer.*"
    else:
        assert (fm.info.vae, fm.info.latent_scale, fm.info.latent_shift) == ("", (), ())
        assert fm.info.origin["left out"] == "v_final_layer.*, rope_freqs"
        assert fm.noise(4000, seed=0).std().item() == pytest.approx(2.0, rel=0.01)
    assert "assumed" not in fm.info.origin and fm.info.recommended_guidance == ()  # another size than the published
    fm.save_pretrained(tmp_path / "out")
    again, card = FlowMap.from_pretrained(tmp_path / "out"), (tmp_path / "out/README.md").read_text()
    assert again.info == fm.info and again.fingerprint() == fm.fingerprint() and again.base_std == fm.base_std
    assert FORMATS[form].license in card and fm.info.origin["sha256"] in card


def test_the_second_head_of_a_training_is_left_out_and_other_spellings_are_read(tmp_path):
    """Its blocks and its last layer; and weights of a wrapper, with tokens of either shape."""
    theirs = MeanFlow("imf")
    expected = import_checkpoint("imf", theirs.save(tmp_path / "net"), image_size=8)
    extra = {name.replace("u_heads", "v_heads"): weight for name, weight in theirs.w.items() if "u_heads" in name}
    weights = {name.removeprefix("net."): weight for name, weight in {**theirs.w, **extra}.items()}
    weights = {name.replace("mlp.w2._flax_linear.weight", "mlp.w2"): weight for name, weight in weights.items()}
    weights |= {name: weight[None] for name, weight in weights.items() if name.endswith("_tokens")}
    torch.save({"ema": weights, "step": 3}, tmp_path / "other")
    fm = import_checkpoint("imf", tmp_path / "other", image_size=8)
    assert fm.fingerprint() == expected.fingerprint()
    assert fm.info.origin["left out"] == "step, v_final_layer.*, v_heads.*"


SIZES = {"imf-b2": "imagenet256", "imf-m2": "imagenet256", "imf-l2": "imagenet256", "imf-xl2": "imagenet256"}
SIZES |= {f"pmf-{size}16": "imagenet256" for size in "blh"} | {f"pmf-{size}32": "imagenet512" for size in "blh"}


@pytest.mark.parametrize("name", SIZES)
def test_every_published_size_is_known(name):
    """Its guidance, and for pixels its noise; a network of ours without the second head has the file's arguments."""
    preset = PRESETS[f"{name}-{SIZES[name]}"]
    width, depth, patch = (preset.options[key] for key in ("width", "depth", "patch"))
    found = IMF_GUIDANCE[width, depth] if name.startswith("imf") else PMF[patch, width, depth][1]
    FlowMapInfo(guidance_max=12.0, guidance_interval=True, recommended_guidance=found)
    with torch.device("meta"):
        network = NETWORKS[preset.network](**preset.options, second_head=False)
    shown = _network(network.state_dict())
    assert shown == {key: network.config[key] for key in shown}


@pytest.mark.parametrize(("form", "depth", "found"), [("imf", 12, (8.0, 0.35, 0.6)), ("pmf", 16, (8.5, 0.3, 0.9))])
def test_a_file_of_a_published_size_needs_no_option(form, depth, found, tmp_path):
    sizes = {"width": 768, "heads": 12, "shared": depth - 8, "head": 8, "hidden": 8}
    patch = {"size": 32, "patch": 2} if form == "imf" else {"size": 32, "patch": 16}
    fm = import_checkpoint(form, MeanFlow(form, **sizes, **patch).save(tmp_path / "net"))
    assert fm.info.recommended_guidance == found and fm.network.config.heads == 12 and fm.base_std == 1.0
    said = {"imf": "image_size 32", "pmf": "base_std 1.0"}[form]
    assert fm.info.shape[1:] == (32, 32) and fm.info.origin["assumed"] == said


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


Q_NORM, TABLE = "net.u_heads.0.attn.q_norm.weight", "net.y_embedder.embedding_table._flax_embedding.weight"


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("imf", lambda w: without(w, "net.omega_tokens"), "prefix.guidance.tokens is missing"),
        ("imf", lambda w: w | {"net.extra.weight": torch.ones(1)}, "extra.weight is new"),
        (
            "imf",
            lambda w: w | {"net.time_tokens": torch.ones(3, 32)},
            r"prefix.gap.tokens is \(3, 32\), expected \(4, 32\)",
        ),
        ("imf", lambda w: without(w, TABLE), "it has no '?prefix.classes.embed.weight"),
        ("imf", lambda w: w | {TABLE: torch.ones(3)}, "label table is not a table"),
        ("imf", lambda w: w | {Q_NORM: torch.ones(0)}, "q_norm has 0 channels"),
        ("imf", lambda w: w | {Q_NORM: torch.ones(5)}, "q_norm has 5 channels"),
        ("imf", lambda w: w | {Q_NORM: torch.tensor(1.0)}, ""),
        ("imf", lambda w: w | {"net.x_embedder.proj.weight": torch.ones(32, 4, 2, 1)}, "patches are not square"),
        ("imf", lambda w: {k: v for k, v in w.items() if "u_heads" not in k}, "it has no 'head_blocks.0"),
        ("imf", lambda w: w | {"net.u_heads.0.attn.q_proj.weight": torch.ones(32, 32)}, "twice"),
        ("imf", lambda w: w | {TABLE: w[TABLE] * float("nan")}, "has NaN or infinity"),
        ("imf", lambda w: w | {TABLE: w[TABLE].to(torch.complex64)}, "is not a plain tensor of floats"),
        ("soflow", lambda w: w, "it has no y_embedder|of imf"),
        ("pmf", lambda w: w, "and seems to be of format imf"),
        ("dit", lambda w: w, ""),
    ],
)
def test_other_files_are_refused_by_what_differs(form, change, reason, tmp_path):
    torch.save(change(MeanFlow("imf").w), tmp_path / "net")
    with pytest.raises(UserError, match=rf"^src=\S+net: .*{reason}") as refused:
        import_checkpoint(form, tmp_path / "net", **OPTIONS.get(form, {}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, {}, r"^base_std: is needed"),
        ({"net.pos_embed": torch.ones(1, 38, 32)}, OPTIONS["pmf"], "pos_embed has 18 places"),
        ({"net.pos_embed": torch.ones(1, 10, 32)}, OPTIONS["pmf"], "not a checkpoint of this format"),
        ({"net.x_embedder.proj2.weight": torch.ones(32, 5, 1, 1)}, OPTIONS["pmf"], "stem.1.weight is"),
        ({}, {"base_std": 0.0}, r"^base_std=0.0: must be from 0.001"),
        ({}, {"base_std": float("nan")}, r"^base_std=nan: must be from 0.001"),
        ({}, {"image_size": 8}, r"^image_size=8: has no use in format pmf"),
    ],
)
def test_other_files_of_pixels_are_refused(change, options, reason, tmp_path):
    torch.save(MeanFlow("pmf").w | change, tmp_path / "net")
    with pytest.raises(UserError, match=reason) as refused:
        import_checkpoint("pmf", tmp_path / "net", **options)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_commands_sample_with_the_guidance_of_the_authors_unless_told_otherwise(tmp_path):
    """The import prints it, the card has it, and samples are those of the same weight and times given by hand."""
    sizes = {"width": 768, "heads": 12, "shared": 4, "head": 8, "hidden": 8, "patch": 4}
    MeanFlow("imf", **sizes).save(tmp_path / "net.pth")
    flags = [f"--src={tmp_path}/net.pth", f"--out={tmp_path}/map", "--image_size=8"]
    done = run_script("scripts/import_checkpoint.py", *flags, check=True)
    line = "--sampler=map, plain jumps, equal steps, --guidance=8 --guidance_interval=0.35,0.6"
    assert line in done.stdout and "left out of the file: v_final_layer.*" in done.stdout
    assert "format   imf, as its content shows" in done.stdout
    card = (tmp_path / "map/README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=8, guidance_interval=(0.35, 0.6)" in card
    fm = FlowMap.from_pretrained(tmp_path / "map")
    fm.decoder = Decoder(str(write_vae(tmp_path / "vae")), fm.info)
    fm.open_decoder()
    fm.save_pretrained(tmp_path / "map")
    made = {}
    given = {"usual": [], "alike": ["--guidance=8", "--guidance_interval=0.35,0.6"], "none": ["--guidance=1"]}
    for name, more in given.items():
        common = [f"--checkpoint={tmp_path}/map", "--steps=2", "--num=3", f"--out={tmp_path}/{name}"]
        done = run_script("scripts/sample.py", *common, *more, check=True)
        assert ("guidance 8.0 from 0.35 to 0.6" in done.stdout) != (name == "none")
        made[name] = np.load(tmp_path / name / "samples-2.npz")["arr_0"]
    assert (made["usual"] == made["alike"]).all() and (made["usual"] != made["none"]).any()
    options = fm.info.usual_guidance()
    x = torch.cat([x for x, _ in generate(fm, uniform_times(2), 3, 0, **options)])
    assert (to_uint8(fm.decode(x)).permute(0, 2, 3, 1).numpy() == made["usual"]).all()


def test_step_sizes_of_such_a_map_are_for_no_guidance_and_the_next_command_says_so(tmp_path):
    fm = import_checkpoint("imf", MeanFlow("imf").save(tmp_path / "net"), image_size=8)
    fm.info = replace(fm.info, recommended_guidance=(3.0, 0.2, 0.6))
    fm.save_pretrained(tmp_path / "map")
    flags = [f"--checkpoint={tmp_path}/map", "--steps=2", "--noises=2", "--fine=4", f"--out={tmp_path}/steps.json"]
    done = run_script("scripts/schedule.py", *flags, check=True)
    assert f"--schedule={tmp_path}/steps.json --guidance=1" in done.stdout


@pytest.mark.parametrize("recommended", [(3.0,), (13.0, 0.2, 0.5), (3.0, 0.5, 0.2), (float("nan"), 0.2, 0.5)])
def test_a_recommendation_that_the_map_cannot_follow_is_refused(recommended):
    with pytest.raises(UserError, match=r"^guidance"):
        FlowMapInfo(guidance_max=12.0, guidance_interval=True, num_classes=5, recommended_guidance=recommended)
