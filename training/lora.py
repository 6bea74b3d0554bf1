"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) by peft: train few numbers, export plain weights."""

import re
from typing import Any

from torch import nn

from flowmaps import UserError


def add_lora(network: nn.Module, rank: int) -> None:
    """Freeze ``network`` and replace the weights W of each Linear and Conv2d by W + B A, with B = 0 at first."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("needs peft: pip install peft", field="lora", value=rank) from None
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise UserError(f"{type(network).__name__} has no Linear or Conv2d layers", field="lora", value=rank)
    network.requires_grad_(False)
    names = "|".join(map(re.escape, layers))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network)


def merge_lora(network: Any) -> None:
    """Add each B A to its W, and restore the original classes and parameter names."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "base_layer"):
            module.merge()
            network.set_submodule(name, module.get_base_layer())
