"""One optimiser step: micro-steps, precision, compilation, memory layout, and the memory they take."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.objectives import LIVE, PLAIN
from helpers.runs import assert_same, tiny

from configs.digits import get_config as digits
from flowmaps import FlowMap, UserError
from flowmaps.data.map_style import MapStyleData
from flowmaps.images import from_uint8
from flowmaps.labels import labels_for
from flowmaps.objectives import OBJECTIVES, Draws
from flowmaps.rng import generator
from training.build import build_model
from training.checkpoint import load_checkpoint
from training.config import Precision
from training.trainer import Trainer


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.module.named_parameters() if p.grad is not None}


def test_micro_steps_sum_to_the_gradient_of_their_shards(monkeypatch):
    """accumulate=2 is the mean of the losses of shards 0 and 1, in one backward."""
    trainer = Trainer.build(tiny(accumulate=2))
    monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda **options: None)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
    trainer.step(3)
    ours = gradients(trainer)
    whole = Trainer.build(tiny(accumulate=2))
    ((whole.micro_step_loss(3, 0).value + whole.micro_step_loss(3, 1).value) / 2).backward()
    expected = gradients(whole)
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-8)


def test_two_micro_steps_equal_one_big_batch_of_their_rows():
    """One loss on all rows of both shards, diagonal rows first, has the gradient of two accumulated micro-steps."""
    config = digits("lagrangian,smoke")
    config.accumulate = 2
    trainer, half = Trainer.build(config), config.batch // 2
    fm, objective = trainer.module.fm, trainer.module.objective
    torch.manual_seed(0)
    for p in trainer.module.parameters():  # away from the zero-initialised branches
        torch.nn.init.normal_(p, std=0.05)
    for micro in range(2):
        (trainer.micro_step_loss(3, micro).value / 2).backward()
    ours = gradients(trainer)
    trainer.module.zero_grad()
    shards = []
    for micro in range(2):
        x1, label = trainer.loader.batch(3 * 2 + micro)
        x1 = from_uint8(x1)
        shards.append((x1, label, *objective.draw(fm, x1, generator(config.seed, "draws", 3, micro))[:4]))
    rows, m = [torch.cat(parts) for parts in zip(*shards, strict=True)], objective.diagonal_rows(half)
    order = torch.cat([torch.arange(half)[part] + start for part in (slice(m), slice(m, None)) for start in (0, half)])
    x1, label, *draws = (values[order] for values in rows)
    objective.loss(fm, x1, label, Draws(*draws)).value.backward()
    expected = gradients(trainer)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-7)


def test_bfloat16_is_close_to_float32_and_keeps_the_derivative_exact():
    losses = {}
    for precision in Precision:
        AcceleratorState._reset_state()  # one process, two precisions: only a test does that
        config = digits("lagrangian,smoke")
        config.precision = precision
        trainer = Trainer.build(config)
        torch.manual_seed(0)
        for p in trainer.module.parameters():  # away from the zero-initialised branches
            torch.nn.init.normal_(p, std=0.05)
        losses[precision] = trainer.micro_step_loss(0, 0)
    AcceleratorState._reset_state()
    exact, half = losses[Precision.fp32].terms, losses[Precision.bf16].terms
    assert half["diagonal"] != exact["diagonal"]  # autocast is on
    assert half["diagonal"].item() == pytest.approx(exact["diagonal"].item(), rel=0.02)
    assert half["off_diagonal"].item() == pytest.approx(exact["off_diagonal"].item(), rel=0.1)


def numbers(logged):
    """Return the values that a step logged, by name and position."""
    return {f"{name} {i}": x for name, value in logged.items() for i, x in enumerate(value.flatten().tolist())}


def losses_and_weights(steps=5, **changes):
    AcceleratorState._reset_state()  # one process, two precisions: only a test does that
    trainer = Trainer.build(dataclasses.replace(digits("lagrangian,smoke"), **changes))
    losses = [trainer.step(k)["loss"].item() for k in range(steps)]
    return losses, dict(trainer.module.fm.network.state_dict())


def test_clipped_says_whether_the_gradient_was_longer_than_the_clip():
    for clip, expected in ((1e-6, 1.0), (1e6, 0.0)):
        config = tiny()
        config.optim.clip = clip
        assert Trainer.build(config).step(0)["clipped"] == expected


def test_label_dropout_hides_its_share_of_labels_and_is_recorded(monkeypatch):
    config = dataclasses.replace(digits("lagrangian,smoke"), batch=1000)
    config.data.label_dropout = 0.2
    trainer, seen = Trainer.build(config), []
    monkeypatch.setattr(trainer, "wrapped", lambda x1, label, draws, share: seen.append(label))
    for _ in range(2):
        trainer.micro_step_loss(0, 0)
    true = trainer.loader.batch(0)[1]
    dropped = seen[0] == 10
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0][~dropped], true[~dropped])
    assert abs(dropped.float().mean() - 0.2) < 0.05
    info = trainer.averaged(0).info
    assert info.label_dropout == 0.2 and labels_for(info, 2, 10).tolist() == [10, 10]


def test_class_names_of_the_data_are_recorded_for_a_network_with_classes():
    config, names = digits("lagrangian,smoke"), tuple("0123456789")
    assert Trainer.build(config).averaged(0).info.class_names == names
    own = MapStyleData(torch.utils.data.TensorDataset(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)), "", (1, 8, 8), 10)
    assert build_model(config, own)[0].info.class_names == ()
    config.network.num_classes = 0
    assert Trainer.build(config).averaged(0).info.class_names == ()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "losses", "parameters"), [("fp32", 1e-4, 1e-5), ("bf16", 1e-2, 1e-3)])
def test_compiled_run_equals_eager(precision, losses, parameters):
    """By inductor, 5 optimiser steps: losses and weights, to the rounding of the precision."""
    changes = {"precision": Precision[precision]}
    eager, weights = losses_and_weights(**changes)
    compiled, others = losses_and_weights(**changes, compile=True)
    assert eager == pytest.approx(compiled, rel=losses)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=parameters)


def test_channels_last_is_the_same_function(tmp_path):
    (plain, weights), (last, others) = losses_and_weights(), losses_and_weights(channels_last=True)
    assert plain == pytest.approx(last, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(others[name].contiguous(), value, rtol=1e-3, atol=1e-5)
    trainer = Trainer.build(dataclasses.replace(digits("lagrangian,smoke"), channels_last=True))
    assert trainer.module.fm.network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    trainer.step(0)
    trainer.save(tmp_path, 1)
    assert_same(FlowMap.from_pretrained(tmp_path).network.state_dict(), trainer.averaged(1).network.state_dict())


@pytest.mark.parametrize("written", [False, True])
def test_checkpoints_of_fused_and_other_optimisers_are_the_same(written, tmp_path):
    """As an older version wrote them, and as one on a device without fused kernels reads them."""
    losses = {}
    for fused in (written, not written):
        trainer = Trainer.build(digits("lagrangian,smoke"))
        assert trainer.optimizer.param_groups[0]["fused"]  # on this CPU
        if not fused:
            group = trainer.optimizer.param_groups[0]
            options = {name: group[name] for name in ("lr", "betas", "weight_decay")}
            trainer.optimizer = torch.optim.AdamW(group["params"], **options)
        if fused is written:
            trainer.step(0)
            trainer.checkpoint(tmp_path / "step-00000001", 1)
        else:
            load_checkpoint(tmp_path / "step-00000001", trainer.module, trainer.optimizer, trainer.ema)
            assert bool(trainer.optimizer.param_groups[0]["fused"]) is fused
        losses[fused] = [trainer.step(k)["loss"].item() for k in (1, 2)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_workers_give_the_same_steps(data_root):
    from configs.folder import get_config as folder

    losses = []
    for workers in (0, 2):
        config = folder("lagrangian,smoke")
        config.data.root, config.data.workers, config.batch = str(data_root / "folder"), workers, 4
        config.network.image_size, config.network.attention_resolutions, config.accumulate = 16, (), 2
        trainer = Trainer.build(config)
        losses.append([trainer.step(k)["loss"].item() for k in range(3)])
    assert losses[0] == losses[1]


def test_non_finite_gradients_skip_the_step_and_then_stop_the_run(tmp_path):
    trainer = Trainer.build(tiny(max_skipped_steps=2))
    weights_before = {k: v.clone() for k, v in trainer.module.fm.network.state_dict().items()}
    trainer.data.x[:] = float("nan")
    for count in (1, 2):
        trainer.step(0)
        assert trainer.skipped == count
    assert_same(weights_before, trainer.module.fm.network.state_dict())
    assert_same(weights_before, trainer.ema.state(0.999))
    with pytest.raises(UserError, match="max_skipped_steps"):
        trainer.step(0)


def test_a_micro_step_without_a_diagonal_row_is_refused():
    with pytest.raises(UserError, match=r"^objective\.diagonal=0\.75: leaves no diagonal row"):
        Trainer.build(tiny(batch=8, accumulate=8))


def test_asking_for_gradient_norms_changes_nothing():
    config = digits("lagrangian,smoke")
    config.network.dropout = 0.3
    asked, plain = Trainer.build(config), Trainer.build(config)
    for step in range(2):
        asked.step(step, term_norms=True)
        plain.step(step)
    assert_same(asked.module.state_dict(), plain.module.state_dict())


@pytest.mark.parametrize("name", LIVE)
def test_gradient_norms_are_those_of_the_terms(name):
    """The diagonal part is the gradient norm of flow matching on these rows, the other part that of the rest."""
    trainer = Trainer.build(digits(f"{name},smoke"))
    torch.manual_seed(0)
    for p in trainer.module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    trainer.micro_step_loss(0, 0)
    module, (x1, label, draws) = trainer.module, trainer.latest[0]
    rows, parameters = module.objective.diagonal_rows(len(x1)), list(module.parameters())

    def gradient(value):
        found = torch.autograd.grad(value, parameters, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    expected = {}
    if 0 < rows < len(x1):
        complete = gradient(module(x1, label, draws, torch.ones(len(x1))).value)
        few = Draws(*(value[:rows] for value in draws[:4]))
        anchor = dataclasses.replace(module.objective, diagonal=1.0)  # small steps have their own weight
        anchor = OBJECTIVES["flow_matching"]() if name in PLAIN else anchor
        alone = anchor.loss(module.fm, x1[:rows], label[:rows], few).value
        diagonal = gradient(alone * rows / len(x1))
        expected["grad_norm_diagonal"] = diagonal.norm().item()
        expected["grad_norm_off_diagonal"] = (complete - diagonal).norm().item()
    logged = trainer.step(0, term_norms=True)
    norms = {key: value.item() for key, value in logged.items() if key.startswith("grad_norm_")}
    assert norms == pytest.approx(expected, rel=1e-3)


def test_gradient_norms_are_of_the_step_not_of_a_micro_step():
    """Two micro-steps have the gradient of one step on both, and so the terms' norms."""
    two = Trainer.build(dataclasses.replace(digits("lagrangian,smoke"), accumulate=2))
    torch.manual_seed(0)
    for p in two.module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    parts = []
    for micro in range(2):
        two.micro_step_loss(0, micro)
        parts.append(torch.cat([g.flatten() for g in two._diagonal_gradient()]))
    assert two.step(0, term_norms=True)["grad_norm_diagonal"].item() == pytest.approx(sum(parts).norm().item())


@pytest.mark.slow
def test_gradient_norms_run_the_graph_that_a_step_compiled(monkeypatch):
    """One graph for steps and norms: no second compilation, and no eager pass with its larger memory."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode: compiler(f, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = digits("mean_flow,smoke")
    compiled, eager = Trainer.build(dataclasses.replace(config, compile=True)), Trainer.build(config)
    logged, expected = (
        [numbers(trainer.step(step, term_norms=True)) for step in range(2)] for trainer in (compiled, eager)
    )
    for values, wanted in zip(logged, expected, strict=True):
        assert "grad_norm_off_diagonal 0" in values and values == pytest.approx(wanted, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradient_checkpointing_is_refused_where_it_cannot_be():
    with pytest.raises(UserError, match=r"^gradient_checkpointing: MLP"):
        Trainer.build(tiny(gradient_checkpointing=True))
    with pytest.raises(UserError, match=r"^gradient_checkpointing: excludes compile"):
        Trainer.build(tiny(gradient_checkpointing=True, compile=True))


def test_gradient_checkpointing_makes_the_same_steps():
    states = []
    for on in (False, True):
        config = digits("lagrangian,smoke")
        config.gradient_checkpointing, config.network.dropout = on, 0.2
        trainer = Trainer.build(config)
        for step in range(3):
            trainer.step(step)
        states.append(trainer.module.state_dict())
    assert_same(*states)
