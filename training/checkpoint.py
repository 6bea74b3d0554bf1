"""Run checkpoints: everything a run needs to resume bit for bit, in safetensors and JSON.

    checkpoints/step-00000500/network.safetensors  weight.safetensors  optimizer.safetensors  ema-0.999.safetensors
                              state.json            step, images seen, and the SHA-256 of each file
    checkpoints/best/         the same, with model/ (the export) and its score in state.json

No random state is stored: every draw is keyed by the step (flowmaps.rng).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowmaps import FlowMap
from flowmaps.errors import UserError, shorten
from flowmaps.export import MODEL
from flowmaps.files import Layout, new_directory, sha256, to_json
from flowmaps.reading import parse, read_json
from flowmaps.run_weights import FORMAT, read_checkpoint
from training.ema import EMA
from training.fsdp import gather_to_cpu, shard_like
from training.loss_module import LossModule

PARTS = ("network", "weight", "optimizer", "ema-*")
CHECKPOINT = Layout(
    "state.json",
    b'"images_seen"',
    ("state.json", *(f"{part}.safetensors" for part in PARTS), *(f"model/{name}" for name in MODEL.names)),
)


@dataclass
class State:
    """The entries of state.json."""

    step: int
    images_seen: int
    norms: tuple[float, ...] = ()  # ``Spikes``; none in a checkpoint from before the detector existed
    shards: int | None = None  # parts of a global batch
    threads: int | None = None  # of torch, on the CPU
    score: float | None = None  # of checkpoints/best, with the next
    judge: dict[str, Any] | None = None  # what gave the score
    origin: dict[str, str] = field(default_factory=dict)  # ``Trainer.origin``, whose entries stand among the others


def read_state(path: Path) -> State:
    """Return the entries of state.json of the checkpoint ``path``."""
    remedy = f"delete {path} to resume from the checkpoint before it"
    return _state(path, read_json(path / "state.json", remedy))


def _state(path: Path, values: Any) -> State:
    where, known = f"{path}/state.json", {f.name for f in fields(State)} - {"origin"}
    try:
        values = parse(dict[str, Any], values, where)
        rest = {key: v for key, v in values.items() if key not in (*known, "format", "files", "written_by")}
        origin = parse(dict[str, str], rest, where)
        return parse(State, {key: v for key, v in values.items() if key in known} | {"origin": origin}, where)
    except UserError as error:
        raise UserError(f"{error}: delete {path} to resume from the checkpoint before it") from None


def save_checkpoint(
    path: Path,
    state: dict[str, Any],
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    model: FlowMap | None = None,
    writes: bool = True,
) -> None:
    """Write the directory ``path``, complete or not at all.

    Args:
        path: The checkpoint.
        state: Entries of state.json: "step", "images_seen" and any others.
        module: The loss, with the network and the learned weight.
        optimizer: Its state is stored, its settings come from the config.
        ema: The averages.
        model: Exported to ``path``/model if given, so that ``path`` can be sampled from.
        writes: Whether this process writes. All must call, since each may hold only a shard of the tensors.
    """
    parts = {"network": module.fm.network.state_dict(), "optimizer": _optimizer_tensors(optimizer)}
    if module.weight is not None:
        parts["weight"] = module.weight.state_dict()
    parts |= {f"ema-{name}": average for name, average in ema.state_dict().items()}
    tensors = {name: gather_to_cpu(part, keep=writes) for name, part in parts.items()}
    if not writes:
        return
    with new_directory(path, CHECKPOINT) as directory:
        for name, part in tensors.items():
            save_file(part, directory / f"{name}.safetensors")
        files = {file.name: sha256(file) for file in sorted(directory.iterdir())}
        (directory / "state.json").write_bytes(to_json({"format": FORMAT, **state, "files": files}))
        if model is not None:
            model.save_pretrained(directory / "model")


def load_checkpoint(path: Path, module: LossModule, optimizer: torch.optim.Optimizer, ema: EMA) -> State:
    """Restore ``module``, ``optimizer`` and ``ema`` in place, and return state.json."""
    values, tensors = read_checkpoint(path)
    state = _state(path, values)
    wanted = {"network", "optimizer", *(f"ema-{name}" for name in ema.state_dict())}
    wanted |= {"weight"} if module.weight is not None else set()
    if wanted != set(tensors):
        raise UserError(f"{path} holds {sorted(tensors)}, but this config needs {sorted(wanted)}: use a new workdir")
    try:
        _restore(module.fm.network, tensors["network"])
        if module.weight is not None:
            _restore(module.weight, tensors["weight"])
        ema.load_state_dict({name: tensors[f"ema-{name}"] for name in ema.state_dict()})
        _restore_optimizer(optimizer, tensors["optimizer"])
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not fit this config ({shorten(error)}): use a new workdir") from None
    return state


def _restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load full tensors into a module, sharded or not."""
    live = module.state_dict()
    module.load_state_dict({k: shard_like(v, live.get(k, v)) for k, v in tensors.items()})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as flat tensors "parameter index/name"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, entry in state.items() for name, value in entry.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split("/")
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = shard_like(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
