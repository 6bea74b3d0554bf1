"""The sections of a config but for network and objective: data, optimiser, weight, best model, trajectories."""
# No `from __future__ import annotations` here: ml_collections reads the annotations as types.

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from samplers import SAMPLERS

T = TypeVar("T")


def may_change(default: T) -> T:
    """Declare a field that may differ when a run resumes, since it does not change the steps already done."""
    return field(default=default, metadata={"may_change": True})


def resumable(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields declared by ``may_change``."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if f.metadata.get("may_change"):
            yield prefix + f.name
        elif dataclasses.is_dataclass(value):
            yield from resumable(value, f"{prefix}{f.name}.")


# Names that accelerate has for trackers.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")


class Optimizer(enum.Enum):
    radam = "radam"
    adamw = "adamw"
    muon = "muon"  # for the matrices of a network, with muon_kernels its kernels too, and AdamW for all else


class Decay(enum.Enum):
    constant = "constant"
    cosine = "cosine"  # to zero at the last step
    linear = "linear"  # to zero at the last step
    inverse_sqrt = "inverse_sqrt"  # lr / sqrt(max(step / decay_start, 1))


class Precision(enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # autocast of all but the derivatives, which have their own precision


class DerivativePrecision(enum.Enum):
    auto = "auto"  # tf32 on CUDA if config.tf32, else fp32
    bf16 = "bf16"
    tf32 = "tf32"  # float32 whose products may be TF32 on CUDA
    fp32 = "fp32"  # IEEE float32


class CompileMode(enum.Enum):
    """Modes of torch.compile."""

    default = "default"
    reduce_overhead = "reduce-overhead"  # CUDA graphs: more memory, and hardly a launch
    max_autotune = "max-autotune"  # CUDA graphs, and kernels chosen by timing: a much longer first step


class DropoutRows(enum.Enum):
    """The rows that ``label_dropout`` takes from, its share being that of all rows."""

    all = "all"
    diagonal = "diagonal"  # s = t: only the drift is learned without a label, and no map


class Fit(enum.Enum):
    """The way from an image to a square."""

    crop = "crop"  # the central square
    pad = "pad"  # the background on both sides


class Background(enum.Enum):
    """Colour behind transparent pixels and around padded images."""

    white = "white"
    black = "black"
    grey = "grey"


@dataclass
class Data:
    name: str = "digits"  # in flowmaps.data.DATASETS; folder, zip, hf, wds (your own images); prepared (prepare_data)
    root: str = may_change("data")  # directory of the data set's files; the folder, zip file, prepared set, or address
    download: bool = may_change(False)  # fetch the files into root first
    workers: int = may_change(0)  # processes that read ahead; 0: read between the steps
    skip_corrupt: bool = False  # skip unreadable image files instead of refusing the folder
    fit: Fit = Fit.crop
    background: Background = Background.white
    flip: bool = False  # mirror half of the images
    label_dropout: float = 0.0  # share of rows trained without their label, for "no label" and guidance
    dropout_rows: DropoutRows = DropoutRows.all
    vae: str = ""  # decoder of latents, a directory or hub id; empty: the VAE that encoded them
    latent_shift: tuple[float, ...] = ()  # a sample is scale (z - shift) of a latent z, one number per channel; empty:
    latent_scale: tuple[float, ...] = ()  # as in the VAE's config
    condition: str = may_change("")  # of each item: an .npy file, pictures of the same names, or hf:PLACE#COLUMN
    augment: float = 0.0  # probability of each of EDM's transforms; the network needs augment_dim=9


@dataclass
class Optim:
    name: Optimizer = Optimizer.radam
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)  # of RAdam and AdamW; Muon's momentum is 0.95
    muon_kernels: bool = False  # Muon trains kernels of convolutions too, each as a matrix [outputs, inputs x pixels]
    nesterov: bool = False  # Nesterov momentum in the AdamW next to Muon: NAdam, at a constant first beta
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm of the gradient; 0: no clipping
    spike: float = 0.0  # skip a step whose gradient norm exceeds this multiple of the recent median; 0 disables
    warmup: int = 100  # steps of linear warm-up
    decay: Decay = Decay.constant
    decay_start: int = 35_000  # steps, for inverse_sqrt


@dataclass
class Weight:
    learned: bool = False  # log-variance weight w(s, t)
    limit: float = 2.0  # |w| stays below this
    log_floor: float = 0.0  # above 0, c of the loss ln(exp(-w) r^2 + c) + w; 0: exp(-w) r^2 + w


@dataclass
class Best:
    """Keep the model with the best ``metric`` in checkpoints/best."""

    # FID, sFID, FD-DINOv2, FD-NAME of any extractor, KID, IS, CMMD, precision, recall; points: W2, KL; empty: keep none
    metric: str = may_change("")
    also: tuple[str, ...] = may_change(())  # others, which are logged
    steps: int = may_change(1)  # sampling steps
    num: int = may_change(2000)  # samples
    every: int = may_change(5000)  # training steps between two scores
    reference: str = may_change("")  # statistics file of stats.py; empty: the training data
    weights: str = may_change("")  # file or folder of the extractors; empty: default ones, your own next to data.root


if TYPE_CHECKING:

    class Solver(enum.Enum):  # a type checker needs the members that config files name
        euler = "euler"
        heun = "heun"
        dpm_solver = "dpm_solver"
else:
    Solver = enum.Enum("Solver", {k: k for k, row in SAMPLERS.items() if row.of == "drift"}, module=__name__)


class Grid(enum.Enum):
    uniform = "uniform"  # from ``low`` to 1
    log_snr = "log_snr"  # uniform in log(signal / noise) from ``low`` to ``high``, and a last step to 1
    given = "given"  # ``times``


class Start(enum.Enum):
    """The first state of a trajectory, at time ``low``."""

    noise = "noise"  # noise alone
    data = "data"  # the path's point between noise and an image


@dataclass
class Trajectories:
    """The solver paths of a teacher, which ``mid_training`` and ``straightening`` learn from."""

    solver: Solver = Solver.heun
    steps: int = 16
    grid: Grid = Grid.uniform
    low: float = 0.0
    high: float = 0.996  # for log_snr
    times: tuple[float, ...] = ()  # for given: increasing, from at least 0 to 1
    start: Start = Start.noise
    substeps: int = 1  # solver steps per step; the states between are not kept
    files: str = may_change("")  # directory that prepare_data.py wrote; empty: integrate the drift in each step
