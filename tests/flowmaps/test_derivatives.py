"""Exact derivatives against closed forms, central differences and the identities of the flow map."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, gaussian_data, gaussian_map
from helpers.small_networks import SMALL, inputs, small

from flowmaps import FlowMap, derivatives
from flowmaps.derivatives import TANGENT_RULES, d_ds, d_dt, transport, velocity_jvp
from flowmaps.networks import MLP


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
    monkeypatch.setattr(derivatives, "TANGENT_RULES", rules)
    ours = found()
    assert set(used) == set(TANGENT_RULES) and len(used) == 4  # not a moving weight, exact GELU, or in place
    monkeypatch.setattr(derivatives, "TANGENT_RULES", {})
    for a, b in zip(ours, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
