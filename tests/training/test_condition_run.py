"""Runs of maps with a condition: they learn it, resume bit for bit, and sample, export and load with it."""

import pytest
import torch
from helpers import generator
from helpers.runs import assert_same, weights

from flowmaps import FlowMap, UserError
from flowmaps.data.map_style import as_dataset
from flowmaps.generate import generate
from flowmaps.networks import UNet
from flowmaps.objectives import FlowMatching, Lagrangian, MidTraining
from samplers import uniform_times
from training import Config, train
from training.config import Data, Optim, network

BRIGHTNESS = torch.linspace(-1, 1, 64)


def pairs(kind):
    """Images of one brightness each, which the condition says: as a number, or as an image of it."""
    pixels = ((BRIGHTNESS + 1) * 127.5).round().to(torch.uint8)
    images = pixels[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    conditions = BRIGHTNESS[:, None] if kind == "vector" else BRIGHTNESS[:, None, None, None].expand(-1, 2, 8, 8)
    return list(zip(images, conditions, strict=True))


def config(kind, steps=8, **changes):
    shape = (1,) if kind == "vector" else (2, 8, 8)
    unet = {"image_size": 8, "channels": 1, "width": 8, "channel_mult": (1,), "blocks": 1, "attention_resolutions": ()}
    made = Config(network(UNet, **unet, condition=shape), changes.pop("objective", Lagrangian()))
    made.data, made.optim = Data(label_dropout=0.25), Optim(lr=1e-2, warmup=0)
    made.steps, made.batch, made.ema, made.base_std, made.checkpoint_every = steps, 16, (0.9,), 0.5, 4
    made.log_every = made.sample_every = 4
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("kind", ["vector", pytest.param("image", marks=pytest.mark.slow)])
def test_a_run_learns_its_condition_and_resumes_bit_for_bit(kind, tmp_path):
    fm = train(config(kind, steps=60, checkpoint_every=30, sample_every=60), tmp_path / "whole", pairs(kind))
    train(config(kind, steps=30, checkpoint_every=30, sample_every=60), tmp_path / "parts", pairs(kind))
    train(config(kind, steps=60, checkpoint_every=30, sample_every=60), tmp_path / "parts", pairs(kind))
    assert_same(weights(tmp_path / "whole", "network"), weights(tmp_path / "parts", "network"))
    loaded = FlowMap.from_pretrained(tmp_path / "whole" / "model")
    asked = as_dataset(pairs(kind)).fetch(torch.tensor([4, 60]))[1]
    x, label = next(generate(loaded, uniform_times(2), 16, seed=0, label=asked))
    assert torch.equal(label[:2], asked) and torch.equal(label[2:4], asked)
    assert x[1::2].mean() - x[::2].mean() > 0.2
    assert fm.conditions is not None and loaded.conditions is None
    with pytest.raises(UserError, match=r"label: must be floats"):
        next(generate(loaded, uniform_times(2), 4, seed=0, label=3))


@pytest.mark.parametrize("objective", [FlowMatching(), MidTraining()])
def test_trajectories_and_guidance_take_conditions(objective, tmp_path):
    drift = train(config("vector", objective=FlowMatching()), tmp_path / "drift", pairs("vector"))
    changes = {} if isinstance(objective, FlowMatching) else {"teacher": str(tmp_path / "drift")}
    changes["data"] = Data(label_dropout=0.0 if changes else 0.25)
    train(config("vector", objective=objective, **changes), tmp_path / "run", pairs("vector"))
    asked, x = BRIGHTNESS[:4, None], drift.noise(4, seed=1)
    with torch.no_grad():
        nothing, told = (drift.drift(x, 0.5, label) for label in (None, asked))
    guided = next(generate(drift, torch.tensor([0.0, 1.0]), 4, seed=1, sampler="euler", label=asked, guidance=3.0))[0]
    with torch.no_grad():
        nothing, told = (drift.drift(x, 0.0, label) for label in (None, asked))
    torch.testing.assert_close(guided, x + nothing + 3 * (told - nothing))


def test_flips_mirror_the_condition_too():
    from flowmaps.data.augment import random_hflip

    x = torch.randn(32, 1, 8, 8)
    flipped, condition = random_hflip(x, torch.cat([x, x], dim=1), generator())
    assert torch.equal(condition[:, :1], flipped) and not torch.equal(flipped, x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network.condition": ()}, r"^config\.network\.condition=\(\): the data have \(1,\)"),
        ({"network.condition": (3,)}, r"^config\.network\.condition=\(3,\): the data have \(1,\)"),
    ],
)
def test_data_of_another_condition_are_refused(change, said, tmp_path):
    made = config("vector")
    made.network.condition, made.data.label_dropout = change["network.condition"], 0.0
    with pytest.raises(UserError, match=said):
        train(made, tmp_path / "run", pairs("vector"))


def test_pairs_must_have_one_shape():
    items = pairs("vector")
    for wrong in (torch.zeros(2), 3):
        with pytest.raises(UserError, match="the condition of item 1 is not of the shape"):
            as_dataset([items[0], (items[1][0], wrong)])
    with pytest.raises(UserError, match="the condition of item 0 is not finite"):
        as_dataset([(items[0][0], torch.tensor([torch.nan]))])
