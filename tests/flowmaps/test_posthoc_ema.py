"""Power-function averages: their definition, and any width of them from snapshots of two."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.runs import assert_same, tiny, weights
from safetensors.torch import load_file

from configs.digits import get_config as digits
from flowmaps import FlowMap, UserError
from flowmaps.networks import NETWORKS, DiT, EDM2UNet, IMFDiT, UNet
from flowmaps.posthoc_ema import coefficients, exponent, inner, list_snapshots, reconstruct
from training.config import WIDEST, network
from training.ema import EMA
from training.loop import train
from training.trainer import Trainer

WIDTHS = (0.05, 0.1)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_exponent_gives_the_width(width):
    """Standard deviation of tau^gamma on [0, 1], by quadrature; EDM2's own two values beside it."""
    gamma = exponent(width)
    tau = (np.arange(100_000) + 0.5) / 100_000
    density = tau**gamma / (tau**gamma).sum()
    mean = (density * tau).sum()
    assert np.sqrt((density * (tau - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_weights_of_the_steps_are_the_integral_of_the_profile():
    """Weights that are 1 at step k alone average to (k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1)."""
    layer, n = torch.nn.Linear(1, 1, bias=False).double(), 12
    for k in range(1, n + 1):
        ema = EMA(layer, (0.999,), WIDTHS)
        for step in range(1, n + 1):
            torch.nn.init.constant_(layer.weight, float(step == k))
            ema.update(step)
        for width in WIDTHS:
            power = exponent(width) + 1
            expected = (k / n) ** power - ((k - 1) / n) ** power
            assert ema.state(f"width-{width}")["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_inner_products_by_quadrature():
    def profile(t, width, tau):
        gamma = exponent(width)
        return np.where(tau < t, (gamma + 1) * np.minimum(tau, t) ** gamma / t ** (gamma + 1), 0)

    tau = (np.arange(400_000) + 0.5) / 40_000  # to 10
    for a, b in (((4, 0.05), (10, 0.2)), ((10, 0.05), (4, 0.2)), ((7, 0.1), (7, 0.1))):
        expected = (profile(*a, tau) * profile(*b, tau)).sum() / 40_000
        assert inner(a, b) == pytest.approx(expected, rel=1e-3)
        assert inner(a, b) == pytest.approx(inner(b, a))
    kept = [(t, width) for t in (4, 7, 10) for width in WIDTHS]
    assert coefficients(kept, (7, 0.1)) == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-6)


def train_with_snapshots(config, workdir, also, steps=64, every=8):
    """A run with snapshots of WIDTHS, and the averages of the widths ``also`` kept directly; returns these."""
    config.steps, config.ema_widths, config.snapshot_every = steps, (*WIDTHS, *also), every
    config.log_every = config.sample_every = config.checkpoint_every = steps
    config.optim.warmup = 5
    trainer = Trainer.build(config)
    workdir.mkdir(exist_ok=True)
    for step in range(steps):
        trainer.step(step)
        if (step + 1) % every == 0:
            config.ema_widths = WIDTHS
            trainer.snapshot(workdir, step + 1)
    trainer.save(workdir, steps)
    return {width: trainer.ema.state(f"width-{width}") for width in also}, trainer


SMALL = {"image_size": 8, "channels": 1, "width": 16, "num_classes": 10}
KINDS = {
    "MLP": None,
    "UNet": network(UNet, **SMALL, channel_mult=(1, 2), blocks=1, attention_resolutions=()),
    "EDM2UNet": network(EDM2UNet, **SMALL, channel_mult=(1, 2), blocks=1, attention_resolutions=()),
    "DiT": network(DiT, **SMALL, patch=2, depth=1, heads=2),
    "IMFDiT": network(IMFDiT, **SMALL, patch=2, depth=1, head_depth=1, heads=2, second_head=False),
}


@pytest.mark.parametrize("name", [*(pytest.param(k, marks=pytest.mark.slow) for k in NETWORKS if k != "DiT"), "DiT"])
def test_a_width_that_was_not_kept_is_reconstructed(name, tmp_path):
    """As near to the average that was kept as a twentieth of what lies between the two widths of the snapshots."""
    config = tiny() if name == "MLP" else digits("flow_matching,smoke")
    if name != "MLP":
        config.network, config.batch = KINDS[name], 4
    kept, trainer = train_with_snapshots(config, tmp_path, also=(0.07, 0.15))
    ends = [trainer.ema.state(f"width-{width}") for width in WIDTHS]
    for width, expected in kept.items():
        made = reconstruct(tmp_path, width)
        assert made.keys() == expected.keys()

        def apart(a, b):
            return sum((a[k] - b[k]).square().sum().item() for k in a if a[k].is_floating_point()) ** 0.5

        assert apart(made, expected) < apart(*ends) / 20, width


def test_export_of_any_average(tmp_path):
    config = digits("flow_matching,smoke")
    config.network, config.batch = KINDS["DiT"], 4
    trainer = train_with_snapshots(config, tmp_path / "run", also=())[1]
    command = ["scripts/export.py", f"--checkpoint={tmp_path}/run"]
    for ema, expected, tolerance in (
        (None, trainer.ema.state(0.99), 0),
        ("0.99", trainer.ema.state(0.99), 0),
        ("raw", trainer.module.fm.network.state_dict(), 0),
        ("0.05", trainer.ema.state("width-0.05"), 1e-5),
    ):
        flag = [f"--ema={ema}"] if ema else []
        run_script(*command, *flag, f"--out={tmp_path}/out", check=True)
        fm = FlowMap.from_pretrained(tmp_path / "out")
        assert fm.info.ema == (None if ema == "raw" else float(ema or 0.99))
        for k, v in expected.items():
            torch.testing.assert_close(fm.network.state_dict()[k], v, atol=tolerance, rtol=tolerance)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for flags, named in (
        ([f"--out={tmp_path}/new", "--ema=0.3"], "--ema=0.3"),
        ([f"--out={tmp_path}/mine"], "--out"),
        ([], "--out: missing"),
    ):
        done = run_script(*command, *flags)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
    file = list_snapshots(tmp_path / "run")[3]
    whole = file.read_bytes()
    for damaged in (whole[:500], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        done = run_script(*command, "--ema=0.08", f"--out={tmp_path}/new")
        assert done.returncode == 2 and file.name in done.stderr and "damaged" in done.stderr
    assert not (tmp_path / "new").exists() and (tmp_path / "mine" / "thesis.tex").exists()


def test_snapshots_are_of_the_run_and_the_same_after_a_resume(tmp_path):
    config = tiny(ema_widths=WIDTHS, snapshot_every=2)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")
    for file in list_snapshots(tmp_path / "parts")[1:]:
        file.unlink()
    train(config, tmp_path / "parts")
    names = [[file.name for file in list_snapshots(tmp_path / run)] for run in ("whole", "parts")]
    assert names[0] == names[1] == [f"step-{k:08d}.safetensors" for k in (2, 4, 6)]
    for name in names[0]:
        assert_same(*(load_file(tmp_path / run / "snapshots" / name) for run in ("whole", "parts")))
    assert_same(weights(tmp_path / "whole", "ema-width-0.05"), weights(tmp_path / "parts", "ema-width-0.05"))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["ema_widths"] == list(WIDTHS)


@pytest.mark.parametrize("widths", [(0.05,), (0.05, 0.05), (0.05, 0.3), (0.0, 0.1)])
def test_widths_that_cannot_be(widths):
    with pytest.raises(UserError, match=r"^ema_widths="):
        tiny(ema_widths=widths).validate()
    with pytest.raises(UserError, match="lie above"):
        tiny(ema_widths=WIDTHS, ema=(WIDEST / 2,)).validate()
