"""From a tree of images to scored samples of a model of latents, by the commands that a user types."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.makers import small_inception, write_inception, write_vae
from helpers.runs import assert_same, weights
from helpers.small_networks import small
from safetensors.torch import load_file

from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.vae import decode, moments, open_vae
from training.config_rows import load_row
from training.trainer import Trainer


@pytest.fixture(scope="module")
def latents(imagenet_root, tmp_path_factory):
    """32 images of 64 x 64 as latents of 8 x 8."""
    out = tmp_path_factory.mktemp("latents") / "set"
    flags = [f"--src={imagenet_root / 'train'}", f"--vae={imagenet_root / 'vae'}", "--size=64", "--flip"]
    run_script("scripts/prepare_data.py", "latents", *flags, f"--out={out}", check=True)
    return out


def small_flags(latents, prefix="--config"):
    return [f"{prefix}.data.root={latents}", f"{prefix}.network.image_size=8", f"{prefix}.network.num_classes=32"]


@pytest.fixture(scope="module")
def run(latents, tmp_path_factory):
    """20 steps of MeanFlow with guidance baked in, stopped after 10 and resumed."""
    workdir = tmp_path_factory.mktemp("run") / "stopped"
    flags = ["--config=configs/imagenet256.py:mean_flow,smoke", f"--workdir={workdir}", *small_flags(latents)]
    run_script("scripts/train.py", *flags, "--config.steps=10", check=True)
    run_script("scripts/train.py", *flags, check=True)
    assert '"event": "resume", "step": 10' in (workdir / "log.jsonl").read_text()
    return workdir


def test_a_resumed_run_has_the_weights_of_one_that_never_stopped(run, latents, tmp_path):
    flags = ["--config=configs/imagenet256.py:mean_flow,smoke", f"--workdir={tmp_path}", *small_flags(latents)]
    run_script("scripts/train.py", *flags, "--config.data.workers=0", check=True)
    for file in ("network", "ema-0.9999", "optimizer"):
        assert_same(weights(tmp_path, file), weights(run, file))


def test_samples_are_decoded_and_scored(run, imagenet_root, tmp_path):
    flags = [f"--checkpoint={run}", "--steps=2", "--num=8"]
    run_script("scripts/sample.py", *flags, f"--out={tmp_path}", check=True)
    made = np.load(tmp_path / "samples-2.npz")
    assert made["arr_0"].shape == (8, 64, 64, 3) and made["label"].tolist() == list(range(8))
    weights = f"--weights={write_inception(tmp_path / 'inception.pth')}"
    reference = ["--extractor=inception", weights, f"--out={tmp_path / 'reference.npz'}"]
    with small_inception(tmp_path):
        run_script(tmp_path / "stats.py", f"--data={imagenet_root / 'imagenet64'}", *reference, check=True)
    found = []
    for source in (flags, [f"--samples={tmp_path / 'samples-2.npz'}"]):
        score = [f"--reference={tmp_path / 'reference.npz'}", weights, f"--json={tmp_path / 'fid.json'}"]
        run_script(tmp_path / "fid.py", *source, *score, check=True)
        found.append(json.loads((tmp_path / "fid.json").read_text()))
    assert len(found[0]["model"]["vae"]["sha256"]) == 64 and found[0]["reference"]["n"] == 32
    assert found[0]["results"][0]["FID"] == pytest.approx(found[1]["results"][0]["FID"], rel=1e-3)


def test_the_export_is_a_complete_pipeline(run, imagenet_root):
    fm, pipe = FlowMap.from_pretrained(run), FlowMapPipeline.from_pretrained(run / "model")
    assert fm.info.latent_scale == 4 * (0.18215,) and fm.info.vae == str(imagenet_root / "vae")
    assert fm.info.guidance == 2.5 and fm.info.label_dropout == 0.1
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=2).images[0].size == (64, 64)
    x = torch.randn(2, 4, 8, 8)
    theirs = decode(open_vae(str(imagenet_root / "vae")), x, fm.info)
    torch.testing.assert_close(fm.decode(x), theirs)


@pytest.mark.slow
def test_a_chain_from_a_small_guided_teacher(latents, tmp_path):
    """A guided B/4 is the teacher of a larger network, whose map is then guided too."""
    stages = ("pre_training", "mid_training", "post_training")
    flags = [flag for stage in stages for flag in small_flags(latents, f"--config.{stage}")]
    command = ["--config=configs/imagenet256.py:cmt,smoke", f"--workdir={tmp_path}", *flags]
    run_script("scripts/train.py", *command, "--config.pre_training.network.width=16", check=True)
    infos = [FlowMap.from_pretrained(tmp_path / stage).info for stage in stages]
    assert [info.kind for info in infos] == ["drift", "map", "map"] and {info.guidance for info in infos} == {2.5}
    assert all((tmp_path / stage / "model/vae").is_dir() for stage in stages)


def test_data_order_and_noise_follow_the_seed_of_the_run(latents):
    """The latent's own noise depends on the step alone, so that it is the same after a resume and for any workers."""
    config = load_row("configs/imagenet256.py", "lagrangian,smoke")
    config.data.root, config.network.image_size, config.network.num_classes = str(latents), 8, 32
    config.data.workers = 0
    seen = []
    for _ in range(2):
        trainer = Trainer.build(config)
        trainer.micro_step_loss(3, 0)
        seen.append(trainer.latest[0][0])
    assert torch.equal(*seen)
    mean = open_dataset("prepared", root=str(latents)).fetch(trainer.loader.indices(3))[0][:, 0].float()
    assert seen[0].shape == (16, 4, 8, 8) and (seen[0] - 0.18215 * mean).std() < 0.18215 * 2


MISTAKES = {
    "flip": ({"flip": True}, r"^data\.flip: .* latents \(.* mirror images too"),
    "augment": ({"augment": 0.1}, r"^data\.augment: .* latents"),
    "vae": ({"vae": "nowhere/no/vae"}, r"data\.vae=nowhere/no/vae"),
    "scale": ({"latent_scale": (1.0, 2.0)}, r"^data\.latent_scale=\(1\.0, 2\.0\): must be 4 numbers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_that_latents_cannot_take_are_refused(name, latents):
    config = load_row("configs/imagenet256.py", "lagrangian,smoke")
    config.data.root, config.network.image_size, config.network.num_classes = str(latents), 8, 32
    for field, value in MISTAKES[name][0].items():
        setattr(config.data, field, value)
    with pytest.raises(UserError, match=MISTAKES[name][1]):
        Trainer.build(config)


def test_a_vae_for_images_is_refused(imagenet_root):
    config = load_row("configs/imagenet64.py", "lagrangian,smoke")
    config.data.root, config.network.num_classes = str(imagenet_root / "imagenet64"), 32
    config.data.vae = str(imagenet_root / "vae")
    with pytest.raises(UserError, match=r"^data\.vae: only for latents"):
        Trainer.build(config)


def test_weights_for_latents_of_another_scaling_are_refused(latents, tmp_path):
    config = load_row("configs/imagenet256.py", "lagrangian,smoke")
    config.data.root, config.network.image_size, config.network.num_classes = str(latents), 8, 32
    trainer = Trainer.build(config)
    fm = trainer.averaged(0)
    fm.info = replace(fm.info, latent_scale=4 * (0.13025,))
    fm.save_pretrained(tmp_path / "other")
    config.init_from = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"^init_from=.* another scaling: data\.latent_scale=0\.13025,"):
        Trainer.build(config)
    config.data.latent_scale = 4 * (0.13025,)
    assert Trainer.build(config).averaged(0).info.latent_scale == 4 * (0.13025,)
    config.init_from, config.teacher = "", str(tmp_path / "other")
    config.data.latent_scale, config.data.label_dropout = (), 0.0
    with pytest.raises(UserError, match=r"teacher.* another scaling"):
        Trainer.build(config)


def test_a_set_and_weights_for_different_ranges_of_the_vae_are_refused(latents, imagenet_root, tmp_path):
    """A set that does not say was made for [-1, 1]; one for [0, 1] has other moments and trains weights that say so."""
    flags = [f"--src={imagenet_root / 'train'}", f"--vae={imagenet_root / 'vae'}", "--size=64"]
    run_script("scripts/prepare_data.py", "latents", *flags, "--vae_range=0,1", f"--out={tmp_path / 'set'}", check=True)
    made = open_dataset("prepared", root=str(tmp_path / "set"))
    pixels = open_dataset("prepared", root=str(imagenet_root / "imagenet64")).fetch(torch.tensor([0]))[0]
    expected = moments(open_vae(str(imagenet_root / "vae")), pixels / 127.5 - 1, (0.0, 1.0))
    torch.testing.assert_close(made.fetch(torch.tensor([0]))[0].float(), expected, rtol=2e-3, atol=1e-3)
    refused = run_script("scripts/prepare_data.py", "latents", *flags, f"--out={tmp_path / 'set'}")
    assert refused.returncode == 2 and "latents of another vae_range ([0.0, 1.0], now [-1.0, 1.0])" in refused.stderr
    shutil.copytree(latents, tmp_path / "old")
    card = json.loads((tmp_path / "old/latents.json").read_text())
    del card["vae_range"]
    (tmp_path / "old/latents.json").write_text(json.dumps(card))

    config = load_row("configs/imagenet256.py", "lagrangian,smoke")
    config.network.image_size, config.network.num_classes, config.data.root = 8, 32, str(tmp_path / "set")
    fm = Trainer.build(config).averaged(0)
    assert fm.info.vae_range == (0.0, 1.0)
    fm.save_pretrained(tmp_path / "model")
    config.data.root, config.init_from = str(tmp_path / "old"), str(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"^init_from=.*in 0 \.\. 1, the prepared set of one for -1 \.\. 1.*vae_range=0,1"
    ):
        Trainer.build(config)
    config.init_from, config.teacher, config.data.label_dropout = "", config.init_from, 0.0
    with pytest.raises(UserError, match=r"^teacher=.*pixels in 0 \.\. 1"):
        Trainer.build(config)
    config.data.root = str(tmp_path / "set")
    Trainer.build(config)


@pytest.mark.parametrize("given", ["1,0", "a,b"])
def test_ranges_that_are_none_are_refused(given, imagenet_root, tmp_path):
    flags = [f"--src={imagenet_root / 'train'}", f"--vae={imagenet_root / 'vae'}", f"--vae_range={given}"]
    done = run_script("scripts/prepare_data.py", "latents", *flags, f"--out={tmp_path / 'set'}")
    assert done.returncode == 2 and f"--vae_range={given}" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_another_vae_is_warned_of(latents, tmp_path, capsys):
    config = load_row("configs/imagenet256.py", "lagrangian,smoke")
    config.data.root, config.network.image_size, config.network.num_classes = str(latents), 8, 32
    Trainer.build(config)
    assert capsys.readouterr().err == ""
    other = write_vae(tmp_path / "vae", latents_mean=4 * [0.0], latents_std=4 * [1.0])
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.bias"] += 1
    shutil.copytree(other, tmp_path / "changed")
    from safetensors.torch import save_file

    save_file(state, tmp_path / "changed/diffusion_pytorch_model.safetensors", {"format": "pt"})
    config.data.vae = str(tmp_path / "changed")
    Trainer.build(config)
    assert "is not the VAE that made" in capsys.readouterr().err


def test_a_judge_of_latents_needs_images_to_compare_with(latents):
    from training.best import BestModel
    from training.config import Best

    with pytest.raises(UserError, match=r"best\.reference: missing"):
        BestModel(Best(metric="FID"), open_dataset("prepared", root=str(latents)), 0, torch.device("cpu"))


def test_a_model_of_latents_without_a_vae_is_refused(tmp_path):
    fm = small("DiT", channels=4)
    fm.info = replace(fm.info, latent_shift=4 * (0.0,), latent_scale=4 * (1.0,))
    fm.save_pretrained(tmp_path / "model")
    done = run_script("scripts/sample.py", f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "--vae: missing" in done.stderr and not (tmp_path / "out").exists()
