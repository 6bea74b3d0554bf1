"""Facts that travel with the weights of a flow map."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from torch import Tensor

from flowmaps.errors import UserError
from samplers.schedule import Schedule


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
    latent_scale: tuple[float, ...] = ()  # flowmaps.vae; empty: samples are images or points
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
