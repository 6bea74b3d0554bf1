"""Few-step generative flow maps: X_{s,t}(x) = x + (t - s) v(x, s, t), from noise (time 0) to data (time 1)."""

from typing import TYPE_CHECKING, Any

from flowmaps import diffusers_hook
from flowmaps.errors import UserError

if TYPE_CHECKING:
    from flowmaps.flow_map import FlowMap
    from flowmaps.info import FlowMapInfo

__version__ = "0.2.0"
__all__ = ["FlowMap", "FlowMapInfo", "UserError", "__version__"]

diffusers_hook.install()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used, so that commands answer --help and mistakes at once."""
    if name == "FlowMap":
        from flowmaps.flow_map import FlowMap

        return FlowMap
    if name == "FlowMapInfo":
        from flowmaps.info import FlowMapInfo

        return FlowMapInfo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
