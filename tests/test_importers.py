"""Published checkpoints: files of the true structure, made here, against evaluations written from the papers."""

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
