"""The exported directory: a diffusers pipeline of safetensors and JSON, read strictly and without running code.

model_index.json                            the pipeline's components, interpolant, base_std and FlowMapInfo
network/config.json                         the network's class and arguments
network/diffusion_pytorch_model.safetensors its weights
scheduler/scheduler_config.json             the time grid's conventions
vae/                                        of a model of latents: what makes images of them, if it was at hand
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from flowmaps.errors import UserError
from flowmaps.files import new_directory, write_file
from flowmaps.flow_map import FlowMap
from flowmaps.hub import from_hub
from flowmaps.info import FlowMapInfo
from flowmaps.model_card import card
from flowmaps.networks import NETWORKS
from flowmaps.vae import Decoder
from samplers import Schedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("model_index.json", "scheduler/*.json", "network/*.json", f"network/{WEIGHTS}")


def save(fm: FlowMap, directory: Path, readme: str = "") -> None:
    """Write ``fm`` as a pipeline directory, complete or not at all; an existing one is replaced.

    ``readme``: its model card. Weights from elsewhere have one in any case.
    """
    from flowmaps.pipeline import FlowMapPipeline

    with new_directory(directory) as beside:
        FlowMapPipeline.from_flow_map(fm).save_pretrained(beside)
        if readme or fm.info.origin:
            (beside / "README.md").write_text(readme or card(fm))


def place(out: str, flag: str) -> Path:
    """The directory ``out``, which ``flag`` names, checked before any work: new, or an exported one to be replaced."""
    path = Path(out)
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]) and not (path / "model_index.json").exists():
        raise UserError(f"{flag}={path} exists and is no exported directory: name another")
    return path


def store_schedule(source: str | Path, schedule: Schedule) -> None:
    """Put ``schedule`` into a pipeline directory or a run's, in the place of one for the same sampler."""
    if not Path(source).is_dir():
        raise UserError(f"{source} is no directory: a schedule can be stored in one, or written to a file")
    path = _pipeline_directory(Path(source)) / "model_index.json"
    index = _read_json(path)
    index["info"]["schedules"] = {**index["info"].get("schedules", {}), schedule.sampler: asdict(schedule)}
    write_file(path, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _pipeline_directory(directory: Path) -> Path:
    if not (directory / "model_index.json").exists() and (directory / "model").is_dir():
        return directory / "model"  # of a run directory
    return directory


def load(source: str | Path) -> FlowMap:
    """Read a pipeline directory, or download one by its hub id; anything unexpected is refused by file name."""
    directory = Path(source)
    directory = _pipeline_directory(directory if directory.is_dir() else from_hub(str(source), FILES))
    index = _read_json(directory / "model_index.json")
    component = index.get("network")
    if not isinstance(component, list) or len(component) != 2 or str(component[1]) not in NETWORKS:
        raise UserError(f"{directory}/model_index.json: network is {component}, expected one of {', '.join(NETWORKS)}")
    network_class = NETWORKS[component[1]]
    config = {k: v for k, v in _read_json(directory / "network" / "config.json").items() if not k.startswith("_")}
    weights = directory / "network" / WEIGHTS
    try:
        with torch.device("meta"):  # costs nothing, however large a hostile config is
            expected = {k: list(v.shape) for k, v in network_class(**config).state_dict().items()}
    except Exception as error:  # anything can be wrong with the arguments in a file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}/network/config.json does not describe a {component[1]}: {reason}") from None
    try:
        with safe_open(weights, "pt") as file:
            found = {k: file.get_slice(k).get_shape() for k in file.keys()}  # not a dict
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
        raise UserError(f"{weights} does not fit {directory}/network/config.json: {reason}") from None
    try:
        info = FlowMapInfo.from_dict(index["info"])
        fm = FlowMap(network, index["interpolant"], index["base_std"], info).eval()
    except KeyError as error:
        raise UserError(f"{directory}/model_index.json has no {error}: not a flow map written by flowmaps") from None
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}/model_index.json: {error}") from None
    if info.latent_scale and isinstance(index.get("vae"), list) and index["vae"][1]:
        fm.decoder = Decoder(str(source), info.latent_shift, info.latent_scale)
    return fm


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
