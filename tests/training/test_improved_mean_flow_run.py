"""A run of improved MeanFlow with a second head: what is kept, resumed, exported, and sampled under an interval."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.runs import assert_same, weights
from helpers.small_networks import small

from configs.digits import get_config
from configs.imagenet256 import get_config as imagenet256
from flowmaps import FlowMap, UserError
from flowmaps.evaluation.evaluate import evaluate
from flowmaps.evaluation.gate import Limits
from flowmaps.evaluation.settings import sampling_settings
from flowmaps.flow_map import FlowMapInfo
from flowmaps.generate import generate
from flowmaps.networks.conditioning import with_guidance
from flowmaps.objectives import perceptual
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.run_weights import list_checkpoints, take_weights
from samplers import Schedule, uniform_times
from training.config_rows import perceptual as add_perceptual
from training.forecast.forecast import forecast
from training.loop import train
from training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, path = get_config("imf,smoke"), tmp_path_factory.mktemp("imf")
    config.steps, config.checkpoint_every, config.log_every, config.sample_every, config.ema = 4, 2, 2, 4, (0.99, 0.9)
    train(config, path / "whole")
    shutil.copytree(path / "whole", path / "parts")
    shutil.rmtree(list_checkpoints(path / "parts")[-1])  # as if it had been killed after step 2
    train(config, path / "parts")
    return path


def test_a_resumed_run_is_bit_equal_and_averages_are_without_the_second_head(run):
    for file in ("network", "optimizer", "ema-0.99", "ema-0.9"):
        assert_same(weights(run / "whole", file), weights(run / "parts", file))
    trained, averaged = weights(run / "whole"), weights(run / "whole", "ema-0.99")
    lost = trained.keys() - averaged.keys()
    assert lost and all(name.startswith("second_") for name in lost) and averaged.keys() < trained.keys()
    fm = FlowMap.from_pretrained(run / "whole")
    assert fm.network.config.second_head is False and fm.network.state_dict().keys() == averaged.keys()
    assert fm.info.guidance_max == 8 and fm.info.guidance_interval
    take_weights(fm, str(run / "whole"), "raw")
    assert torch.equal(fm.network.head[1].weight, trained["head.1.weight"])
    logged = [json.loads(line) for line in (run / "whole" / "log.jsonl").read_text().splitlines()][-1]
    assert {"diagonal", "off_diagonal", "second_diagonal", "second_off_diagonal"} <= logged.keys()


def test_perceptual_terms_and_ramped_averages_are_logged_and_resumed_bit_equal(tmp_path, monkeypatch):
    """With toy features; the crops come from the step's own draws."""
    for name in ("lpips", "convnext"):
        monkeypatch.setattr(perceptual, name, lambda *given: lambda y, x: (y - x).square().flatten(1).mean(dim=1))
    config = get_config("pmf,smoke")
    add_perceptual(config)
    config.objective.convnext_weights, config.ema, config.ema_ramp = "given", (0.9, 0.5), 0.5
    config.steps, config.batch, config.checkpoint_every, config.log_every, config.sample_every = 4, 8, 2, 2, 4
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    train(config, tmp_path / "parts")
    for file in ("network", "optimizer", "ema-0.9", "ema-0.5"):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))
    fm = FlowMap.from_pretrained(tmp_path / "whole")
    for decay in ("0.9", "0.5"):
        take_weights(fm, str(tmp_path / "whole"), decay)
        averaged = weights(tmp_path / "whole", f"ema-{decay}")["head.1.weight"]
        assert fm.info.ema == float(decay) and torch.equal(fm.network.head[1].weight, averaged)
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()][-1]
    assert logged["lpips"] == logged["convnext"] > 0
    trainer, other = Trainer.build(config), Trainer.build(config)
    other.module.objective.lpips = 0.0
    assert trainer.step(0)["loss"] > other.step(0)["loss"]


def test_a_variant_adds_perceptual_terms_where_they_fit():
    config = imagenet256("pmf_h16,perceptual")
    assert config.ema_ramp == 0.05 and config.ema[0] == pytest.approx(0.5 ** (1024 / 1e6), abs=1e-5)
    assert (config.objective.lpips, config.objective.convnext, config.objective.perceptual_after) == (0.4, 0.1, 0.4)
    with pytest.raises(UserError, match=r"^objective\.convnext=0\.1: needs convnext_weights"):
        config.validate()
    config.objective.convnext_weights = "given"
    config.validate()
    config.network.second_head = False
    with pytest.raises(UserError, match=r"^objective\.lpips=0\.4: needs network\.second_head=True"):
        config.validate()
    with pytest.raises(UserError, match="for rows of improved_mean_flow"):
        imagenet256("lagrangian,perceptual")


@pytest.mark.slow
def test_a_forecast_knows_the_networks_of_perceptual_terms():
    config = get_config("pmf,smoke")
    config.batch, plain = 2, forecast(config)
    config.objective.lpips, config.objective.convnext, config.objective.convnext_weights = 0.4, 0.1, "given"
    seen = forecast(config)
    assert sum(seen.flops.values()) > 10 * sum(plain.flops.values())


def test_a_run_with_a_second_head_starts_from_weights_without(run):
    config = get_config("imf,smoke")
    config.init_from = str(run / "whole")
    trainer = Trainer.build(config)
    assert trainer.module.fm.network.config.second_head
    assert torch.equal(trainer.module.fm.network.head[1].weight, weights(run / "whole", "ema-0.99")["head.1.weight"])
    config.objective.teacher_ema = 0.9  # a second copy, which gives drifts
    config.objective.guidance_max, config.objective.guidance_interval = 1.0, False
    config.network.guidance = config.network.guidance_interval = False
    config.init_from = ""
    trainer = Trainer.build(config)
    trainer.step(0)
    assert not trainer.module.teacher.network.config.second_head


def test_a_second_head_that_nothing_would_train_is_refused():
    config = get_config("lagrangian,smoke")
    config.network = get_config("imf,smoke").network
    config.network.guidance = config.network.guidance_interval = False
    with pytest.raises(UserError, match=r"network\.second_head=True: only ImprovedMeanFlow trains it"):
        config.validate()
    config.network.second_head = False
    config.validate()


def told():
    fm = small("IMFDiT").eval()
    fm.info = FlowMapInfo(shape=(1, 8, 8), num_classes=4, guidance_max=8.0, guidance_interval=True, label_dropout=0.1)
    return fm


def test_samples_are_told_weight_and_interval():
    fm = told()
    found = {
        interval: torch.cat([x for x, _ in generate(fm, uniform_times(1), 4, 0, guidance=3.0, **interval_of(interval))])
        for interval in (None, (0.0, 1.0), (0.4, 0.6))
    }
    label, zero = torch.arange(4), torch.zeros(4)
    rows = with_guidance(label, torch.tensor([3.0, 0.4, 0.6]).expand(4, 3), 4)
    with torch.no_grad():
        torch.testing.assert_close(found[0.4, 0.6], fm(fm.noise(4, 0), zero, zero + 1, rows))
    torch.testing.assert_close(found[None], found[0.0, 1.0])
    assert not torch.allclose(found[None], found[0.4, 0.6], atol=1e-5)
    pipe = FlowMapPipeline.from_flow_map(fm)
    made = pipe(latents=fm.noise(4, 0), guidance_scale=3.0, guidance_interval=(0.4, 0.6), output_type="latent").images
    torch.testing.assert_close(made, found[0.4, 0.6])


def interval_of(interval):
    return {} if interval is None else {"guidance_interval": interval}


@pytest.mark.parametrize(
    ("interval", "weight", "facts", "reason"),
    [
        ((0.4, 0.6), 3.0, {"guidance_interval": False}, "was not trained to take one"),
        ((0.6, 0.4), 3.0, {}, "two times in order"),
        ((0.4, 1.2), 3.0, {}, "two times in order"),
        ((0.4, float("nan")), 3.0, {}, "two times in order"),
        ((0.4,), 3.0, {}, "two times in order"),
        ((0.4, 0.6), None, {}, "no effect without guidance"),
    ],
)
def test_an_interval_that_the_model_cannot_take_is_refused(interval, weight, facts, reason):
    fm = told()
    fm.info = replace(fm.info, **facts)
    calls = (
        lambda: next(generate(fm, uniform_times(1), 4, 0, guidance=weight, guidance_interval=interval)),
        lambda: FlowMapPipeline.from_flow_map(fm)(guidance_scale=weight, guidance_interval=interval),
        lambda: sampling_settings(fm, [1], ["map"], guidance=weight, guidance_interval=interval),
    )
    for call in calls:
        with pytest.raises(UserError, match=f"guidance_interval=.*{reason}"):
            call()


def test_a_schedule_was_fitted_for_all_times():
    fm = told()
    schedule = Schedule({2: (0.0, 0.3, 1.0)}, sampler="map", guidance=3.0)
    fm.info = replace(fm.info, schedules={"map": schedule})
    grids = [
        sampling_settings(fm, [2], ["map"], guidance=3.0, **interval_of(interval))[0].grid
        for interval in (None, (0.4, 0.6))
    ]
    assert grids == ["stored", "uniform"]
    with pytest.raises(UserError, match="at all times: leave guidance_interval out"):
        sampling_settings(fm, [2], ["map"], [schedule], guidance=3.0, guidance_interval=(0.4, 0.6))


def test_scores_record_the_interval_and_are_not_compared_with_others(run, tmp_path):
    fm, file = FlowMap.from_pretrained(run / "whole"), tmp_path / "before.json"
    options = {"num": 40, "guidance": 2.0}
    record = evaluate(fm, "digits:heldout", guidance_interval=(0.4, 0.6), **options)
    assert record["guidance_interval"] == [0.4, 0.6]
    file.write_text(json.dumps(record))
    limits = Limits.read(None, str(file), 0.0)
    limits.check(record)
    with pytest.raises(UserError, match=r"another guidance_interval \(\[0.4, 0.6\], now None\)"):
        limits.check(evaluate(fm, "digits:heldout", **options))


def test_the_flags_reach_the_samples(run, tmp_path):
    command = ["scripts/sample.py", f"--checkpoint={run}/whole", "--num=10", "--steps=1"]
    for name, flags in {"all": [], "some": ["--guidance_interval=0.4,0.6"]}.items():
        run_script(*command, "--guidance=8", *flags, f"--out={tmp_path}/{name}", check=True)
    assert np.load(tmp_path / "some" / "samples-1.npz")["label"].tolist() == list(range(10))
    for value in ("0.4", "0.4,high"):
        done = run_script(*command, "--guidance=8", f"--guidance_interval={value}", f"--out={tmp_path}/no")
        assert done.returncode == 2 and "--guidance_interval" in done.stderr and "two times" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
