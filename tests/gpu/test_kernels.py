"""Attention kernels: the one that a forward pass gets, and the MATH kernel of the derivative."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmaps import FlowMap
from flowmaps.derivatives import tf32_products, velocity_jvp
from flowmaps.networks import DiT

pytestmark = pytest.mark.gpu

HEADS = {"dit-xl2": (16, 72), "edm2": (12, 64), "small": (4, 32)}
ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the output, whose entries are below 1


@pytest.mark.parametrize("dtype", ERROR, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HEADS)
def test_the_default_kernel_and_math_agree(name, dtype, device, record_property):
    heads, size = HEADS[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, size, generator=generator).to(device, dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(*(x.cpu().double() for x in (q, k, v)))
    with tf32_products(False):
        default = F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(SDPBackend.MATH):
            plain = F.scaled_dot_product_attention(q, k, v)
    for kernel, out in (("default", default), ("math", plain)):
        error = float((out.cpu().double() - exact).abs().max())
        record_property(f"{kernel}_error", error)
        assert error < ERROR[dtype]


def test_the_derivative_of_a_transformer_agrees_with_float64_on_the_cpu(device, record_property):
    """Through the MATH kernel, value and derivative, and the gradient of both."""
    torch.manual_seed(0)
    network = DiT(image_size=16, channels=4, patch=2, width=288, depth=2, heads=4, num_classes=10)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
    x, s, label = torch.randn(8, 4, 16, 16), torch.linspace(0.1, 0.6, 8), torch.arange(8)
    found = {}
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        network.zero_grad()
        fm = FlowMap(network.to(where, dtype), base_std=0.5)
        inputs = [value.to(where, dtype) for value in (x, s, s + 0.3)]
        with tf32_products(False):
            v, dv = velocity_jvp(fm, *inputs, label.to(where), dt=1.0)
            (v.square().mean() + dv.square().mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found[dtype] = [value.detach().cpu().double() for value in (v, dv, gradient)]
    for name, ours, exact in zip(("value", "derivative", "gradient"), *found.values(), strict=True):
        error = float((ours - exact).norm() / exact.norm())
        record_property(f"{name}_error", error)
        assert error < 1e-4
