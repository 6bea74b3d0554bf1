"""The small classifiers whose features score small data sets: the network, its file, and where that is looked for."""

import json
import os
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError, shorten
from flowmaps.reading import parse, parse_json
from flowmaps.tensors import read_header


class Classifier(nn.Module):
    """A small convolutional classifier; its features are the last hidden layer, before the ReLU.

    Trained by the command ``extractor`` (``training/cli/extractor.py``). Images [n, channels, size, size] in [-1, 1].
    """

    def __init__(self, channels: int, size: int, classes: int, width: int, features: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2),
            )  # fmt: skip

        widths = [channels, width]
        while size // 2 ** (len(widths)) >= 2:  # down to 2 x 2, or 3 x 3
            widths.append(min(2 * widths[-1], 4 * width))
        self.stages = nn.Sequential(*[stage(a, b) for a, b in pairwise(widths)])
        side = size // 2 ** (len(widths) - 1)
        self.features = nn.Linear(widths[-1] * side**2, features)
        self.head = nn.Linear(features, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features [n, features]."""
        return cast(Tensor, self.features(self.stages(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [n, classes]."""
        return cast(Tensor, self.head(torch.relu(self.embed(x))))


@dataclass(frozen=True)
class ClassifierOptions:
    """The arguments of a ``Classifier``, as its file has them."""

    channels: int
    size: int
    classes: int
    width: int = 16
    features: int = 64

    def build(self) -> Classifier:
        return Classifier(**asdict(self))


@dataclass(frozen=True)
class OwnExtractor:
    """The facts of an extractor in its file, in the safetensors metadata under ``KEY``."""

    name: str  # its Fréchet distance is FD-name
    network: ClassifierOptions
    task: str  # what it was trained to tell apart: classes or rotations

    def metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self))}


KEY, SUFFIX = "extractor", ".safetensors"
UNTRAINED = ("inception", "checkerboard")  # names that no classifier can have
LARGEST_NETWORK = ClassifierOptions(channels=3, size=4096, classes=1_000_000, width=1024, features=4096)
CLASSIFIERS = {  # that ship with this package
    "digits": ClassifierOptions(channels=1, size=8, classes=10, width=32),
    "fashion_mnist": ClassifierOptions(channels=1, size=32, classes=10),
}


def read_own(file: Path) -> OwnExtractor:
    """Return what the file of an extractor trained on one's own data says of itself.

    Raises:
        UserError: It is missing, damaged, or something else.
    """
    remedy = "give a file that train_extractor.py wrote"
    header = read_header(file, remedy)[1]
    if KEY not in header:
        raise UserError(f"{file} is not an extractor: {remedy}")
    own = parse(OwnExtractor, parse_json(header[KEY], f"{file}: {KEY}", remedy), f"{file}: {KEY}")
    sizes, most = asdict(own.network), asdict(LARGEST_NETWORK)
    if wrong := [name for name in sizes if not 1 <= sizes[name] <= most[name]]:
        raise UserError(f"{file}: {wrong[0]} must lie in 1 .. {most[wrong[0]]:,}: {remedy}")
    if not re.fullmatch(r"[\w.-]{1,60}", own.name) or own.name in UNTRAINED:
        raise UserError(f"{file}: {shorten(own.name, 60)!r} cannot be the name of an extractor: {remedy}")
    return own


def own_file(source: str | Path) -> Path:
    """Return where the extractor of the folder, zip file or prepared set ``source`` is looked for: next to it."""
    path = Path(os.path.abspath(source))  # noqa: PTH100 (a link keeps its own name)
    return path.with_name(f"{path.stem if path.suffix == '.zip' else path.name}.extractor{SUFFIX}")


def own_name(source: str | Path) -> str:
    """Return the name of the extractor trained on ``source``: that of its file, as far as a metric's name can have it.

    The name of an extractor of this package is another one's.
    """
    name = re.sub(r"[^\w.-]+", "-", own_file(source).name.removesuffix(f".extractor{SUFFIX}"))[:50]
    return f"my-{name}" if name in (*CLASSIFIERS, *UNTRAINED) else name
