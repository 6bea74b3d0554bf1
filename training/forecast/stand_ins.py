"""Stand-ins for what a run reads from disk: data, checkpoints, trajectories and LPIPS, all by their shape."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.data import DataSet, Latents, TrajectoryFiles
from flowmaps.data.dataset import Batch
from flowmaps.info import VAE_RANGE
from flowmaps.metrics import convnext
from flowmaps.metrics.lpips import lpips, untrained
from flowmaps.vae import Decoder
from training.build import build_flow_map, scaled
from training.config import Config
from training.network_section import fitted
from training.teacher_trajectories import to_dict, trajectory_times

ITEMS = 1024  # in a stand-in for a data set


@dataclass(frozen=True)
class Shapes(DataSet):
    """Images uint8 or points float32 of ``shape``, without content."""

    shape: tuple[int, ...] = ()
    num_classes: int = 0
    condition: tuple[int, ...] = ()

    def __len__(self) -> int:
        return ITEMS

    def digest(self) -> str:
        return ""

    def fetch(self, index: Tensor) -> Batch:
        dtype = torch.uint8 if len(self.shape) == 3 else torch.float32
        return torch.zeros(len(index), *self.shape, dtype=dtype), _labels(self, index)


class LatentShapes(Latents):
    """Moments of latents, without content."""

    def fetch(self, index: Tensor) -> Batch:
        return torch.zeros(len(index), 2, *self.shape, dtype=torch.float16), _labels(self, index)


class TrajectoryShapes(TrajectoryFiles):
    """Stored trajectories, without content."""

    def fetch(self, index: Tensor) -> Batch:
        return torch.zeros(len(index), len(self.facts["times"]), *self.shape), _labels(self, index)


def _labels(data: DataSet, index: Tensor) -> Tensor | None:
    if data.condition:
        return torch.zeros(len(index), *data.condition)
    return torch.zeros(len(index), dtype=torch.int64) if data.num_classes else None


class Unread(FlowMap):
    """A flow map in place of a checkpoint."""

    def fingerprint(self) -> str:
        return ""


def data_of(config: Config) -> DataSet:
    """Return a data set of what the network of ``config`` takes; prepared sets of other than 3 channels are latents.

    Raises:
        UserError: The network does not say the shape of its samples.
    """
    net: Any = config.network
    classes, channels = getattr(net, "num_classes", 0) or 0, getattr(net, "channels", 3) or 3  # None: as the data have
    condition = tuple(getattr(net, "condition", ()))
    if hasattr(net, "dim"):
        return Shapes((net.dim,), classes, condition)
    if not hasattr(net, "image_size") or not hasattr(net, "channels"):
        raise UserError("needs the options image_size and channels, or dim, for a forecast", field="network")
    shape = (channels, net.image_size, net.image_size)
    if config.data.name != "prepared" or channels == 3:
        return Shapes(shape, classes, condition)
    scaling = {"latent_shift": channels * (0.0,), "latent_scale": channels * (1.0,), "vae_range": VAE_RANGE}
    return scaled(config, LatentShapes(Path(), {"shape": shape, "num_classes": classes, "vae": "", **scaling}, [ITEMS]))


@contextmanager
def stand_ins(config: Config, data: DataSet, runs: Mapping[str, Config]) -> Iterator[None]:
    """Replace, inside the block, everything that building a trainer for ``config`` would read from a file.

    A checkpoint is a run of ``runs`` if it is named there, else a drift with the network of ``config``.
    """

    def load_flow_map(field: str, source: str, config: Config) -> FlowMap:
        latents = data.info if isinstance(data, Latents) else {}
        made = runs.get(source, config)
        made = replace(made, network=fitted(made.network, data.shape, data.num_classes))
        fm = build_flow_map(made, data.shape, data.num_classes, **latents)
        if source not in runs:
            fm.info = replace(fm.info, kind="drift", guidance=None, guidance_max=None, guidance_interval=False)
        return Unread(fm.network, fm.interpolant_name, fm.base_std, fm.info).eval()

    def open_decoder(config: Config, data: Latents) -> Decoder:
        return Decoder("", FlowMapInfo(data.shape, **data.info))

    found: dict[str, Any] = {
        "training.initialise.load_flow_map": load_flow_map,
        "training.trainer.open_decoder": open_decoder,
        "flowmaps.objectives.mid_training.lpips": lru_cache(lpips.__wrapped__),  # not the cache of real networks
        "flowmaps.objectives.perceptual.lpips": lru_cache(lpips.__wrapped__),
        "flowmaps.objectives.perceptual.convnext": lru_cache(convnext.convnext.__wrapped__),
        "flowmaps.metrics.convnext._network": lambda weights: convnext.untrained(),
        "flowmaps.metrics.lpips._file": lambda folder, name: Path(name),
        "flowmaps.metrics.lpips._network": lambda *files: untrained(),
    }
    if config.trajectories.files:
        stored = _stored(config, data)
        found["training.teacher_trajectories.TrajectoryFiles"] = SimpleNamespace(open=lambda folder: stored)
    with ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(patch(name, value))
        yield


def _stored(config: Config, data: DataSet) -> TrajectoryFiles:
    facts = {
        "shape": data.shape,
        "num_classes": data.num_classes,
        "interpolant": config.interpolant,
        "base_std": config.base_std,
        "teacher": "",
        "guidance": None,
        "times": trajectory_times(config.trajectories).tolist(),
        "made": to_dict(config.trajectories),
    }
    return TrajectoryShapes(Path(config.trajectories.files), facts, [ITEMS])
