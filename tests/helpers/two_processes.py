"""The work of each process for test_distributed.py: ``torchrun ... tests/helpers/two_processes.py OUT ROW ...``.

Each row of configs/digits.py is trained for 20 steps, by DDP and sharded. Losses (means over processes) and full
weights go to OUT/MODE-ROW-RANK.pt, since a launcher's exit code is not to be trusted: gloo now and then aborts after
all is done.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch.distributed.tensor import DTensor

from configs.digits import get_config
from flowmaps.networks import DiT
from training.config import Optimizer, Trajectories, network
from training.fsdp import full_tensor
from training.trainer import Trainer

STEPS = 20
MODES = ("ddp", "shard")
CONDITIONS = "conditions.npy"  # in OUT: of rows with "_told"
DRIFT = "drift"  # in OUT: the teacher of rows that learn from trajectories


def config_of(row, out, **changes):
    """A small run of ``row`` with dropout; with "_dit" that of a transformer, with "_muon" by Muon, kernels included.

    With "_told" it has conditions in place of classes, from a file that the test has made. Muon's is without clipping:
    it iterates in bfloat16, where the rounding of a norm would turn bits.
    """
    row, muon, _ = row.partition("_muon")
    row, told, _ = row.partition("_told")
    config = get_config(f"{row.removesuffix('_dit')},smoke")
    config.steps, config.batch, config.optim.warmup = STEPS, 16, 5
    if muon:
        config.optim.name, config.optim.clip = Optimizer.muon, 0.0
        config.optim.muon_kernels = not row.endswith("_dit")
    if told:
        config.network.num_classes, config.network.condition = 0, (3,)
        config.data.condition, config.data.label_dropout = str(out / CONDITIONS), 0.25
    if row.endswith("_dit"):
        config.network = network(DiT, image_size=8, channels=1, patch=2, width=16, depth=2, heads=2, num_classes=10)
    if hasattr(config.network, "dropout"):
        config.network.dropout = 0.1
    if row in ("mid_training", "straightening", "reflow"):
        config.init_from, config.teacher = "", str(out / DRIFT)
        config.trajectories = Trajectories(steps=4)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def run(config):
    """Return the losses of all steps and the final weights of a trainer in this process.

    Muon of kernels iterates in float64, since the gradients of convolutions differ in their last bits.
    """
    trainer = Trainer.build(config)
    if config.shard:
        assert all(isinstance(p, DTensor) for p in trainer.module.parameters())
        assert all(isinstance(v, DTensor) for v in trainer.ema.shadows[str(config.ema[0])].values())
    exact = patch.object(torch.Tensor, "bfloat16", torch.Tensor.double) if config.optim.muon_kernels else nullcontext()
    with exact:
        losses = [trainer.step(k)["loss"] for k in range(STEPS)]
    if config.shard:
        state = next(iter(trainer.optimizer.state.values()))
        assert isinstance(state.get("exp_avg", state.get("momentum_buffer")), DTensor)
    losses = trainer.accelerator.reduce(torch.stack(losses), "mean")
    return (
        losses,
        {k: full_tensor(v.detach()) for k, v in trainer.module.state_dict().items()},
        trainer.ema.state(config.ema[0]),
    )


def main(out, *rows):
    out = Path(out)
    for row in rows:
        for mode in MODES:
            result = run(config_of(row, out, shard=mode == "shard"))
            torch.save(result, out / f"{mode}-{row}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
