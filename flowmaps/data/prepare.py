"""ImageNet, or any folder of images, on disk as a run reads it: square crops, or the latents of a VAE."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowmaps import UserError
from flowmaps.data import Loader
from flowmaps.data.image_folder import READ_ERRORS, Source, find_images, find_labels
from flowmaps.data.image_io import BadImage, adm_square, decode, with_channels
from flowmaps.data.shards import begin, complete
from flowmaps.images import from_uint8
from flowmaps.vae import fingerprint, moments, reduction, scaling

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Crops:
    """ADM's centre crops of image files, each decoded when it is asked for; turned by no EXIF mark, as theirs."""

    source: Source
    names: list[str]
    size: int
    skip_corrupt: bool

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [k, 3, size, size] at ``index`` [b], and which of them they are, [k]: those that are whole."""
        images, whole = [], []
        for i in index.tolist():
            try:
                pixels = with_channels(decode(self.source.read(self.names[i]), upright=False), 3)
            except (BadImage, *READ_ERRORS) as error:
                if self.skip_corrupt:
                    continue
                raise UserError(
                    f"{self.source.root}: {self.names[i]} is no whole image ({error}): repair it, or leave such files "
                    "out (--skip_corrupt)"
                ) from None
            images.append(torch.from_numpy(np.array(adm_square(pixels, self.size))))
            whole.append(i)
        made = torch.stack(images) if images else torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return made.permute(0, 3, 1, 2).contiguous(), torch.tensor(whole, dtype=torch.int64)


@dataclass(frozen=True)
class Encoder:
    """What makes latents of images: a VAE, the name it was opened by, and whether of their mirror images too."""

    vae: "AutoencoderKL"
    source: str
    flip: bool = False

    def facts(self, size: int) -> dict[str, Any]:
        """What the set's card says of them; ``size`` is that of the images."""
        if size % reduction(self.vae):
            raise UserError(f"--size={size} is no multiple of {reduction(self.vae)}, by which --vae reduces images")
        side = size // reduction(self.vae)
        shift, scale = scaling(self.vae)
        return {
            "shape": [self.vae.config.latent_channels, side, side],
            "image_size": size,
            "flip": self.flip,
            "vae": self.source,
            "vae_sha256": fingerprint(self.vae),
            "latent_shift": list(shift),
            "latent_scale": list(scale),
        }

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Moments [B, 2, C, h, w] in float16 of uint8 images [B, 3, H, W]; and of their mirror images, if wanted."""
        made = [moments(self.vae, from_uint8(x)).half().cpu() for x in [images] + [images.flip(-1)] * self.flip]
        if not all(bool(torch.isfinite(part).all()) for part in made):
            raise UserError(f"--vae={self.source} gives latents that are not finite in float16")
        return made


def write_images(
    out: Path,
    root: Path,
    size: int,
    encoder: Encoder | None = None,
    *,
    shard: int = 1024,
    batch: int = 64,
    workers: int = 0,
    skip_corrupt: bool = False,
) -> Iterator[tuple[int, int]]:
    """Write the images under ``root`` (folder or zip) to ``out`` as ``size`` x ``size``, or their latents.

    Yields (shards made, shards to make) of this process, at first and after each. Labels are those of
    ``flowmaps.data.open_images``. A shard has ``shard`` images, less those left out, then their mirror images.
    """
    source, found, _ = find_images(root, "--src")
    names = list(found)
    label, classes = find_labels(source, names)
    listing = json.dumps([names, None if label is None else label.tolist()])
    facts: dict[str, Any] = {"shape": [3, size, size]} if encoder is None else encoder.facts(size)
    facts |= {
        "num": len(names),
        "shard": shard,
        "num_classes": len(classes),
        "classes": list(classes),
        "crop": "adm",
        "files": hashlib.sha256(listing.encode()).hexdigest(),
    }
    total = math.ceil(len(names) / shard)
    missing = begin(out, "images" if encoder is None else "latents", facts, total)
    numbers = {number: torch.arange(number * shard, min((number + 1) * shard, len(names))) for number in missing}
    batches = [part for number in missing for part in torch.split(numbers[number], batch)]
    loader = Loader(
        Crops(source, names, size, skip_corrupt),
        lambda k: batches[k] if k < len(batches) else torch.empty(0, dtype=torch.int64),
        workers,
    )
    asked = 0

    def make(number: int) -> tuple[dict[str, Tensor], list[str]]:
        nonlocal asked
        parts: list[list[Tensor]] = []
        there: list[Tensor] = []
        for _ in torch.split(numbers[number], batch):
            images, whole = loader.shard(asked)
            asked += 1
            assert whole is not None
            parts.append([images] if encoder is None else encoder(images))
            there.append(whole)
        rows = torch.cat(there)
        made = torch.cat([part[side] for side in range(len(parts[0])) for part in parts])
        tensors = {"images" if encoder is None else "moments": made}
        if label is not None:
            tensors["label"] = label[rows].repeat(len(parts[0]))
        left_out = sorted(set(numbers[number].tolist()) - set(rows.tolist()))
        return tensors, [names[i] for i in left_out]

    yield from complete(out, total, missing, make)
