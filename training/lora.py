"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) through peft: train few numbers, export plain weights."""

import re
from typing import Any

from torch import nn

from flowmaps import UserError


def add_lora(network: nn.Module, rank: int) -> None:
    """Freeze ``network`` and put W + B A, with B = 0 at first, in the place of each Linear's and Conv2d's weights W."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(f"--config.lora={rank} needs peft: pip install 'flowmaps[lora]'") from None
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise UserError(f"--config.lora={rank}: {type(network).__name__} has no Linear or Conv2d layers")
    network.requires_grad_(False)
    names = "|".join(map(re.escape, layers))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network)


def merge_lora(network: Any) -> None:
    """Add each B A to its W, and leave the network as it was made: the same classes and parameter names."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "base_layer"):
            module.merge()
            network.set_submodule(name, module.get_base_layer())
