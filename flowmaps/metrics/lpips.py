"""LPIPS: a perceptual distance between two images, on the features of a VGG-16 network."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError, shorten

LEAST_SIZE = 16  # pixels: the network halves four times
CHANNELS = (64, 128, 256, 512, 512)  # of the features that are compared
LAYERS = (3, 8, 15, 22, 29)  # of VGG-16, whose outputs they are: the last ReLU of each of five stages
FILES = {  # as torchvision and torch-fidelity release and cache them, with the first digits of their SHA-256 or none
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "weights-vgg16-lpips.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
}


@functools.lru_cache(maxsize=2)
def lpips(folder: str = "", device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Return the distance between two batches of images [n, C, H, W] in [-1, 1]: a differentiable function to [n].

    Zhang et al. 2018 (arXiv 1801.03924), version 0.1, at the images' own resolution; grey images count as three equal
    channels.

    Args:
        folder: Directory with the two files of ``FILES``; empty means torch.hub's cache, into which missing ones are
            downloaded.
        device: Where the network runs.

    Raises:
        UserError: A weight file is missing, damaged or of another version; the images are too small.
    """
    network = _network(*(_file(folder, name) for name in FILES)).to(device)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[2:]) < LEAST_SIZE:
            raise UserError(f"LPIPS needs images of at least {LEAST_SIZE} pixels, got {tuple(x.shape[2:])}")
        with torch.autocast(x.device.type, enabled=False):
            value: Tensor = network(*((127.5 * (image.float() + 1)).expand(-1, 3, -1, -1) for image in (x, y)))
        return value

    return distance


def _file(folder: str, name: str) -> Path:
    file = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if file.is_file():
        return file
    remedy = f"fetch {FILES[name]} where there is a network and pass its folder"
    if folder:
        raise UserError(f"{file} is missing: {remedy}", field="lpips_weights", value=folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(FILES[name], str(file), progress=os.isatty(2))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is missing and cannot be downloaded ({error}): {remedy}", field="lpips_weights"
        ) from None
    return file


class _Lpips(nn.Module):
    """The network of version 0.1: weighted squared differences of unit-length features, averaged over positions."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, vgg: nn.Sequential) -> None:
        super().__init__()
        self.vgg = vgg[: LAYERS[-1] + 1]
        self.linear = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in CHANNELS)
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])  # of [-1, 1]
        self.register_buffer("mean", (1 + mean[:, None, None]) * 255 / 2)
        self.register_buffer("inverse_std", 2 / (std[:, None, None] * 255))

    def _features(self, x: Tensor) -> list[Tensor]:
        h, found = (x - self.mean) * self.inverse_std, []
        for i, layer in enumerate(self.vgg):
            h = layer(h)
            if i in LAYERS:
                found.append(h)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance [n] of images [n, 3, H, W] in 0 .. 255."""
        total = torch.zeros(len(x), 1, device=x.device)
        for linear, a, b in zip(self.linear, self._features(x), self._features(y), strict=True):
            total = total + linear((_unit(a) - _unit(b)) ** 2).mean(dim=(2, 3))
        return total.flatten()


def _unit(features: Tensor) -> Tensor:
    """Features [n, C, H, W] of length 1 at each position."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)  # whose gradient at 0 is 0
    return features / (length + 1e-10)


def untrained() -> _Lpips:
    """Return the network with random weights."""
    from torchvision.models.vgg import cfgs, make_layers

    return _Lpips(make_layers(cfgs["D"])).eval().requires_grad_(False)


def _network(vgg: Path, linear: Path) -> _Lpips:
    from flowmaps.importers.torch_files import read_tensors

    network = untrained()
    try:
        weights = read_tensors(vgg)
        network.vgg.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if "features." in k})
        weights = read_tensors(linear)
        network.linear.load_state_dict({k[3:].replace("model.1.", ""): v for k, v in weights.items()})
    except Exception as error:  # load_state_dict raises a dozen types on a wrong file
        reason = error.message if isinstance(error, UserError) else shorten(error)
        raise UserError(f"{vgg} and {linear.name} are not LPIPS weights of version 0.1: {reason}") from None
    return network
