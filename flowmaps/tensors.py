"""Reading of safetensors files that may be damaged, of another model, or something else."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowmaps.errors import UserError, shorten
from flowmaps.reading import regular_file

MODEL_FILE = "diffusion_pytorch_model.safetensors"  # of a diffusers model in one piece
PART = r"diffusion_pytorch_model(?:\.([\w-]+?))?(?:-(\d{5})-of-(\d{5}))?\.safetensors"  # with its variant, or a shard


def model_files(folder: Path, remedy: str) -> tuple[list[Path], str]:
    """Return the weight files of a diffusers model and their variant: one file, or all of its shards.

    They are those without a variant if there are any, else those of the only one, such as "fp16".

    Raises:
        UserError: They are missing, incomplete or ambiguous; the message names the files that are there.
    """
    there = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
    found: dict[str, list[tuple[int, int, str]]] = {}  # by variant: number, count and name of each shard
    for name in there:
        if part := re.fullmatch(PART, name):
            found.setdefault(part[1] or "", []).append((int(part[2] or 1), int(part[3] or 1), name))
    shown = f"; there: {shorten(', '.join(there))}" if there else ""
    if not found:
        raise UserError(f"{folder / MODEL_FILE} is missing: the checkpoint is incomplete{shown}")
    if "" not in found and len(found) > 1:
        raise UserError(f"{folder / MODEL_FILE} is missing, and there is more than one variant{shown}: {remedy}")
    variant = "" if "" in found else next(iter(found))
    shards = sorted(found[variant])
    if [number for number, *_ in shards] != list(range(1, shards[0][1] + 1)) or len({of for _, of, _ in shards}) > 1:
        raise UserError(f"{folder} has an incomplete set of {MODEL_FILE}{shown}: {remedy}")
    return [folder / name for *_, name in shards], variant


@contextmanager
def _opened(path: Path, remedy: str) -> Iterator[Any]:
    try:
        with safe_open(regular_file(path, remedy), "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({shorten(error, 200)}): {remedy}") from None


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; a missing or damaged one is refused with ``remedy``."""
    with _opened(path, remedy) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # not a dict


def read_header(path: Path, remedy: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of the tensors in a safetensors file and its metadata, without reading any tensor.

    The library compares the sizes with the file's own, so that a header cannot promise more than there is.
    """
    with _opened(path, remedy) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return shapes, file.metadata() or {}


def merged(parts: Sequence[dict[str, Any]], where: Path, remedy: str) -> dict[str, Any]:
    """Return the tensors, or their shapes, of all shards; one that is in two of them is refused."""
    found: dict[str, Any] = {}
    for part in parts:
        if twice := found.keys() & part.keys():
            raise UserError(f"{where}: {sorted(twice)[0]} is in two files: {remedy}")
        found |= part
    return found


def check_shapes(network: nn.Module, found: dict[str, tuple[int, ...]], path: Path, owner: object) -> None:
    """Refuse the file ``path`` unless its shapes are those of ``network``, which may be on the meta device."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit {owner}: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none of this name')}"
            )
