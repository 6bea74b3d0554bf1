"""The flow map: a two-time velocity network, the path it was trained on, and what is known about it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.info import FlowMapInfo
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.rng import generator
from samplers.callables import expand

if TYPE_CHECKING:
    from flowmaps.vae import Decoder


class FlowMap(nn.Module):
    """X_{s,t}(x) = x + (t - s) v_{s,t}(x): jumps along the probability-flow ODE from time s to time t.

    Boffi, Albergo and Vanden-Eijnden 2025 (arXiv 2505.18825), equation for the parametrisation in section 3; noise
    is at time 0 and has standard deviation ``base_std``, data at time 1. In all methods ``x`` is [B, ...], times are
    floats [B] with s <= t, and ``label`` is int64 [B] or None ("no label").
    """

    def __init__(
        self,
        network: nn.Module,
        interpolant: str = "linear",
        base_std: float = 1.0,
        info: FlowMapInfo | None = None,
    ) -> None:
        super().__init__()
        if interpolant not in INTERPOLANTS:
            raise UserError(f"unknown interpolant {interpolant!r}: choose one of {', '.join(INTERPOLANTS)}")
        if not base_std > 0:
            raise UserError(f"base_std must be positive, got {base_std}")
        config = getattr(network, "config", {})
        if config.get("convention") and (interpolant, base_std) != ("linear", config["base_std"]):
            raise UserError(
                f"the network's weights want the linear path and base_std {config['base_std']:g}, "
                f"got {interpolant} and {base_std:g}"
            )
        self.network = network
        self.interpolant_name = interpolant
        self.interpolant = INTERPOLANTS[interpolant]
        self.base_std = base_std
        self.info = info or FlowMapInfo()
        self.decoder: Decoder | None = None  # of latents, made when needed; no part of the module's parameters

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """X_{s,t}(x), same shape as ``x``; refused for a network of kind "drift", where it was never trained."""
        self.info.check_sampler("map")
        return x + expand(t - s, x).to(x.dtype) * self.velocity(x, s, t, label)

    def velocity(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """v_{s,t}(x), the average velocity between s and t: the network's output, verbatim."""
        v: Tensor = self.network(x, s, t, label)
        return v

    def drift(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """b_t(x) = v_{t,t}(x), the velocity of the probability-flow ODE."""
        return self.velocity(x, t, t, label)

    def decode(self, x: Tensor) -> Tensor:
        """Images of samples x [B, ...]: those that the VAE makes of latents [B, 3, H, W], else x itself."""
        return self.open_decoder()(x) if self.info.latent_scale else x

    def open_decoder(self) -> "Decoder":
        """The decoder of latents, its VAE open."""
        from flowmaps.vae import Decoder  # needs diffusers, which `import flowmaps` does not load

        if self.decoder is None:
            self.decoder = Decoder(self.info.vae, self.info.latent_shift, self.info.latent_scale)
        self.decoder.open()
        return self.decoder

    def noise(self, n: int, seed: int, start: int = 0, draw: int = 0) -> Tensor:
        """x0 of samples ``start`` .. ``start + n - 1``: [n, *shape], normal with standard deviation ``base_std``.

        Sample i has the same noise whatever ``n``, the batch size or the number of processes. ``draw`` 1, 2, ... is
        further noise of the same samples, for samplers that need it.
        """
        if not self.info.shape:
            raise UserError("FlowMapInfo.shape is empty: say what one sample looks like before drawing noise")
        streams = (generator(seed, "noise", i, draw) for i in range(start, start + n))
        rows = [torch.randn(self.info.shape, generator=stream) for stream in streams]
        parameter = next(self.network.parameters(), torch.empty(0))  # a closed form has none
        return self.base_std * torch.stack(rows).to(device=parameter.device, dtype=parameter.dtype)

    def fingerprint(self) -> str:
        """SHA-256 over the network's config and its weights by name: what a record says it was made with."""
        config = {k: v for k, v in getattr(self.network, "config", {}).items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps([config, self.interpolant_name, self.base_std], sort_keys=True).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a diffusers pipeline directory: safetensors and JSON only, complete or not at all."""
        from flowmaps.export import save  # needs diffusers, which `import flowmaps` does not load

        save(self, Path(directory))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "FlowMap":
        """Read what ``save_pretrained`` wrote, from a directory or a Hugging Face hub id, in eval mode on the CPU."""
        from flowmaps.export import load

        return load(source)
