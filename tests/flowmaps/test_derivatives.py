"""Exact derivatives against closed forms, central differences and the identities of the flow map."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks.objectives import peak_memory
from helpers import CASES, gaussian_data, gaussian_map
from helpers.small_networks import SMALL, inputs, small

from flowmaps import FlowMap, tangents
from flowmaps.derivatives import (
    d_ds,
    d_dt,
    derivative_dtype,
    recorded_derivatives,
    tf32_products,
    transport,
    velocity_jvp,
)
from flowmaps.networks import MLP
from flowmaps.tangents import TANGENT_RULES


def random_flow_map(name):
    """A float64 network, points of it, times and labels."""
    fm = small(name).double()
    return fm, *inputs(fm, 5, torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_identities_hold_for_the_exact_map(case):
    """Lagrangian: d_t X = b_t(X). Eulerian: d_s X + grad X . b_s = 0."""
    fm = gaussian_map(*case)
    x, label = gaussian_data(fm, 100)
    s, t = torch.rand(2, 100, dtype=torch.float64).sort(dim=0).values
    x_t, dx_dt = d_dt(fm, x, s, t, label)
    torch.testing.assert_close(x_t, fm(x, s, t, label))
    torch.testing.assert_close(dx_dt, fm.drift(x_t, t, label), atol=1e-9, rtol=1e-9)
    _, moved = transport(fm, x, s, t, fm.drift(x, s, label), label)
    torch.testing.assert_close(moved, torch.zeros_like(moved), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_match_central_differences(name):
    fm, x, s, t, label = random_flow_map(name)
    w, h = torch.randn_like(x), 1e-6

    def difference(along_x, along_s, along_t):
        """Of fourth order: levels that count 0 .. 999 turn too fast for the second order."""

        def at(k):
            return fm(x + k * h * along_x * w, s + k * h * along_s, t + k * h * along_t, label)

        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)

    expected = {d_dt: difference(0, 0, 1), d_ds: difference(0, 1, 0), transport: difference(1, 1, 0)}
    for derivative, value in expected.items():
        arguments = (w, label) if derivative is transport else (label,)
        x_t, dx = derivative(fm, x, s, t, *arguments)
        torch.testing.assert_close(x_t, fm(x, s, t, label))
        torch.testing.assert_close(dx, value, rtol=1e-6, atol=1e-7)
        assert dx.dtype == torch.float64


@pytest.mark.parametrize("name", SMALL)
def test_gradient_through_the_tangent_matches_double_backward(name):
    """d/dtheta of d_t X by reverse-over-forward equals reverse-over-reverse."""
    fm, x, s, t, label = random_flow_map(name)
    weights = list(fm.parameters())
    w = torch.randn_like(x)

    _, dx_dt = d_dt(fm, x, s, t, label)
    forward = torch.autograd.grad((dx_dt * w).sum(), weights, allow_unused=True)

    t_leaf = t.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        v = (fm(x, s, t_leaf, label) * w).flatten(1).sum(dim=1)
        (by_t,) = torch.autograd.grad(v.sum(), t_leaf, create_graph=True)
        reverse = torch.autograd.grad(by_t.sum(), weights, allow_unused=True)
    for a, b in zip(forward, reverse, strict=True):
        torch.testing.assert_close(a, b if b is not None else torch.zeros_like(a), rtol=1e-8, atol=1e-10)


def test_half_precision_input_is_differentiated_in_float32():
    torch.manual_seed(0)
    fm = FlowMap(MLP(dim=2, width=16, depth=2))
    s, t = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v, dv = velocity_jvp(fm, torch.randn(2, 2, dtype=torch.bfloat16), s, t, dt=1.0)
    assert v.dtype == dv.dtype == torch.float32


class Mixed(torch.nn.Module):
    """Every function of TANGENT_RULES, with weights that stand still, and one whose weight moves with the time."""

    def __init__(self):
        super().__init__()
        self.line, self.conv = torch.nn.Linear(6, 6), torch.nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x, s, t, label):
        x = F.gelu(self.line(x) * t[:, None], approximate="tanh") + F.gelu(x * t[:, None])
        x = F.linear(x, self.line.weight * t.mean()) + F.silu((x + s[:, None]).clone(), inplace=True)
        y = self.conv((x * t[:, None]).view(-1, 1, 2, 3))
        return F.silu(y).mean(dim=1).flatten(1)


def test_rules_are_torchs_derivatives(monkeypatch):
    """Value, tangent, and the gradient of both, against torch's own jvp; the rules are what gave them."""
    torch.manual_seed(0)
    fm, used = FlowMap(Mixed().double()), []
    x, (s, t) = torch.randn(4, 6, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)

    def found():
        v, dv = velocity_jvp(fm, x, s, t, dx=x.sin(), dt=1.0)
        return v, dv, *torch.autograd.grad((v * dv).sum(), list(fm.parameters()))

    rules = {
        f: lambda *a, f=f, rule=rule, **kw: (used.append(f), rule(*a, **kw))[1] for f, rule in TANGENT_RULES.items()
    }
    monkeypatch.setattr(tangents, "TANGENT_RULES", rules)
    ours = found()
    assert set(used) == set(TANGENT_RULES) and len(used) == 4  # not a moving weight, exact GELU, or in place
    monkeypatch.setattr(tangents, "TANGENT_RULES", {})
    for a, b in zip(ours, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_a_constant_derivative_has_the_same_values_and_no_graph(name):
    """Value, derivative, and the gradient of the value are those of the full derivative; less memory is kept."""
    fm, x, s, t, label = random_flow_map(name)
    w, weights = torch.randn_like(x), list(fm.parameters())
    full, lean = (velocity_jvp(fm, x, s, t, label, dx=w, ds=1.0, constant=constant) for constant in (False, True))
    for a, b in zip(lean, full, strict=True):
        assert torch.equal(a, b)
    assert full[1].requires_grad and not lean[1].requires_grad
    ours, expected = (torch.autograd.grad((v * w).sum(), weights, allow_unused=True) for v in (lean[0], full[0]))
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["UNet", "EDM2UNet", "DiT"])
def test_a_constant_derivative_takes_less_memory(name):
    """Most bytes alive during the forward pass, by the profiler of torch's allocator."""
    fm = small(name)
    x, s, t, label = inputs(fm, 32)
    full, lean = (
        peak_memory(lambda c=c: velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0, constant=c), x.device)
        for c in (False, True)
    )
    assert lean < 0.6 * full


def test_a_constant_derivative_keeps_no_graph_with_recomputed_activations():
    fm, x, s, t, label = random_flow_map("UNet")
    weights, found = list(fm.parameters()), []
    for constant in (False, True):
        for recompute in (False, True):
            fm.network.gradient_checkpointing = recompute
            v, dv = velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0, constant=constant)
            found.append([v, dv, *torch.autograd.grad((v * dv.detach()).sum(), weights)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["UNet", "EDM2UNet", "DiT"])
def test_under_autocast_a_constant_derivative_leaves_the_value_to_its_own_pass(name):
    """The derivative has the bits of float32, the value those of a forward pass under autocast; both are float32."""
    fm = small(name)
    x, s, t, label = inputs(fm, 5)
    with torch.no_grad():
        exact = velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0)[1]
    with torch.autocast("cpu", torch.bfloat16):
        v, dv = velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0, constant=True)
        expected = fm.velocity(x, s, t, label)
    assert torch.equal(dv, exact) and torch.equal(v, expected.float())
    assert v.dtype == dv.dtype == torch.float32 and v.requires_grad and not dv.requires_grad


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_derivative_in_bfloat16_is_near_and_comes_back_in_float32(name, constant):
    fm = small(name)
    x, s, t, label = inputs(fm, 5)
    v, dv = velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), derivative_dtype(torch.bfloat16):
            near = velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0, constant=constant)
        for a, b in zip(near, (v, dv), strict=True):
            assert a.dtype == torch.float32
            assert 1e-5 < (a - b).norm() / b.norm() < 0.1
    assert torch.equal(velocity_jvp(fm, x, s, t, label, dx=x.sin(), ds=1.0)[1], dv)  # float32 again


def test_switches_of_tf32_agree_inside_and_are_restored():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    assert before == [False, True]  # torch's defaults, which differ
    for enabled in (True, False):
        with pytest.raises(ZeroDivisionError), tf32_products(enabled):
            assert [backend.allow_tf32 for backend in backends] == [enabled, enabled]
            raise ZeroDivisionError
        assert [backend.allow_tf32 for backend in backends] == before


def test_derivatives_are_recorded_only_inside_the_block():
    fm, x, s, t, label = random_flow_map("MLP")
    with recorded_derivatives() as taken:
        dv = velocity_jvp(fm, x, s, t, label, dt=1.0)[1]
    velocity_jvp(fm, x, s, t, label, ds=1.0)
    assert len(taken) == 1 and torch.equal(taken[0], dv) and not taken[0].requires_grad
