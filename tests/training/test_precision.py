"""The precision of a step: what the config says, what is computed, what the log shows."""

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import run_script
from helpers.runs import tiny
from helpers.small_networks import small

from configs.digits import get_config as digits
from flowmaps import UserError, jvp_attention
from flowmaps.derivatives import derivative_dtype, velocity_jvp
from flowmaps.objectives import FlowMatching, Lagrangian, MeanFlow, Objective, eulerian, facm, lagrangian
from flowmaps.objectives.base import DerivativeRole
from flowmaps.objectives.lagrangian import Derivative
from training.config import CompileMode, Config, DerivativePrecision, Precision
from training.config_rows import METHODS
from training.loop import train
from training.precision import StepPrecision, advice, step_precision
from training.trainer import Trainer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
AUTO, B, T, F = DerivativePrecision.auto, DerivativePrecision.bf16, DerivativePrecision.tf32, DerivativePrecision.fp32


@pytest.fixture(autouse=True)
def _one_accelerator():
    yield
    AcceleratorState._reset_state()  # one process, several precisions: only a test does that


def config(objective: Objective, **changes) -> Config:
    return dataclasses.replace(tiny(), objective=objective, **changes)


@pytest.mark.parametrize(
    ("precision", "asked", "tf32", "expected"),
    [
        ("bf16", AUTO, True, StepPrecision(FP32, True)),
        ("bf16", AUTO, False, StepPrecision(FP32, False)),
        ("bf16", T, False, StepPrecision(FP32, True)),  # all float32 products are the derivative's
        ("bf16", F, True, StepPrecision(FP32, False)),
        ("bf16", B, True, StepPrecision(BF16, True)),
        ("fp32", AUTO, True, StepPrecision(FP32, True)),
        ("fp32", AUTO, False, StepPrecision(FP32, False)),
        ("fp32", T, True, StepPrecision(FP32, True)),
        ("fp32", F, True, StepPrecision(FP32, False)),  # one switch: the stricter one
        ("fp32", B, False, StepPrecision(BF16, False)),
    ],
)
def test_precision_of_a_step_on_cuda(precision, asked, tf32, expected):
    given = {"precision": Precision[precision], "derivative_precision": asked, "tf32": tf32}
    for objective in (Lagrangian(), MeanFlow()):
        made = config(objective, **given)
        made.validate()
        assert step_precision(made, objective, CUDA) == expected
        on_cpu = step_precision(made, objective, CPU)
        assert on_cpu == StepPrecision(expected.derivative, False)
    drift = FlowMatching()
    assert step_precision(config(drift, **given), drift, CUDA).tf32 == tf32


def test_finite_differences_are_in_ieee_float32_whatever_tf32_says():
    objective = Lagrangian(derivative=Derivative.finite)
    for tf32 in (True, False):
        assert step_precision(config(objective, tf32=tf32), objective, CUDA) == StepPrecision(FP32, False)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("derivative_precision", {"derivative_precision": T, "tf32": False}),
        ("derivative_precision", {"derivative_precision": B, "objective": Lagrangian(derivative=Derivative.finite)}),
        ("derivative_precision", {"derivative_precision": T, "objective": Lagrangian(derivative=Derivative.finite)}),
        ("compile_mode", {"compile_mode": CompileMode.reduce_overhead}),
    ],
)
def test_contradictions_are_refused(field, changes):
    with pytest.raises(UserError, match=f"^{field}="):
        tiny(**changes).validate()


@pytest.mark.parametrize("name", METHODS)
def test_the_role_of_derivatives_is_what_the_loss_makes_of_them(name, monkeypatch):
    objective, graphs = METHODS[name]().for_run(10), []  # in the last step, as alpha_flow's first take no derivative

    def spy(*given, **moving):
        v, dv = velocity_jvp(*given, **moving)
        graphs.append(dv.requires_grad)
        return v, dv

    for module in (lagrangian, eulerian, facm):
        monkeypatch.setattr(module, "velocity_jvp", spy)
    stream = torch.Generator().manual_seed(0)
    objective(small("UNet"), torch.randn(8, 1, 8, 8), torch.arange(8) % 4, generator=stream, step=10)
    expected = DerivativeRole.trained if any(graphs) else DerivativeRole.constant if graphs else DerivativeRole.absent
    assert objective.derivative_role is expected


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("asked", [AUTO, B])
@pytest.mark.parametrize("name", ["lagrangian", "eulerian", "improved_mean_flow"])
def test_the_drift_in_the_target_has_the_precision_of_the_derivative(name, asked, precision):
    made = digits(f"{name},smoke")
    made.precision, made.derivative_precision = Precision[precision], asked
    trainer, seen = Trainer.build(made), []
    drift = trainer.module.fm.drift

    def spy(x, t, label=None):
        if not torch.is_grad_enabled():
            seen.append(torch.is_autocast_enabled("cpu"))
        return drift(x, t, label)

    trainer.module.fm.drift = spy
    trainer.micro_step_loss(0, 0)
    assert seen == [asked is B]


def test_error_of_the_derivative_is_relative_to_float32_on_the_last_rows():
    made = digits("lagrangian,smoke")
    made.derivative_precision = B
    trainer = Trainer.build(made)
    torch.manual_seed(0)
    for p in trainer.module.parameters():
        torch.nn.init.normal_(p, std=0.05)
    trainer.micro_step_loss(0, 0)
    x1, label, draws = trainer.latest[0]
    fm, found = trainer.module.fm.eval(), []
    x = fm.interpolant.point(draws.x0, x1, draws.s)[-4:]
    for autocast in (True, False):
        with torch.autocast("cpu", BF16, enabled=autocast), torch.no_grad():
            found.append(jvp_in(BF16 if autocast else FP32, fm, x, draws.s[-4:], draws.t[-4:], label[-4:]))
    expected = (found[0] - found[1]).norm() / found[1].norm()
    error = trainer.derivative_error()
    assert 1e-4 < error < 0.1 and error == pytest.approx(float(expected), rel=1e-5)
    assert trainer.precision == StepPrecision(BF16, False)


def jvp_in(dtype, fm, x, s, t, label):
    with derivative_dtype(dtype):
        return velocity_jvp(fm, x, s, t, label, dt=1.0)[1]


@pytest.mark.parametrize("name", ["flow_matching", "progressive", "alpha_flow"])
def test_there_is_no_error_without_a_derivative(name):
    made = digits(f"{name},smoke")
    made.derivative_precision = B
    trainer = Trainer.build(made)
    trainer.micro_step_loss(0, 0)
    assert trainer.derivative_error() is None


@pytest.mark.parametrize(("name", "step"), [("alpha_flow", 19), ("facm", 0)])
def test_rows_of_other_kinds_have_an_error_too(name, step):
    made = digits(f"{name},smoke")
    made.derivative_precision = B
    trainer = Trainer.build(made)
    torch.manual_seed(0)
    for p in trainer.module.parameters():
        torch.nn.init.normal_(p, std=0.05)
    trainer.micro_step_loss(step, 0)
    assert 1e-4 < trainer.derivative_error() < 0.1


def test_advice_is_given_where_it_applies():
    lsd, drift, mean_flow = Lagrangian(), FlowMatching(), MeanFlow()
    assert not advice(config(lsd), lsd, CPU)
    assert not advice(config(drift), drift, CUDA)
    assert not advice(config(mean_flow, derivative_precision=B), mean_flow, CPU)
    assert not advice(config(lsd, compile=True), lsd, CUDA)
    (biased,) = advice(config(lsd, derivative_precision=B), lsd, CPU)
    (eager,) = advice(config(mean_flow), mean_flow, CUDA)
    assert "biases the gradient" in biased and "compile=True" in eager


def test_a_run_in_bfloat16_says_what_it_costs(tmp_path):
    done = run_script(
        "scripts/train.py",
        "--config=configs/digits.py:lagrangian,smoke",
        "--config.derivative_precision=bf16",
        "--config.precision=bf16",
        f"--workdir={tmp_path}",
        check=True,
    )
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    errors = [row["derivative_error"] for row in rows if "derivative_error" in row]
    assert len(errors) == 4 and all(1e-5 < error < 0.1 for error in errors)
    assert done.stderr.count("note: derivative_precision=bf16 biases") == 1


def test_a_run_says_once_that_attention_in_its_derivative_is_not_fused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jvp_attention, "shared_memory", lambda device: 99)  # KiB, as if on a GPU
    train(digits("mean_flow,smoke"), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "MATH" in line]
    assert said == [f"note: {line}" for line in jvp_attention.notes] and "TF32" in said[0]
