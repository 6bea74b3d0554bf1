"""The checkpoints that a run depends on: the weights it starts from, and its teacher."""

import json
import math
from dataclasses import replace
from typing import Any, cast

from flowmaps import FlowMap, UserError
from flowmaps.errors import blame
from flowmaps.networks import NETWORKS
from flowmaps.objectives import Objective
from flowmaps.run_weights import load_weights, run_weights
from training.config import Config, class_name
from training.ema import sampling_copy

# Arguments of the network that may differ from those of the checkpoint, and those that may be True for the first time.
MAY_DIFFER, MAY_COME = {"dropout", "decoupled"}, {"guidance", "guidance_interval", "second_head"}

TRAVELS = ("format", "sha256", "license")  # facts about an imported teacher that its student's card has


def load_flow_map(field: str, source: str, config: Config) -> FlowMap:
    """Load the checkpoint that the config's ``field`` names; it may have the config's own class of network."""
    with blame(field, source):
        own = config.network.network_class
        return FlowMap.from_pretrained(source, None if own in NETWORKS.values() else own)


def init_from_checkpoint(config: Config, fm: FlowMap) -> str:
    """Load the weights of ``config.init_from`` into ``fm`` and return the fingerprint of that checkpoint.

    They are the weights that the checkpoint exports or, with ``config.init_ema``, others of the same run. Parameters
    that no checkpoint has (the embedding of a guidance weight, zero at first) and those of ``config.init_fresh`` keep
    their initial values.

    Raises:
        UserError: The checkpoint has a network of another class, other arguments, another path or another scaling of
            its latents.
    """
    start = load_flow_map("init_from", config.init_from, config)
    if config.init_ema:
        with blame("init_ema", config.init_ema):
            load_weights(start.network, run_weights(config.init_from, config.init_ema))

    def refused(reason: str) -> UserError:
        return UserError(reason, field="init_from", value=config.init_from)

    if type(start.network) is not type(fm.network):
        raise refused(f"has a {type(start.network).__name__}, this run's network is a {type(fm.network).__name__}")
    ours, theirs = (dict(cast(Any, network).config) for network in (fm.network, start.network))
    for name in (name for name in ours if not name.startswith("_") and name not in MAY_DIFFER):
        free = name in MAY_COME and ours[name]
        if not free and json.dumps(ours[name]) != json.dumps(theirs[name]):  # a loaded config has lists for tuples
            raise refused(f"was made with network.{name}={theirs[name]}, this run has {ours[name]}")
    if (start.interpolant_name, start.base_std) != (fm.interpolant_name, fm.base_std):
        raise refused(
            f"has interpolant {start.interpolant_name} and base_std {start.base_std:g}: interpolant and base_std must "
            "be the same"
        )
    _check_latents("init_from", config.init_from, start, fm)
    taken = start.network.state_dict()
    for prefix in config.init_fresh:
        fresh = [name for name in taken if name.startswith(prefix)]
        if not fresh:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in taken))
            raise UserError(f"no parameter's name begins so: they are in {known}", field="init_fresh", value=prefix)
        for name in fresh:
            del taken[name]
    fm.network.load_state_dict({**fm.network.state_dict(), **taken})
    fm.info = replace(fm.info, origin=start.info.origin)
    return start.fingerprint()


def _check_latents(field: str, source: str, theirs: FlowMap, ours: FlowMap) -> None:
    """Refuse weights for latents of another scaling, or of a VAE with another range."""
    a, b = theirs.info.vae_range, ours.info.vae_range
    if theirs.info.latent_scale and ours.info.latent_scale and a != b:
        raise UserError(
            f"has latents of a VAE for pixels in {a[0]:g} .. {a[1]:g}, the prepared set of one for {b[0]:g} .. "
            f"{b[1]:g}: prepare the images with vae_range={a[0]:g},{a[1]:g}",
            field=field,
            value=source,
        )
    for name in ("latent_shift", "latent_scale"):
        a, b = (getattr(fm.info, name) for fm in (theirs, ours))
        if len(a) != len(b) or not all(
            math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6) for x, y in zip(a, b, strict=True)
        ):
            shown = ",".join(f"{x:.6g}" for x in a)
            raise UserError(
                f"has latents of another scaling: data.{name}={shown or None}, this run has {b or None}",
                field=field,
                value=source,
            )


def build_teacher(config: Config, fm: FlowMap, objective: Objective) -> FlowMap | None:
    """Return the frozen flow map whose drift is the target: ``config.teacher``, a copy for an average, or None."""
    if not config.teacher:
        if not objective.teacher_ema:
            return None
        copied = FlowMap(sampling_copy(fm.network), fm.interpolant_name, fm.base_std, fm.info)
        return copied.requires_grad_(False).eval()

    def refused(reason: str) -> UserError:
        return UserError(reason, field="teacher", value=config.teacher)

    if not objective.uses_teacher:
        raise refused(f"{class_name(objective)} does not use a teacher: leave it out")
    if objective.teacher_ema:
        raise refused("this objective already uses its own average as teacher: set objective.teacher_ema=0")
    teacher = load_flow_map("teacher", config.teacher, config)
    for name, theirs, ours in (
        ("samples of shape", teacher.info.shape, fm.info.shape),
        ("num_classes", teacher.info.num_classes, fm.info.num_classes),
        ("condition", teacher.info.condition, fm.info.condition),
        ("interpolant", teacher.interpolant_name, fm.interpolant_name),
        ("base_std", teacher.base_std, fm.base_std),
        ("augment_dim", *(getattr(m.network.config, "augment_dim", 0) for m in (teacher, fm))),
    ):
        if theirs != ours:
            raise refused(f"has {name} {theirs}, this run {ours}")
    _check_latents("teacher", config.teacher, teacher, fm)
    if teacher.info.guidance and objective.diagonal:  # of one conditioned on the weight, the drift of weight 1 is taken
        raise refused("has guidance baked in, this run's diagonal has none: set objective.diagonal=0")
    if teacher.info.guidance:  # without a diagonal, all that is learned comes from the teacher
        fm.info = replace(fm.info, guidance=teacher.info.guidance)
    if config.data.label_dropout and not teacher.info.label_dropout:
        raise refused(f"was never trained without labels, but data.label_dropout={config.data.label_dropout:g}")
    if teacher.info.kind == "consistency":
        raise refused("is a consistency model and does not have a drift to distil")
    taught = {f"teacher's {name}": fact for name, fact in teacher.info.origin.items() if name in TRAVELS}
    fm.info = replace(fm.info, origin={**fm.info.origin, **taught})
    return teacher.to(next(fm.parameters()).device).requires_grad_(False)
