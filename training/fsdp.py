"""Weights sharded over processes by FSDP2, with checkpoints that are independent of the sharding."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.loss_module import LossModule

# Torch 2.11 frees a block's weights before the backward pass of a forward derivative uses them; 2.14 does not.
RESHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def shard(module: LossModule, device: torch.device, by_block: bool = True) -> None:
    """Shard every parameter over the processes, and with it gradients, optimiser state and averages.

    With ``by_block`` the weights of each block (an item of one of the network's ModuleLists) are gathered only while
    it runs, before torch 2.14 until the backward pass has used them, and all others for the complete loss. A compiled
    loss needs ``by_block=False``: the hooks that gather a block would break its graph.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for blocks in module.fm.network.children():
        for block in blocks if by_block and isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh, reshard_after_forward=RESHARDS)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of ``tensor``, or all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of ``tensor``; a collective call if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_cpu(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather the full tensors of ``state`` one at a time, to the CPU of the processes that ``keep`` them."""
    found = {}
    for name, tensor in state.items():
        gathered = full_tensor(tensor.detach())
        if keep:
            found[name] = gathered.cpu().contiguous()
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor``, which every process holds in full, as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_into_shard(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, which every process holds in full, into ``target``, sharded or not."""
    local(target).copy_(local(shard_like(source, target)))
