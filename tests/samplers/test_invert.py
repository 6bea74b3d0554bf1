"""Inversion on Gaussian maps, whose inverse is known and on which plain iteration fails, and on held-out digits."""

from itertools import pairwise

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map

from flowmaps import FlowMap
from flowmaps.data import open_dataset
from flowmaps.images import from_uint8
from samplers import rollout, uniform_times
from samplers.invert import invert, invert_drift

WIDE, EQUAL = ((1, 0.3, 0.05, 0.01, 0.001), 1.0), ((0.36, 0.36, 0.36), 1.0)  # variances of the data, std of the noise
STEEP = ((9.0, 1.0, 0.01), 0.7)
ERRORS = {  # relative, of the data that plain iteration rebuilds, at least
    (WIDE, 1, 16): 5e-3,
    (WIDE, 4, 8): 1e-3,
    (STEEP, 1, 16): 1e8,
    (STEEP, 4, 8): 1e-2,
}


def exact(case):
    """The map of N(0, v), and data."""
    variances, base_std = case
    v = torch.tensor(variances, dtype=torch.float64)

    def fm(x, s, t, label=None):
        q_s, q_t = ((base_std * (1 - u.double()[:, None])) ** 2 + u.double()[:, None] ** 2 * v for u in (s, t))
        return (q_t / q_s).sqrt() * x

    x = v.sqrt() * torch.randn(64, len(v), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return fm, x


def plain(fm, x, times, iterations):
    z = x
    for s, t in reversed(list(pairwise(times))):
        goal = z
        for _ in range(iterations):
            z = z + goal - fm(z, s.expand(len(x)), t.expand(len(x)))
    return z


@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_anderson_converges_where_plain_iteration_does_not(case):
    law, steps, iterations = case
    fm, x = exact(law)
    times = uniform_times(steps)
    slow = (rollout(fm, plain(fm, x, times, iterations), times) - x).norm() / x.norm()
    found = invert(fm, x, times, iterations=iterations)
    fast = (found.rebuilt - x).norm() / x.norm()
    assert slow > ERRORS[case] and fast < 1e-13
    torch.testing.assert_close(found.error, (found.rebuilt - x).square().mean(dim=1).sqrt())


def test_equal_variances_are_solved_at_once():
    """All steps are then parallel: the least squares is singular but for its damping, whose floor is absolute."""
    fm, x = exact(EQUAL)
    for iterations in (3, 8):
        assert invert(fm, x, uniform_times(1), iterations=iterations).error.max() < 1e-9
    at_rest = invert(lambda x, s, t, label: x, x, uniform_times(2))
    assert torch.equal(at_rest.noise, x) and (at_rest.error == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_the_noise_of_an_exact_map_is_found(case):
    fm = gaussian_map(*case)
    x, label = gaussian_data(fm, 20)
    with torch.no_grad():
        x0 = fm.base_std * torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = rollout(fm, x0, uniform_times(2), label)
    found = invert(fm, x, uniform_times(2), label, iterations=24)
    assert (found.noise - x0).abs().max() < 1e-5
    assert (invert_drift(fm.drift, x, uniform_times(200), label) - x0).abs().max() < 1e-3


def test_states_are_reported_from_data_to_noise_and_evaluations_counted():
    fm, x = exact(WIDE)
    calls, seen = [], []

    def counted(*arguments):
        calls.append(1)
        return fm(*arguments)

    found = invert(counted, x, [0.2, 0.6, 1.0], callback=lambda k, t, z: seen.append((k, float(t), z)), iterations=5)
    assert len(calls) == 2 * 5 + 2
    assert [k for k, _, _ in seen] == [2, 1, 0] and [t for _, t, _ in seen] == pytest.approx([1, 0.6, 0.2])
    assert torch.equal(seen[0][2], x) and torch.equal(seen[-1][2], found.noise)


def test_a_row_does_not_depend_on_the_others():
    fm, x = exact(STEEP)
    torch.testing.assert_close(invert(fm, x, uniform_times(4)).noise[3:4], invert(fm, x[3:4], uniform_times(4)).noise)


@pytest.mark.parametrize("bad", [{"iterations": 0}, {"memory": 0}, {"times": [1.0, 0.0]}])
def test_refusals(bad):
    with pytest.raises(ValueError, match=r"at least 1|times must"):
        invert(lambda x, s, t, label: x, torch.zeros(2, 3), **{"times": [0.0, 1.0], **bad})


def test_held_out_digits_come_back():
    """Half a grey level: 4 steps of 8 evaluations, on [-1, 1]."""
    fm, data = FlowMap.from_pretrained("assets/digits"), open_dataset("digits", "heldout")
    images, label = data.fetch(torch.arange(8))
    assert invert(fm, from_uint8(images), uniform_times(4), label).error.square().mean().sqrt() < 0.01


@pytest.mark.slow
def test_the_drift_leaves_fifteen_times_that():
    """16 steps of Heun cost as much as 4 x 8 evaluations; rebuilt by 8 steps of the map."""
    fm, data = FlowMap.from_pretrained("assets/digits"), open_dataset("digits", "heldout")
    images, label = data.fetch(torch.arange(24))
    x = from_uint8(images)
    with torch.no_grad():
        rebuilt = rollout(fm, invert_drift(fm.drift, x, uniform_times(16), label), uniform_times(8), label)
    assert 0.04 < (rebuilt - x).square().mean().sqrt() < 0.08
    assert invert(fm, x, uniform_times(4), label).error.square().mean().sqrt() < 0.006
