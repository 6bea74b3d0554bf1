"""Training flow maps: configs, data, the loop, and checkpoints that resume bit for bit."""

from training.config import Config, build_network
from training.loop import train

__all__ = ["Config", "build_network", "train"]
