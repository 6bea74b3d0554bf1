"""Configs of one step by any objective on a small network, with made-up data and teacher (``gpu.made_up``)."""

from flowmaps.objectives import OBJECTIVES, TrajectoryObjective
from helpers.small_networks import SMALL
from training.config import Config, Trajectories, network


def small_run(objective, name, **changes):
    cls, options = SMALL[name]
    options = {key: value for key, value in options.items() if not key.startswith("guidance")}
    if "second_head" in options:
        options["second_head"] = objective == "improved_mean_flow"
    config = Config(network(cls, **options), OBJECTIVES[objective](), batch=16, base_std=0.5, **changes)
    if isinstance(config.objective, TrajectoryObjective):
        config.teacher, config.trajectories = "made up", Trajectories(steps=4)
    return config
