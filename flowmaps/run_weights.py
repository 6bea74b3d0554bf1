"""Weights inside a run directory: checkpoints, their moving averages, and averages reconstructed afterwards."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import sha256
from flowmaps.flow_map import FlowMap
from flowmaps.posthoc_ema import WIDEST, list_snapshots, reconstruct

FORMAT = 1  # of a checkpoint's directory


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
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        files, version = dict(state["files"]), state["format"]
        if path.name != f"step-{state['step']:08d}":
            raise ValueError(f"it says step {state['step']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/state.json is missing or damaged ({error}): {remedy}") from None
    if version != FORMAT:
        raise UserError(f"{path} has checkpoint format {version}, this version reads {FORMAT}")
    tensors = {}
    for name, digest in files.items():
        file = path / name
        if not file.is_file() or sha256(file) != digest:
            raise UserError(f"{file} is missing or damaged (its checksum differs): {remedy}")
        tensors[name.removesuffix(".safetensors")] = load_file(file)
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
    tensors = read_checkpoint(found[-1])[1]
    name = "network" if which == "raw" else f"ema-{which}"
    width = float(which) if re.fullmatch(r"0?\.\d+", which) else 0.0
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
    fm.network.load_state_dict(run_weights(run, which))
    fm.info = replace(fm.info, ema=None if which == "raw" else float(which))
