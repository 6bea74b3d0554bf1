"""Reading of safetensors files that may be damaged, of another model, or something else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowmaps.errors import UserError, shorten
from flowmaps.reading import regular_file


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


def check_shapes(network: nn.Module, found: dict[str, tuple[int, ...]], path: Path, owner: object) -> None:
    """Refuse the file ``path`` unless its shapes are those of ``network``, which may be on the meta device."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit {owner}: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none of this name')}"
            )
