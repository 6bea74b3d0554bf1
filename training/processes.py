"""This process among those that torchrun or accelerate started."""

import torch
from accelerate import PartialState

ON_CPU = not torch.accelerator.is_available()  # accelerate joins processes without an accelerator only if told so


def processes() -> PartialState:
    """How many processes there are, which one this is, and barriers between them."""
    return PartialState(cpu=ON_CPU)
