"""Feature extractors by name or file: uint8 images in, features out.

Only ``inception``'s Fréchet distance is called FID. Points of the checkerboard are their own features and are scored by
the KL divergence from its known density.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flowmaps.errors import UserError, blame, shorten
from flowmaps.files import sha256
from flowmaps.images import from_uint8
from flowmaps.metrics.classifier import CLASSIFIERS, SUFFIX, Classifier, ClassifierOptions, read_own
from flowmaps.metrics.stats import INCEPTION_DIM, FeatureStats, Origin, pixels
from flowmaps.tensors import check_shapes, read_header, read_tensors

INCEPTION_BATCH = {"cpu": 16}  # images of 299 x 299 at a time: more are slower (docs/metrics.md) and take memory
INCEPTION_HASH = "6726825d"  # first digits of the SHA-256 of the weights that torch-fidelity releases
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"  # as it caches them


@dataclass(frozen=True)
class Extractor:
    """A named feature function: ``embed`` maps uint8 images [n, C, H, W], or points, to features [n, dim]."""

    embed: Callable[[Tensor], Tensor]
    dim: int
    origin: Origin  # extractor name, weight hash, resize
    logits: Callable[[Tensor], Tensor] | None = None  # class logits [n, classes] of features, for the Inception Score

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance on these features; KL for points, which have a better score."""
        return METRIC_OF.get(self.origin.extractor, f"FD-{self.origin.extractor}")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse points, except for the one extractor that takes only points."""
        if (len(shape) == 3) == (self.origin.extractor == POINTS):
            kind = "images, not points" if len(shape) == 3 else "points, not images"
            raise UserError(
                f"does not take samples of shape {tuple(shape)}: they are {kind}",
                field="extractor",
                value=self.origin.extractor,
            )

    @torch.no_grad()
    def stats(
        self, batches: Iterable[Tensor], data: str = "", split: str = "", crop: str = "", keep: bool = False
    ) -> FeatureStats:
        """Return the moments of the features of uint8 image batches, streamed; ``keep`` also keeps the features."""
        stats = FeatureStats(self.dim, replace(self.origin, data=data, split=split, crop=crop), keep)
        for images in batches:
            self.check_shape(images.shape[1:])
            size = pixels(*images.shape[2:]) if images.ndim == 4 else ""
            if stats.n and size != stats.origin.size:
                raise UserError(f"images of {stats.origin.size} and of {size} pixels: crop and resize them to one size")
            stats.origin = replace(stats.origin, size=size)
            stats.update(self.embed(images))
        return stats


POINTS = "checkerboard"
METRIC_OF = {"inception": "FID", POINTS: "KL"}


def extractor_file(name: str) -> Path:
    """Return the weight file that ships with this package: next to the code in a wheel, in assets/ in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package, package.parent):
        file = folder / "assets" / "extractors" / f"{name}.safetensors"
        if file.is_file():
            return file
    raise UserError(
        f"the weights of {name!r} are not installed: pass their file as weights", field="extractor", value=name
    )


def _shipped(name: str, weights: Path | None, device: torch.device) -> Extractor:
    try:
        return _classifier(name, CLASSIFIERS[name], weights or extractor_file(name), device)
    except UserError as error:
        if weights is None:
            raise
        raise UserError(f"not a weight file of {name!r}: {error}", field="weights", value=weights) from None


def read_classifier(name: str, options: ClassifierOptions, file: Path) -> Classifier:
    """Return the classifier with the weights of ``file``, on the CPU in eval mode; errors name the extractor."""
    with torch.device("meta"):
        network = options.build()
    check_shapes(network, read_header(file, "give another file")[0], file, f"the extractor {name}")
    network.to_empty(device="cpu").load_state_dict(read_tensors(file, "give another file"))
    return network.eval().requires_grad_(False)


def _classifier(name: str, options: ClassifierOptions, file: Path, device: torch.device) -> Extractor:
    network = read_classifier(name, options, file).to(device)
    shape = (options.channels, options.size, options.size)

    def embed(images: Tensor) -> Tensor:
        if images.shape[1:] != shape:
            raise UserError(
                f"the extractor {name!r} takes images of shape {shape}, got {tuple(images.shape[1:])}: choose another "
                "extractor, or train one at this size"
            )
        return network.embed(from_uint8(images.to(device)))

    return Extractor(embed, options.features, Origin(extractor=name, weights=sha256(file), resize="none"))


def _own(name: str, weights: Path | None, device: torch.device) -> Extractor:
    if weights:
        raise UserError("this extractor is a file with its weights: leave it out", field="weights", value=weights)
    own = read_own(Path(name))
    return _classifier(own.name, own.network, Path(name), device)


def _inception(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """torch-fidelity's port of the 2015 Inception graph, pool features (2048), with its own TF1 bilinear resize."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    from flowmaps.importers.torch_files import read_tensors as read_pickled

    file = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.is_file() and weights is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_HASH, progress=os.isatty(2)
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(
                f"the Inception weights are not in {file} and cannot be downloaded ({error}): "
                f"fetch {URL_INCEPTION_V3} where there is a network and pass its file as weights, or score by an "
                "extractor trained on your own images (train_extractor.py)"
            ) from None
    try:  # torch-fidelity would unpickle anything, so refuse everything but tensors first
        read_pickled(file)
        network: Any = create_feature_extractor(
            "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(file), verbose=False
        )
    except Exception as error:  # torch.load and load_state_dict raise a dozen types on a wrong file
        reason = error.message if isinstance(error, UserError) else shorten(error)
        raise UserError(
            f"not an Inception weight file of torch-fidelity: {reason}", field="weights", value=file
        ) from None
    fold_batch_norms(network)
    network.to(device)
    if device.type == "cpu":
        network.to(memory_format=torch.channels_last)  # 1.5 times as fast

    def embed(images: Tensor) -> Tensor:
        parts = torch.split(images, INCEPTION_BATCH.get(device.type, 128))  # grey counts as three equal channels
        return torch.cat([network(part.to(device).expand(-1, 3, -1, -1))[0] for part in parts])

    def logits(features: Tensor) -> Tensor:
        return cast(Tensor, features.to(device) @ network.fc.weight.T)  # without bias, as the score is defined

    resize = "inception (TF1 bilinear, 299)"
    return Extractor(embed, INCEPTION_DIM, Origin(extractor=name, weights=sha256(file), resize=resize), logits)


def fold_batch_norms(network: nn.Module) -> None:
    """Replace each pair ``conv``, ``bn`` of torch-fidelity's Inception, in eval mode, by one convolution."""
    for layer in network.modules():
        conv, norm = getattr(layer, "conv", None), getattr(layer, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _points(name: str, weights: Path | None, device: torch.device) -> Extractor:
    if weights:
        raise UserError("points are their own features: leave it out", field="weights", value=weights)
    return Extractor(lambda points: points.float(), 2, Origin(extractor=name, resize="none"))


EXTRACTORS: dict[str, Callable[[str, Path | None, torch.device], Extractor]] = {
    "inception": _inception,
    **dict.fromkeys(CLASSIFIERS, _shipped),
    POINTS: _points,
}


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Return an extractor of ``EXTRACTORS``, or of a file that ``train_extractor.py`` wrote.

    Args:
        name: The extractor's name, or its file, which ends in .safetensors and has its weights too.
        weights: Other weights for a named one.
        device: Where it runs.

    Raises:
        UserError: The extractor is unknown, or the weight file is missing or not one of this extractor.
    """
    check_extractor(name, weights)
    load = _own if name.endswith(SUFFIX) else EXTRACTORS[name]
    return load(name, None if weights is None else Path(weights), torch.device(device))


def extractor_name(name: str) -> str:
    """Return the name of an extractor that is given by name or file."""
    return read_own(Path(name)).name if name.endswith(SUFFIX) else name


def check_extractor(name: str | None, weights: str | Path | None = None) -> None:
    """Refuse, before any work, an unknown extractor and a weight file that is not there; ``name`` None is any."""
    if name is not None and name.endswith(SUFFIX):
        with blame("extractor", name):
            read_own(Path(name))
    elif name is not None and name not in EXTRACTORS:
        raise UserError(
            f"choose one of {', '.join(EXTRACTORS)}, or a file that train_extractor.py wrote",
            field="extractor",
            value=name,
        )
    if weights is not None and not Path(weights).is_file():
        raise UserError("no such file", field="weights", value=weights)
