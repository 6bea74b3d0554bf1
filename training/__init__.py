"""Training: configs, the loss of a step, the loop, and checkpoints that resume bit for bit.

What learns belongs here. Data sets, objectives, networks and scoring are in ``flowmaps``, command lines in
``training.cli``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config import Config, build_network
    from training.loop import train

__all__ = ["Config", "build_network", "train"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used, so that commands answer --help and mistakes at once."""
    if name in ("Config", "build_network"):
        from training import config

        return getattr(config, name)
    if name == "train":
        from training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
