"""Pictures carried to noise and back, and edited by another label."""

from dataclasses import replace

import pytest
import torch
from helpers import gaussian_data, gaussian_map
from helpers.pictures import digit

from flowmaps import FlowMap, UserError
from flowmaps.editing import rebuild
from flowmaps.images import from_uint8
from samplers import rollout, uniform_times


@pytest.mark.parametrize("kind", ["map", "drift"])
def test_an_edit_of_gaussian_data_moves_the_mean_and_keeps_the_rest(kind):
    """The noise is (x - mean) / std of its class, so that the edit is x with the mean of the other class."""
    fm = gaussian_map(classes=True)
    fm.info = replace(fm.info, kind=kind)
    x, label = gaussian_data(fm, 10)
    steps, iterations = (3, 24) if kind == "map" else (100, 0)
    found = rebuild(fm, x, uniform_times(steps), label, 1 - label, max(iterations, 1))
    expected = x + fm.network.mean[1 - label] - fm.network.mean[label]
    assert (found.samples - expected).abs().max() < 1e-3 and found.error.max() < 1e-3
    assert found.nfe == (3 * 25 + 3 if kind == "map" else 6 * 100)
    plain = rebuild(fm, x, uniform_times(steps), label, None, max(iterations, 1))
    assert (plain.samples - x).abs().max() < 1e-3 and plain.nfe < found.nfe
    assert torch.equal(plain.noise, found.noise)


def test_a_digit_comes_back_and_becomes_another():
    fm = FlowMap.from_pretrained("assets/digits")
    x = from_uint8(digit(3))[None]
    found = rebuild(fm, x, uniform_times(4), torch.tensor([3]), torch.tensor([8]))
    assert found.error < 0.01 and (found.samples - x).square().mean().sqrt() > 0.1
    with torch.no_grad():
        again = rollout(fm, found.noise, uniform_times(4), torch.tensor([3]))
    assert (again - x).square().mean().sqrt().item() == pytest.approx(found.error.item(), rel=1e-3)


def test_evaluations_are_counted():
    fm = FlowMap.from_pretrained("assets/digits")
    calls = []
    hook = fm.network.register_forward_hook(lambda *a: calls.append(1))
    found = rebuild(fm, from_uint8(digit(3))[None], uniform_times(2), torch.tensor([3]), torch.tensor([8]), 5)
    hook.remove()
    assert found.nfe == len(calls) == 2 * 5 + 2 + 2


def test_a_model_that_only_jumps_to_data_cannot_be_followed_back():
    fm = gaussian_map()
    fm.info = replace(fm.info, kind="consistency")
    with pytest.raises(UserError, match="only jumps to data"):
        rebuild(fm, torch.zeros(1, 3).double(), uniform_times(1))
    with pytest.raises(UserError, match="times"):
        rebuild(gaussian_map(), torch.zeros(1, 3).double(), [0.5, 1.0])
