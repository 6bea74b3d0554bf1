"""What a run on latents has beside its data: their scaling, and the VAE that makes images of samples."""

import sys
from dataclasses import replace

from flowmaps import UserError
from flowmaps.latents import Decoder, fingerprint
from training.config import Config
from training.data import DataSet, Latents


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
    decoder = Decoder(data.facts["vae"], shift, scale, flag="--config.data.vae")
    if fingerprint(decoder.open()) != data.facts["vae_sha256"]:
        print(
            f"warning: --config.data.vae={decoder.source} is not the VAE that made --config.data.root="
            f"{config.data.root}: right only if it has the same encoder",
            file=sys.stderr,
        )
    return decoder
