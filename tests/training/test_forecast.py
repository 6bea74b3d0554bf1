"""Forecasts: equal to the books of real steps, close to the allocator's, and made of nothing but a config."""

import dataclasses
import importlib
import json
import resource
import time

import pytest
import torch
from benchmarks.objectives import peak_memory
from helpers import ROOT, run_script

from flowmaps import UserError
from training.cli.train import Memory
from training.config import Grid, Precision, Solver, Trajectories, build_network
from training.forecast.forecast import MARGIN, Forecast, fit, forecast
from training.forecast.ledger import Ledger, pretend
from training.forecast.report import CARDS, forecasts, lines, seconds
from training.forecast.stand_ins import data_of, stand_ins
from training.forecast.step import cuda_dropout, first_of, measure
from training.trainer import Trainer

GIB = 2**30


def row(name, **changes):
    file, _, choice = name.partition(":")
    made = importlib.import_module(f"configs.{file}").get_config(choice)
    for field, value in changes.items():
        section = made.network if hasattr(made.network, field) else made
        setattr(section, field, value)
    return made


def small_dit(objective, **changes):
    """Rows of imagenet256 with a DiT of some millions of parameters."""
    return row(f"imagenet256:{objective}", **({"width": 192, "depth": 4, "heads": 6, "batch": 16} | changes))


def built(config):
    data = data_of(config)
    return stand_ins(config, data, {}), data


@pytest.mark.parametrize(
    "config",
    [
        row("digits:lagrangian,smoke"),
        row("digits:straightening,smoke", trajectories=Trajectories(steps=4)),
        row("checkerboard:lagrangian,smoke", accumulate=2),
        small_dit("terminal_velocity", patch=8, width=32, depth=2, heads=2, dropout=0.1, gradient_checkpointing=True),
    ],
    ids=lambda config: f"{config.data.name}-{type(config.objective).__name__}",
)
def test_a_forecast_is_what_a_real_step_has_in_its_books(config):
    """Bytes in each phase and FLOPs, the same to the last one."""
    found = forecast(config)
    files, data = built(config)
    with first_of(1), files, Ledger() as ledger, cuda_dropout():
        measure(
            Trainer.build(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0)), data), ledger
        )
    assert {name: peak.total for name, peak in ledger.peaks.items()} == found.phases
    assert sum(products.total() for products in ledger.products.values()) == pytest.approx(sum(found.flops.values()))
    assert found.parts["weights"] >= 4 * found.parameters and sum(found.parts.values()) == found.peak


def true_peak(config):
    """Most bytes of tensors alive in two steps, by the profiler of torch's allocator."""

    def work():
        trainer = Trainer.build(config, data)
        for group in trainer.optimizer.param_groups:
            group["foreach"] = not group.get("fused")
        for step in range(2):
            trainer.step(step)

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    files, data = built(config)
    with first_of(1), files, cuda_dropout():
        return peak_memory(work, torch.device("cpu"))


SIX = {
    "digits lagrangian": row("digits:lagrangian"),
    "digits mean_flow, bf16": row("digits:mean_flow", precision=Precision.bf16),
    "U-Net of cifar10 lagrangian": row("cifar10:lagrangian,ddpmpp", width=32, blocks=1, batch=16),
    "EDM2 of cifar10 lagrangian, checkpointing": row(
        "cifar10:lagrangian", width=32, blocks=1, batch=16, gradient_checkpointing=True
    ),
    "DiT of imagenet256 mean_flow, bf16": small_dit("mean_flow"),
    "DiT of imagenet256 terminal_velocity, 2 micro-steps": small_dit(
        "terminal_velocity", accumulate=2, precision=Precision.fp32
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_a_forecast_is_within_five_percent_of_the_allocators_peak(name):
    config = SIX[name]
    found, true = forecast(config).peak, true_peak(config)
    print(f"\n| {name} ({config.batch}) | {found / 2**20:.1f} | {true / 2**20:.1f} | {found / true - 1:+.1%} |")
    assert found == pytest.approx(true, rel=0.05)


def test_a_step_reads_one_number_and_knows_the_times_of_its_solver():
    """The norm of the gradient. DPM-Solver++ reads its grid, and the optimiser its counter: those are true."""
    config = row("digits:mid_training,smoke", trajectories=Trajectories(Solver.dpm_solver, 4, Grid.log_snr, low=0.0062))
    files, data = built(config)
    with first_of(1), files, pretend() as ledger:
        trainer = Trainer.build(config, data)
        measure(trainer, ledger)
        counters = [state["step"].item() for state in trainer.optimizer.state.values()]
        x = trainer.paths(torch.rand(2, 1, 8, 8), torch.arange(2), torch.Generator())
        assert x.times[0].item() == pytest.approx(0.0062) and x.times[-1].item() == 1
    assert ledger.asked == 1 and set(counters) == {2}


def test_what_a_ledger_frees_it_no_longer_counts():
    with pretend() as ledger:
        x = torch.zeros(1000)
        y = x[10:]
        del x
        assert ledger.live.total() == 4000
        ledger.label(y, "weights")
        assert ledger.live["weights"] == 4000
        del y
        y = torch.ones(10)
        y.untyped_storage().resize_(0)
        assert ledger.live.total() == 0
        a, b = torch.rand(3, 5), torch.rand(5, 7).bfloat16()
        a @ b.float(), b.mT @ b
    assert ledger.products == {"": {"fp32": 2 * 3 * 5 * 7, "bf16": 2 * 7 * 5 * 7}}


QUICK = ["checkerboard:mid_training"]


def all_rows():
    for file in sorted((ROOT / "configs").glob("*.py")):
        for name in importlib.import_module(f"configs.{file.stem}").ROWS:
            yield f"{file.stem}:{name}"
            if name.startswith("from_"):
                yield f"{file.stem}:{name},taught"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in all_rows()]
)
def test_every_row_has_a_forecast_without_any_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, _, choice = name.partition(":")
    made = importlib.import_module(f"configs.{file}").get_config(f"{choice},smoke")
    for stage, facts in forecasts(made, memory=80, gpus=1, mfu=0.4):
        assert facts["parts"]["teacher"] == teacher_bytes(made, stage, facts)
        assert facts["fit"]["accumulate"] == 1 and len(list(lines(facts))) >= 8
        json.dumps(facts)
    assert not list(tmp_path.iterdir())


def teacher_bytes(made, stage, facts):
    """A teacher has the network of the stage that it is, else that of the run; so has an average."""
    config = made.stages()[stage] if stage else made
    if not config.teacher and not config.objective.teacher_ema:
        return 0
    stages = made.stages() if stage else {}
    with torch.device("meta"):
        net = build_network(stages.get(config.teacher, config))
    return sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))


def test_shards_and_gradients_that_stay_are_in_a_forecast():
    """FSDP divides what is stored by the processes, up to padding; DDP keeps gradients between the steps."""
    config = small_dit("lagrangian", width=96, depth=1, batch=32)
    alone, copied = forecast(dataclasses.replace(config, batch=8)), forecast(config, gpus=4)
    sharded = forecast(dataclasses.replace(config, shard=True), gpus=4)
    assert copied.parts["gradients"] == copied.gradients == 4 * alone.trained > alone.parts["gradients"]
    assert copied.peak - alone.peak == copied.gradients - alone.parts["gradients"]
    assert sharded.peak < alone.peak
    assert sharded.parts["optimiser"] == pytest.approx(alone.parts["optimiser"] / 4, rel=0.02)
    assert sum(sharded.flops.values()) == sum(copied.flops.values()) == 4 * sum(alone.flops.values())


def test_a_pass_without_gradient_hides_no_weight_of_a_sharded_run():
    """In bf16: the cast of a gathered weight would stay in autocast's cache, without the weight behind it."""
    config = small_dit("mean_flow", width=48, depth=2, shard=True)
    assert config.objective.guidance > 1 and config.precision is Precision.bf16
    files, data = built(config)
    config.data.workers = 0
    with first_of(2), files, pretend():
        trainer = Trainer.build(config, data)
        trainer.accelerator.backward(trainer.micro_step_loss(0, 0).value)
        assert all(p.grad is not None for p in trainer.module.parameters())


def books(**phases):
    """A forecast with the given GiB by phase."""
    sizes = {name: int(value * GIB) for name, value in phases.items()}
    return Forecast(1, 64, 64, 1, 10, 10, sizes, {}, GIB, {})


def test_the_largest_micro_batch_is_where_the_lines_meet_the_memory():
    config = row("digits:consistency", batch=64)
    one = books(forward=2 + 64 * 0.5, update=3)
    two = dataclasses.replace(books(forward=2 + 128 * 0.5, update=3), micro_batch=128)
    assert fit(config, 40 * MARGIN, one, two)[1:] == (76, 1)
    assert fit(config, 20 * MARGIN, one, two)[1:] == (34, 2)  # (20 - 2 - 1 GiB of gradients) / 0.5
    assert fit(config, 2.9 * MARGIN, one, two)[1:] == (0, 0)  # the update alone is larger
    one, two = (dataclasses.replace(found, multiple=16) for found in (one, two))
    assert fit(config, 20 * MARGIN, one, two)[1:] == (32, 2)


def test_the_time_is_that_of_the_products_at_their_own_peaks():
    found = dataclasses.replace(books(update=1), gpus=2, flops={"bf16": 989e12, "TF32": 495e12, "fp32": 67e12})
    assert seconds(found, CARDS["H100"], 0.5) == pytest.approx(3)


def test_tf32_is_told_from_float32_by_the_configs_own_rules():
    config = row("checkerboard:lagrangian,smoke")
    assert set(forecast(config).flops) == {"TF32"}
    assert set(forecast(dataclasses.replace(config, tf32=False)).flops) == {"fp32"}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"gpus": 0}, r"^gpus=0: must be positive"),
        ({}, {"memory": 0.0}, r"^forecast=0\.0: must be positive"),
        ({}, {"mfu": 1.5}, r"^mfu=1\.5: a share"),
        ({"shard": True}, {}, r"^config\.shard: needs several processes"),
        ({"batch": 10}, {"gpus": 4}, r"^config\.batch=10: not divisible by 4 processes"),
    ],
)
def test_a_mistake_in_a_forecast_is_named(changes, arguments, message):
    config = row("digits:lagrangian,smoke", **changes)
    with pytest.raises(UserError, match=message):
        list(forecasts(config, **({"memory": 80.0, "gpus": 1, "mfu": 0.4} | arguments)))


def test_the_command_prints_a_forecast_and_writes_no_more_than_its_record(tmp_path):
    flags = ["--config=configs/checkerboard.py:mean_flow,smoke", "--forecast=24", f"--json={tmp_path}/forecast.json"]
    shown = run_script("scripts/train.py", *flags, check=True).stdout
    assert shown.startswith("parameters 0.0 M\n") and "fits 24 GiB" in shown and "A100" in shown
    assert [facts["fit"]["memory"] for facts in json.loads((tmp_path / "forecast.json").read_text())] == [24]
    assert [Memory().parse(given) for given in ("true", "false", "16")] == [80, None, 16]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--config=configs/imagenet256.py:mean_flow"], ["--config=configs/imagenet512.py:cmt"]]
)
def test_the_largest_networks_have_a_forecast_in_two_minutes(flags):
    """A chain has two minutes for each of its stages."""
    start = time.monotonic()
    shown = run_script("scripts/train.py", *flags, "--forecast", "--gpus=8", check=True).stdout
    assert time.monotonic() - start < 120 * shown.count("peak memory")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB
