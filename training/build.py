"""From a config to everything that one optimiser step touches."""

import sys
from dataclasses import replace
from typing import Any

from flowmaps.data import DataSet, Latents
from flowmaps.errors import UserError, within
from flowmaps.flow_map import FlowMap
from flowmaps.info import FlowMapInfo
from flowmaps.vae import Decoder, fingerprint
from training.config import Config, build_network, build_objective


def scaled(config: Config, data: DataSet) -> DataSet:
    """``data``, if it is latents with the VAE and scaling that ``config`` has for them."""
    given = {name: getattr(config.data, name) for name in ("vae", "latent_shift", "latent_scale")}
    given = {name: value for name, value in given.items() if value}
    if not isinstance(data, Latents):
        if given:
            raise UserError(f"--config.data.{next(iter(given))} is for latents, {config.data.name} has none")
        return data
    channels = data.shape[0]
    for name in ("latent_shift", "latent_scale"):
        if len(given.get(name, data.facts[name])) != channels or 0 in given.get("latent_scale", ()):
            raise UserError(f"--config.data.{name} must be {channels} numbers, a channel each, got {given[name]}")
    return replace(data, facts={**data.facts, **given})


def open_decoder(config: Config, data: Latents) -> Decoder:
    """The VAE of a run, open: without it there are no pictures, no scores and no whole export."""
    shift, scale = data.info["latent_shift"], data.info["latent_scale"]
    decoder = Decoder(data.facts["vae"], shift, scale)
    with within("data"):
        decoder.open()
    if fingerprint(decoder.open()) != data.facts["vae_sha256"]:
        print(
            f"warning: --config.data.vae={decoder.source} is not the VAE that made --config.data.root="
            f"{config.data.root}: right only if it has the same encoder",
            file=sys.stderr,
        )
    return decoder


def build_flow_map(config: Config, shape: tuple[int, ...], num_classes: int, **facts: Any) -> FlowMap:
    """A flow map round a fresh network, for samples of ``shape``; ``facts`` are further fields of its info."""
    wants = config.network
    expected = (wants.dim,) if hasattr(wants, "dim") else (wants.channels, wants.image_size, wants.image_size)
    if expected != shape:
        raise UserError(f"--config.network is made for samples of shape {expected}, {config.data.name} has {shape}")
    classes = num_classes if getattr(config.network, "num_classes", 0) else 0
    if classes and config.network.num_classes != num_classes:
        raise UserError(
            f"--config.network.num_classes={config.network.num_classes}, but {config.data.name} has {num_classes}"
        )
    made = build_objective(config)
    info = FlowMapInfo(
        shape=shape,
        num_classes=classes,
        kind=made.kind,
        data=config.data.name,
        ema=config.ema[0],
        label_dropout=config.data.label_dropout,
        guidance=made.guidance if made.guidance > 1 else None,
        guidance_max=made.guidance_max if made.guidance_max > 1 else None,
        schedules=made.schedules,
        **facts,
    )
    return FlowMap(build_network(config), config.interpolant, config.base_std, info)
