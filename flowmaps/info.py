"""Facts that travel with the weights of a flow map."""

import math
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from torch import Tensor

from flowmaps.errors import UserError, shorten
from flowmaps.reading import parse
from samplers import SAMPLERS, Schedule

VAE_RANGE = (-1.0, 1.0)  # that Stable Diffusion's VAE was trained with
MOST_CLASSES, LARGEST_SAMPLE = 1_000_000, 1 << 28  # bounds of what a file can claim: classes, numbers in one sample
LONGEST_NAME = 255  # characters of a class name; a folder's name has no more


def check_vae_range(values: tuple[float, float]) -> tuple[float, float]:
    """Return ``values`` if they can be the pixel values of black and white.

    Raises:
        UserError: They are not two different finite numbers in increasing order. The field is "vae_range".
    """
    if len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]:
        given = ",".join(f"{value:g}" for value in values)
        raise UserError("must be two increasing numbers, such as 0,1", field="vae_range", value=given)
    return values


BOUNDS = (  # field, least, most
    ("num_classes", 0, MOST_CLASSES),
    ("ema", 0, 1),
    ("images_seen", 0, 1e18),
    ("guidance", 0, 1e6),
    ("guidance_max", 1, 1e6),
    ("label_dropout", 0, 1),
)


@dataclass(frozen=True)
class FlowMapInfo:
    """Facts that travel with the weights; a sampler refuses what they forbid.

    The arguments are the fields, all of which have defaults.

    Compatibility between versions: a fact that changes what the network computes or how it may be sampled is a plain
    field, and a version that does not know it refuses the checkpoint by the fact's name. A fact that only describes
    (a date, a note) may be added in a minor version as ``field(default=..., metadata={"optional": True})``: its name is
    then written under the key ``"optional"``, and a version that does not know it ignores it with a warning.

    Raises:
        UserError: A field is out of range, or the latent scaling does not have one number per channel.

    Example:
        >>> info = FlowMapInfo(shape=(1, 8, 8), num_classes=10, kind="drift")
        >>> info.check_sampler("map")
        Traceback (most recent call last):
        flowmaps.errors.UserError: sampler=map: this model is a drift (trained by flow matching alone) ...
    """

    shape: tuple[int, ...] = ()  # of one sample: (channels, height, width) for images, (dim,) for points
    num_classes: int = 0  # 0: unconditional; else labels 0 .. num_classes - 1, and num_classes means "no label"
    kind: str = "map"  # "map": v_{s,t} is trained for s <= t; "drift": only v_{t,t}; "consistency": only v_{s,1}
    data: str = ""  # the name of the training set
    ema: float | None = None  # decay of the weights' moving average, or its relative width (< 0.29); None: raw weights
    images_seen: int = 0
    guidance: float | None = None  # guidance weight baked in by training, if any
    guidance_max: float | None = None  # the network takes a guidance weight in [1, guidance_max]
    guidance_interval: bool = False  # and the times from which and up to which it applies
    schedules: dict[str, Schedule] = field(default_factory=dict)  # sampler -> its fitted step sizes
    t_range: tuple[float, float] = (0.0, 1.0)  # times for which the velocity was trained
    label_dropout: float = 0.0  # share of training rows without a label; 0: "no label" was never trained
    vae: str = ""  # of latents: directory or hub id of their VAE
    vae_range: tuple[float, float] = VAE_RANGE  # of latents: the values of black and white that the VAE takes and gives
    latent_shift: tuple[float, ...] = ()  # of latents z, per channel: a sample is latent_scale (z - latent_shift)
    latent_scale: tuple[float, ...] = ()  # of latents, per channel; empty: samples are images or points
    origin: dict[str, str] = field(default_factory=dict)  # of imported weights: format, sha256, license and the like
    condition: tuple[int, ...] = ()  # the shape of what is given in place of a class: a vector, tokens, an image
    recommended_sampler: str = field(default="", metadata={"optional": True})  # of a map whose authors say so
    recommended_guidance: tuple[float, ...] = field(default=(), metadata={"optional": True})  # the same: (w, low, high)
    class_names: tuple[str, ...] = field(default=(), metadata={"optional": True})  # by number; empty: unknown
    class_shares: tuple[float, ...] = field(default=(), metadata={"optional": True})  # in the data; empty: equal ones

    def __post_init__(self) -> None:
        if self.kind not in ("map", "drift", "consistency"):
            raise UserError("must be 'map', 'drift' or 'consistency'", field="kind", value=repr(self.kind))
        if any(size < 1 for size in self.shape) or math.prod(self.shape) > LARGEST_SAMPLE:
            raise UserError(f"must be sizes of at least 1, {LARGEST_SAMPLE:,} numbers at most", "shape", self.shape)
        for name, least, most in BOUNDS:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # NaN fails this too
                raise UserError(f"must lie from {least:g} to {most:g}", field=name, value=value)
        if self.condition and (self.num_classes or any(size < 1 for size in self.condition)):
            raise UserError("must be sizes of at least 1, and num_classes 0", "condition", self.condition)
        if not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise UserError("must be two increasing times in [0, 1]", field="t_range", value=self.t_range)
        shares = self.class_shares
        if shares and not (len(shares) == self.num_classes and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6):
            raise UserError("must be a share for each class, 1 in all", field="class_shares", value=shorten(shares, 60))
        for sampler, schedule in self.schedules.items():
            if sampler not in SAMPLERS or schedule.sampler not in ("", sampler):
                raise UserError(f"has one of {schedule.sampler or 'a sampler'} for {sampler}", field="schedules")
        if self.recommended_sampler:
            self.check_sampler(self.recommended_sampler, 2)
        if self.recommended_guidance:
            weight, *interval = self.recommended_guidance
            self.check_guidance(weight, interval=(*interval,))  # type: ignore[arg-type]
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"has {len(self.class_names):,} for {self.num_classes:,} classes", "class_names")
        if wrong := [name for name in self.class_names if not 0 < len(name) <= LONGEST_NAME]:
            raise UserError(f"must have 1 to {LONGEST_NAME} characters each", "class_names", repr(wrong[0]))
        check_vae_range(self.vae_range)
        channels = self.shape[0] if self.latent_scale and self.shape else 0
        numbers = (*self.latent_scale, *self.latent_shift)
        if (
            (len(self.latent_scale), len(self.latent_shift)) != (channels, channels)
            or 0 in self.latent_scale
            or not all(map(math.isfinite, numbers))
        ):
            raise UserError(
                f"latent_shift and latent_scale need one finite number for each of {channels} channels, and no scale "
                f"may be 0, got {self.latent_shift} and {self.latent_scale}"
            )

    @property
    def label_size(self) -> int:
        """The number of classes, or of the numbers in a condition; 0 for an unconditional model."""
        return self.num_classes or (math.prod(self.condition) if self.condition else 0)

    @property
    def sampler(self) -> str:
        """The default sampler: one that takes any number of steps and asks only for what the network was trained on.

        Of a published map it is the one by which its authors' figures were made.
        """
        return self.recommended_sampler or {"map": "map", "drift": "euler", "consistency": "stochastic"}[self.kind]

    def usual_guidance(self) -> dict[str, Any]:
        """Return the guidance behind the figures of a published map as options of ``generate``, none for others."""
        if not self.recommended_guidance:
            return {}
        weight, low, high = self.recommended_guidance
        return {"guidance": weight, "guidance_interval": (low, high)}

    def check_guidance(
        self, weight: float | None, sampler: str = "map", interval: tuple[float, float] | None = None
    ) -> None:
        """Refuse guidance that neither the network nor the sampler can apply; a weight of None or 1 means none.

        Raises:
            UserError: Guidance is baked in, was not trained, or the weight or its ``interval`` of times is out of
                range; the field is "guidance" or "guidance_interval".
        """
        if interval is not None:
            self._check_interval(weight, interval)
        if weight is None:
            return
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise UserError("must be a number", field="guidance", value=weight)
        if not math.isfinite(weight):
            self._refuse_guidance(weight, "must be finite")
        if weight == 1:
            return
        if self.guidance is not None:
            self._refuse_guidance(weight, f"guidance {self.guidance:g} is baked into this model: leave guidance out")
        if self.guidance_max is None:
            if self.label_dropout and SAMPLERS[sampler].of == "drift":
                return  # classifier-free, from the drifts with and without a label
            reason = "to take a guidance weight" if self.label_dropout else "with a guidance weight or without labels"
            remedy = "use an ODE solver or leave guidance out" if self.label_dropout else "leave guidance out"
            self._refuse_guidance(weight, f"this model was not trained {reason}: {remedy}")
        elif not 1 <= weight <= self.guidance_max:
            self._refuse_guidance(weight, f"this model takes weights from 1 to {self.guidance_max:g}")

    def _check_interval(self, weight: float | None, interval: tuple[float, float]) -> None:
        given = ",".join(map(str, interval))
        if not self.guidance_interval:
            raise UserError("this model was not trained to take one: leave it out", "guidance_interval", given)
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:  # NaN fails this too
            raise UserError("must be two times in order from 0 to 1, such as 0.4,0.6", "guidance_interval", given)
        if weight is None:
            raise UserError("has no effect without guidance", "guidance_interval", given)

    def _refuse_guidance(self, weight: float, reason: str) -> None:
        raise UserError(reason, field="guidance", value=f"{weight:g}")

    def check_sampler(self, sampler: str, steps: int = 1, gamma: float = 1.0) -> None:
        """Refuse a sampler that asks the network for what it was never trained on.

        Args:
            sampler: A key of ``samplers.SAMPLERS``.
            steps: The number of steps that will be taken.
            gamma: The share of noise that ``sampler="stochastic"`` renews per step.

        Raises:
            UserError: The sampler is unknown, or not for a model of this kind.
        """
        if sampler not in SAMPLERS:
            raise UserError(f"choose from {', '.join(SAMPLERS)}", field="sampler", value=sampler)
        row = SAMPLERS[sampler]
        if self.kind == "drift" and row.of != "drift":
            raise UserError(
                "this model is a drift (trained by flow matching alone) and has no map to jump with: "
                "sample it with an ODE solver (sampler=euler)",
                field="sampler",
                value=sampler,
            )
        if self.kind == "consistency" and (row.of == "drift" or (steps > 1 and not (row.renoises and gamma == 1))):
            raise UserError(
                "this model is a consistency model, which only jumps to data: sample it in one step, or in several "
                "steps with fresh noise between them (sampler=stochastic, gamma=1)",
                field="sampler",
                value=sampler,
            )

    def times(self, sampler: str, steps: int, guidance: float | None = None) -> Tensor | None:
        """Return the stored grid of ``steps`` steps for ``sampler`` under ``guidance``; None if there is none."""
        schedule = self.schedules.get(sampler)
        if schedule is None or steps not in schedule or (schedule.guidance or 1) != (guidance or 1):
            return None
        return schedule[steps]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the names of optional facts, if any, under ``"optional"``.

        Optional facts that have their defaults are left out.
        """
        optional = [f for f in fields(self) if f.metadata.get("optional")]
        unused = {f.name for f in optional if getattr(self, f.name) == f.default}
        used = [f.name for f in optional if f.name not in unused]
        values = {name: value for name, value in asdict(self).items() if name not in unused}
        return values | ({"optional": used} if used else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from ``to_dict``, also of a newer version (lists become tuples again).

        Facts unknown to this version that ``values["optional"]`` lists are ignored and named in a warning. Facts that
        an earlier version did not know have their defaults. A checkpoint of latents from EDM2 must say the range of
        its VAE: the versions that did not record it got it wrong.

        Raises:
            UserError: Another fact is unknown, or one has the wrong type or is out of range.
        """
        where = "flow map facts"
        plain: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in parse(dict[str, Any], values, where).items()
        }
        optional = parse(list[str], plain.pop("optional", []), f"{where}: optional")
        unknown = sorted(plain.keys() - {f.name for f in fields(cls)})
        if required := [name for name in unknown if name not in optional]:
            raise UserError(
                f"unknown flow map facts {shorten(required)}: the checkpoint is from a newer version of flowmaps"
            )
        if unknown:
            ignored = shorten(", ".join(unknown))
            warnings.warn(f"ignored facts of a newer version of flowmaps: {ignored}", stacklevel=2)
        known = {name: value for name, value in plain.items() if name not in unknown}
        schedules = {}
        for sampler, schedule in parse(dict[str, Any], known.pop("schedules", {}), f"{where}: schedules").items():
            try:
                schedules[sampler] = Schedule.from_dict(schedule)
            except ValueError as error:
                raise UserError(f"{where}: schedules: {shorten(sampler, 60)}: {error}") from None
        info = replace(parse(cls, known, where), schedules=schedules)
        if info.latent_scale and info.origin.get("format") == "edm2" and "vae_range" not in known:
            raise UserError("missing, lost by the version that imported this from EDM2: import it again", "vae_range")
        return info
