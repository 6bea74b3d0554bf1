"""The run config: typed dataclasses that a file in configs/ fills and ``--config.a.b=value`` overrides.

Closed choices are Enums (given by name on the command line). The sections ``network`` and ``objective`` have exactly
the arguments of the class they configure, read from its signature, so that nothing is listed twice.
"""
# No `from __future__ import annotations` here: ml_collections reads the annotations as types.

import dataclasses
import enum
import inspect
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowmaps.errors import UserError
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.networks import NETWORKS, PRESETS
from flowmaps.objectives import OBJECTIVES, Objective, PathObjective
from flowmaps.posthoc_ema import WIDEST
from samplers import SAMPLERS


class Optimizer(enum.Enum):
    radam = "radam"
    adamw = "adamw"


class Decay(enum.Enum):
    constant = "constant"
    cosine = "cosine"  # to zero at the last step
    linear = "linear"  # likewise
    inverse_sqrt = "inverse_sqrt"  # lr / sqrt(max(step / decay_start, 1))


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # autocast of the primal; derivatives stay float32


@dataclass
class Data:
    name: str = "digits"  # a key of flowmaps.data.DATA; folder or zip for images of your own; prepared, by prepare_data
    root: str = "data"  # folder of the data set's files, where it has any; the folder, zip file or prepared set
    download: bool = False  # fetch the files into root first
    workers: int = 0  # processes that read ahead; 0: read between the steps
    skip_corrupt: bool = False  # leave out files that are no whole images, instead of refusing the folder
    flip: bool = False  # mirror half of the images
    label_dropout: float = 0.0  # share of rows trained without their label, for "no label" and guidance
    vae: str = ""  # of latents: what makes images of them, a directory or hub id; empty: the VAE that made them
    latent_shift: tuple[float, ...] = ()  # of latents z: a sample is scale (z - shift), a number a channel; empty: as
    latent_scale: tuple[float, ...] = ()  # the VAE's config says
    augment: float = 0.0  # probability of each of EDM's transforms; the network needs augment_dim=9


@dataclass
class Optim:
    name: Optimizer = Optimizer.radam
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm of the gradient
    spike: float = 0.0  # a step whose gradient is longer than this many times the usual one is left out; 0: none is
    warmup: int = 100  # steps of linear warm-up
    decay: Decay = Decay.constant
    decay_start: int = 35_000  # steps, for inverse_sqrt


@dataclass
class Weight:
    learned: bool = False  # log-variance weight w(s, t)
    limit: float = 2.0  # |w| stays below this


@dataclass
class Best:
    """Which model a run keeps in checkpoints/best: that of the lowest ``metric``."""

    metric: str = ""  # FID, FD-digits, FD-fashion_mnist; for points W2 or KL; empty: none is kept
    steps: int = 1  # sampling steps
    num: int = 2000  # samples
    every: int = 5000  # training steps between two looks
    reference: str = ""  # statistics file of stats.py; empty: the training data
    weights: str = ""  # weight file of the extractor


if TYPE_CHECKING:

    class Solver(enum.Enum):  # a type checker needs the members that config files name
        euler = "euler"
        heun = "heun"
        dpm_solver = "dpm_solver"
else:
    Solver = enum.Enum("Solver", {k: k for k, row in SAMPLERS.items() if row.of == "drift"}, module=__name__)


class Grid(enum.Enum):
    uniform = "uniform"  # from ``low`` to 1
    log_snr = "log_snr"  # uniform in the logarithm of signal over noise from ``low`` to ``high``, and a last step to 1
    given = "given"  # ``times``


class Start(enum.Enum):
    """The first state of a trajectory, at time ``low``: a point of the path with the data, or without them."""

    noise = "noise"
    data = "data"


@dataclass
class Trajectories:
    """The solver paths of a teacher, on which ``mid_training`` and ``straightening`` regress."""

    solver: Solver = Solver.heun
    steps: int = 16
    grid: Grid = Grid.uniform
    low: float = 0.0
    high: float = 0.996  # for log_snr
    times: tuple[float, ...] = ()  # for given: increasing, from at least 0 to 1
    start: Start = Start.noise
    substeps: int = 1  # solver steps in each step, whose states are not kept
    files: str = ""  # directory that prepare_data.py wrote; empty: walk along the teacher's drift at each step


@dataclass
class Section:
    """Options of one class from a table: ``name`` is its key, the other fields are its arguments."""

    name: str

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}


@dataclass
class Config:
    network: Any  # network("UNet", width=...)
    objective: Any  # objective("lagrangian", diagonal=...)
    teacher: str = ""  # checkpoint whose drift teaches, frozen; empty: the network itself, or its average
    init_from: str = ""  # checkpoint whose weights the network starts from; empty: random weights
    init_ema: str = ""  # which of a run's weights: the decay of one of its averages, or raw; empty: what it exports
    init_fresh: tuple[str, ...] = ()  # parameters, by the beginnings of their names, that start from random weights
    lora: int = 0  # rank of the low-rank changes that are trained instead of the weights; 0: the weights
    trajectories: Trajectories = field(default_factory=Trajectories)  # for mid_training and straightening
    data: Data = field(default_factory=Data)
    interpolant: str = "linear"
    base_std: float = 0.5  # standard deviation of the noise; the paper takes that of the data
    weight: Weight = field(default_factory=Weight)
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    batch: int = 128  # global batch, in images
    accumulate: int = 1  # micro-steps a step: divides the memory, not the result
    precision: Precision = Precision.fp32
    compile: bool = False  # torch.compile of the loss module
    channels_last: bool = False  # memory layout of convolutions
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    max_skipped_steps: int = 10  # steps with a non-finite gradient are skipped; after this many the run stops
    seed: int = 0
    shard: bool = False  # spread weights, optimiser and averages over the processes (FSDP2), which else have copies
    ema: tuple[float, ...] = (0.999,)  # decays kept side by side; the first one is sampled and exported
    ema_widths: tuple[float, ...] = ()  # of power-function averages, whose snapshots give any width afterwards
    snapshot_every: int = 1000  # steps between these
    log_every: int = 50
    sample_every: int = 500
    sample_steps: tuple[int, ...] = (1, 2, 4, 8)
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints kept
    best: Best = field(default_factory=Best)

    def validate(self) -> None:
        """Refuse what types cannot: each message names the flag."""
        for name in (
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "sample_every",
            "checkpoint_every",
            "snapshot_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--config.{name} must be at least 1, got {getattr(self, name)}")
        for name, value in (
            ("base_std", self.base_std),
            ("optim.lr", self.optim.lr),
            ("optim.clip", self.optim.clip),
        ):
            if not 0 < value < float("inf"):
                raise UserError(f"--config.{name} must be positive, got {value}")
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise UserError(f"--config.optim.betas must be two numbers in [0, 1), got {self.optim.betas}")
        for name, number, least in (
            ("data.workers", self.data.workers, 0),
            ("best.steps", self.best.steps, 1),
            ("best.num", self.best.num, 2),
            ("best.every", self.best.every, 1),
        ):
            if number < least:
                raise UserError(f"--config.{name} must be at least {least}, got {number}")
        if self.lora < 0 or (self.lora and not self.init_from):
            raise UserError(
                f"--config.lora={self.lora} is the rank of changes to weights: name these by --config.init_from"
            )
        for name, share in (("augment", self.data.augment), ("label_dropout", self.data.label_dropout)):
            if not 0 <= share <= 1:
                raise UserError(f"--config.data.{name} is a probability, got {share}")
        if self.data.label_dropout and not getattr(self.network, "num_classes", 0):
            raise UserError("--config.data.label_dropout needs labels: --config.network.num_classes=N")
        if self.optim.weight_decay < 0:
            raise UserError(f"--config.optim.weight_decay must not be negative, got {self.optim.weight_decay}")
        if not self.weight.limit > 0:
            raise UserError(f"--config.weight.limit must be positive, got {self.weight.limit}")
        for name, count in (("warmup", self.optim.warmup), ("decay_start", self.optim.decay_start)):
            if count < (name == "decay_start"):
                raise UserError(f"--config.optim.{name} must not be negative or divide by zero, got {count}")
        if not self.ema or not all(0 <= decay < 1 for decay in self.ema) or len(set(self.ema)) < len(self.ema):
            raise UserError(f"--config.ema must be one or more different decays in [0, 1), got {self.ema}")
        if self.ema_widths and not (
            all(0 < width < WIDEST for width in self.ema_widths)
            and len(set(self.ema_widths)) == len(self.ema_widths) > 1
            and min(self.ema) > WIDEST
        ):
            raise UserError(
                f"--config.ema_widths={self.ema_widths}: two or more different widths between 0 and {WIDEST:.4f}, such "
                "as (0.05, 0.1); the decays of --config.ema lie above"
            )
        if self.optim.spike and not 1 < self.optim.spike < float("inf"):
            raise UserError(f"--config.optim.spike={self.optim.spike:g}: above 1, or 0 to leave out no step")
        if not self.sample_steps or min(self.sample_steps) < 1:
            raise UserError(f"--config.sample_steps must be step counts of at least 1, got {self.sample_steps}")
        if self.interpolant not in INTERPOLANTS:
            raise UserError(f"--config.interpolant={self.interpolant}: choose one of {', '.join(INTERPOLANTS)}")
        if self.gradient_checkpointing and self.compile:
            raise UserError("--config.gradient_checkpointing and --config.compile exclude each other: leave one out")
        made = build_objective(self)
        if self.trajectories.files and not isinstance(made, PathObjective):
            raise UserError(f"--config.trajectories.files: {self.objective.name} learns from data, leave them out")
        if made.guided and not self.data.label_dropout:
            raise UserError("--config.objective.guidance needs rows without a label: --config.data.label_dropout=0.1")
        if made.guided and self.teacher:
            raise UserError("--config.objective.guidance bakes in the network's own: leave --config.teacher out")
        if getattr(self.network, "guidance", False) != (made.guidance_max > 1):
            raise UserError(
                f"--config.objective.guidance_max={made.guidance_max:g} needs "
                f"--config.network.guidance={made.guidance_max > 1}: the network is told the weight, or has none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON (config.json of a run)."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _section(key: str, cls: type[Any], options: dict[str, Any]) -> Any:
    """A mutable dataclass instance with the arguments of ``cls``, their types and defaults, and ``options`` set."""
    constructor = inspect.unwrap(vars(cls).get("__init__", cls))
    hints = typing.get_type_hints(constructor)
    parameters = [p for p in inspect.signature(constructor).parameters.values() if p.name != "self"]
    unknown = set(options) - {p.name for p in parameters}
    if unknown:
        raise UserError(f"{key} has no option {', '.join(sorted(unknown))}")
    arguments = [(p.name, hints[p.name], field(default=p.default)) for p in parameters]
    made = dataclasses.make_dataclass(f"{cls.__name__}Section", arguments, bases=(Section,))
    return made(key, **options)


def network(name: str, **options: Any) -> Any:
    """The config section of a network from ``flowmaps.networks.NETWORKS``, or of a row of its PRESETS with changes."""
    if name in PRESETS:
        name, options = PRESETS[name].network, {**PRESETS[name].options, **options}
    return _section(name, NETWORKS[name], options)


def objective(name: str, **options: Any) -> Any:
    """The config section of an objective from ``flowmaps.objectives.OBJECTIVES``."""
    return _section(name, OBJECTIVES[name], options)


def build_network(config: Config) -> Any:
    """The network that ``config.network`` describes, freshly initialised from torch's global generator."""
    return _build(NETWORKS, config.network, "network")


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective`` describes."""
    built: Objective = _build(OBJECTIVES, config.objective, "objective")
    return built


def _build(table: dict[str, Any], section: Section, name: str) -> Any:
    if section.name not in table:
        raise UserError(f"--config.{name}.name={section.name}: choose one of {', '.join(table)}")
    try:
        return table[section.name](**section.options())
    except (TypeError, ValueError) as error:
        raise UserError(f"--config.{name}: {error}") from None
