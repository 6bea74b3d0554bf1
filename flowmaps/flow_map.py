"""The flow map: a two-time velocity network, the path it was trained on, and what is known about it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.rng import generator
from samplers.callables import expand
from samplers.schedule import Schedule

if TYPE_CHECKING:
    from flowmaps.latents import Decoder


@dataclass(frozen=True)
class FlowMapInfo:
    """Facts that travel with the weights; a sampler refuses what they forbid."""

    shape: tuple[int, ...] = ()  # of one sample: (channels, height, width) for images, (dim,) for points
    num_classes: int = 0  # 0: unconditional; else labels 0 .. num_classes - 1, and num_classes means "no label"
    kind: str = "map"  # "map": v_{s,t} is trained for s <= t; "drift": v_{t,t} alone; "consistency": v_{s,1} alone
    data: str = ""  # the name of the training set
    ema: float | None = None  # decay of the weights' moving average, or its relative width (< 0.29); None: raw weights
    images_seen: int = 0
    guidance: float | None = None  # the guidance weight that is baked in, if any
    guidance_max: float | None = None  # the network takes a guidance weight from [1, this]
    schedules: dict[str, Schedule] = field(default_factory=dict)  # sampler -> its fitted step sizes
    t_range: tuple[float, float] = (0.0, 1.0)  # times on which the velocity is defined
    label_dropout: float = 0.0  # share of training rows without a label; 0: "no label" was never trained
    vae: str = ""  # of latents: the directory or hub id of the VAE that made them
    latent_shift: tuple[float, ...] = ()  # of latents: a sample is scale (z - shift), a number a channel, see
    latent_scale: tuple[float, ...] = ()  # flowmaps.latents; empty: samples are images or points
    origin: dict[str, str] = field(default_factory=dict)  # of imported weights: format, sha256, license and the like

    def __post_init__(self) -> None:
        if self.kind not in ("map", "drift", "consistency"):
            raise UserError(f"FlowMapInfo.kind must be 'map', 'drift' or 'consistency', got {self.kind!r}")
        channels = self.shape[0] if self.latent_scale and self.shape else 0
        if (len(self.latent_scale), len(self.latent_shift)) != (channels, channels) or 0 in self.latent_scale:
            raise UserError(
                f"FlowMapInfo.latent_shift and latent_scale are a number for each of {channels} channels, the latter "
                f"not 0, got {self.latent_shift} and {self.latent_scale}"
            )

    @property
    def sampler(self) -> str:
        """The sampler of ``flowmaps.generate`` that takes any number of steps and what the network was trained for."""
        return {"map": "map", "drift": "euler", "consistency": "stochastic"}[self.kind]

    def check_guidance(self, weight: float | None, sampler: str = "map") -> None:
        """Refuse a guidance weight that neither the network takes nor a solver can bring about."""
        if weight is None:
            return
        if self.guidance is not None:
            raise UserError(f"guidance {self.guidance:g} is baked into this model: leave --guidance out")
        if self.guidance_max is None:
            if self.label_dropout and sampler in ("euler", "heun"):
                return  # classifier-free, from the drifts with and without a label
            raise UserError(
                "this model was not trained to take a guidance weight: leave --guidance out"
                if self.label_dropout
                else "this model was trained neither to take a guidance weight nor without labels: leave --guidance out"
            )
        if not 1 <= weight <= self.guidance_max:
            raise UserError(f"--guidance={weight:g}: this model takes weights from 1 to {self.guidance_max:g}")

    def check_sampler(self, sampler: str, steps: int = 1, gamma: float = 1.0) -> None:
        """Refuse a sampler of ``flowmaps.generate`` that asks the network for what it was never trained on."""
        solver = sampler in ("euler", "heun")
        if self.kind == "drift" and not solver:
            raise UserError(
                "this model is a drift (trained by flow matching alone) and has no map to jump with: "
                "sample it with an ODE solver (--sampler=euler)"
            )
        if self.kind == "consistency" and (solver or (steps > 1 and not (sampler == "stochastic" and gamma == 1))):
            raise UserError(
                "this model is a consistency model, which only jumps to data: sample it in one step, or in several "
                "with fresh noise between them (--sampler=stochastic --gamma=1)"
            )

    def times(self, sampler: str, steps: int, guidance: float | None = None) -> Tensor | None:
        """The stored grid of ``steps`` steps for ``sampler``, which was fitted under ``guidance``; None without one."""
        schedule = self.schedules.get(sampler)
        if schedule is None or steps not in schedule or (schedule.guidance or 1) != (guidance or 1):
            return None
        return schedule[steps]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from ``to_dict`` (lists become tuples again); an unknown field is refused by name."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"unknown flow map facts {unknown}: the checkpoint is from a newer version of flowmaps")
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            frozen["schedules"] = {k: Schedule.from_dict(v) for k, v in values.get("schedules", {}).items()}
            info = cls(**frozen)
            whole = (*info.shape, info.num_classes, info.images_seen)
            if not all(isinstance(v, int) and v >= 0 for v in whole) or len(info.t_range) != 2:
                raise TypeError("shape, num_classes, images_seen or t_range")
            if not all(v is None or isinstance(v, (int, float)) for v in (info.guidance, info.guidance_max)):
                raise TypeError("guidance or guidance_max")
            if not all(isinstance(text, str) for item in [*info.origin.items(), (info.vae,)] for text in item):
                raise TypeError("origin or vae")
            if not all(isinstance(v, (int, float)) for v in (*info.latent_shift, *info.latent_scale)):
                raise TypeError("latent_shift or latent_scale")
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"flow map facts of the wrong type: {error}") from None
        return info


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
        from flowmaps.latents import Decoder  # needs diffusers, which `import flowmaps` does not load

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
