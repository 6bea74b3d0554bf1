"""The run config: typed dataclasses that a file in configs/ fills and ``--config.a.b=value`` overrides.

Closed choices are Enums, given by name on the command line. ``objective`` is the objective itself, a dataclass of its
options. ``network`` has exactly the arguments of the class that it configures, read from its constructor.
"""
# No `from __future__ import annotations` here: ml_collections reads the annotations as types.

import dataclasses
import enum
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn

from flowmaps.errors import UserError, choose, within
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.networks import NETWORKS
from flowmaps.objectives import OBJECTIVES, Objective, TrajectoryObjective
from flowmaps.objectives.base import DerivativeRole
from flowmaps.posthoc_ema import WIDEST
from training.config_sections import (
    TRACKERS,
    Background,
    Best,
    CompileMode,
    Data,
    Decay,
    DerivativePrecision,
    DropoutRows,
    Fit,
    Grid,
    Optim,
    Optimizer,
    Precision,
    Solver,
    Start,
    Trajectories,
    Weight,
    may_change,
    resumable,
)
from training.config_values import check_assigned, check_values
from training.network_section import NetworkSection, check_fit, network, preset

__all__ = [
    "WIDEST",
    "Background",
    "Best",
    "CompileMode",
    "Config",
    "Data",
    "Decay",
    "DerivativePrecision",
    "DropoutRows",
    "Fit",
    "Grid",
    "NetworkSection",
    "Optim",
    "Optimizer",
    "Precision",
    "Solver",
    "Start",
    "Trajectories",
    "Weight",
    "build_network",
    "build_objective",
    "class_name",
    "network",
    "plain",
    "preset",
]


@dataclass
class Config:
    """Everything that defines a run. Fields are flags of train.py: ``--config.optim.lr=1e-3``.

    Args:
        network: The architecture: ``network(UNet, image_size=32)`` or ``preset("dit-b4-imagenet256")``.
        objective: The loss: ``Lagrangian(diagonal=0.75)``, any of ``flowmaps.objectives``.

    The other fields have defaults. A number without a unit counts optimiser steps.

    Example:
        >>> unet = network(UNet, image_size=8, channels=1, width=32, channel_mult=(1, 2), num_classes=10)
        >>> config = Config(unet, Lagrangian(), data=Data(name="digits"), steps=1500, batch=64)
        >>> train(config, "runs/digits")
    """

    network: NetworkSection
    objective: Objective
    teacher: str = may_change("")  # checkpoint whose frozen drift is the target; empty: the network or its average
    init_from: str = may_change("")  # checkpoint whose weights the network starts from; empty: random weights
    init_ema: str = ""  # which weights of that run: the decay of an average, or raw; empty: those it exports
    init_fresh: tuple[str, ...] = ()  # prefixes of names of parameters that keep their random initial values
    lora: int = 0  # rank of low-rank updates to train instead of the weights; 0: train the weights
    trajectories: Trajectories = field(default_factory=Trajectories)  # for mid_training and straightening
    data: Data = field(default_factory=Data)
    interpolant: str = "linear"
    base_std: float = 0.5  # standard deviation of the noise; the paper uses that of the data
    weight: Weight = field(default_factory=Weight)
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    batch: int = 128  # global batch, in images
    accumulate: int = may_change(1)  # micro-steps per step: divides the memory, does not change the result
    precision: Precision = Precision.fp32
    derivative_precision: DerivativePrecision = DerivativePrecision.auto  # of the products inside derivatives
    tf32: bool = True  # allow TF32 in the other float32 products on CUDA: matrix products and convolutions
    compile: bool = False  # torch.compile of the loss module
    compile_mode: CompileMode = CompileMode.default
    channels_last: bool = False  # memory layout of convolutions
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    max_skipped_steps: int = may_change(10)  # a step with a non-finite gradient is skipped; after this many, stop
    seed: int = 0
    shard: bool = may_change(False)  # shard weights, optimiser and averages over the processes (FSDP2) instead of DDP
    ema: tuple[float, ...] = (0.999,)  # decays of averages kept side by side; the first is sampled and exported
    ema_ramp: float = 0.0  # largest half-life of ema, as a share of the steps so far; 0: decays rise in another way
    ema_widths: tuple[float, ...] = ()  # of power-function averages; their snapshots give any width afterwards
    timeout: int = may_change(1800)  # seconds that a process waits for the others
    snapshot_every: int = may_change(1000)
    log_every: int = may_change(50)
    log_with: tuple[str, ...] = may_change(())  # of TRACKERS, next to log.jsonl; tensorboard also by being installed
    sample_every: int = may_change(500)
    sample_steps: tuple[int, ...] = may_change((1, 2, 4, 8))
    checkpoint_every: int = may_change(500)
    keep: int = may_change(2)  # number of checkpoints kept
    best: Best = field(default_factory=Best)

    def validate(self) -> None:
        """Check everything, types first (``check_values``, which tidies them too).

        Raises:
            UserError: A field has a wrong value or two fields contradict each other; its ``field`` is relative to the
                config, such as "optim.lr".
        """
        check_values(self)
        self._check_ranges()
        self._check_optional_parts()
        self._check_averages()
        self._check_objective()
        check_assigned(self)

    def _check_ranges(self) -> None:
        for least, names in (
            (0, "data.workers optim.warmup optim.weight_decay lora weight.log_floor"),
            (1, "steps batch accumulate log_every sample_every checkpoint_every snapshot_every keep"),
            (1, "best.steps best.every optim.decay_start timeout"),
            (2, "best.num"),
        ):
            for name in names.split():
                if attrgetter(name)(self) < least:
                    raise UserError(f"must be at least {least}", field=name, value=attrgetter(name)(self))
        if not 0 <= self.optim.clip < float("inf"):
            raise UserError("must be 0 (no clipping) or positive", field="optim.clip", value=self.optim.clip)
        for name in ("base_std", "optim.lr", "weight.limit"):
            if not 0 < attrgetter(name)(self) < float("inf"):
                raise UserError("must be positive and finite", field=name, value=attrgetter(name)(self))
        for name in ("data.augment", "data.label_dropout"):
            if not 0 <= attrgetter(name)(self) <= 1:
                raise UserError("a probability must lie in [0, 1]", field=name, value=attrgetter(name)(self))
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise UserError("must be two numbers in [0, 1)", field="optim.betas", value=self.optim.betas)
        if self.optim.spike and not 1 < self.optim.spike < float("inf"):
            raise UserError("must be above 1, or 0 to skip no step", field="optim.spike", value=self.optim.spike)
        if self.optim.name is not Optimizer.muon:
            if self.optim.nesterov:
                raise UserError("is for the AdamW next to Muon: set optim.name=muon", "optim.nesterov", True)
            if self.optim.muon_kernels:
                raise UserError("is for Muon: set optim.name=muon", "optim.muon_kernels", True)
        if not self.sample_steps or min(self.sample_steps) < 1:
            raise UserError("must be step counts of at least 1", field="sample_steps", value=self.sample_steps)

    def _check_optional_parts(self) -> None:
        if self.interpolant not in INTERPOLANTS:
            raise UserError(f"choose one of {', '.join(INTERPOLANTS)}", field="interpolant", value=self.interpolant)
        if self.weight.log_floor and not self.weight.learned:
            raise UserError("needs weight.learned=True", field="weight.log_floor", value=self.weight.log_floor)
        if unknown := [name for name in self.log_with if name not in TRACKERS]:
            raise UserError(choose(unknown[0], TRACKERS), field="log_with", value=unknown[0])
        if self.lora and not self.init_from:
            raise UserError("needs a base model: set init_from", field="lora", value=self.lora)
        for name in ("init_ema", "init_fresh"):
            if getattr(self, name) and not self.init_from:
                raise UserError("has no effect without init_from", field=name)
        if self.derivative_precision is DerivativePrecision.tf32 and not self.tf32 and self.precision is Precision.fp32:
            raise UserError(
                "needs tf32=True or precision=bf16: one switch rules all float32 products of a backward pass",
                field="derivative_precision",
                value="tf32",
            )
        if self.compile_mode is not CompileMode.default and not self.compile:
            raise UserError("has no effect without compile=True", "compile_mode", self.compile_mode.name)
        if self.gradient_checkpointing and self.compile:
            raise UserError("excludes compile: choose one of the two", field="gradient_checkpointing")

    def _check_averages(self) -> None:
        if not self.ema or not all(0 <= decay < 1 for decay in self.ema) or len(set(self.ema)) < len(self.ema):
            raise UserError("must be one or more different decays in [0, 1)", field="ema", value=self.ema)
        if not 0 <= self.ema_ramp <= 1:
            raise UserError("a share must lie in [0, 1]", field="ema_ramp", value=self.ema_ramp)
        if self.ema_widths and not (
            all(0 < width < WIDEST for width in self.ema_widths)
            and len(set(self.ema_widths)) == len(self.ema_widths) > 1
            and min(self.ema) > WIDEST
        ):
            raise UserError(
                f"must be two or more different widths between 0 and {WIDEST:.4f}, such as (0.05, 0.1), and the decays "
                "of ema must lie above",
                field="ema_widths",
                value=self.ema_widths,
            )

    def _check_objective(self) -> None:
        """Check the objective, and what it needs of data, network and teacher."""
        made = build_objective(self)
        reduced = self.derivative_precision in (DerivativePrecision.bf16, DerivativePrecision.tf32)
        if made.derivative_role is DerivativeRole.finite and reduced:
            raise UserError(
                "a finite difference needs fp32: leave this out, or set objective.derivative=exact",
                field="derivative_precision",
                value=self.derivative_precision.name,
            )
        if self.trajectories.files and not isinstance(made, TrajectoryObjective):
            raise UserError(f"{class_name(made)} learns from data: leave them out", field="trajectories.files")
        if self.data.dropout_rows is DropoutRows.diagonal and not self.data.label_dropout <= made.diagonal:
            raise UserError(
                f"leaves rows with s = t alone without a label, a share of {made.diagonal:g}: set "
                "data.dropout_rows=all, or a smaller data.label_dropout",
                field="data.dropout_rows",
                value=self.data.dropout_rows.name,
            )
        told = getattr(self.network, "num_classes", 0) != 0 or getattr(self.network, "condition", ())
        if self.data.label_dropout and not told:
            raise UserError("needs labels: set network.num_classes", "data.label_dropout", self.data.label_dropout)
        if made.guided and (self.teacher or not self.data.label_dropout):
            own = "bakes in guidance of the network's own drift: leave teacher out"
            name = "guidance" if made.guidance > 1 else "guidance_max"
            raise UserError(
                own if self.teacher else "needs rows without a label: set data.label_dropout=0.1",
                field=f"objective.{name}",
                value=f"{getattr(made, name):g}",
            )
        check_fit(self.network, made)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON (config.json of a run)."""
        values: dict[str, Any] = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return values

    def resumable_fields(self) -> set[str]:
        """Return the dotted names of the fields that may differ when a run resumes."""
        return set(resumable(self))


def plain(value: Any) -> Any:
    """Convert config values to JSON values: sections to dicts, enums to names, tuples to lists."""
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        name = {"name": class_name(value)} if isinstance(value, (Objective, NetworkSection)) else {}
        return name | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def class_name(section: Objective | NetworkSection) -> str:
    """Return the name of a section's class in our tables, or the import path of a class of the user's own."""
    cls: Any = section.network_class if isinstance(section, NetworkSection) else type(section)
    table: dict[str, Any] = NETWORKS if isinstance(section, NetworkSection) else OBJECTIVES
    return next((name for name, known in table.items() if known is cls), f"{cls.__module__}.{cls.__qualname__}")


def build_network(config: Config) -> nn.Module:
    """Create the network of a config.

    Args:
        config: The run. The weights come from torch's global generator.

    Returns:
        The network, v(x [B, ...], s [B], t [B], label [B] or None) -> [B, ...].

    Raises:
        UserError: The class refuses its arguments; field "network".

    Example:
        >>> network = build_network(get_config("lagrangian"))
        >>> v = network(x, s, t, label)
    """
    try:
        return config.network.network_class(**config.network.options())
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(str(error), field="network") from None


def build_objective(config: Config) -> Objective:
    """Return a validated copy of ``config.objective``, independent of later changes to the config."""
    with within("objective"):
        return config.objective.for_run(config.steps)
