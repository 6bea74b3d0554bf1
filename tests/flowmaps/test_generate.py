"""Samples by index: what is refused before anything is sampled."""

import pytest
import torch
from helpers import gaussian_map

from flowmaps import UserError
from flowmaps.generate import check_sampling, generate


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], (0, 0.4, 1), torch.tensor([0.0, 0.4, 1.0])])
def test_times_are_numbers_or_a_tensor(times):
    x, _ = next(generate(gaussian_map(), times, 4, 0))
    torch.testing.assert_close(x, next(generate(gaussian_map(), torch.tensor([0.0, 0.4, 1.0]), 4, 0))[0])


@pytest.mark.parametrize(
    "times", [[], [1.0], [0.0, 0.5], [0.5, 1.0], [0.0, 0.6, 0.4, 1.0], [0.0, float("nan"), 1.0], [0.0, 2.0], ["a", "b"]]
)
def test_times_that_do_not_lead_from_noise_to_data_are_refused(times):
    with pytest.raises(UserError, match=r"^times"):
        next(generate(gaussian_map(), times, 4, 0))


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, float("nan"), "2", None, 100_001])
def test_what_is_not_a_number_of_steps_is_refused(steps):
    with pytest.raises(UserError, match=r"steps(=\S+)?: must be a whole number of at least 1 and at most 100,000"):
        check_sampling(gaussian_map(), "map", steps)


def test_a_label_by_name_needs_names():
    with pytest.raises(UserError, match="label=a: this checkpoint has no class names"):
        next(generate(gaussian_map(classes=True), [0.0, 1.0], 4, 0, label="a"))
