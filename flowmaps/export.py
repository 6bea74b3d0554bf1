"""The exported directory: a diffusers pipeline of safetensors and JSON, read strictly and without running code.

model_index.json                            the pipeline's components, interpolant, base_std and FlowMapInfo
network/config.json                         the network's class and arguments
network/diffusion_pytorch_model.safetensors its weights
scheduler/scheduler_config.json             conventions of the time grid
vae/                                        of a model of latents: its VAE, if it was open when the model was written

The content is what ``FlowMapPipeline.save_pretrained`` writes. This module deals in plain values; ``FlowMap`` and the
pipeline are built on it.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from flowmaps.errors import UserError, blame
from flowmaps.files import WRITER, WRITTEN_BY, Layout, new_directory, writable_directory, write_file
from flowmaps.hub import from_hub
from flowmaps.info import FlowMapInfo
from flowmaps.networks import NETWORKS
from samplers import Schedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = (INDEX, "scheduler/*.json", "network/*.json", f"network/{WEIGHTS}")
MODEL = Layout(
    INDEX,
    b'"FlowMapPipeline"',
    (
        *(INDEX, "README.md", "scheduler/scheduler_config.json"),
        *(f"{part}/{name}" for part in ("network", "vae") for name in ("config.json", "diffusion_pytorch_model*")),
    ),
)
SIGNATURE = f"<!-- {WRITTEN_BY}: {WRITER}, sha256 "
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}  # the defaults of diffusers' FlowMapEulerDiscreteScheduler


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

    Raises:
        UserError: The network is not a diffusers model.
    """
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    if not isinstance(network, diffusers.ModelMixin):
        raise UserError(
            f"{type(network).__name__} cannot be saved: derive it from diffusers' ModelMixin and ConfigMixin"
        )
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
    check_card(directory)
    with new_directory(directory, MODEL) as folder:
        network.save_pretrained(folder / "network")
        if vae is not None:
            vae.save_pretrained(folder / "vae")
        (folder / "scheduler").mkdir()
        scheduler = {"_class_name": "FlowMapScheduler", **version, **SCHEDULER}
        (folder / "scheduler" / "scheduler_config.json").write_bytes(_json(scheduler))
        (folder / INDEX).write_bytes(_json(values))
        if readme:
            (folder / "README.md").write_text(_signed(readme))


def check_output(out: str) -> Path:
    """Check, before any work, that ``out`` is new or an exported directory, to be replaced; return its path."""
    with blame("out", out):
        MODEL.check(Path(out))
        check_card(Path(out))
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
    index["info"]["schedules"] = {**index["info"].get("schedules", {}), schedule.sampler: asdict(schedule)}
    write_file(path, _json(index), check=False)


def _exported_directory(directory: Path) -> Path:
    if not (directory / INDEX).exists() and (directory / "model").is_dir():
        return directory / "model"  # of a run directory
    return directory


def load(source: str | Path, network_class: type[nn.Module] | None = None) -> Exported:
    """Read an exported directory, or download one by its hub id; anything unexpected is refused by file name.

    Args:
        source: The directory, the directory of a run, or a hub id.
        network_class: The class of a network that is not in ``flowmaps.networks``; its name must be the recorded one.

    Returns:
        The content of the directory, with the network in train mode on the CPU.

    Raises:
        UserError: A file is missing, damaged, or does not fit the others.
    """
    directory = Path(source)
    directory = _exported_directory(directory if directory.is_dir() else from_hub(str(source), FILES))
    index = _read_json(directory / INDEX)
    network = _load_network(directory, _network_class(directory / INDEX, index.get("network"), network_class))
    try:
        info = FlowMapInfo.from_dict(index["info"])
        interpolant, base_std = index["interpolant"], index["base_std"]
    except KeyError as error:
        raise UserError(f"{directory}/{INDEX} has no {error}: not a flow map written by flowmaps") from None
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}/{INDEX}: {error}") from None
    has_vae = bool(info.latent_scale and isinstance(index.get("vae"), list) and index["vae"][1])
    return Exported(network, interpolant, base_std, info, has_vae, directory / INDEX)


def _network_class(file: Path, component: Any, given: type[nn.Module] | None) -> type[nn.Module]:
    """Return the class that ``component``, i.e. [module, class name], names; nothing is imported by its name."""
    known: dict[str, type[nn.Module]] = {given.__name__: given} if given else dict(NETWORKS)
    if not isinstance(component, list) or len(component) != 2 or str(component[1]) not in known:
        remedy = "" if given else "; if the network class is yours, pass it as network_class"
        raise UserError(f"{file}: network is {component}, expected one of {', '.join(known)}{remedy}")
    return known[component[1]]


def _load_network(directory: Path, network_class: type[nn.Module]) -> nn.Module:
    file, weights = directory / "network" / "config.json", directory / "network" / WEIGHTS
    config = {k: v for k, v in _read_json(file).items() if not k.startswith("_")}
    try:
        with torch.device("meta"):  # costs nothing, however large a hostile config is
            expected = {k: list(v.shape) for k, v in network_class(**config).state_dict().items()}
    except Exception as error:  # anything can be wrong with the arguments in a file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not describe a {network_class.__name__}: {reason}") from None
    try:
        with safe_open(weights, "pt") as opened:
            found = {k: opened.get_slice(k).get_shape() for k in opened.keys()}  # not a dict
        if wrong := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
            raise RuntimeError(f"{wrong[0]} is {found.get(wrong[0])}, expected {expected.get(wrong[0])}")
        network = network_class(**config)
        network.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise UserError(f"{weights} is missing: the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged ({error}): export or download it again") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{weights} does not fit {file}: {reason}") from None
    return network


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()  # as diffusers writes it


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: give the directory that save_pretrained or train.py (model/) wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): export or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values
