"""Features of a ConvNeXt V2, whose squared differences are a perceptual distance between two images."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmaps.errors import UserError, shorten

CHECKPOINT = "facebook/convnextv2-base-22k-224"


@functools.lru_cache(maxsize=2)
def convnext(weights: str, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Return the distance between two batches of images [n, C, H, W]: a differentiable function to [n].

    It is the sum of squared differences of the network's features, pooled over places and normalised. Images enter as
    they are, in [-1, 1], without the mean and deviation of ImageNet, as in pixel MeanFlow (arXiv 2601.22158); grey
    images count as three equal channels.

    Args:
        weights: A directory or hub id of transformers' ConvNextV2, such as ``CHECKPOINT``.
        device: Where the network runs.

    Raises:
        UserError: transformers is not installed, or ``weights`` is not such a network.
    """
    network = _network(weights).to(device)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a, b = (network(image.float().expand(-1, 3, -1, -1)).pooler_output for image in (x, y))
            value: Tensor = (a - b).square().sum(dim=1)
        return value

    return distance


def untrained() -> Any:
    """Return ConvNeXt V2 Base with random weights."""
    transformers = _library("")
    config = transformers.ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024])
    return transformers.ConvNextV2Model(config).eval().requires_grad_(False)


def _library(weights: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("needs transformers: pip install transformers", "convnext_weights", weights) from None
    return transformers


def _network(weights: str) -> Any:
    library = _library(weights)
    try:
        network, found = library.ConvNextV2Model.from_pretrained(weights, output_loading_info=True)
    except Exception as error:  # of a dozen types
        reason = f"is not a directory or hub id of a ConvNextV2: {shorten(error)}"
        raise UserError(reason, field="convnext_weights", value=weights) from None
    if found["missing_keys"]:
        reason = f"lacks weights of a ConvNextV2: {min(found['missing_keys'])} and others"
        raise UserError(reason, field="convnext_weights", value=weights)
    return network.eval().requires_grad_(False)
