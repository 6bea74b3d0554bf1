"""The published maps that reproduce.py samples: where their files are, and the FID that their authors report."""

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from flowmaps.errors import UserError
from flowmaps.hub import from_hub

COUNT = 50_000  # images behind a published FID
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
REFERENCES = {256: "256/VIRTUAL_imagenet256_labeled.npz", 512: "512/VIRTUAL_imagenet512.npz"}  # there, by image size


class Published(NamedTuple):
    """A map: format, hub id (empty: its file is not there), the file's name there as a pattern, FID by steps."""

    form: str
    hub: str
    file: str
    fid: dict[int, float]
    options: dict[str, Any]  # of the import
    size: int = 256  # of the images
    guided: Mapping[int, dict[str, Any]] = MappingProxyType({})  # by steps, where the import recommends another one


def _soflow(name: str, one: float, two: float) -> Published:
    return Published("soflow", "zlab-princeton/SoFlow", f"{name}-cond/*.pt", {1: one, 2: two}, {"guidance": 3.0})


def _meanflow(guidance: float, one: float) -> Published:
    return Published("meanflow_sit", "", "", {1: one}, {"guidance": guidance})


def _dmf(size: int, fid: dict[int, float]) -> Published:
    options = {"guidance": 2.5, "decoupled": 20}
    return Published("dmf", "kyungmnlee/DMF", f"dmf_xl_2_{size}.pt", fid, options, size)


def _tvm(name: str, guidance: float, fid: dict[int, float], size: int = 256) -> Published:
    return Published("tvm", "lumaai/tvm", f"im{size}_{name}.pkl", fid, {"guidance": guidance}, size)


def _imf(name: str, fid: dict[int, float], two_steps: dict[str, Any] | None = None) -> Published:
    guided = {2: two_steps} if two_steps else {}
    return Published("imf", "Lyy0725/iMF", f"iMF-{name}-2.pth", fid, {"image_size": 32}, guided=guided)


def _pmf(name: str, base_std: float, fid: float, size: int = 256) -> Published:
    return Published("pmf", "Lyy0725/pMF", f"pMF-{name}.pt", {1: fid}, {"base_std": base_std}, size)


MAPS = {
    "soflow-b4": _soflow("B-4", 11.59, 8.22),
    "soflow-b2": _soflow("B-2", 4.85, 4.24),
    "soflow-m2": _soflow("M-2", 3.73, 3.42),
    "soflow-l2": _soflow("L-2", 3.20, 2.90),
    "soflow-xl2": _soflow("XL-2", 2.96, 2.66),
    "meanflow-sit-b4": _meanflow(2.0, 15.43),
    "meanflow-sit-b2": _meanflow(2.0, 6.06),
    "meanflow-sit-l2": _meanflow(2.5, 3.94),
    "meanflow-sit-xl2": _meanflow(2.5, 3.39),
    "dmf-xl2": _dmf(256, {1: 2.16, 2: 1.64, 4: 1.51}),
    "dmf-xl2-512": _dmf(512, {1: 2.12, 2: 1.75, 4: 1.68}),
    "imf-b2": _imf("B", {1: 3.39}),
    "imf-m2": _imf("M", {1: 2.27}),
    "imf-l2": _imf("L", {1: 1.86}),
    "imf-xl2": _imf("XL", {1: 1.72, 2: 1.54}, {"guidance": 4.0, "guidance_interval": (0.36, 0.64)}),
    "pmf-b16": _pmf("B-16", 1.0, 3.12),
    "pmf-l16": _pmf("L-16", 1.0, 2.52),
    "pmf-h16": _pmf("H-16", 2.0, 2.22),
    "pmf-b32": _pmf("B-32", 2.0, 3.70, 512),
    "pmf-l32": _pmf("L-32", 4.0, 2.75, 512),
    "pmf-h32": _pmf("H-32", 4.0, 2.48, 512),
    "tvm-w2": _tvm("w2", 2.0, {1: 3.29, 2: 2.80}),
    "tvm-w1p75": _tvm("w1p75", 1.75, {1: 4.58, 2: 2.61, 4: 1.99}),
    "tvm-512-w2p5": _tvm("w2p5", 2.5, {1: 4.32, 2: 3.50}, 512),
}


def find_file(chosen: Published, hub: str | None) -> Path:
    """Return the file of a map, from the hub (fetched once) or from a folder in its place: OWNER/NAME/FILE.

    Raises:
        UserError: It is not on the hub, or there is none, or more than one, of that name.
    """
    if not chosen.hub:
        raise UserError("its authors' file is not on the hub: download it and give --file")
    folder = Path(hub) / chosen.hub if hub else from_hub(chosen.hub, [chosen.file])
    found = sorted(path for path in folder.rglob("*") if fnmatch(path.relative_to(folder).as_posix(), chosen.file))
    if len(found) != 1:
        names = ", ".join(str(file.relative_to(folder)) for file in found[:8]) or "none"
        raise UserError(
            f"{chosen.hub} should have one file {chosen.file}, and has {names}: download it and give --file"
        )
    return found[0]


def find_reference(size: int, hub: str | None, folder: Path) -> Path:
    """Return ADM's reference statistics of ImageNet, from their site (fetched once, to ``folder``) or from ``hub``.

    Raises:
        UserError: They cannot be fetched.
    """
    name = REFERENCES[size].rpartition("/")[2]
    file = (Path(hub) if hub else folder) / name
    if file.is_file():
        return file
    if hub:
        raise UserError(f"has no {name}", field="hub", value=hub)
    try:
        torch.hub.download_url_to_file(f"{ADM}/{REFERENCES[size]}", str(file), progress=os.isatty(2))
    except OSError as error:
        remedy = "download it elsewhere and give --reference"
        raise UserError(f"{name} cannot be downloaded from {ADM} ({error}): {remedy}") from None
    return file
