"""LPIPS: how far apart two images look, by the features of a VGG-16 network."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from flowmaps.errors import UserError

LEAST_SIZE = 16  # pixels: the network halves four times
FILES = {  # as torchvision and torch-fidelity release and cache them, with the first digits of their SHA-256 or none
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "weights-vgg16-lpips.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
}


@functools.lru_cache(maxsize=2)
def lpips(folder: str = "", device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """The distance of two batches of images [n, C, H, W] in [-1, 1]: [n], differentiable; grey counts as three colours.

    Zhang et al. 2018 (arXiv 1801.03924), version 0.1, torch-fidelity's port; at the images' own resolution. ``folder``
    has the two files of ``FILES``; empty means torch.hub's cache, into which missing ones are downloaded.
    """
    network = _network(*(_file(folder, name) for name in FILES)).to(device)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[2:]) < LEAST_SIZE:
            raise UserError(f"LPIPS needs images of at least {LEAST_SIZE} pixels, got {tuple(x.shape[2:])}")
        with torch.autocast(x.device.type, enabled=False):
            value = network(*((127.5 * (image.float() + 1)).expand(-1, 3, -1, -1) for image in (x, y)))
        return cast(Tensor, value.flatten())

    return distance


def _file(folder: str, name: str) -> Path:
    file = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if file.is_file():
        return file
    remedy = f"fetch {FILES[name]} where there is a network and name its folder by --config.objective.lpips_weights=DIR"
    if folder:
        raise UserError(f"LPIPS: {file} is missing: {remedy}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(FILES[name], str(file), progress=os.isatty(2))
    except (OSError, RuntimeError) as error:
        raise UserError(f"LPIPS: {file} is missing and cannot be downloaded ({error}): {remedy}") from None
    return file


def _network(vgg: Path, linear: Path) -> Any:
    """torch-fidelity's module with weights from these files: its constructor would fetch and unpickle them itself."""
    import torch_fidelity.sample_similarity_lpips as port
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"])
    try:
        weights = torch.load(vgg, map_location="cpu", weights_only=True)
        features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if "features." in k})
        loaded = torch.load(linear, map_location="cpu", weights_only=True)
        with mock.patch.multiple(
            port,
            load_state_dict_from_url=lambda *_, **__: loaded,
            torchvision_load_pretrained_vgg16=lambda: SimpleNamespace(features=features),
        ):
            network = port.SampleSimilarityLPIPS("lpips")
    except Exception as error:  # torch.load and load_state_dict raise a dozen types on a wrong file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{vgg} and {linear.name} are no LPIPS weights of version 0.1: {reason}") from None
    return network
