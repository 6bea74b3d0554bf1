"""Attention with a constant tangent: the rule by a formula, the kernel in Triton's interpreter, when it applies."""

import os
import subprocess
import sys

import pytest
import torch

from flowmaps import FlowMap, jvp_attention
from flowmaps.derivatives import tf32_products, velocity_jvp
from flowmaps.networks import DiT

GPU = 99  # KiB of shared memory of a consumer's GPU


def random_map(head=4, **options):
    """A flow map on 64 tokens with 2 heads, points and times."""
    torch.manual_seed(0)
    network = DiT(**{"image_size": 16, "channels": 1, "width": 2 * head, "depth": 2, "heads": 2, **options})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, (s, t) = torch.randn(3, 1, 16, 16), torch.rand(2, 3).sort(dim=0).values
    return FlowMap(network), x, s, t


def formula(q, k, v, dq, dk, dv):
    """Value and tangent of attention, written out."""
    scale = q.shape[-1] ** -0.5
    p = (scale * q @ k.mT).softmax(-1)
    dp = p * scale * (dq @ k.mT + q @ dk.mT)
    dp = dp - p * dp.sum(-1, keepdim=True)
    return p @ v, dp @ v + p @ dv


def value_tangent_gradient(fm, x, s, t, jvp=velocity_jvp):
    v, dv = jvp(fm, x, s, t, dx=x.sin(), ds=1.0, dt=0.5, constant=True)
    gradient = torch.autograd.grad((v * dv).sum(), list(fm.parameters()))
    return v, dv, torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_value_tangent_and_gradient_are_those_of_the_math_kernel(monkeypatch, compiled):
    """The gradient flows through the value, of which torch's fused kernel gives it, and not through the tangent."""
    fm, x, s, t = random_map(qk_norm=True, depth=1)
    fm, arguments = fm.double(), [y.double() for y in (x, s, t)]
    expected = value_tangent_gradient(fm, *arguments)
    monkeypatch.setattr(jvp_attention, "applies", lambda *args, **kwargs: True)
    monkeypatch.setattr(jvp_attention, "kernel", formula)
    jvp = torch.compile(velocity_jvp, fullgraph=True, backend="aot_eager") if compiled else velocity_jvp
    for ours, reference in zip(value_tangent_gradient(fm, *arguments, jvp), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        found, expected = (velocity_jvp(fm, *arguments, dt=1.0, constant=constant) for constant in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_derivative_with_a_gradient_keeps_the_math_kernel(monkeypatch):
    fm, x, s, t = random_map()
    monkeypatch.setattr(jvp_attention, "applies", None)  # cannot be called
    velocity_jvp(fm, x, s, t, dt=1.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2, 18, 256, 64), torch.float32, ""),
        ((2, 4, 64, 128), torch.bfloat16, ""),
        ((2, 16, 256, 72), torch.float32, "heads of 72"),
        ((2, 16, 256, 16), torch.float32, "heads of 16"),
        ((2, 4, 48, 64), torch.float32, "48 tokens"),
        ((2, 4, 64, 128), torch.float32, "need 104 KiB"),
        ((2, 4, 64, 64), torch.float64, "float64"),
    ],
)
def test_the_kernel_is_for_some_sizes_and_types(monkeypatch, shape, dtype, expected):
    monkeypatch.setattr(jvp_attention, "INSTALLED", True)
    q = torch.empty(shape, dtype=dtype)
    with tf32_products(True):
        reason = jvp_attention.obstacle(q, GPU)
    assert expected in reason and bool(expected) == bool(reason)


def test_the_kernel_needs_its_package_and_tf32_and_follows_autocast(monkeypatch):
    q = torch.empty(2, 4, 64, 128)
    with tf32_products(False), torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(jvp_attention, "INSTALLED", True)
        assert not jvp_attention.obstacle(q, GPU)  # in bfloat16
        monkeypatch.setattr(jvp_attention, "INSTALLED", False)
        assert "pip install 'jvp-flash-attention" in jvp_attention.obstacle(q, GPU)
    with tf32_products(False):
        assert "derivative_precision" in jvp_attention.obstacle(q, GPU)


def test_a_gpu_notes_why_it_uses_the_math_kernel_and_a_cpu_does_not(monkeypatch):
    fm, x, s, t = random_map(head=24)
    monkeypatch.setattr(jvp_attention, "notes", {})
    expected = velocity_jvp(fm, x, s, t, dt=1.0, constant=True)
    assert not jvp_attention.notes
    monkeypatch.setattr(jvp_attention, "shared_memory", lambda device: GPU)
    with tf32_products(True):
        found = velocity_jvp(fm, x, s, t, dt=1.0, constant=True)
    (note,) = jvp_attention.notes
    assert "heads of 24" in note and torch.equal(found[1], expected[1])


def test_only_plain_self_attention_that_moves_is_replaced(monkeypatch):
    monkeypatch.setattr(jvp_attention, "shared_memory", lambda device: GPU)
    monkeypatch.setattr(jvp_attention, "INSTALLED", True)
    q, other, found = torch.randn(1, 2, 32, 64), torch.randn(1, 2, 64, 64), {}

    def calls(x):
        found["moves"] = jvp_attention.applies(x, x, x)
        found["stands"] = jvp_attention.applies(x, x, q)
        found["cross"] = jvp_attention.applies(x, other, other)
        found["masked"] = jvp_attention.applies(x, x, x, torch.ones(32, 32))
        found["causal"] = jvp_attention.applies(x, x, x, is_causal=True)
        return x

    with tf32_products(True):
        torch.func.jvp(calls, (q,), (q,))
    assert found == {"moves": True, "stands": False, "cross": False, "masked": False, "causal": False}


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernel: that of 3.6 fails with numpy 2.5."""
    if not jvp_attention.INSTALLED:
        return False
    import triton

    return not triton.__version__.startswith("3.6.")


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="needs jvp-flash-attention and Triton 3.7")
def test_the_kernel_in_tritons_interpreter_agrees_with_the_math_kernel():
    """In a separate process, since Triton decides when it is imported whether to interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, check=True)


def compare_in_the_interpreter():
    calls, kernel = [], jvp_attention.kernel
    jvp_attention.shared_memory = lambda device: GPU
    jvp_attention.kernel = lambda *args: calls.append(args) or kernel(*args)
    for head, tokens in ((32, 64), (64, 32)):
        q, k, v, *tangents = torch.randn(6, 2, 3, tokens, head).unbind()
        exact = formula(*(x.double() for x in (q, k, v, *tangents)))
        for ours, reference in zip(kernel(q, k, v, *tangents), exact, strict=True):
            torch.testing.assert_close(ours, reference.float(), rtol=1e-5, atol=1e-5)
    fm, x, s, t = random_map(head=32)
    math = value_tangent_gradient(fm, x, s, t)
    assert not calls
    with tf32_products(True):
        fused = value_tangent_gradient(fm, x, s, t)
    assert len(calls) == 2
    exact = value_tangent_gradient(fm.double(), x.double(), s.double(), t.double())
    for ours, theirs, reference in zip(fused, math, exact, strict=True):
        assert (ours - reference).norm() < 2 * (theirs - reference).norm() + 1e-6 * reference.norm()


if __name__ == "__main__":
    compare_in_the_interpreter()
