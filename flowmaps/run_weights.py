"""Weights inside a run directory: checkpoints, their moving averages, and averages reconstructed afterwards."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.files import sha256
from flowmaps.flow_map import FlowMap
from flowmaps.posthoc_ema import WIDEST, list_snapshots, reconstruct
from flowmaps.reading import parse, read_json
from flowmaps.tensors import read_tensors

FORMAT = 1  # of a checkpoint's directory


@dataclass(frozen=True)
class _State:
    """The entries that state.json of each checkpoint has; training adds others."""

    format: int
    step: int
    images_seen: int
    files: dict[str, str]  # SHA-256 by name


def list_checkpoints(workdir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    found = (workdir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return state.json of a checkpoint, and its tensors by file and name.

    Raises:
        UserError: A file is missing or damaged; the message names it.
    """
    remedy = f"delete {path} to resume from the checkpoint before it"
    file = path / "state.json"
    state = read_json(file, remedy)
    names = {f.name for f in fields(_State)}
    try:
        entries = parse(dict[str, Any], state, str(file))
        known = parse(_State, {name: value for name, value in entries.items() if name in names}, str(file))
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    if known.format != FORMAT:
        raise UserError(f"{path} has checkpoint format {known.format}, this version reads {FORMAT}")
    if path.name != f"step-{known.step:08d}":
        raise UserError(f"{file} is damaged (it says step {known.step}): {remedy}")
    tensors = {}
    for name, digest in known.files.items():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{file} is damaged ({name!r} is not the name of a file of tensors): {remedy}")
        if not (path / name).is_file() or sha256(path / name) != digest:
            raise UserError(f"{path / name} is missing or damaged (its checksum differs): {remedy}")
        tensors[name.removesuffix(".safetensors")] = read_tensors(path / name, remedy)
    return state, tensors


def run_weights(run: str, which: str) -> dict[str, Tensor]:
    """Return weights of the network of a run.

    Args:
        run: The run directory.
        which: "raw", or the decay of one of the averages, from the last checkpoint; or the width of a power-function
            average, reconstructed from the snapshots.

    Raises:
        UserError: The run does not have these weights; field "ema".
    """
    found = list_checkpoints(Path(run))
    if not found:
        raise UserError(f"{run} is not a run with checkpoints: leave it out", field="ema", value=which)
    if which != "raw" and not re.fullmatch(r"0?\.\d{1,12}", which):
        raise UserError("give the decay of an average or a width, such as 0.999, or raw", field="ema", value=which)
    tensors = read_checkpoint(found[-1])[1]
    width = 0.0 if which == "raw" else float(which)
    name = "network" if which == "raw" else f"ema-{width}"
    if name not in tensors and 0 < width < WIDEST and list_snapshots(Path(run)):
        tensors[name] = reconstruct(Path(run), width)
    if name not in tensors:
        have = [key.removeprefix("ema-") for key in tensors if key.startswith("ema-") and "width" not in key]
        widths = f", any width below {WIDEST:.4f}" * bool(list_snapshots(Path(run)))
        raise UserError(f"{found[-1]} has {', '.join([*have, 'raw'])}{widths}", field="ema", value=which)
    if any(".base_layer." in key for key in tensors[name]):
        raise UserError(f"{run} was trained with LoRA: leave it out", field="ema", value=which)
    return tensors[name]


def take_weights(fm: FlowMap, run: str, which: str) -> None:
    """Load the weights of ``run_weights`` into ``fm``, and record in its info which they are."""
    load_weights(fm.network, run_weights(run, which))
    fm.info = replace(fm.info, ema=None if which == "raw" else float(which))


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights of a run into its ``network`` as it is exported, which can lack a head that only training needs."""
    config = getattr(network, "config", {})
    unused = ("second_",) if config.get("second_head") is False else ()
    network.load_state_dict({name: w for name, w in weights.items() if not name.startswith(unused)})
