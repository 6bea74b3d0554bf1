"""Two-time velocity networks v(x, s, t, label), each a diffusers model with a frozen module path.

The path ``flowmaps.networks.<module>`` and the class name are written into every exported checkpoint. ``Network`` in
``flowmaps.networks.interface`` states the requirements on a network, for writing another one.
"""

from flowmaps.networks.dit import DiT
from flowmaps.networks.edm2unet import EDM2UNet
from flowmaps.networks.imfdit import IMFDiT
from flowmaps.networks.interface import Network, registered
from flowmaps.networks.mlp import MLP
from flowmaps.networks.presets import PRESETS
from flowmaps.networks.unet import UNet

NETWORKS = {network.__name__: network for network in (MLP, UNet, EDM2UNet, DiT, IMFDiT)}

__all__ = ["MLP", "NETWORKS", "PRESETS", "DiT", "EDM2UNet", "IMFDiT", "Network", "UNet", "registered"]
