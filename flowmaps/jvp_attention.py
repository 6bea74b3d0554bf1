"""Attention inside a constant derivative by a fused kernel, where one can run.

Torch's MATH kernel, the only one with a forward derivative, stores n x n numbers per head for n tokens, several times.
The Triton kernel of the package jvp-flash-attention (the extra ``attention``) computes value and tangent block by
block (Lu and Song 2024, arXiv 2410.11081, appendix F). No gradient flows through its tangent, and a network
that calls the package itself loses that part of its gradient without an error. So it serves constant derivatives only.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("jvp_flash_attention", "triton"))
BLOCK = 32  # tokens; the kernel reads and writes complete blocks, without a check
# KiB of shared memory by size of a head, as compiled for GPUs of capability 8.0, 8.9 and 9.0 by Triton 3.6 and 3.8
SHARED_MEMORY = {
    torch.float32: {32: 24, 64: 56, 128: 104, 256: 200},
    torch.bfloat16: {32: 12, 64: 30, 128: 54, 256: 102},
}
notes: dict[str, None] = {}  # why attention inside a derivative on a GPU used the MATH kernel, in order


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shared_memory(device: torch.device) -> int:
    """Return the KiB of shared memory that a kernel can have on ``device``, 0 if Triton has no kernels for it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) // 1024


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which attention multiplies: that of autocast, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def obstacle(q: Tensor, memory: int) -> str:
    """Return why the kernel cannot attend with queries ``q`` on a GPU of ``memory`` KiB, "" if it can."""
    tokens, size = q.shape[-2:]
    dtype = product_dtype(q)
    if dtype not in SHARED_MEMORY:
        return f"no {dtype}"
    if dtype is torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "it multiplies in TF32, which derivative_precision excludes"
    if size not in SHARED_MEMORY[dtype]:
        return f"heads of {size}, not of 32, 64, 128 or 256"
    if tokens % BLOCK:
        return f"{tokens} tokens, not a multiple of {BLOCK}"
    if SHARED_MEMORY[dtype][size] > memory:
        return f"heads of {size} need {SHARED_MEMORY[dtype][size]} KiB of shared memory, of {memory} here"
    return "" if INSTALLED else "not installed, pip install 'jvp-flash-attention>=0.14,<0.15'"


def applies(*args: object, **kwargs: object) -> bool:
    """Return whether ``attention`` can replace F.scaled_dot_product_attention(*args, **kwargs) inside a jvp.

    It needs plain self-attention on a GPU with all of q, k and v moving. Otherwise ``notes`` has the reason.
    """
    q, *others = args
    if kwargs or len(args) != 3 or not isinstance(q, Tensor) or q.dim() != 4:
        return False
    same = all(isinstance(x, Tensor) and x.shape == q.shape for x in others)
    if not same or any(forward_ad.unpack_dual(x)[1] is None for x in args):  # type: ignore[no-untyped-call]
        return False
    memory = shared_memory(q.device)
    if not memory:
        return False
    reason = obstacle(q, memory)
    if reason:
        notes[f"attention inside the derivative uses torch's MATH kernel; the fused one: {reason}"] = None
    return not reason


def kernel(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(S) v with S = q k^T / sqrt(c), and its tangent, for contiguous [B, heads, tokens, c].

    With P = softmax(S) and dS = (dq k^T + q dk^T) / sqrt(c) the tangent is (P o dS - rowsum(P o dS) P) v + P dv.
    """
    from jvp_flash_attention.jvp_attention import _attn_fwd_dual_triton as fused

    tokens, size = q.shape[-2:]
    assert tokens % BLOCK == 0 and size in SHARED_MEMORY[torch.float32]  # else it would write past the end
    # mask (none), scale, rate and seed of dropout, causal, warp specialisation, kind of mask (none)
    rest = (q.new_empty(0), size**-0.5, 0.0, 0, False, False, 0)
    value, tangent, _ = fused(q, k, v, dq, dk, dv, *rest)
    return value, tangent


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with dual q, k and v [B, heads, tokens, c]: the value with its gradient, the tangent as a constant.

    The value comes from torch's fused kernels where it needs a gradient. In float32 the tangent's products are TF32.
    """
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)), strict=True)  # type: ignore[no-untyped-call]
    dtype = product_dtype(q)
    with torch.no_grad():
        value, tangent = kernel(*(x.to(dtype).contiguous() for x in (*primals, *tangents)))
    if torch.is_grad_enabled():
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            value = F.scaled_dot_product_attention(*primals)
    return forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call, no-any-return]
