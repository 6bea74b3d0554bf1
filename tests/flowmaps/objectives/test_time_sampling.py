"""Laws of training times, by a million draws, and their ends."""

import math

import pytest
import torch

from flowmaps import FlowMap, UserError
from flowmaps.networks import MLP
from flowmaps.objectives import OBJECTIVES
from flowmaps.objectives.time_sampling import DiagonalDraw, Times, gap_first, raised_end

N = 1_000_000
PIXELS = {"diagonal_draw": DiagonalDraw.single, "time_std": (0.8, 0.8)}
LAWS = {  # objective and options: mean gap, P(gap > 0.8), mean time of diagonal rows
    "terminal_velocity": ({}, 0.340, 0.0145, 0.582),
    "mean_flow": ({}, 0.233, 0.0009, 0.465),
    "improved_mean_flow": ({"diagonal_draw": DiagonalDraw.single}, 0.233, 0.0009, 0.582),
    "soflow": ({}, 0.269, 0.0013, 0.541),
    "alpha_flow": ({}, 0.233, 0.0009, 0.465),
    "lagrangian": ({}, 1 / 3, 0.04, 0.5),
    "improved_mean_flow of pixels, B": ({**PIXELS, "time_mean": (-0.8, -0.8)}, 0.180, 4e-5, 0.331),
    "improved_mean_flow of pixels, L": ({**PIXELS, "time_mean": (0.0, 0.0)}, 0.202, 6e-5, 0.5),
    "improved_mean_flow of pixels, H": ({**PIXELS, "time_mean": (0.0, 0.0), "uniform_share": 0.1}, 0.215, 0.0041, 0.5),
}


@pytest.mark.parametrize("name", LAWS)
def test_times_have_the_stated_law(name):
    options, gap, tail, diagonal = LAWS[name]
    objective = OBJECTIVES[name.partition(" ")[0]](diagonal=0.5, **options)
    x1 = torch.zeros(2 * N, 1)
    _, s, t, *_ = objective.draw(FlowMap(MLP(1)), x1, torch.Generator().manual_seed(0))
    assert torch.equal(s[:N], t[:N]) and bool((s[N:] <= t[N:]).all())
    assert bool(torch.isfinite(t).all()) and s.min() >= 0 and t.max() <= 1
    seen = (t - s)[N:].double()
    assert seen.mean() == pytest.approx(gap, rel=0.01)
    assert (seen > 0.8).double().mean() == pytest.approx(tail, abs=5e-5 + 3 * (tail / N) ** 0.5)
    assert s[:N].double().mean() == pytest.approx(diagonal, rel=0.01)
    large, median = (seen > 0.8).double().mean(), s[:N].median()
    print(f"{name}: gap {seen.mean():.4f}, P(gap > 0.8) {large:.5f}, diagonal median {median:.4f}")


def test_the_gap_and_the_end_have_their_logits():
    """The end is logit-normal as far as the gap leaves it room."""
    uniform = torch.rand(2, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = gap_first(uniform, (0.4, -0.8), (1.0, 1.5))
    logit = torch.logit(t - s)
    assert abs(logit.mean() + 0.8) < 0.01 and abs(logit.std() - 1.5) < 0.01
    small = t - s < 0.02  # nothing is cut off there
    assert abs(torch.logit(t[small]).mean() - 0.4) < 0.03 and abs(torch.logit(t[small]).std() - 1) < 0.03


@pytest.mark.parametrize("a", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("b", [0.0, 1 - 2**-24])
def test_the_ends_of_the_generator_give_times(a, b):
    s, t = gap_first(torch.tensor([[a], [b]]), (0.4, -0.8), (1.0, 1.0))
    assert bool(torch.isfinite(torch.stack([s, t])).all()) and 0 <= s <= t <= 1
    s, t = raised_end(torch.tensor([[a], [b]]), (0.9, 4.0), (1.6, 1.6))
    assert 0 <= s <= t <= 1 and t - s > 0.99e-4


def test_a_raised_end_has_its_logit_where_it_was_above_the_start():
    uniform = torch.rand(2, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = raised_end(uniform, (-0.2, 1.0), (0.8, 0.8))
    assert abs(torch.logit(s).mean() + 0.2) < 0.01 and abs(torch.logit(s).std() - 0.8) < 0.01
    low = s < 0.1  # almost all ends are above
    assert abs(torch.logit(t[low]).mean() - 1) < 0.03 and abs(torch.logit(t[low]).std() - 0.8) < 0.03
    raised = (t - s < 1.01e-4).double().mean()
    assert raised == pytest.approx(0.5 * math.erfc(1.2 / 0.8 / 2), abs=0.002)  # P(end's logit < start's)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"times": Times.triangle, "time_mean": (0.0, 0.0)}, "time_mean"),
        ({"times": Times.triangle, "diagonal_draw": DiagonalDraw.single}, "diagonal_draw"),
        ({"times": Times.gap, "diagonal_draw": DiagonalDraw.single}, "diagonal_draw"),
        ({"time_std": (1.0, 0.0)}, "time_std"),
        ({"diagonal_draw": DiagonalDraw.own}, "time_mean"),
        ({"diagonal_draw": DiagonalDraw.own, "time_mean": (0.0, 0.0, 0.0)}, "time_std"),
        ({"time_mean": (0.0, 0.0, 0.0)}, "time_mean"),
        ({"times": Times.gap, "uniform_share": 0.1}, "uniform_share"),
        ({"uniform_share": 1.0}, "uniform_share"),
        ({"times": Times.gap, "time_mean": (float("nan"), 0.0)}, "time_mean"),
    ],
)
def test_options_without_effect_are_refused(options, field):
    with pytest.raises(UserError, match=field):
        OBJECTIVES["mean_flow"](**options)
