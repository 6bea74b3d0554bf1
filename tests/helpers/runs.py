"""Short training runs and their files."""

import torch

from configs.checkerboard import get_config
from flowmaps.run_weights import list_checkpoints


def tiny(steps=6, **changes):
    config = get_config("lagrangian,smoke")
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = steps, 3, 2, steps
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def weights(workdir, file="network"):
    from safetensors.torch import load_file

    return load_file(list_checkpoints(workdir)[-1] / f"{file}.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
