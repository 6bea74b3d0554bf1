import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT

from configs.checkerboard import get_config
from flowmaps import FlowMap, UserError
from training.checkpoint import list_checkpoints
from training.config import Decay, Optim, Precision
from training.ema import EMA
from training.loop import Trainer, train
from training.optim import learning_rate


def tiny(steps=6, **changes):
    config = get_config("lagrangian,smoke")
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = steps, 3, 2, steps
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def weights(workdir, file="network"):
    from safetensors.torch import load_file

    return load_file(list_checkpoints(workdir)[-1] / f"{file}.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_run_directory(tmp_path):
    fm = train(tiny(), tmp_path)
    assert fm.info.images_seen == 6 * 64 and fm.info.data == "checkerboard" and fm.info.kind == "map"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.json", "log.jsonl", "model", "samples"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"loss", "diagonal", "off_diagonal", "grad_norm", "lr", "images_per_second"} <= rows[0].keys()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-00000006.png"]
    assert_same(FlowMap.from_pretrained(tmp_path).network.state_dict(), fm.network.state_dict())


@pytest.mark.parametrize("learned", [False, True])
def test_resume_is_bit_exact(tmp_path, learned):
    """6 steps, against 3 steps, a new process's state, 3 more: every tensor of the checkpoint is equal."""
    config = tiny()
    config.weight.learned = learned
    train(config, tmp_path / "whole")
    half = tiny(steps=6)
    half.weight.learned = learned
    train(half, tmp_path / "parts")
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])  # as if it had been killed after step 3
    train(half, tmp_path / "parts")
    events = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert {"event": "resume", "step": 3} in events
    for file in ("network", "optimizer", "ema-0.999", *(["weight"] if learned else [])):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(tiny(), tmp_path)
    before = weights(tmp_path)
    train(tiny(), tmp_path)
    assert_same(before, weights(tmp_path))


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tiny(steps=9, keep=1), tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000009"]


def test_resume_refuses_another_config(tmp_path):
    train(tiny(), tmp_path)
    for change in ({"seed": 1}, {"batch": 32}, {"steps": 12}):  # the cosine rate follows the number of steps
        with pytest.raises(UserError, match=f"--config.{next(iter(change))} differs"):
            train(tiny(**change), tmp_path)
    train(tiny(log_every=1), tmp_path)


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, damage):
    train(tiny(), tmp_path)
    file = list_checkpoints(tmp_path)[-1] / name
    content, middle = file.read_bytes(), file.stat().st_size // 2
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match="damaged") as error:
        train(tiny(), tmp_path)
    assert str(file.parent) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_lies_about_its_step_is_refused(tmp_path):
    train(tiny(), tmp_path)
    file = list_checkpoints(tmp_path)[-1] / "state.json"
    file.write_text(file.read_text().replace('"step": 6', '"step": 5'))
    with pytest.raises(UserError, match="it says step 5"):
        train(tiny(), tmp_path)


def test_log_has_each_step_once_and_true_means(tmp_path, monkeypatch):
    """Means cover every step of an interval, whatever is written inside it; a resume drops what came after."""
    losses = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, k: (losses.append(step(self, k)), losses[-1])[1])
    train(tiny(log_every=5, checkpoint_every=3), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]
    assert rows[0]["loss"] == pytest.approx(sum(float(r["loss"]) for r in losses[:5]) / 5)
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"step": k, "loss": 0}) + "\n" for k in (2, 3, 4, 5)) + '{"st'
    )
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(log_every=5, checkpoint_every=3), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("event")) for row in rows] == [
        (2, None),
        (3, None),
        (3, "resume"),
        (5, None),
        (6, None),
    ]


def test_resume_with_dropout_is_bit_exact(tmp_path):
    from configs.digits import get_config as digits

    config = digits("lagrangian,smoke")
    config.steps, config.checkpoint_every, config.sample_every, config.network.dropout = 4, 2, 4, 0.3
    config.ema = (0.1, 0.99)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    train(config, tmp_path / "parts")
    for file in ("network", "ema-0.1", "ema-0.99"):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))
    different = weights(tmp_path / "whole", "ema-0.1"), weights(tmp_path / "whole", "ema-0.99")
    assert any(not torch.equal(different[0][k], different[1][k]) for k in different[0])


def test_loss_falls_and_every_term_is_logged(tmp_path):
    """Digits: the loss of the zero network is the variance of dI/dt; 60 steps must explain a third of it."""
    from configs.digits import get_config as digits

    config = digits("lagrangian,smoke")
    config.steps = config.checkpoint_every = config.sample_every = 60
    config.optim.warmup, config.log_every, config.batch = 5, 10, 32
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["diagonal"] < 2 / 3 * rows[0]["diagonal"] and rows[-1]["off_diagonal"] > 0


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.module.named_parameters() if p.grad is not None}


def test_micro_steps_sum_to_the_gradient_of_their_shards(monkeypatch):
    """accumulate=2 is the mean of the losses of shards 0 and 1, in one backward."""
    trainer = Trainer.build(tiny(accumulate=2))
    monkeypatch.setattr(trainer.prepared, "zero_grad", lambda **options: None)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
    trainer.step(3)
    ours = gradients(trainer)
    whole = Trainer.build(tiny(accumulate=2))
    ((whole.shard_loss(3, 0).value + whole.shard_loss(3, 1).value) / 2).backward()
    expected = gradients(whole)
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-8)


def test_bfloat16_is_close_to_float32_and_keeps_the_derivative_exact():
    from configs.digits import get_config as digits

    losses = {}
    for precision in Precision:
        AcceleratorState._reset_state()  # one process, two precisions: only a test does that
        config = digits("lagrangian,smoke")
        config.precision = precision
        trainer = Trainer.build(config)
        torch.manual_seed(0)
        for p in trainer.module.parameters():  # away from the zero-initialised branches
            torch.nn.init.normal_(p, std=0.05)
        losses[precision] = trainer.shard_loss(0, 0)
    AcceleratorState._reset_state()
    exact, half = ({k: float(v) for k, v in losses[p].terms.items()} for p in (Precision.fp32, Precision.bf16))
    assert half["diagonal"] != exact["diagonal"]  # autocast is on
    assert half["diagonal"] == pytest.approx(exact["diagonal"], rel=0.02)
    assert half["off_diagonal"] == pytest.approx(exact["off_diagonal"], rel=0.1)


@pytest.mark.slow
def test_compiled_run_equals_eager(tmp_path):
    from configs.digits import get_config as digits

    rows = []
    for compiled in (False, True):
        config = digits("lagrangian,smoke")
        config.compile, config.steps = compiled, 5
        trainer = Trainer.build(config)
        rows.append([trainer.step(k)["loss"].item() for k in range(5)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_non_finite_gradients_skip_the_step_and_then_stop_the_run(tmp_path):
    trainer = Trainer.build(tiny(max_skipped_steps=2))
    weights_before = {k: v.clone() for k, v in trainer.module.fm.network.state_dict().items()}
    trainer.data.x[:] = float("nan")
    for count in (1, 2):
        assert trainer.step(0)["skipped"] == count
    assert_same(weights_before, trainer.module.fm.network.state_dict())
    assert_same(weights_before, trainer.ema.state(0.999))
    with pytest.raises(UserError, match="max_skipped_steps"):
        trainer.step(0)


def test_ema_is_the_weighted_mean_of_the_weights():
    network = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(network, (0.5, 0.9))
    torch.nn.init.constant_(network.weight, 1.0)
    expected = {decay: ema.state(decay)["weight"].item() for decay in (0.5, 0.9)}
    for step in range(1, 40):
        torch.nn.init.constant_(network.weight, float(step))
        ema.update(step)
        for decay in expected:
            now = min(decay, (1 + step) / (10 + step))
            expected[decay] = now * expected[decay] + (1 - now) * step
    for decay, value in expected.items():
        assert ema.state(decay)["weight"].item() == pytest.approx(value, rel=1e-5)
        assert ema.network(decay).weight.item() == pytest.approx(value, rel=1e-5)
    assert network.weight.item() == 39  # the live weights are untouched


def test_ema_moves_where_half_precision_would_not():
    network = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.constant_(network.weight, 1.0)
    ema = EMA(network, (0.999,))
    torch.nn.init.constant_(network.weight, 1.0078125)  # the next bfloat16
    for step in range(20_000, 21_000):
        ema.update(step)
    assert ema.state(0.999)["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**1000), rel=1e-4)


def test_learning_rates():
    def rate(step, **options):
        return learning_rate(Optim(lr=1.0, warmup=options.pop("warmup", 0), **options), step, 100)

    assert [rate(k, warmup=3) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(0, decay=Decay.cosine) == 1 and rate(50, decay=Decay.cosine) == pytest.approx(0.5)
    assert rate(10, decay=Decay.inverse_sqrt, decay_start=20) == 1
    assert rate(80, decay=Decay.inverse_sqrt, decay_start=20) == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("ema", (1.0,)),
        ("ema", ()),
        ("base_std", 0.0),
        ("sample_steps", (0,)),
        ("interpolant", "x"),
    ],
)
def test_config_mistakes_name_the_flag(field, value):
    with pytest.raises(UserError, match=f"--config.{field}"):
        tiny(**{field: value}).validate()


def config_rows():
    import importlib

    for file in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        yield from (pytest.param(module, row, id=f"{file.stem}:{row}") for row in module.ROWS)


@pytest.mark.parametrize(("module", "row"), list(config_rows()))
def test_every_config_row_takes_two_steps(module, row):
    """What --dry_run does, without the grid; and the smoke variant exists."""
    from training.loop import dry_run

    facts, picture = dry_run(module.get_config(row), batch=8)
    assert facts["parameters"] > 0 and picture.width > 50
    Trainer.build(module.get_config(f"{row},smoke"))


def test_accidental_options_are_refused():
    from training.config import network, objective

    with pytest.raises(UserError, match="heads"):
        network("UNet", heads=3)
    with pytest.raises(UserError, match="colour"):
        objective("lagrangian", colour=1)
