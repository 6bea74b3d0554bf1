import pytest
import torch

from flowmaps.interpolants import INTERPOLANTS


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_ends_are_noise_and_data(name):
    path = INTERPOLANTS[name]
    x0, x1 = torch.randn(2, 4, 3, dtype=torch.float64)
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(path.point(x0, x1, zero), x0)
    torch.testing.assert_close(path.point(x0, x1, one), x1)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_is_the_time_derivative(name):
    path, h = INTERPOLANTS[name], 1e-6
    x0, x1 = torch.randn(2, 50, 2, 3, dtype=torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    difference = (path.point(x0, x1, t + h) - path.point(x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(path.conditional_velocity(x0, x1, t), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_time_inverts_the_noise_to_data_ratio(name):
    path, t = INTERPOLANTS[name], torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(path.time(path.alpha(t) / path.beta(t)), t)
