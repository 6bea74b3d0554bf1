"""Snapshots of ECT and CMT as consistency models, against their map from the paper's equations; and EDM's NCSN++."""

import pytest
import torch
from helpers import released, released_ect, released_edm2

from flowmaps import FlowMap, UserError
from flowmaps.importers import import_checkpoint
from samplers import stochastic


def jumped(fm, x, s, label=None):
    """X_{s,1}(x)."""
    with torch.no_grad():
        return x + (1 - s)[:, None, None, None] * fm.velocity(x, s, torch.ones_like(s), label)


@pytest.mark.parametrize(
    ("form", "variant", "least"),
    [
        ("ect", "ddpm++", 0.003),
        ("edm", "ddpm++", 0.003),
        ("ect", "ncsn++", 0.003),
        ("edm", "adm", 0),
    ],
)
def test_ect(form, variant, least, tmp_path):
    net = released_ect.ect(tmp_path / "net.pkl", variant, least).double()
    fm = import_checkpoint(form, tmp_path / "net.pkl").double()
    assert fm.info.kind == "consistency" and fm.info.t_range[0] == 0
    s = torch.tensor([0, 0.001, 0.2, 0.9, 0.99]).double()
    x, label = 0.5 * torch.randn(5, 3, 16, 16).double(), torch.tensor([0, 1, 2, 4, 5])
    sigma = (0.5 * (1 - s) / s).clamp(max=80)
    y = x * (sigma / (0.5 * (1 - s)))[:, None, None, None]  # at time 0: 80 times normal noise
    with torch.no_grad():
        theirs = net(y, sigma, torch.eye(6)[label][:, :5].double())
    assert (jumped(fm, x, s, label) - theirs).abs().max() < 1e-7
    one = torch.ones(5).double()
    assert torch.equal(jumped(fm, x, one, label), x)
    fm.float().save_pretrained(tmp_path / "out")
    again = FlowMap.from_pretrained(tmp_path / "out")
    assert again.info == fm.info and again.fingerprint() == fm.fingerprint()


class Map:
    """X_{s,t} without a check of its kind, which allows no other time than t = 1."""

    def __init__(self, fm):
        self.fm = fm

    def __call__(self, x, s, t, label=None):
        assert (t == 1).all()
        return jumped(self.fm, x, s, label)


def test_two_steps_are_those_of_its_sampler(tmp_path):
    """From 80 e to data, noise of 0.821 added, and to data again."""
    net = released_ect.ect(tmp_path / "net.pkl", classes=0).double()
    fm = import_checkpoint("ect", tmp_path / "net.pkl").double()
    first, second = (torch.randn(2, 3, 16, 16).double() for _ in range(2))
    with torch.no_grad():
        x = net(80 * first, torch.full((2,), 80.0).double(), None)
        theirs = net(x + 0.821 * second, torch.full((2,), 0.821).double(), None)
        middle = 0.5 / (0.5 + 0.821)
        times = torch.tensor([0, middle, 1]).double()
        path = fm.interpolant
        ours = stochastic(Map(fm), 0.5 * first, times, path=path, noise=lambda k: 0.5 * second)
    assert (ours - theirs).abs().max() < 1e-7
    with pytest.raises(UserError, match="consistency model"):
        fm.info.check_sampler("map", 2)


@pytest.mark.parametrize("classes", [0, 5])
def test_cmt_on_edm2(classes, tmp_path):
    """Its files have nothing but the network: the format says that it is a consistency model of EDM2's latents."""
    net = released_edm2.edm2(tmp_path / "net.pkl", classes)
    encoder = import_checkpoint("edm2", tmp_path / "net.pkl").info
    net.unet.enc["16x16_block0"].dropout = 0.0
    released.dump({"ema": net}, tmp_path / "net.pkl")
    fm = import_checkpoint("ect", tmp_path / "net.pkl").double()
    assert fm.info.kind == "consistency" and "latents as EDM2" in fm.info.origin["assumed"]
    for name in ("vae", "vae_range", "latent_shift", "latent_scale"):
        assert getattr(fm.info, name) == pytest.approx(getattr(encoder, name)), name
    s, x = torch.tensor([0.0, 0.5]).double(), 0.5 * torch.randn(2, 4, 16, 16).double()
    label, given = (torch.tensor([1, 5]), torch.eye(6)[[1, 5]][:, :5]) if classes else (None, torch.zeros(2, 0))
    with torch.no_grad():
        theirs = net.double()(x * torch.tensor([160, 2])[:, None, None, None], torch.tensor([80, 0.5]), given.double())
    assert (jumped(fm, x, s, label) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_denoiser_is_not_a_consistency_model(tmp_path):
    net = released.edm("ddpm++", tmp_path / "net.pkl")
    loss = released_ect.ECMLoss()
    type(loss).__name__ = "EDMLoss"
    try:
        released.dump({"ema": net, "loss_fn": loss}, tmp_path / "net.pkl")
    finally:
        type(loss).__name__ = "ECMLoss"
    with pytest.raises(UserError, match="its loss is EDMLoss, not that of a consistency model: choose format edm"):
        import_checkpoint("ect", tmp_path / "net.pkl")


@pytest.mark.parametrize("mult", [(1, 2), (1, 2, 2)])
def test_ncsn(mult, tmp_path):
    """EDM's -ve files: Fourier features, filters (1, 3, 3, 1), and the input again at every level."""
    net = released.edm("ncsn++", tmp_path / "net.pkl", mult=mult, attention=(8,)).double()
    fm = import_checkpoint("edm", tmp_path / "net.pkl").double()
    t, label = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99]).double(), torch.tensor([0, 1, 2, 4, 5])
    x, wide = 0.5 * torch.randn(5, 3, 16, 16).double(), t[:, None, None, None]
    with torch.no_grad():
        denoised = net(x / wide, 0.5 * (1 - t) / t, torch.eye(6)[label][:, :5].double())
        theirs = (denoised - x) / (1 - wide)
        assert (fm.drift(x, t, label) - theirs).abs().max() < 1e-7 * theirs.abs().max()
    assert fm.network.config.variant == "ncsn++" and fm.info.kind == "drift"
    with pytest.raises(UserError, match="resample_filter is not that of"):
        net.model.enc["8x8_aux_residual"].resample_filter = torch.full((1, 1, 2, 2), 0.25)
        released.dump({"ema": net.float()}, tmp_path / "net.pkl")
        import_checkpoint("edm", tmp_path / "net.pkl")
