"""Published flow maps: files of the true nesting, names and shapes, against evaluations from the papers' formulas."""

import argparse

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.makers import write_vae
from helpers.released_maps import Map

from flowmaps import FlowMap, UserError
from flowmaps.importers import FORMATS, import_checkpoint
from flowmaps.vae import Decoder
from samplers import rollout, stochastic, uniform_times

OPTIONS = {"soflow": {"heads": 2}, "meanflow_sit": {"heads": 2, "guidance": 2.0}, "dmf": {"heads": 2, "decoupled": 2}}
GUIDANCE = {"soflow": 3.0, "meanflow_sit": 2.0, "dmf": 2.5}
LABEL = torch.tensor([0, 1, 2, 4, 5])  # the last: no label


def points():
    g = torch.Generator().manual_seed(2)
    x, times = torch.randn(5, 4, 8, 8, generator=g, dtype=torch.float64), torch.rand(2, 5, generator=g).double()
    s, t = times.sort(dim=0).values
    return x, s, t


@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_published_map(form, qk_norm, tmp_path):
    """Its velocity for any two times, its drift, and one and two jumps as its authors make them."""
    theirs = Map(form, qk_norm=qk_norm)
    fm = import_checkpoint(form, theirs.save(tmp_path / "net.pt"), **OPTIONS[form]).double()
    x, s, t = points()
    with torch.no_grad():
        for start, end in ((s, t), (s, s), (torch.zeros_like(s), torch.ones_like(t))):
            expected = theirs(x, start, end, LABEL)
            assert expected.std() > 0.1
            assert (fm.velocity(x, start, end, LABEL) - expected).abs().max() <= 1e-5 * expected.abs().max()
        half = torch.full_like(s, 0.5)
        middle = x + 0.5 * theirs(x, 0 * s, half, LABEL)
        expected = middle + 0.5 * theirs(middle, half, 2 * half, LABEL)
        jumped = rollout(fm, x, uniform_times(2), LABEL)
        assert (jumped - expected).abs().max() <= 1e-5 * expected.abs().max()
    info = fm.info
    assert (info.kind, info.t_range, fm.base_std, info.shape) == ("map", (0, 1), 1.0, (4, 8, 8))
    assert (info.num_classes, info.label_dropout, info.guidance) == (5, 0.1, GUIDANCE[form])
    with pytest.raises(UserError, match="is baked into this model"):
        info.check_guidance(1.5)


@pytest.mark.parametrize(
    ("form", "vae", "scale"), [("soflow", "mse", 0.18215), ("meanflow_sit", "ema", 0.18125), ("dmf", "ema", 0.18215)]
)
def test_facts_about_latents_are_those_of_the_authors(form, vae, scale, tmp_path):
    """MeanFlow SiT's scale is 0.18125; DMF's latents are encoded by one VAE and decoded by the other."""
    fm = import_checkpoint(form, Map(form).save(tmp_path / "net.pt"), **OPTIONS[form])
    assert fm.info.vae == f"stabilityai/sd-vae-ft-{vae}"
    assert (fm.info.latent_shift, fm.info.latent_scale) == (4 * (0.0,), 4 * (scale,))
    assert fm.info.origin.get("latents encoded by", "") == ("stabilityai/sd-vae-ft-mse" if form == "dmf" else "")
    fm.save_pretrained(tmp_path / "out")
    again, card = FlowMap.from_pretrained(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert again.info == fm.info and again.fingerprint() == fm.fingerprint()
    assert FORMATS[form].license in card and form in card and fm.info.origin["sha256"] in card


def test_the_sampling_of_the_authors_is_recorded(tmp_path):
    """SoFlow's two steps have fresh noise between them; DMF's at 512 have another grid."""
    found = {form: import_checkpoint(form, Map(form).save(tmp_path / form), **OPTIONS[form]) for form in OPTIONS}
    assert {form: fm.info.sampler for form, fm in found.items()} == {
        "soflow": "stochastic",
        "meanflow_sit": "map",
        "dmf": "map",
    }
    assert all(fm.info.times("map", 2) is None for fm in found.values())
    large = Map("dmf", size=64, patch=32, qk_norm=True)
    fm = import_checkpoint("dmf", large.save(tmp_path / "large"), **OPTIONS["dmf"])
    assert fm.info.times("map", 2).tolist() == [0, 0.4, 1]
    assert fm.info.times("map", 4).tolist() == pytest.approx([0, 0.25 / 1.375, 0.4, 0.75 / 1.125, 1])
    fm.save_pretrained(tmp_path / "out")
    assert FlowMap.from_pretrained(tmp_path / "out").info.times("map", 2).tolist() == [0, 0.4, 1]


def test_a_training_checkpoint_and_what_is_left_out_of_files(tmp_path):
    theirs = Map("meanflow_sit")
    fm = import_checkpoint("meanflow_sit", theirs.save(tmp_path / "a", training=True), **OPTIONS["meanflow_sit"])
    x, s, t = points()
    with torch.no_grad():
        expected = theirs(x, s, t, LABEL)
        assert (fm.double().velocity(x, s, t, LABEL) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert fm.info.origin["left out"] == "model, opt, args, steps"
    fm = import_checkpoint("soflow", Map("soflow").save(tmp_path / "b"), heads=2)
    assert fm.info.origin["left out"] == "model, optimizer, finished_steps, finished_epochs"
    fm = import_checkpoint("dmf", Map("dmf").save(tmp_path / "c"), **OPTIONS["dmf"])
    assert fm.info.origin["left out"] == "logvar_linear.weight, logvar_linear.bias"
    assert (
        "left out"
        not in import_checkpoint(
            "meanflow_sit", Map("meanflow_sit").save(tmp_path / "d"), **OPTIONS["meanflow_sit"]
        ).info.origin
    )


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


TABLE, SECOND = "y_embedder.embedding_table.weight", "s_embedder.mlp.2.weight"


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("soflow", lambda w: without(w, SECOND), "embedding.gap.2.weight is missing"),
        (
            "soflow",
            lambda w: w | {SECOND: torch.zeros(128, 64)},
            r"embedding.gap.2.weight is \(128, 64\), expected \(128, 128\)",
        ),
        ("soflow", lambda w: without(w, TABLE), f"it has no '{TABLE}'"),
        ("soflow", lambda w: w | {"blocks.0.attn.q_norm.weight": torch.ones(64)}, "k_norm"),
        ("soflow", lambda w: w | {"pos_embed": w["pos_embed"] + 1}, "pos_embed is not DiT's table"),
        ("soflow", lambda w: w | {"guidance_embedder.mlp.0.weight": torch.ones(1)}, "are those of tvm"),
        ("meanflow_sit", lambda w: w, "its weights are those of soflow"),
        ("dmf", lambda w: w, "its weights are those of soflow"),
        (
            "soflow",
            lambda w: {k.replace("s_embedder", "r_embedder"): v for k, v in w.items()},
            "are those of meanflow_sit",
        ),
        ("soflow", lambda w: {k: v for k, v in w.items() if "s_embedder" not in k}, "are those of dit or sit"),
        ("dmf", lambda w: {k: v for k, v in w.items() if "s_embedder" not in k}, "are those of dit or sit"),
    ],
)
def test_other_files_are_refused_by_what_differs(form, change, reason, tmp_path):
    torch.save(change(Map("soflow").w), tmp_path / "net")
    with pytest.raises(UserError, match=rf"^src=\S+net: .*{reason}") as refused:
        import_checkpoint(form, tmp_path / "net", **OPTIONS[form])
    assert "\n" not in str(refused.value)


def test_other_conventions_are_refused(tmp_path):
    content = {"ema": Map("meanflow_sit").w, "args": argparse.Namespace(path_type="cosine")}
    torch.save(content, tmp_path / "net")
    with pytest.raises(UserError, match="path_type is cosine"):
        import_checkpoint("meanflow_sit", tmp_path / "net", **OPTIONS["meanflow_sit"])
    with pytest.raises(UserError, match=r"^guidance: is needed"):
        import_checkpoint("meanflow_sit", Map("meanflow_sit").save(tmp_path / "net"), heads=2)
    with pytest.raises(UserError, match=r"^decoupled: is needed"):
        import_checkpoint("dmf", Map("dmf").save(tmp_path / "net"), heads=2)
    with pytest.raises(UserError, match=r"^decoupled=4: must be from 1 to 3"):
        import_checkpoint("dmf", Map("dmf").save(tmp_path / "net"), heads=2, decoupled=4)
    with pytest.raises(UserError, match=r"^format=facm: is not supported: .*VA-VAE"):
        import_checkpoint("facm", tmp_path / "missing")


@pytest.mark.parametrize(
    ("omega", "kappa", "weight"),
    [(0.2, 0.92, 2.5), (1.0, 0.5, 2.0), (0.0, 0.0, None), (1, 0, None), (-1, 0, "refused")],
)
def test_guidance_in_the_arguments_of_a_training_decides(omega, kappa, weight, tmp_path):
    args = argparse.Namespace(cfg_omega=omega, cfg_kappa=kappa)
    torch.save({"ema": Map("meanflow_sit").w, "args": args}, tmp_path / "net")
    if weight == "refused":
        with pytest.raises(UserError, match="cfg_omega and cfg_kappa are -1 and 0"):
            import_checkpoint("meanflow_sit", tmp_path / "net", heads=2)
        return
    fm = import_checkpoint("meanflow_sit", tmp_path / "net", heads=2)
    assert fm.info.guidance == (None if weight is None else pytest.approx(weight))


@pytest.mark.slow
def test_published_sizes_need_no_option(tmp_path):
    """Heads, guidance and the blocks of DMF follow from the published width and depth."""
    for form, sizes in (("soflow", {"width": 768, "depth": 12}), ("meanflow_sit", {"width": 768, "depth": 12})):
        fm = import_checkpoint(form, Map(form, patch=4, heads=12, **sizes).save(tmp_path / form))
        assert fm.network.config.heads == 12 and fm.info.guidance == GUIDANCE[form]
    fm = import_checkpoint("dmf", Map("dmf", width=64, depth=28, heads=1).save(tmp_path / "dmf"), heads=1)
    assert fm.network.config.decoupled == 20


def test_a_map_without_guidance_and_one_without_labels(tmp_path):
    fm = import_checkpoint("soflow", Map("soflow").save(tmp_path / "net"), heads=2, guidance=1.0)
    assert fm.info.guidance is None and "guidance" not in fm.info.origin.get("assumed", "")
    fm = import_checkpoint("soflow", Map("soflow", classes=0).save(tmp_path / "net"), heads=2)
    assert (fm.info.guidance, fm.info.num_classes) == (None, 0)


def test_stochastic_jumps_are_those_of_the_authors(tmp_path):
    """Jump to data, fresh noise at time one half, jump again."""
    theirs = Map("soflow")
    fm = import_checkpoint("soflow", theirs.save(tmp_path / "net"), heads=2).double()
    x, fresh = points()[0], torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(7)).double()
    start, end = torch.zeros(5).double(), torch.ones(5).double()
    with torch.no_grad():
        middle = 0.5 * fresh + 0.5 * (x + theirs(x, start, end, LABEL))
        expected = middle + 0.5 * theirs(middle, end / 2, end, LABEL)
        found = stochastic(fm, x, uniform_times(2), LABEL, path=fm.interpolant, noise=lambda step: fresh, gamma=1.0)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_commands_sample_as_the_authors_do_unless_told_otherwise(tmp_path):
    """Two steps of SoFlow by default are the stochastic ones, whose second one starts from fresh noise."""
    fm = import_checkpoint("soflow", Map("soflow", width=64, heads=1, depth=1).save(tmp_path / "net"))
    fm.decoder = Decoder(str(write_vae(tmp_path / "vae")), fm.info)
    fm.open_decoder()
    fm.save_pretrained(tmp_path / "map")
    for name, flags in (("usual", []), ("stochastic", ["--sampler=stochastic"]), ("plain", ["--sampler=map"])):
        common = [f"--checkpoint={tmp_path}/map", "--steps=2", "--num=4", f"--out={tmp_path}/{name}"]
        run_script("scripts/sample.py", *common, *flags, check=True)
    usual, chosen, plain = (np.load(tmp_path / f"{n}/samples-2.npz")["arr_0"] for n in ("usual", "stochastic", "plain"))
    assert (usual == chosen).all() and (usual != plain).any()


def test_the_script_says_how_the_authors_sample_and_what_it_left_out(tmp_path):
    Map("soflow").save(tmp_path / "net.pt")
    flags = [f"--src={tmp_path}/net.pt", f"--out={tmp_path}/made", "--heads=2"]
    done = run_script("scripts/import_checkpoint.py", "--format=soflow", *flags)
    assert done.returncode == 0, done.stderr
    for line in ("--sampler=stochastic", "left out of the file: model, optimizer", "guidance 3.0", "license: code MIT"):
        assert line in done.stdout
    assert FlowMap.from_pretrained(tmp_path / "made").info.sampler == "stochastic"
    assert "--sampler=stochastic" in (tmp_path / "made/README.md").read_text()
    done = run_script("scripts/import_checkpoint.py", "--format=facm", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--format=facm: is not supported" in done.stderr
