"""Few-step generative flow maps: X_{s,t}(x) = x + (t - s) v(x, s, t), from noise (time 0) to data (time 1)."""

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.info import FlowMapInfo

__version__ = "0.1.0"
__all__ = ["FlowMap", "FlowMapInfo", "UserError", "__version__"]
