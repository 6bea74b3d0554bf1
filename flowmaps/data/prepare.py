"""Write ImageNet, or any folder of images, to disk as a run reads it: square crops, or the latents of a VAE."""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowmaps.data.file_source import READ_ERRORS, FileSource
from flowmaps.data.image_folder import find_images, find_labels, summary
from flowmaps.data.image_io import LARGEST_SIDE, BadImage, adm_center_crop, decode, with_channels
from flowmaps.data.loader import Loader
from flowmaps.data.shard_writing import check_directory, check_shard, start_writing, write_missing
from flowmaps.distributed import processes
from flowmaps.errors import UserError, blame
from flowmaps.images import from_uint8
from flowmaps.info import VAE_RANGE, check_vae_range
from flowmaps.vae import fingerprint, moments, reduction, scaling

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Crops:
    """ADM's centre crops of image files, decoded on demand; the EXIF orientation is ignored, as ADM does."""

    source: FileSource
    names: list[str]
    size: int
    skip_corrupt: bool

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the intact images at ``index`` [b] as uint8 [k, 3, size, size], and their indices [k]."""
        images, intact = [], []
        for i in index.tolist():
            try:
                pixels = with_channels(decode(self.source.read(self.names[i]), upright=False), 3)
                made = np.array(adm_center_crop(pixels, self.size))
            except (BadImage, *READ_ERRORS) as error:
                if self.skip_corrupt:
                    continue
                raise UserError(
                    f"{self.source.root}: {self.names[i]} is not an intact image ({error}): repair it, or set "
                    "skip_corrupt to leave such files out"
                ) from None
            images.append(torch.from_numpy(made))
            intact.append(i)
        x = torch.stack(images) if images else torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return x.permute(0, 3, 1, 2).contiguous(), torch.tensor(intact, dtype=torch.int64)


@dataclass(frozen=True)
class Encoder:
    """Encodes images as latents.

    ``source`` is the name that ``vae`` was opened by; ``flip`` encodes the mirror images too; ``vae_range`` are the
    values that stand for black and white.
    """

    vae: "AutoencoderKL"
    source: str
    flip: bool = False
    vae_range: tuple[float, float] = VAE_RANGE

    def facts(self, size: int) -> dict[str, Any]:
        """Return the facts about the latents of images of ``size`` pixels, for the set's card."""
        if size % reduction(self.vae):
            raise UserError(f"must be a multiple of {reduction(self.vae)}, the VAE's reduction", "size", size)
        check_vae_range(self.vae_range)
        side = size // reduction(self.vae)
        shift, scale = scaling(self.vae)
        return {
            "shape": [self.vae.config.latent_channels, side, side],
            "image_size": size,
            "flip": self.flip,
            "vae": self.source,
            "vae_sha256": fingerprint(self.vae),
            "vae_range": list(self.vae_range),
            "latent_shift": list(shift),
            "latent_scale": list(scale),
        }

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return moments [B, 2, C, h, w] float16 of uint8 images [B, 3, H, W]; with ``flip`` also of their mirrors."""
        made = [
            moments(self.vae, from_uint8(x), self.vae_range).half().cpu()
            for x in [images] + [images.flip(-1)] * self.flip
        ]
        if not all(bool(torch.isfinite(part).all()) for part in made):
            raise UserError("latents are not finite in float16: choose another VAE", field="vae", value=self.source)
        return made


def write_images(
    out: str | Path,
    root: str | Path,
    size: int,
    encoder: Encoder | None = None,
    *,
    shard: int = 1024,
    batch: int = 64,
    workers: int = 0,
    skip_corrupt: bool = False,
) -> Iterator[tuple[int, int]]:
    """Write images to disk as square crops, or as the latents of a VAE, for training to read.

    Args:
        out: Directory of the set; one that was started with the same arguments is completed.
        root: Source of images, as ``open_images`` takes and labels them.
        size: Pixels per side of the crops.
        encoder: Write the latents that it makes instead of the crops.
        shard: Images per file, less those left out; their mirror images come on top. A file is made in memory.
        batch: Images per call of the encoder.
        workers: Processes that decode images.
        skip_corrupt: Leave out files that are not intact images instead of refusing them.

    Yields:
        (shards made, shards to make) by this process, first before any work and then after each shard.

    Raises:
        UserError: An image is damaged, ``out`` holds anything else, or ``size`` does not fit the VAE.
    """
    if not 1 <= size <= LARGEST_SIDE:
        raise UserError(f"must lie in 1 .. {LARGEST_SIDE:,}", field="size", value=size)
    check_shard(shard, 3 * size**2)
    kind = "images" if encoder is None else "latents"
    check_directory(Path(out), kind)
    with blame("src", root):
        source, found, left_out = find_images(root)
    if left_out and processes().is_main_process:
        tqdm.write(f"{root}: {len(found)} images; left out: {', '.join(summary(left_out))}", file=sys.stderr)
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
        "sources": [_sources([*found.values()][i : i + shard]) for i in range(0, len(names), shard)],
    }
    writing = start_writing(out, kind, facts, math.ceil(len(names) / shard))
    numbers = {n: torch.arange(n * shard, min((n + 1) * shard, len(names))) for n in writing.missing}
    batches = [part for items in numbers.values() for part in torch.split(items, batch)]
    loader = Loader(
        Crops(source, names, size, skip_corrupt),
        lambda k: batches[k] if k < len(batches) else torch.empty(0, dtype=torch.int64),
        workers,
    )
    asked = 0

    def make(number: int) -> tuple[dict[str, Tensor], list[str]]:
        nonlocal asked
        parts: list[list[Tensor]] = []
        kept: list[Tensor] = []
        for _ in torch.split(numbers[number], batch):
            images, intact = loader.batch(asked)
            asked += 1
            assert intact is not None
            parts.append([images] if encoder is None else encoder(images))
            kept.append(intact)
        rows = torch.cat(kept)
        made = torch.cat([part[side] for side in range(len(parts[0])) for part in parts])
        tensors = {"images" if encoder is None else "moments": made}
        if label is not None:
            tensors["label"] = label[rows].repeat(len(parts[0]))
        damaged = sorted(set(numbers[number].tolist()) - set(rows.tolist()))
        return tensors, [names[i] for i in damaged]

    with loader.watched():
        yield from write_missing(writing, make)


def _sources(states: list[str]) -> str:
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()
