"""configs/folder.py at the sizes that its docstring offers: attention that fits no level is dropped silently."""

import runpy

import torch
from common import CLONE, case, raised

from flowmaps.networks.layers import SelfAttention
from training.config import build_network

for size in (64, 48, 96, 128, 160, 192, 256):
    config = runpy.run_path(str(CLONE / "configs/folder.py"))["get_config"]("lagrangian")
    config.network.image_size = size
    with torch.device("meta"):
        e, net = raised(lambda: build_network(config))
    found = 0 if net is None else sum(isinstance(m, SelfAttention) for m in net.modules())
    case(
        f"image_size={size}: attention, or an error that names attention_resolutions",
        e is not None or found > 0,
        f"{found} layers",
    )
