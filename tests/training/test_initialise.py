"""Maps that start from the weights of a drift."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.runs import assert_same, weights

from configs.digits import get_config
from flowmaps import FlowMap, UserError
from flowmaps.objectives import FlowMatching
from flowmaps.run_weights import list_checkpoints
from training.loop import train
from training.trainer import Trainer


def started(start, row="lagrangian_distilled,smoke"):
    config = get_config(row)
    config.init_from, config.teacher = str(start), str(start) if config.teacher else ""
    return config


@pytest.mark.parametrize("row", ["lagrangian_distilled,smoke", "lagrangian_started,smoke"])
def test_a_map_starts_as_the_drift(start, row):
    """Same weights, so the same function at s = t; a map of kind "map" that may then learn to jump."""
    fm, drift = Trainer.build(started(start, row)).module.fm, FlowMap.from_pretrained(start)
    assert_same(fm.network.state_dict(), drift.network.state_dict())
    x, s, label = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 1.0]), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(fm.eval().velocity(x, s, s, label), drift.drift(x, s, label))
    assert fm.info.kind == "map"


def test_a_decoupled_map_starts_as_the_drift_bit_for_bit(tmp_path):
    """DMF: a DiT trained with one time, whose blocks are then given one time each."""
    drift = get_config("dmf,smoke")
    drift.objective, drift.weight.learned, drift.weight.log_floor = FlowMatching(), False, 0.0
    drift.network.decoupled, drift.steps = 0, 10
    start = train(drift, tmp_path / "drift").eval()
    config = get_config("dmf,smoke")
    config.init_from = str(tmp_path / "drift")
    fm = Trainer.build(config).module.fm.eval()
    x, s, label = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 1.0]), torch.arange(3)
    with torch.no_grad():
        assert torch.equal(fm.velocity(x, s, s, label), start.drift(x, s, label))
        assert not torch.equal(fm.velocity(x, s, s + 0.1, label), start.drift(x, s, label))


@pytest.mark.parametrize("option", ["guidance", "guidance_interval"])
def test_an_embedding_of_guidance_may_come_but_not_go(option, tmp_path):
    known, plain = get_config("lagrangian_guided,smoke"), get_config("lagrangian_started,smoke")
    known.network.guidance_interval = known.objective.guidance_interval = option == "guidance_interval"
    plain.init_from = ""
    if option == "guidance_interval":
        plain = get_config("lagrangian_guided,smoke")
    for config, folder in ((plain, "plain"), (known, "known")):
        Trainer.build(config).module.fm.save_pretrained(tmp_path / folder)
    known.init_from, plain.init_from = str(tmp_path / "plain"), str(tmp_path / "known")
    Trainer.build(known)
    with pytest.raises(UserError, match=rf"was made with network\.{option}=True, this run has False"):
        Trainer.build(plain)


def test_a_started_run_resumes_exactly_and_refuses_another_start(start, tmp_path):
    config = started(start)
    config.steps = config.sample_every = 6
    config.checkpoint_every = 3
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")

    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    train(config, tmp_path / "parts")
    for file in ("network", "optimizer"):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))
    other = FlowMap.from_pretrained(start)
    next(other.network.parameters()).data.add_(1)
    other.save_pretrained(tmp_path / "other")
    config.init_from = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"^config\.init_from: has changed"):
        train(config, tmp_path / "parts")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c.network, "width", 24), r"^init_from=.*network\.width=16"),
        (lambda c: setattr(c.network, "convention", "edm"), r"^init_from=.*network\.convention="),
        (lambda c: setattr(c, "base_std", 1.0), r"^init_from=.*base_std"),
        (lambda c: setattr(c, "network", get_config("lagrangian_edm2,smoke").network), "EDM2UNet"),
        (lambda c: setattr(c, "init_from", "nowhere"), "nowhere"),
    ],
)
def test_weights_that_do_not_fit_are_refused(start, change, reason):
    config = started(start, "lagrangian_started,smoke")
    change(config)
    with pytest.raises(UserError, match=reason):
        Trainer.build(config)


def test_dropout_may_differ_and_imported_facts_travel_on(start, tmp_path):

    fm = FlowMap.from_pretrained(start)
    fm.info = replace(fm.info, origin={"format": "edm", "license": "NC"})
    fm.save_pretrained(tmp_path / "import")
    config = started(tmp_path / "import", "lagrangian_started,smoke")
    config.network.dropout = 0.3
    made = train(config, tmp_path / "run")
    assert made.info.origin == fm.info.origin
    config.teacher = str(tmp_path / "import")
    taught = Trainer.build(config).module.fm.info.origin
    assert taught == {**fm.info.origin, "teacher's format": "edm", "teacher's license": "NC"}
    assert "NC" in (tmp_path / "run" / "model" / "README.md").read_text()
