"""Published checkpoints: files of the true structure, made here, against evaluations written from the papers."""

import argparse
import json

import pytest
import released
import torch

from flowmaps import FlowMap
from flowmaps.importers import import_checkpoint


def drift_of_denoiser(denoise, x, t, base_std, *rest):
    """(D(x / t, sigma) - x) / (1 - t)."""
    sigma, t = base_std * (1 - t) / t, t[:, None, None, None]
    return (denoise(x / t, sigma, *rest) - x) / (1 - t)


def close(ours, theirs, bound=1e-5):
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


T = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99])


@pytest.mark.parametrize("variant", ["ddpm++", "adm"])
def test_edm(variant, tmp_path):
    net = released.edm(variant, tmp_path / "net.pkl")
    fm = import_checkpoint("edm", tmp_path / "net.pkl")
    x, label = 0.5 * torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 4, 5])
    classes = torch.eye(6)[label][:, :5]  # 5: no label
    with torch.no_grad():
        theirs = drift_of_denoiser(net.double(), x.double(), T.double(), 0.5, classes.double())
        close(fm.double().drift(x.double(), T.double(), label), theirs)
    assert fm.info.t_range == (0.5 / 80.5, 0.5 / 0.502) and fm.info.kind == "drift"
    assert fm.network.config.dropout == 0.1 and fm.network.config.augment_dim == 9
    assert len(fm.info.origin["sha256"]) == 64 and "NC" in fm.info.origin["license"]
    fm.float().save_pretrained(tmp_path / "out")
    again = FlowMap.from_pretrained(tmp_path / "out")
    assert again.info == fm.info and again.fingerprint() == fm.fingerprint()


@pytest.mark.parametrize("classes", [0, 5])
def test_edm2(classes, tmp_path):
    net = released.edm2(tmp_path / "net.pkl", classes)
    fm = import_checkpoint("edm2", tmp_path / "net.pkl")
    x, label = 0.5 * torch.randn(5, 4, 16, 16), torch.tensor([0, 1, 2, 4, 5]) if classes else None
    given = torch.eye(6)[label][:, :5] if classes else torch.zeros(5, 0)
    with torch.no_grad():
        theirs = drift_of_denoiser(net.double(), x.double(), T.double(), 0.5, given.double())
        close(fm.double().drift(x.double(), T.double(), label), theirs)
    latents = json.loads(fm.info.origin["latents"])
    assert latents["vae"] == "stabilityai/sd-vae-ft-mse" and latents["scale"][1] == pytest.approx(0.5 / 4.62)


@pytest.mark.parametrize("kind", ["dit", "sit"])
@pytest.mark.parametrize("training", [False, True])
def test_transformers(kind, training, tmp_path):
    """Released weights are a bare state dict; a training checkpoint has its EMA and argparse's namespace too."""
    model, file = released.Transformer(), tmp_path / "net.pt"
    plain = {k: torch.zeros_like(v) for k, v in model.w.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save({"model": plain, "ema": model.w, "opt": {"state": {}}, "args": args} if training else model.w, file)
    fm = import_checkpoint(kind, file)
    x, label, t = torch.randn(5, 4, 8, 8).double(), torch.tensor([0, 1, 2, 4, 5]), T.double().clamp(0.01, 0.985)
    if kind == "sit":
        theirs = model(x, t, label)
    else:
        a = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        k = torch.tensor([990, 700, 400, 30, 0])
        t = 1 / (1 + ((1 - a[k]) / a[k]).sqrt())  # where sigma = (1 - t) / t is that of step k
        z = x / t[:, None, None, None] * a[k].sqrt()[:, None, None, None]
        theirs = (x - model(z, k.double(), label)) / t[:, None, None, None]
    with torch.no_grad():
        close(fm.double().drift(x, t, label), theirs)
    assert fm.info.num_classes == 5 and fm.info.label_dropout > 0 and fm.base_std == 1


def test_rectified_flow(tmp_path):
    model = released.NCSNpp()
    model.save(tmp_path / "checkpoint_10.pth")
    fm = import_checkpoint("rectified_flow", tmp_path / "checkpoint_10.pth")
    x, t = torch.randn(5, 3, 32, 32).double(), T.double()
    with torch.no_grad():
        close(fm.double().drift(x, t), model(x, 999 * (t * (1 - 1e-3) + 1e-3)))
    assert fm.info.num_classes == 0 and fm.info.t_range == (0, 1) and fm.base_std == 1


@pytest.mark.parametrize("kind", ["ddpm", "diffusers"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers(kind, pipeline, tmp_path):
    """Against diffusers' own UNet2DModel and its DDPM scheduler's table."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    options = {"ddpm": {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}}.get(kind, {})
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None if kind == "ddpm" else 8,
        num_class_embeds=None if kind == "ddpm" else 5,
        **options,
    )
    net, scheduler = released.randomise(net, 0.05).double(), DDPMScheduler()
    DDPMPipeline(net, scheduler).save_pretrained(tmp_path) if pipeline else net.save_pretrained(tmp_path)
    fm = import_checkpoint("diffusers_unet", tmp_path).double()
    x, label = torch.randn(4, 3, 8, 8).double(), None if kind == "ddpm" else torch.tensor([0, 1, 2, 4])
    k, a = torch.tensor([999, 500, 20, 0]), scheduler.alphas_cumprod.double()
    t = 1 / (1 + ((1 - a[k]) / a[k]).sqrt())
    z, wide = x / t[:, None, None, None] * a[k].sqrt()[:, None, None, None], t[:, None, None, None]
    with torch.no_grad():
        theirs = (x - net(z, k, label).sample) / wide
        close(fm.drift(x, t, label), theirs)
