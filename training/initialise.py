"""What a run starts from: the weights of another run, and the teacher that it follows."""

import copy
import json
import math
from dataclasses import replace
from typing import Any, cast

from flowmaps import FlowMap, UserError
from flowmaps.objectives import Objective
from flowmaps.run_weights import run_weights
from training.config import Config

# What a network may have otherwise than the one whose weights it starts from.
FREE = {"dropout", "guidance"}


def start_from(config: Config, fm: FlowMap) -> str:
    """Give ``fm`` the weights of ``config.init_from``, whose network must be of the same class and arguments.

    They are those that the checkpoint exports or, with ``config.init_ema``, others of the same run. What no checkpoint
    has, the guidance weight's embedding, stays as it is: it starts as nothing; so do the parameters of
    ``config.init_fresh``. Returns the fingerprint of what ``init_from`` held.
    """
    start = opened("init_from", config.init_from)
    if config.init_ema:
        start.network.load_state_dict(run_weights(config.init_from, config.init_ema))
    if type(start.network) is not type(fm.network):
        raise UserError(
            f"--config.init_from={config.init_from} has a {type(start.network).__name__}, this run's network is a "
            f"{config.network.name}"
        )
    ours, theirs = (dict(cast(Any, network).config) for network in (fm.network, start.network))
    for name in (name for name in ours if not name.startswith("_") and name not in FREE):
        if json.dumps(ours[name]) != json.dumps(theirs[name]):  # there, tuples are lists
            raise UserError(
                f"--config.init_from={config.init_from} was made with --config.network.{name}={theirs[name]}, "
                f"this run has {ours[name]}"
            )
    if (start.interpolant_name, start.base_std) != (fm.interpolant_name, fm.base_std):
        raise UserError(
            f"--config.init_from={config.init_from} has interpolant {start.interpolant_name} and base_std "
            f"{start.base_std:g}: --config.interpolant and --config.base_std must be the same"
        )
    _same_latents("init_from", config.init_from, start, fm)
    taken = start.network.state_dict()
    for beginning in config.init_fresh:
        fresh = [name for name in taken if name.startswith(beginning)]
        if not fresh:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in taken))
            raise UserError(f"--config.init_fresh={beginning} begins no parameter's name: they are in {known}")
        for name in fresh:
            del taken[name]
    fm.network.load_state_dict({**fm.network.state_dict(), **taken})
    fm.info = replace(fm.info, origin=start.info.origin)
    return start.fingerprint()


def _same_latents(flag: str, source: str, theirs: FlowMap, ours: FlowMap) -> None:
    """Refuse weights for latents of another scaling."""
    for name in ("latent_shift", "latent_scale"):
        a, b = (getattr(fm.info, name) for fm in (theirs, ours))
        if len(a) != len(b) or not all(
            math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6) for x, y in zip(a, b, strict=True)
        ):
            shown = ",".join(f"{x:.6g}" for x in a)
            raise UserError(
                f"--config.{flag}={source} has latents of another scaling: --config.data.{name}={shown or None}, this "
                f"run has {b or None}"
            )


def opened(flag: str, source: str) -> FlowMap:
    """The checkpoint that ``--config.flag`` names."""
    try:
        return FlowMap.from_pretrained(source)
    except UserError as error:
        raise UserError(f"--config.{flag}: {error}") from None


def build_teacher(config: Config, fm: FlowMap, objective: Objective) -> FlowMap | None:
    """The flow map whose drift teaches ``fm``: that of ``config.teacher``, a copy for an average, or None."""
    if not config.teacher:
        return copy.deepcopy(fm).requires_grad_(False).eval() if objective.teacher_ema else None
    if not objective.uses_teacher or objective.teacher_ema:
        reason = f"{config.objective.name} takes no teacher: leave it out"
        if objective.uses_teacher:
            reason = "an average teaches already: add --config.objective.teacher_ema=0"
        raise UserError(f"--config.teacher={config.teacher}, but {reason}")
    teacher = opened("teacher", config.teacher)
    for name, theirs, ours in (
        ("samples of shape", teacher.info.shape, fm.info.shape),
        ("num_classes", teacher.info.num_classes, fm.info.num_classes),
        ("interpolant", teacher.interpolant_name, fm.interpolant_name),
        ("base_std", teacher.base_std, fm.base_std),
        ("augment_dim", *(getattr(m.network.config, "augment_dim", 0) for m in (teacher, fm))),
    ):
        if theirs != ours:
            raise UserError(f"--config.teacher={config.teacher} has {name} {theirs}, this run {ours}")
    _same_latents("teacher", config.teacher, teacher, fm)
    if teacher.info.guidance_max or (teacher.info.guidance and objective.diagonal):
        raise UserError(f"--config.teacher={config.teacher} has guidance baked in, this run's diagonal has none")
    if teacher.info.guidance:  # all that is learned is the teacher's
        fm.info = replace(fm.info, guidance=teacher.info.guidance)
    if config.data.label_dropout and not teacher.info.label_dropout:
        raise UserError(
            f"--config.data.label_dropout={config.data.label_dropout:g}, but --config.teacher={config.teacher} "
            "was never trained without labels"
        )
    if teacher.info.kind == "consistency":
        raise UserError(f"--config.teacher={config.teacher} is a consistency model and has no drift to teach")
    return teacher.to(next(fm.parameters()).device).requires_grad_(False)
