"""The training loop: files of a run, exact resumption, averages, the log, the best checkpoint."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.runs import assert_same, tiny, weights

from flowmaps import FlowMap, UserError
from flowmaps.metrics.extractors import EXTRACTORS, load_extractor
from flowmaps.metrics.stored import Origin
from flowmaps.objectives import SoFlow
from flowmaps.run_weights import list_checkpoints
from training.best import BestModel
from training.config import Decay, Optim, Optimizer
from training.ema import EMA
from training.log import read_log
from training.loop import train
from training.optim import learning_rate
from training.trainer import Trainer


def test_run_directory(tmp_path):
    fm = train(tiny(), tmp_path)
    assert fm.info.images_seen == 6 * 64 and fm.info.data == "checkerboard" and fm.info.kind == "map"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "log.jsonl",
        "model",
        "samples",
        "tb",
    ]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    logged = {"loss", "diagonal", "off_diagonal", "jvp_norm", "grad_norm", "clipped", "skipped", "lr"}
    logged |= {"grad_norm_diagonal", "grad_norm_off_diagonal", "images_per_second", "residuals"}
    assert logged == rows[0].keys() - {"step"}
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-00000006.png"]
    assert_same(FlowMap.from_pretrained(tmp_path).network.state_dict(), fm.network.state_dict())


@pytest.mark.parametrize(("learned", "optimizer"), [(False, "adamw"), (True, "radam"), (True, "muon")])
def test_resume_is_bit_exact(tmp_path, learned, optimizer):
    """6 steps, against 3 steps, a new process's state, 3 more: every tensor of the checkpoint is equal."""
    config = tiny(log_every=3)
    config.weight.learned, config.optim.name = learned, Optimizer[optimizer]
    for run in ("whole", "parts"):
        train(config, tmp_path / run)
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])  # as if it had been killed after step 3
    train(config, tmp_path / "parts")
    events = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert {"event": "resume", "step": 3} in events
    for file in ("network", "optimizer", "ema-0.999", *(["weight"] if learned else [])):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))
    last = [read_log(tmp_path / run / "log.jsonl")[-1] for run in ("whole", "parts")]
    for row in last:
        del row["images_per_second"]
    assert last[0] == last[1] and last[0]["residuals"]["largest"]


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
        way = (
            f"^config.{next(iter(change))}: differs from the run in .* a new workdir, there with init_from={tmp_path} "
        )
        with pytest.raises(UserError, match=way):
            train(tiny(**change), tmp_path)
    train(tiny(log_every=1), tmp_path)


@pytest.mark.parametrize("alpha_steps", [0, 6])
def test_more_steps_are_refused_where_a_schedule_covers_the_run(tmp_path, alpha_steps):
    for steps in (6, 8):
        config = tiny(steps=steps, objective=SoFlow(alpha_steps=alpha_steps))
        config.optim.decay = Decay.constant
        if steps == 6 or alpha_steps:
            train(config, tmp_path)
        else:
            with pytest.raises(UserError, match=r"^config\.steps: differs"):
                train(config, tmp_path)


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
    """Means cover every step of an interval, whatever is written inside it; a resume drops later rows."""
    losses = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *a, **kw: (losses.append(step(*a, **kw)), losses[-1])[1])
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


@pytest.mark.parametrize("ramp", [0.0, 0.05])
def test_ema_is_the_weighted_mean_of_the_weights(ramp):
    """With a ramp the half-life is that of the decay, but at most a share of the images seen; here 8 in a batch."""
    network = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(network, (0.5, 0.9), ramp=ramp)
    torch.nn.init.constant_(network.weight, 1.0)
    expected = {decay: ema.state(decay)["weight"].item() for decay in (0.5, 0.9)}
    for step in range(1, 40):
        torch.nn.init.constant_(network.weight, float(step))
        ema.update(step)
        for decay in expected:
            half_life = -8 * math.log(2) / math.log(decay)
            now = 0.5 ** (8 / min(half_life, ramp * 8 * step)) if ramp else min(decay, (1 + step) / (10 + step))
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
    assert rate(0, decay=Decay.linear) == 1 and rate(75, decay=Decay.linear) == 0.25
    assert rate(10, decay=Decay.inverse_sqrt, decay_start=20) == 1
    assert rate(80, decay=Decay.inverse_sqrt, decay_start=20) == 0.5


def test_tensorboard_files_hold_what_the_log_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "diagonal", "grad_norm"):
        plotted = [(event.step, event.value) for event in events.Scalars(name)]
        assert plotted == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [image.step for image in events.Images("samples")] == [6]


def best_config(**changes):
    config = tiny(steps=9, **changes)
    config.best.metric, config.best.every, config.best.num, config.best.steps = "W2", 2, 500, 2
    return config


def test_best_checkpoint_is_the_lowest_score_and_can_be_sampled(tmp_path):
    train(best_config(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["W2@2"] for row in rows if "W2@2" in row}
    assert list(scores) == [2, 4, 6, 8, 9]
    best = tmp_path / "checkpoints" / "best"
    state = json.loads((best / "state.json").read_text())
    assert state["score"] == min(scores.values()) and scores[state["step"]] == state["score"]
    assert state["judge"] == {"metric": "W2", "steps": 2, "num": 500, "seed": 0}
    fm = FlowMap.from_pretrained(best)
    assert fm.info.images_seen == state["step"] * 64
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000009"]  # it is none of the kept


def test_best_survives_a_resume_and_changes_no_step(tmp_path):
    train(best_config(), tmp_path / "whole")
    train(best_config(), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000009")
    best = tmp_path / "parts" / "checkpoints" / "best" / "state.json"
    kept = json.loads(best.read_text())
    train(best_config(), tmp_path / "parts")
    assert json.loads(best.read_text()) == kept
    train(tiny(steps=9), tmp_path / "plain")
    for other in ("parts", "plain"):
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / other))


def test_best_by_features(tmp_path):
    from configs.digits import get_config as digits

    config = digits("flow_matching,smoke")
    config.steps = config.sample_every = config.checkpoint_every = 4
    config.best.metric, config.best.every, config.best.num, config.best.steps = "FD-digits", 2, 40, 1
    train(config, tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "best" / "state.json").read_text())
    assert state["judge"].items() >= {"metric": "FD-digits", "steps": 1, "num": 40}.items() and 0 < state["score"] < 1e5
    assert len(state["judge"]["reference"]) == len(state["judge"]["weights"]) == 64
    config.best.reference = str(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"config\.best\.reference=.*no such file"):
        train(config, tmp_path / "never")
    for wrong in ("W2", "FD-faces"):
        config.best.metric = wrong
        with pytest.raises(UserError, match=f"config.best.metric={wrong}"):
            train(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_best_of_another_judge_or_of_a_run_without_checkpoints_does_not_count(tmp_path):
    train(best_config(), tmp_path)
    best = tmp_path / "checkpoints" / "best" / "state.json"
    data = Trainer.build(best_config()).data
    device = torch.device("cpu")
    config = best_config()
    assert BestModel(config.best, data, 0, device).best_score(tmp_path) == json.loads(best.read_text())["score"]
    config.best.num = 20
    assert BestModel(config.best, data, 0, device).best_score(tmp_path) == math.inf
    assert BestModel(best_config().best, data, 1, device).best_score(tmp_path) == math.inf
    for checkpoint in list_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    train(tiny(), tmp_path)
    assert not best.exists()


def test_several_scores_are_logged_and_the_first_one_judges(tmp_path, monkeypatch):
    """The largest IS is the best; all are of the same samples, and features of digits stand for those of Inception."""
    from configs.digits import get_config as digits

    stand_in = replace(load_extractor("digits"), origin=Origin(extractor="inception"), logits=lambda features: features)
    monkeypatch.setitem(EXTRACTORS, "inception", lambda name, weights, device: stand_in)
    config = digits("flow_matching,smoke")
    config.steps = config.sample_every = config.checkpoint_every = 4
    config.best.every, config.best.num, config.best.steps = 2, 20, 1
    config.best.metric, config.best.also = "IS", ("FID", "recall", "FD-digits", "IS")
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = {name: [row[f"{name}@1"] for row in rows if f"{name}@1" in row] for name in ("IS", *config.best.also)}
    state = json.loads((tmp_path / "run/checkpoints/best/state.json").read_text())
    assert state["score"] == max(found["IS"]) and state["judge"]["metric"] == "IS"
    assert [len(values) for values in found.values()] == [2] * 4 and found["FID"] == found["FD-digits"]
    for field, value, message in (
        ("also", ("KID",), r"config\.best\.num=20: needs 1000 images"),
        ("also", ("W2",), r"config\.best\.also=W2"),
        ("metric", "FD-dinov2-vit-l-15", r"config\.best\.metric=FD-dinov2-vit-l-15"),
    ):
        other = digits("flow_matching,smoke")
        other.best.metric, other.best.num = "FID", 20
        setattr(other.best, field, value)
        with pytest.raises(UserError, match=message):
            train(other, tmp_path / "never")


def test_a_broken_model_scores_infinity_and_the_run_goes_on():
    from configs.digits import get_config as digits

    rows = (tiny(), "W2"), (digits("lagrangian,smoke"), "FD-digits"), (digits("consistency,smoke"), "FD-digits")
    for config, metric in rows:
        config.best.metric, config.best.num, config.best.steps = metric, 20, 2
        trainer = Trainer.build(config)
        judge = BestModel(config.best, trainer.data, 0, torch.device("cpu"))
        fm = trainer.averaged(0)
        assert math.isfinite(judge.score(fm)[metric])
        for p in fm.network.parameters():
            torch.nn.init.constant_(p, float("nan"))
        assert judge.score(fm) == {metric: math.inf}


def test_resume_refuses_other_samples_or_labels(data_root, tmp_path):
    from configs.folder import get_config as folder

    shutil.copytree(data_root / "folder", tmp_path / "images")
    config = folder("lagrangian,smoke")
    config.data.root, config.data.workers, config.network.image_size = str(tmp_path / "images"), 0, 16
    config.network.attention_resolutions, config.network.num_classes = (), 2
    config.batch, config.steps = 2, 1
    train(config, tmp_path / "run")
    config.steps = 2
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "zebra")
    with pytest.raises(UserError, match=r"^config\.data\.root: has changed"):
        train(config, tmp_path / "run")
    (tmp_path / "images" / "zebra").rename(tmp_path / "images" / "a")
    train(config, tmp_path / "run")
