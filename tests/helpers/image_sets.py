"""The same pictures as the files of other tools: a parquet file of ``datasets``, and WebDataset's tar shards."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from helpers.makers import encoded, photograph

NAMES = ("cat", "dog", "emu")


def pictures(n: int, height: int = 40, width: int = 30) -> list[bytes]:
    return [encoded(photograph(i, height, width), "png") for i in range(n)]


def table(images: Sequence[bytes], names: Sequence[str] | None = NAMES, image: str = "image", label: str = "label"):
    """A ``datasets.Dataset`` of images, with class labels in turn if there are ``names``."""
    import datasets

    columns = {image: [{"bytes": content, "path": None} for content in images]}
    features = {image: datasets.Image()}
    if names is not None:
        columns[label] = [i % len(names) for i in range(len(images))]
        features[label] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(folder: Path, images: Sequence[bytes], split: str = "train", **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table(images, **options).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, images: Sequence[bytes], each: int = 10, labels: Sequence[str] = NAMES) -> Path:
    """Shards of ``each`` samples: an image, and a label if there are ``labels``, in turn."""
    for first in range(0, len(images), each):
        files = {}
        for i in range(first, min(first + each, len(images))):
            files[f"{i:06d}.png"] = images[i]
            if labels:
                files[f"{i:06d}.cls"] = labels[i % len(labels)].encode()
        write_tar(folder / f"train-{first // each:03d}.tar", files)
    return folder
