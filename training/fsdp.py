"""Weights spread over processes: FSDP2, with checkpoints that do not know of it."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.loss_module import LossModule


def shard(module: LossModule, device: torch.device, by_block: bool = True) -> None:
    """Leave each process a part of every parameter, and with it of gradients, optimiser state and averages.

    Weights are gathered for their use alone: ``by_block``, a block being an item of a ModuleList of the network, and
    the others for the whole loss. What gathers blocks would break a compiled loss into pieces.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for blocks in module.fm.network.children():
        for block in blocks if by_block and isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``; if it is sharded, by all processes at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """``state`` whole and on the CPU, gathered one at a time by all processes, for those that ``keep`` it."""
    found = {}
    for name, tensor in state.items():
        gathered = whole(tensor.detach())
        if keep:
            found[name] = gathered.cpu().contiguous()
    return found


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which every process has whole, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, which every process has whole, into ``target``, sharded or not."""
    local(target).copy_(local(alike(source, target)))
