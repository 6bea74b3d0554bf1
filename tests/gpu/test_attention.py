"""The attention kernel of constant derivatives on a GPU, against the MATH kernel in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmaps import FlowMap, jvp_attention
from flowmaps.derivatives import tf32_products, velocity_jvp
from flowmaps.networks import DiT

pytestmark = pytest.mark.gpu
LIMITS = {torch.float32: 3e-3, torch.bfloat16: 2e-2}  # relative; products in TF32 and bfloat16
CASES = [(dtype, size) for dtype, sizes in jvp_attention.SHARED_MEMORY.items() for size in sizes]


@pytest.fixture(scope="module")
def memory(device):
    """KiB of shared memory of the GPU."""
    found = jvp_attention.shared_memory(device)
    if not (found and jvp_attention.INSTALLED):
        pytest.skip("needs a CUDA GPU and jvp-flash-attention")
    return found


def relative(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [32, 256, 1024])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_value_and_tangent_are_those_of_the_math_kernel(device, memory, dtype, size, tokens):
    if jvp_attention.SHARED_MEMORY[dtype][size] > memory:
        pytest.skip(f"this GPU has {memory} KiB of shared memory")
    torch.manual_seed(0)
    given = [x.contiguous() for x in torch.randn(6, 2, 3, tokens, size, device=device, dtype=dtype).unbind()]
    exact = [x.double() for x in given]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(F.scaled_dot_product_attention, tuple(exact[:3]), tuple(exact[3:]))
    for ours, reference in zip(jvp_attention.kernel(*given), expected, strict=True):
        assert relative(ours, reference) < LIMITS[dtype]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_derivative_is_as_exact_and_needs_less_memory(device, memory, monkeypatch, compiled):
    """Velocity, derivative and gradient of a DiT with heads of 64 on 1024 tokens, eager and compiled."""
    torch.manual_seed(0)
    fm = FlowMap(DiT(image_size=64, channels=2, patch=2, width=128, depth=2, heads=2, qk_norm=True).to(device))
    for p in fm.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, (s, t) = torch.randn(8, 2, 64, 64, device=device), torch.rand(2, 8, device=device).sort(dim=0).values

    def step(x, s, t):
        v, dv = velocity_jvp(fm, x, s, t, dx=x.sin(), ds=1.0, constant=True)
        return v, dv, (v * dv).sum()

    def run(step, *point):
        torch.compiler.reset()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with tf32_products(True):
            v, dv, loss = step(*point)
            gradient = torch.autograd.grad(loss, list(fm.parameters()))
        peak = torch.cuda.max_memory_allocated() - before
        return [v, dv, torch.cat([g.flatten() for g in gradient])], peak

    monkeypatch.setattr(jvp_attention, "notes", {})
    taken = torch.compile(step) if compiled else step
    fused, fused_peak = run(taken, x, s, t)
    assert not jvp_attention.notes
    monkeypatch.setattr(jvp_attention, "INSTALLED", False)
    math, math_peak = run(taken, x, s, t)
    assert jvp_attention.notes
    fm.double()
    exact, _ = run(step, x.double(), s.double(), t.double())
    for ours, theirs, reference in zip(fused, math, exact, strict=True):
        assert relative(ours, reference) < 2 * relative(theirs, reference) + 1e-3
    assert fused_peak < math_peak
