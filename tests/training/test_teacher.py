"""Teachers: an average of the weights, or a frozen checkpoint."""

import shutil

import pytest
import torch
from helpers.runs import assert_same, tiny, weights

from configs.checkerboard import get_config
from flowmaps import UserError
from flowmaps.run_weights import list_checkpoints
from training.config import Decay, Optim
from training.loop import train
from training.trainer import Trainer


def test_terminal_velocity_uses_its_own_average_as_teacher_and_resumes_exactly(tmp_path):
    """The teacher has the averaged weights after every step; it is not trained, and a resume restores it."""
    config = get_config("terminal_velocity,smoke")
    config.steps, config.checkpoint_every, config.sample_every = 6, 3, 6
    trainer = Trainer.build(config)
    assert set(trainer.ema.shadows) == {"0.999", "0.99"}
    before = {k: v.clone() for k, v in trainer.module.teacher.network.state_dict().items()}
    assert_same(before, trainer.module.fm.network.state_dict())
    for step in range(3):
        trainer.step(step)
    taught = trainer.module.teacher.network.state_dict()
    assert_same(taught, trainer.ema.state(0.99))
    assert not torch.equal(taught["layers.0.weight"], before["layers.0.weight"])
    assert not any("teacher" in name for name, _ in trainer.module.named_parameters())
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    train(config, tmp_path / "parts")
    for file in ("network", "ema-0.99", "ema-0.999", "optimizer"):
        assert_same(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))


def test_a_frozen_teacher_is_distilled_and_does_not_change(tmp_path):

    teacher = train(get_config("flow_matching,smoke"), tmp_path / "teacher")
    config = tiny(teacher=str(tmp_path / "teacher"), optim=Optim(decay=Decay.constant))
    taught, alone = Trainer.build(config), Trainer.build(tiny(optim=config.optim))
    assert taught.step(0)["off_diagonal"] != alone.step(0)["off_diagonal"]
    taught.step(1)
    assert taught.module.teacher.fingerprint() == teacher.fingerprint()
    train(config, tmp_path / "run")
    config.steps += 1
    train(config, tmp_path / "run")  # resumes
    other = get_config("flow_matching,smoke")
    other.seed, config.steps = 1, config.steps + 1
    train(other, tmp_path / "other")
    for changed in (str(tmp_path / "other"), ""):
        config.teacher = changed
        with pytest.raises(UserError, match=r"^config\.teacher: has changed"):
            train(config, tmp_path / "run")


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    from configs.digits import get_config as digits

    train(digits("consistency,smoke"), tmp_path)
    for row, reason in (("lagrangian", "consistency model"), ("progressive", "does not use a teacher")):
        config = digits(f"{row},smoke")
        config.teacher = str(tmp_path)
        with pytest.raises(UserError, match=rf"^teacher=.*{reason}"):
            Trainer.build(config)
    guided = digits("flow_matching,smoke")
    guided.objective.guidance, guided.data.label_dropout = 2.0, 0.1
    train(guided, tmp_path / "guided")
    plain = digits("flow_matching,smoke")
    train(plain, tmp_path / "plain")
    for name, reason in (("guided", "guidance"), ("plain", "label_dropout")):
        config = digits("lagrangian,smoke")
        config.teacher, config.data.label_dropout = str(tmp_path / name), 0.1
        with pytest.raises(UserError, match=reason):
            Trainer.build(config)
    with pytest.raises(UserError, match=r"objective\.teacher_ema=0"):
        Trainer.build(tiny(teacher=str(tmp_path), objective=digits("terminal_velocity").objective))
    with pytest.raises(UserError, match="shape"):
        Trainer.build(tiny(teacher=str(tmp_path)))
    with pytest.raises(UserError, match="nothing"):
        Trainer.build(tiny(teacher=str(tmp_path / "nothing")))
