"""Training: configs, the loss of a step, the loop, and checkpoints that resume bit for bit.

What learns belongs here. Data sets, objectives, networks and scoring are in ``flowmaps``, command lines in
``training.cli``.
"""

from training.config import Config, build_network
from training.loop import train

__all__ = ["Config", "build_network", "train"]
