"""Published networks as feature extractors: Inception, DINOv2 and CLIP, each from its authors' file of weights."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flowmaps.errors import UserError, shorten
from flowmaps.files import sha256
from flowmaps.metrics.features import Extractor
from flowmaps.metrics.stored import INCEPTION_DIM, PUBLISHED_DIMS, Origin
from flowmaps.metrics.vit import Transformer, ViT, build

BATCH = {"cpu": 16}  # images of 224 or 299 pixels at a time: more are slower (docs/metrics.md) and take memory
INCEPTION_HASH = "6726825d"  # first digits of the SHA-256 of the weights that torch-fidelity releases
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"  # as it caches them
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2"
CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
SPATIAL_CHANNELS = 7  # of Inception's first branch of mixed_6, as in ADM


@dataclass(frozen=True)
class Weights:
    """A published file of weights: where it is from, its names on disks, and the first digits of its SHA-256."""

    url: str
    files: tuple[str, ...]  # the first is the one that a download gets
    digest: str | None = None
    sizes: Transformer | None = None


@dataclass(frozen=True)
class Preparation:
    """The input of a ViT from uint8 images: a resize, then (x / 255 - mean) / deviation."""

    resize: str
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __call__(self, images: Tensor, size: int) -> Tensor:
        if self.resize == TF1:
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1

            x = tf1(images.float(), size=(size, size), align_corners=False)
        else:
            x = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
        mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.deviation))
        return cast(Tensor, (x.expand(-1, 3, -1, -1) - 255 * mean) / (255 * deviation))


TF1, BICUBIC = "TF1 bilinear", "bicubic, antialias"
OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OF_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _dinov2(letter: str, width: int, depth: int) -> Weights:
    name = f"dinov2_vit{letter}14"
    file = f"{name}_pretrain.pth"
    return Weights(f"{DINOV2_URL}/{name}/{file}", (file,), None, Transformer(width, depth, 14, 37))


def _clip(name: str, digest: str, sizes: Transformer) -> Weights:
    file = f"{name}.pt"
    cached = f"clip-{name.lower()}-{digest}.pt"  # as torch-fidelity names it
    return Weights(f"{CLIP_URL}/{digest}/{file}", (cached, file), digest, sizes)


INCEPTION = Weights(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE,
    (INCEPTION_FILE,),
    INCEPTION_HASH,
)
WEIGHTS = {
    "inception": INCEPTION,
    "inception-spatial": INCEPTION,
    "dinov2": (DINOV2_L := _dinov2("l", 1024, 24)),
    "dinov2-vit-s-14": _dinov2("s", 384, 12),
    "dinov2-vit-b-14": _dinov2("b", 768, 12),
    "dinov2-vit-l-14": DINOV2_L,
    "clip-vit-b-32": _clip(
        "ViT-B-32",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        Transformer(768, 12, 32, 7, 224, 512),
    ),
    "clip-vit-b-16": _clip(
        "ViT-B-16",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        Transformer(768, 12, 16, 14, 224, 512),
    ),
    "clip-vit-l-14": _clip(
        "ViT-L-14",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        Transformer(1024, 24, 14, 16, 224, 768),
    ),
    "clip-vit-l-14-336px": _clip(
        "ViT-L-14-336px",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        Transformer(1024, 24, 14, 24, 336, 768),
    ),
}


def load_published(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """Return the extractor ``name`` of ``WEIGHTS`` with its file ``weights``, or the one in that folder.

    Without ``weights`` the folder is torch's cache, to which a missing file is downloaded.

    Raises:
        UserError: There is no such file and no network, or it has other weights.
    """
    file = _find(name, weights)
    if not file.is_file():
        raise UserError("no such file", field="weights", value=file)
    digest, sizes = sha256(file), WEIGHTS[name].sizes
    network = _network("inception" if sizes is None else name, file, digest, device)
    if sizes is None:
        return _inception(Origin(extractor=name, weights=digest, resize="inception (TF1 bilinear, 299)"), network)
    resize = BICUBIC if name == "dinov2" else TF1
    return _vit(Origin(extractor=name, weights=digest, resize=f"{resize}, {sizes.pixels}"), network, sizes, resize)


def _find(name: str, weights: Path | None) -> Path:
    """Return the file of weights; download it if none is given and none is cached."""
    known = WEIGHTS[name]
    if weights is not None and not weights.is_dir():
        return weights
    folder = weights or Path(torch.hub.get_dir()) / "checkpoints"
    if found := [folder / file for file in known.files if (folder / file).is_file()]:
        return found[0]
    if weights is not None:
        raise UserError(f"has no {' or '.join(known.files)}: fetch {known.url}", field="weights", value=weights)
    file = folder / known.files[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(known.url, str(file), hash_prefix=known.digest, progress=os.isatty(2))
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        raise UserError(
            f"the weights of {name} are not in {file} and cannot be downloaded ({error}): fetch {known.url} where "
            "there is a network and pass its file as weights, or score by an extractor trained on your own images "
            "(train_extractor.py)"
        ) from None
    return file


@functools.lru_cache(maxsize=4)
def _network(name: str, file: Path, digest: str, device: torch.device) -> Any:
    """Return the network with the weights of ``file``, whose SHA-256 is ``digest``: one object for all its features."""
    from flowmaps.importers.torch_files import read_tensors as read_pickled
    from flowmaps.importers.torchscript import is_torchscript, read_torchscript

    sizes = WEIGHTS[name].sizes
    kind = "an Inception weight file of torch-fidelity" if sizes is None else f"a weight file of {name}"
    try:  # torch-fidelity would unpickle anything, so refuse everything but tensors first
        content = read_torchscript(file) if is_torchscript(file) else read_pickled(file)
        network: Any = _Inception(file) if sizes is None else build(sizes, content)
    except Exception as error:  # torch.load and load_state_dict raise a dozen types on a wrong file
        reason = error.message if isinstance(error, UserError) else shorten(error)
        raise UserError(f"not {kind}: {reason}", field="weights", value=file) from None
    return network.to(device)


class _Inception(nn.Module):
    """torch-fidelity's port of the 2015 Inception graph, with its own TF1 bilinear resize.

    Images [n, C, H, W] to pool features [n, 2048] and spatial ones [n, 2023]: as in ADM's evaluations 17 x 17 places of
    the first 7 channels of the first branch of "mixed_6".
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        from torch_fidelity.utils import create_feature_extractor

        options = {"cuda": False, "feature_extractor_weights_path": str(file), "verbose": False}
        self.network: Any = create_feature_extractor("inception-v3-compat", ["2048"], **options)
        fold_batch_norms(self.network)
        self._spatial: list[Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda layer, inputs, output: self._spatial.append(
                output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            )
        )
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # images and what became of them

    def to(self, device: Any) -> Any:  # type: ignore[override]
        on_cpu = torch.device(device).type == "cpu"
        layout = {"memory_format": torch.channels_last} if on_cpu else {}  # 1.5 times as fast there
        return super().to(device, **layout)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return both kinds of features; a second call with the same images computes nothing."""
        if self._last is None or self._last[0] is not images:
            device = self.network.fc.weight.device
            self._spatial.clear()
            parts = torch.split(images, BATCH.get(device.type, 128))  # grey counts as three equal channels
            pool = torch.cat([self.network(part.to(device).expand(-1, 3, -1, -1))[0] for part in parts])
            spatial = torch.cat(self._spatial)
            self._spatial.clear()
            self._last = images, pool, spatial
        return self._last[1:]


def _inception(origin: Origin, network: _Inception) -> Extractor:
    if origin.extractor == "inception-spatial":
        return Extractor(lambda images: network(images)[1], PUBLISHED_DIMS[origin.extractor], origin)

    def logits(features: Tensor) -> Tensor:  # without bias, as the score is defined
        weight = network.network.fc.weight
        return cast(Tensor, features.to(weight.device) @ weight.T)

    return Extractor(lambda images: network(images)[0], INCEPTION_DIM, origin, logits)


def _vit(origin: Origin, network: ViT, sizes: Transformer, resize: str) -> Extractor:
    prepare = Preparation(resize, *(OF_CLIP if sizes.projection else OF_IMAGENET))

    def embed(images: Tensor) -> Tensor:
        device = network.positions.device
        parts = torch.split(images, BATCH.get(device.type, 128))
        return torch.cat([network(prepare(part.to(device), sizes.pixels)) for part in parts])

    return Extractor(embed, sizes.features, origin)


def fold_batch_norms(network: nn.Module) -> None:
    """Replace each pair ``conv``, ``bn`` of torch-fidelity's Inception, in eval mode, by one convolution."""
    for layer in network.modules():
        conv, norm = getattr(layer, "conv", None), getattr(layer, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()
