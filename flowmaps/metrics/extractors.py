"""Feature extractors by name, file or function: uint8 images in, features out.

Only ``inception``'s Fréchet distance is called FID. Points of the checkerboard are their own features and are scored by
the KL divergence from its known density.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError, blame, choose, shorten
from flowmaps.files import sha256
from flowmaps.images import from_uint8
from flowmaps.metrics.classifier import CLASSIFIERS, SUFFIX, Classifier, ClassifierOptions, read_own
from flowmaps.metrics.features import POINTS, Extractor
from flowmaps.metrics.published import WEIGHTS, load_published
from flowmaps.metrics.stored import Origin
from flowmaps.tensors import check_shapes, read_header, read_tensors

Function = Callable[[Tensor], Tensor]  # uint8 images [n, C, H, W] -> features [n, dim]


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


def _points(name: str, weights: Path | None, device: torch.device) -> Extractor:
    if weights:
        raise UserError("points are their own features: leave it out", field="weights", value=weights)
    return Extractor(lambda points: points.float(), 2, Origin(extractor=name, resize="none"))


EXTRACTORS: dict[str, Callable[[str, Path | None, torch.device], Extractor]] = {
    **dict.fromkeys(WEIGHTS, load_published),
    **dict.fromkeys(CLASSIFIERS, _shipped),
    POINTS: _points,
}


def load_extractor(
    name: str | Function,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    shape: Sequence[int] = (),
    dim: int = 0,
) -> Extractor:
    """Return an extractor of ``EXTRACTORS``, of a file that ``train_extractor.py`` wrote, or a function as one.

    Args:
        name: The extractor's name, or its file, which ends in .safetensors and has its weights too. Or a function or
            ``nn.Module`` from uint8 images [n, C, H, W] to features [n, dim], itself or as ``"module:function"`` of an
            installed module. A module of torch is moved to ``device`` and put in eval mode.
        weights: Other weights for a named one: their file, or a folder that has it under its published name.
        device: Where it runs.
        shape: The shape of an image [C, H, W], from which a function's features are counted.
        dim: The number of a function's features, if it is known.

    Raises:
        UserError: The extractor is unknown, or the weight file is missing or not one of this extractor.
    """
    if not isinstance(name, str):
        return _function(name, weights, torch.device(device), shape, dim)
    check_extractor(name, weights)
    if ":" in name and not name.endswith(SUFFIX):
        return _function(_imported(name), weights, torch.device(device), shape, dim)
    load = _own if name.endswith(SUFFIX) else EXTRACTORS[name]
    return load(name, None if weights is None else Path(weights), torch.device(device))


def _imported(name: str) -> Function:
    """Return ``"module:function"``, an object of a class if it is one."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"cannot be imported ({shorten(error)}): install the module, or correct the name"
        raise UserError(reason, field="extractor", value=name) from None
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise UserError("is not a function from images to features", field="extractor", value=name)
    return found  # type: ignore[no-any-return]


def function_name(function: Function) -> str:
    """Return the name under which a function's distance is reported."""
    return str(getattr(function, "__name__", type(function).__name__))


def _function(function: Function, weights: object, device: torch.device, shape: Sequence[int], dim: int) -> Extractor:
    name = function_name(function)
    if weights:
        raise UserError("a function has its own weights: leave it out", field="weights", value=weights)
    if name in EXTRACTORS or not re.fullmatch(r"[\w.-]{1,60}", name):
        raise UserError("cannot be the name of a function: rename it", field="extractor", value=name)
    if isinstance(function, nn.Module):
        function.to(device).eval()

    def embed(images: Tensor) -> Tensor:
        features = function(images.to(device))
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if found != [len(images), dim or features.shape[-1]]:
            reason = f"must return features [{len(images)}, {dim or 'dim'}], it returned {found}"
            raise UserError(reason, field="extractor", value=name)
        return features

    if not dim:
        with torch.no_grad():
            dim = embed(torch.zeros(2, *shape, dtype=torch.uint8)).shape[1]
    return Extractor(embed, dim, Origin(extractor=name, resize="unknown"), cached=False)


def extractor_name(name: str | Function) -> str:
    """Return the name of an extractor that is given by name, file or function."""
    if not isinstance(name, str):
        return function_name(name)
    if name.endswith(SUFFIX):
        return read_own(Path(name)).name
    return function_name(_imported(name)) if ":" in name else name


def check_extractor(name: str | Function | None, weights: str | Path | None = None) -> None:
    """Refuse, before any work, an unknown extractor and a weight file that is not there; ``name`` None is any."""
    if isinstance(name, str) and name.endswith(SUFFIX):
        with blame("extractor", name):
            read_own(Path(name))
    elif isinstance(name, str) and ":" in name:
        _imported(name)
    elif isinstance(name, str) and name not in EXTRACTORS:
        reason = f"{choose(name, EXTRACTORS)}, a file that train_extractor.py wrote, or module:function"
        raise UserError(reason, field="extractor", value=name)
    if weights is None:
        return
    folder = Path(weights).is_dir() and (not isinstance(name, str) or name in WEIGHTS)
    if not folder and not Path(weights).is_file():
        raise UserError("no such file", field="weights", value=weights)


def check_extractors(names: Sequence[str | Function], weights: str | Path | None = None) -> None:
    """Refuse what ``check_extractor`` refuses, two of the same name, and one file of weights for several networks."""
    several = len(names) > 1
    for name in names or (None,):
        check_extractor(name, weights_of(name, weights, several))
    known = [extractor_name(name) for name in names]
    if len(set(known)) < len(known):
        raise UserError("give different ones", field="extractor", value=",".join(known))
    if several and POINTS in known:
        raise UserError("points have no other features", field="extractor", value=",".join(known))
    networks = {WEIGHTS[name].url for name in known if name in WEIGHTS}
    if weights is not None and not Path(weights).is_dir() and several and len(networks) != 1:
        raise UserError(
            f"is one file, and the extractors are {', '.join(known)}: give a folder with the files",
            field="weights",
            value=weights,
        )


def weights_of(name: str | Function | None, weights: str | Path | None, several: bool) -> str | Path | None:
    """Return the weights for one extractor of ``several``: a file or folder is for published networks alone."""
    return weights if not several or (isinstance(name, str) and name in WEIGHTS) else None
