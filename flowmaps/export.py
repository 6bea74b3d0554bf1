"""The exported directory: a diffusers pipeline of safetensors and JSON, read strictly and without running code.

model_index.json                            the pipeline's components, interpolant, base_std and FlowMapInfo
network/config.json                         the network's class and arguments
network/diffusion_pytorch_model.safetensors its weights, large ones in shards
scheduler/scheduler_config.json             conventions of the time grid
vae/                                        of a model of latents: its VAE, if it was open when the model was written

The content is what ``FlowMapPipeline.save_pretrained`` writes. This module deals in plain values; ``FlowMap`` and the
pipeline are built on it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import diffusers
import torch
from torch import nn

from flowmaps.errors import UserError, blame, shorten
from flowmaps.files import WRITER, WRITTEN_BY, Layout, new_directory, writable_directory, write_file
from flowmaps.hub import from_hub, shipped
from flowmaps.info import FlowMapInfo
from flowmaps.networks import NETWORKS
from flowmaps.reading import parse, read_json
from flowmaps.tensors import check_shapes, merged, model_files, read_header, read_tensors
from samplers import Schedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

T = TypeVar("T")
INDEX = "model_index.json"
FILES = (INDEX, "scheduler/*.json", "network/*.json", "network/diffusion_pytorch_model*.safetensors")
MODEL = Layout(
    INDEX,
    b'"FlowMapPipeline"',
    (
        *(INDEX, "README.md", "samples.png", "scheduler/scheduler_config.json"),
        *(f"{part}/{name}" for part in ("network", "vae") for name in ("config.json", "diffusion_pytorch_model*")),
    ),
)
SIGNATURE = f"<!-- {WRITTEN_BY}: {WRITER}, sha256 "
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}  # the defaults of diffusers' FlowMapEulerDiscreteScheduler
REMEDY = "export or download it again"
LAYERS = ("blocks", "depth")  # of a network's config: numbers of layers, which cannot be more than its tensors
SPARE = 1 << 26  # numbers that a network may hold beyond those of its file, such as tables of positions


@dataclass(frozen=True)
class _Index:
    """The schema of model_index.json without what diffusers adds (names that begin with _)."""

    interpolant: str
    base_std: float
    info: dict[str, Any]
    network: tuple[str, str]
    scheduler: tuple[str, str]
    vae: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class _Scheduler:
    """The schema of scheduler_config.json."""

    num_train_timesteps: int
    shift: float


class Exported(NamedTuple):
    """The content of an exported directory."""

    network: nn.Module
    interpolant: str
    base_std: float
    info: FlowMapInfo
    has_vae: bool
    file: Path  # its model_index.json, for error messages


def save(
    directory: Path,
    network: nn.Module,
    interpolant: str,
    base_std: float,
    info: FlowMapInfo,
    vae: "AutoencoderKL | None" = None,
    readme: str = "",
    picture: bytes = b"",
) -> None:
    """Write an exported directory, complete or not at all; an existing one is replaced.

    Args:
        directory: The directory to write.
        network: A diffusers model, i.e. a ``ModelMixin`` and ``ConfigMixin``.
        interpolant: The name of its path.
        base_std: The standard deviation of its noise.
        info: What is known about it.
        vae: For a model of latents, the VAE to store with it.
        readme: The model card, if there is to be one.
        picture: A PNG file for the card, if it shows one.

    Raises:
        UserError: The network is not a diffusers model.
    """
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    if not isinstance(network, diffusers.ModelMixin):
        raise UserError(
            f"{type(network).__name__} cannot be saved: derive it from diffusers' ModelMixin and ConfigMixin"
        )
    if any("_orig_mod." in name for name in network.state_dict()):
        raise UserError("a part of the network is wrapped by torch.compile: use its method compile(), or save without")
    version = {"_diffusers_version": diffusers.__version__}
    values = {
        "_class_name": "FlowMapPipeline",
        **version,
        "interpolant": interpolant,
        "base_std": base_std,
        "info": info.to_dict(),
        "network": [type(network).__module__, type(network).__name__],
        "scheduler": ["flowmaps.pipeline", "FlowMapScheduler"],
        "vae": [None, None] if vae is None else ["diffusers", type(vae).__name__],
    }
    with new_directory(directory, MODEL) as folder:
        check_card(directory)
        network.save_pretrained(folder / "network")
        if vae is not None:
            vae.save_pretrained(folder / "vae")
        (folder / "scheduler").mkdir()
        scheduler = {"_class_name": "FlowMapScheduler", **version, **SCHEDULER}
        (folder / "scheduler" / "scheduler_config.json").write_bytes(_json(scheduler))
        (folder / INDEX).write_bytes(_json(values))
        if readme:
            (folder / "README.md").write_text(_signed(readme))
        if picture:
            (folder / "samples.png").write_bytes(picture)


def check_output(out: str, source: str = "") -> Path:
    """Check, before any work, that ``out`` is new or an exported directory, to be replaced; return its path.

    It must not be what is exported from ``source``, such as model/ of a run.
    """
    with blame("out", out):
        MODEL.check(Path(out))
        check_card(Path(out))
        if source and Path(out).exists() and Path(out).resolve() == _exported_directory(Path(source)).resolve():
            raise UserError("is the checkpoint itself, which would be lost: choose another directory")
        return writable_directory(Path(out))


def _signed(readme: str) -> str:
    """Return a card with its own digest in the last line, which shows whether somebody has edited it."""
    return f"{readme.rstrip()}\n\n{SIGNATURE}{hashlib.sha256(readme.rstrip().encode()).hexdigest()} -->\n"


def check_card(directory: Path) -> None:
    """Refuse to replace an exported directory whose card somebody has edited."""
    card = directory / "README.md"
    if card.is_file():
        text = card.read_text(errors="replace")
        if _signed(text.rpartition(SIGNATURE)[0]) != text:
            raise UserError(f"{card} was edited by hand and would be lost: move it, or choose another directory")


def store_schedule(source: str | Path, schedule: Schedule) -> None:
    """Store ``schedule`` in an exported directory or that of a run, replacing one for the same sampler."""
    if not Path(source).is_dir():
        raise UserError(f"{source} is not a directory: a schedule is stored in a directory, or written to a file")
    path = _exported_directory(Path(source)) / INDEX
    index = _read_json(path)
    FlowMapInfo.from_dict(_parse(_Index, index, path).info)
    index["info"]["schedules"] = {**index["info"].get("schedules", {}), schedule.sampler: asdict(schedule)}
    write_file(path, _json(index), check=False)


def _exported_directory(directory: Path) -> Path:
    if not (directory / INDEX).exists() and (directory / "model").is_dir():
        return directory / "model"  # of a run directory
    return directory


def load(source: str | Path, network_class: type[nn.Module] | None = None) -> Exported:
    """Read an exported directory, or one that is shipped or on the hub; anything unexpected is refused by file name.

    Args:
        source: The directory, the directory of a run, the name of a shipped checkpoint, or a hub id.
        network_class: The class of a network that is not in ``flowmaps.networks``; its name must be the recorded one.

    Returns:
        The content of the directory, with the network in train mode on the CPU.

    Raises:
        UserError: A file is missing, damaged, or does not fit the others.
    """
    directory = Path(source)
    if not directory.is_dir():
        directory = shipped(str(source)) or from_hub(str(source), FILES)
    directory = _exported_directory(directory)
    file = directory / INDEX
    index = _parse(_Index, _read_json(file), file)
    scheduler = directory / "scheduler" / "scheduler_config.json"
    if scheduler.exists() and vars(_parse(_Scheduler, _read_json(scheduler), scheduler)) != SCHEDULER:
        raise UserError(f"{scheduler} must have {SCHEDULER}, which flowmaps writes: {REMEDY}")
    try:
        info = FlowMapInfo.from_dict(index.info)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {error}") from None
    network = _load_network(directory, _network_class(file, index.network, network_class))
    if reason := _misfit(info, getattr(network, "config", {})):
        raise UserError(f"{file}: {reason}: {REMEDY}")
    return Exported(network, index.interpolant, index.base_std, info, bool(info.latent_scale and index.vae[1]), file)


def _misfit(info: FlowMapInfo, config: Any) -> str:
    """Return what the facts ``info``, where they are known, and the network's config contradict each other in."""
    shape, classes = info.shape, config.get("num_classes", info.num_classes)
    if info.num_classes and classes != info.num_classes:
        return f"num_classes is {info.num_classes:,}, that of the network is {classes:,}"
    for name, sides in (("dim", 1), ("channels", 3)):
        if name in config and shape and (len(shape) != sides or shape[0] != config[name]):
            return f"shape is {list(shape)}, the network's {name} is {config[name]}"
    if len(shape) == 3 and "image_size" in config and {*shape[1:]} != {config["image_size"]}:
        return f"shape is {list(shape)}, the network's image_size is {config['image_size']}"
    return ""


def _network_class(file: Path, component: tuple[str, str], given: type[nn.Module] | None) -> type[nn.Module]:
    """Return the class that ``component``, i.e. [module, class name], names; nothing is imported by its name."""
    known: dict[str, type[nn.Module]] = {given.__name__: given} if given else dict(NETWORKS)
    if component[1] not in known:
        remedy = "" if given else "; if the network class is yours, pass it as network_class"
        raise UserError(f"{file}: network is {shorten(component)}, expected one of {', '.join(known)}{remedy}")
    return known[component[1]]


def _load_network(directory: Path, network_class: type[nn.Module]) -> nn.Module:
    """Build the network that the config describes, once it is known to be that of the weights."""
    folder = directory / "network"
    file = folder / "config.json"
    config = {k: v for k, v in _read_json(file).items() if not k.startswith("_")}
    parts, _ = model_files(folder, REMEDY)
    weights = parts[0] if len(parts) == 1 else folder
    shapes = merged([read_header(part, REMEDY)[0] for part in parts], weights, REMEDY)
    layers = [len(v) if isinstance(v, list) else v for k, v in config.items() if k in LAYERS or isinstance(v, list)]
    with _describing(file, network_class):
        if any(isinstance(count, int) and count > max(len(shapes), 64) for count in layers):
            raise ValueError(f"it has more layers than {weights.name} has tensors")
        with torch.device("meta"):  # costs nothing, however wide a hostile config is
            planned = network_class(**config)
        numbers = sum(t.numel() for t in chain(planned.parameters(), planned.buffers()))
    check_shapes(planned, shapes, weights, file)
    with _describing(file, network_class):
        if numbers > sum(part.stat().st_size for part in parts) + SPARE:
            raise ValueError(f"it has more numbers than {weights.name}")
        network = network_class(**config)
    network.load_state_dict(merged([read_tensors(part, REMEDY) for part in parts], weights, REMEDY))
    return network


@contextmanager
def _describing(file: Path, network_class: type[nn.Module]) -> Iterator[None]:
    """Blame the config: anything can be wrong with the arguments in a file."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{file} does not describe a {network_class.__name__}: {shorten(error)}") from None


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()  # as diffusers writes it


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} is missing: give the directory that save_pretrained or train.py (model/) wrote")
    values = read_json(path, REMEDY)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object: {REMEDY}")
    return values


def _parse(kind: type[T], values: dict[str, Any], path: Path) -> T:
    return parse(kind, {name: value for name, value in values.items() if not name.startswith("_")}, str(path))
