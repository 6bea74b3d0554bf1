"""Steering against closed forms: Gaussian data, where all weights are equal, and a product of mixtures in the plane."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from benchmarks.plane import DATA_STD, TARGETS, Mixture, drift, plane_map
from helpers.steering import LINEAR, elliptical_slice, picked, run

from flowmaps.metrics import sliced_w2
from samplers import heun, stochastic, uniform_times
from samplers.measurement import Measurement, downsample, inpaint
from samplers.steer import Score, _stages, steer

SIGMA0, V = 0.7, 0.36
MEAN = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
A = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
GAUSSIAN = {"dim": 3, "base_std": SIGMA0, "data_std": V**0.5}
PLANE = {"dim": 2, "data_std": DATA_STD}
LINEAR_REWARD, NOTHING = Score(lambda x: x @ A, ascents=1), Score(lambda x: 0 * x[:, 0], ascents=0)


def gaussian(mean, v=V, sigma0=SIGMA0):
    """The map of N(mean, v I): mu_t + sqrt(Q_t / Q_s) (x - mu_s)."""

    def fm(x, s, t, label=None):
        s, t = s.double()[:, None], t.double()[:, None]
        q_s, q_t = ((1 - u) ** 2 * sigma0**2 + u**2 * v for u in (s, t))
        return t * mean + (q_t / q_s).sqrt() * (x - s * mean)

    return fm


def exponents(steps, gamma=1.0):
    return [stage.exponent for stage in _stages(LINEAR, uniform_times(steps), gamma, SIGMA0, V**0.5)][:-1]


def first_potential(fm, reward, steps, n, gamma=1.0, **facts):
    """The potential of the first look-ahead of ``run`` with the same arguments."""
    g = torch.Generator().manual_seed(0)
    x0 = facts["base_std"] * torch.randn(n, facts["dim"], generator=g, dtype=torch.float64)
    stage = _stages(LINEAR, uniform_times(steps), gamma, facts["base_std"], facts["data_std"])[0]
    return reward.potential(fm(x0, torch.zeros(n), torch.ones(n)), stage)


LOG_WEIGHTS = {2: (0.963815, 0.65079), 4: (1.918806, 0.16663), 8: (2.135965, 0.00748)}


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("steps", LOG_WEIGHTS)
def test_for_gaussian_data_and_a_linear_reward_all_weights_are_equal(steps, gamma):
    """After the first look-ahead nothing is left to chance: the weight and the shift are the same for all particles."""
    fm, lam = gaussian(MEAN), exponents(steps, gamma)[0]
    steered, plain = (run(fm, reward, steps, 500, gamma=gamma, **GAUSSIAN) for reward in (LINEAR_REWARD, NOTHING))
    shift = V * A * (1 - lam**2)
    assert (steered.x - plain.x - shift).abs().max() < 1e-14
    rest = steered.log_weights[:, 0] - first_potential(fm, LINEAR_REWARD, steps, 500, gamma, **GAUSSIAN)
    expected = A @ MEAN * (1 - lam) + V * A @ A * (1 - lam**2) / 2
    assert (rest - expected).abs().max() < 2e-14
    if gamma == 1:
        assert (expected.item(), lam) == pytest.approx(LOG_WEIGHTS[steps], abs=5e-6)


def test_exponents_are_products_of_correlations():
    assert exponents(4) == pytest.approx([0.16663, 0.60654, 0.932, 1], abs=5e-6)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.151), (2, 0.449), (4, 0.949), (8, 0.9999)])
def test_effective_number_of_particles_and_log_z(steps, share):
    found = run(gaussian(MEAN), LINEAR_REWARD, steps, 1, particles=16_384, resample=0.0, **GAUSSIAN)
    assert math.exp(-(exponents(steps)[0] ** 2) * V * A @ A) == pytest.approx(share, abs=6e-4)
    assert found.ess[-1].item() == pytest.approx(share, abs=0.02) and len(found.ess) == steps
    assert A @ MEAN + V * A @ A / 2 == pytest.approx(2.145)
    standard_error = (1 / share - 1) ** 0.5 / 128
    assert found.log_z.item() == pytest.approx(2.145, abs=4 * standard_error + 1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_deterministic_guidance_is_exact_for_gaussian_data(steps):
    steered, plain = (run(gaussian(MEAN), r, steps, 50, gamma=0.0, **GAUSSIAN) for r in (LINEAR_REWARD, NOTHING))
    assert (steered.x - plain.x - V * A).abs().max() < 5e-15


Y = torch.tensor([[0.5, 0.1, -0.4]], dtype=torch.float64)
OBSERVED = Measurement(lambda x: x, lambda y: y, 1.0, Y, 0.5, MEAN)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_for_gaussian_data_and_a_measurement_all_weights_are_equal(steps):
    fm = gaussian(MEAN)
    rest = run(fm, OBSERVED, steps, 500, **GAUSSIAN).log_weights[:, 0]
    rest = rest - first_potential(fm, OBSERVED, steps, 500, **GAUSSIAN)
    assert (rest - rest.mean()).abs().max() < 2e-14
    found = run(fm, OBSERVED, steps, 1, particles=16_384, resample=0.0, seed=1, **GAUSSIAN)
    weight, noise = found.log_weights.softmax(dim=1)[0], 0.25
    mean = weight @ found.x
    error = 4 / (16_384 * found.ess[-1].item()) ** 0.5  # four standard errors in units of a standard deviation
    assert ((mean - MEAN - V * (Y[0] - MEAN) / (V + noise)).abs() / 0.1475**0.5).max() < error
    assert (weight @ (found.x - mean) ** 2 / 0.1475 - 1).abs().max() < 1.5 * error
    log_z = -(Y - MEAN).square().sum() / (2 * (V + noise)) - 1.5 * math.log(1 + V / noise)
    assert found.log_z.item() == pytest.approx(log_z.item(), abs=error)


@pytest.mark.parametrize("kind", ["inpainting", "means"])
@pytest.mark.parametrize(("steps", "share"), [(8, 0.93), (16, 0.99)])
def test_a_measurement_in_1024_dimensions(kind, steps, share):
    """Exact but for the start, also where A A^T is not the identity: log Z and the effective number of particles."""
    mean, v, std = 0.2, 0.36, 0.3
    g = torch.Generator().manual_seed(3)
    image = (0.5 + 0.6 * torch.randn(1, 1, 32, 32, generator=g)).double()
    mask = (torch.arange(1024) >= 800).double().view(1, 1, 32, 32)
    made = inpaint(image, mask, std) if kind == "inpainting" else downsample(image[:, :, :8, :8], 4, std)
    reward = replace(made, mean=mean)

    def fm(x, s, t, label=None):
        return gaussian(mean, v)(x.flatten(1), s, t).view_as(x)

    def noise(k):
        return SIGMA0 * torch.randn(256, 1, 32, 32, generator=g, dtype=torch.float64)

    facts = {"path": LINEAR, "base_std": SIGMA0, "data_std": v**0.5, "particles": 256, "resample": 0.0}
    found = steer(fm, noise(0), uniform_times(steps), reward, noise=noise, uniform=lambda k: torch.rand(1), **facts)
    c, count = made.gain, {"inpainting": 800, "means": 64}[kind]
    seen = made.forward(image) if kind == "inpainting" else image[:, :, :8, :8]
    residual = seen - (mean * (1 - mask) if kind == "inpainting" else mean)
    log_z = -residual.square().sum() / (2 * (c * v + std**2)) - count / 2 * math.log(1 + c * v / std**2)
    assert reward.observed.item() == count
    assert found.ess[-1] > share and found.log_z.item() == pytest.approx(log_z.item(), abs=0.1)


@pytest.mark.parametrize("name", ["linear, mild", "linear, rare", "measurement, mild", "measurement, rare"])
def test_log_z_of_the_plane(name):
    expected = {
        "linear, mild": 0.5883,
        "linear, rare": 3.440,
        "measurement, mild": -1.7080,
        "measurement, rare": -4.332,
    }
    assert TARGETS[name].exact.log_z == pytest.approx(expected[name], abs=5e-4)


def test_the_map_of_the_plane_is_that_of_its_drift():
    g = torch.Generator().manual_seed(0)
    x, zero = torch.randn(200, 2, generator=g, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    walked = heun(drift, x, torch.linspace(0, 0.95, 400, dtype=torch.float64))
    assert (plane_map(x, zero, zero + 0.95) - walked).abs().max() < 2e-4


@dataclass(frozen=True)
class Distorted:
    """A reward whose potentials and proposals are worse than those of the reward it has, as far as r stays the same."""

    reward: object
    power: float = 1.0  # of the exponent
    proposal: float = 1.0  # of the stage's exponent, 0: none

    def potential(self, guess, stage):
        return self.reward.potential(guess, replace(stage, exponent=stage.exponent**self.power))

    def propose(self, guess, z, stage):
        if not self.proposal:
            return stage.width * z, z.new_zeros(len(z))
        return self.reward.propose(guess, z, replace(stage, exponent=self.proposal * stage.exponent))


DISTORTED = {"as it is": {}, "late potentials": {"power": 4.0}, "no proposals": {"proposal": 0.0}}
DISTORTED |= {"timid": {"power": 0.0, "proposal": 0.4}}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("how", DISTORTED)
@pytest.mark.parametrize("name", ["linear, mild", "measurement, mild"])
def test_z_is_unbiased_whatever_the_potentials_and_proposals(name, how, gamma, steps):
    target = TARGETS[name]
    reward = Distorted(target.reward, **DISTORTED[how])
    found = run(plane_map, reward, steps, 1500, particles=4, gamma=gamma, **PLANE)
    ratio = (found.log_z - target.exact.log_z).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 1500**0.5


@pytest.mark.parametrize("name", TARGETS)
def test_the_picked_law_is_the_exact_tilt(name):
    """Sliced W2 to 2,000 exact samples; unsteered it is 0.6 and more, of exact samples 0.01 to 0.04."""
    target = TARGETS[name].exact
    exact = target.sample(2000, torch.Generator().manual_seed(5))
    found = run(plane_map, TARGETS[name].reward, 4, 2000, particles=16, **PLANE)
    assert sliced_w2(picked(found), exact) < 0.07
    plain = run(plane_map, NOTHING, 4, 2000, **PLANE)
    assert sliced_w2(plain.x, exact) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear, rare", "measurement, mild"])
def test_the_oracle_agrees(name):
    """Elliptical slice sampling of the noise knows nothing of chains, weights or exact tilts."""
    reward = TARGETS[name].reward
    values = (
        reward
        if isinstance(reward, Score)
        else lambda x: -(((reward.y - reward.forward(x))[:, 0] / reward.std) ** 2) / 2
    )
    oracle = elliptical_slice(plane_map, values, 2000, 48, dim=2)
    exact = TARGETS[name].exact.sample(2000, torch.Generator().manual_seed(5))
    found = picked(run(plane_map, reward, 4, 2000, particles=16, **PLANE))
    assert sliced_w2(oracle, exact) < 0.05 and sliced_w2(found, oracle) < 0.08


def test_a_constant_added_to_the_reward_changes_log_z_alone():
    target = TARGETS["linear, mild"].reward
    raised = Score(lambda x: target(x) + 1e4, ascents=1)
    a, b = (run(plane_map, reward, 4, 20, particles=8, **PLANE) for reward in (target, raised))
    assert (a.x - b.x).abs().max() < 1e-9 and (b.log_z - a.log_z - 1e4).abs().max() < 1e-9


def test_one_particle_is_the_chain_without_weights_and_a_reward_of_zero_is_the_stochastic_sampler():
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(30, 2, generator=g, dtype=torch.float64) for _ in range(5)]
    expected = stochastic(plane_map, noise[0], uniform_times(4), path=LINEAR, noise=lambda k: noise[k + 1])
    for reward in (NOTHING, Score(lambda x: 0 * x.sum(dim=1))):
        assert (run(plane_map, reward, 4, 30, uniform=None, **PLANE).x - expected).abs().max() < 1e-12


def test_equal_weights_are_resampled_to_themselves():
    plain, resampled = (run(plane_map, NOTHING, 4, 10, particles=8, resample=r, **PLANE) for r in (0.0, 2.0))
    assert torch.equal(plain.x, resampled.x) and torch.equal(resampled.origin, torch.arange(80))


def test_a_sample_does_not_depend_on_the_others():
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(3, 8, 2, generator=g, dtype=torch.float64) for _ in range(5)]
    uniform = [torch.rand(3, generator=g, dtype=torch.float64) for _ in range(5)]
    reward = Score(lambda x: -(x**4).sum(dim=1) / 0.1)  # stiff, so that rows differ in the tries they need

    def steered(rows):
        options = {"noise": lambda k: noise[k + 1][rows].flatten(0, 1), "uniform": lambda k: uniform[k][rows]}
        facts = {"path": LINEAR, "base_std": 1.0, "data_std": DATA_STD, "particles": 8}
        return steer(plane_map, noise[0][rows].flatten(0, 1), uniform_times(4), reward, **options, **facts)

    every, second = steered(slice(None)), steered(slice(1, 2))
    torch.testing.assert_close(every.x[8:16], second.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(every.log_weights[1:2], second.log_weights, rtol=1e-10, atol=1e-10)


def test_labels_move_with_their_particles_and_weights_choose_a_class():
    """Two Gaussians as classes, and a reward that wants the second: all picks descend from starts with its label."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    seen = []

    def fm(x, s, t, label):
        seen.append(label)
        return gaussian(means[label], 0.04, 1.0)(x, s, t)

    label = torch.arange(800) % 2
    reward = Score(lambda x: 3 * x[:, 0], ascents=1)
    found = run(fm, reward, 4, 200, dim=2, data_std=0.2, particles=4, label=label, resample=0.9)
    rows = found.pick(torch.rand(200))
    assert (label[found.origin[rows]] == 1).all() and (found.x[rows, 0] > 1).all()
    assert torch.equal(seen[-1], label[found.origin]) and not torch.equal(seen[-1], label)
    assert (found.origin // 4 == torch.arange(800) // 4).all()


def test_callbacks_see_the_particles_at_every_time():
    seen = []
    found = run(
        plane_map, TARGETS["linear, mild"].reward, 3, 5, particles=4, callback=lambda *a: seen.append(a), **PLANE
    )
    assert [k for k, _, _ in seen] == [0, 1, 2, 3] and [float(t) for _, t, _ in seen] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )
    assert [len(state.ess) for _, _, state in seen] == [1, 2, 3, 3] and seen[-1][2] is found
    assert (seen[1][2].log_z == 0).all() or (seen[0][2].ess < 1).all()


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 4])
def test_evaluations(gamma, steps):
    rows = []

    def fm(x, s, t, label=None):
        rows.append(len(x))
        return plane_map(x, s, t)

    run(fm, TARGETS["linear, mild"].reward, steps, 5, particles=4, gamma=gamma, **PLANE)
    assert rows == [20] * (steps if gamma == 1 else 2 * steps - 1)


def test_a_black_box_is_weighed():
    """A reward without a gradient: the signs of the coordinates, which only weights can see."""
    reward = Score(lambda x: 8 * (x.detach() > 0).all(dim=1).double(), ascents=0)
    found = picked(run(plane_map, reward, 4, 500, particles=16, **PLANE))
    assert (found > 0).all(dim=1).double().mean() > 0.95
    with pytest.raises(ValueError, match=r"no gradient.*ascents=0"):
        run(plane_map, replace(reward, ascents=1), 2, 5, **PLANE)


def test_ascents_of_a_stiff_reward_find_the_best_place():
    """r = -|x - c|^2 / (2 e^2) with e far below the reach: a plain step along the gradient would overshoot 100-fold."""
    goal = torch.tensor([0.3, -0.4], dtype=torch.float64)
    reward = Score(lambda x: -(x - goal).square().sum(dim=1) / (2 * 0.05**2), ascents=5)
    guess = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stage = _stages(LINEAR, uniform_times(4), 1.0, 1.0, 0.5)[2]
    best = guess + (goal - guess) / (1 + 0.05**2 / (stage.exponent * stage.reach))
    assert (reward._ascended(guess, stage) - best).norm(dim=1).max() < 0.03 * (guess - best).norm(dim=1).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [0.0, 0.5]}, "ends at time 1"),
        ({"particles": 3}, "groups of particles"),
        ({"particles": 0}, "groups of particles"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": 0.0, "particles": 2}, "one particle"),
        ({"data_std": 0.0}, "data_std"),
        ({"reward": Score(lambda x: x)}, r"one number for each sample, \[4\], got \[4, 2\]"),
        ({"reward": Score(lambda x: 3.0)}, "got float"),
        ({"reward": Score(lambda x: x[:, 0] / 0)}, "NaN or infinity"),
        ({"reward": inpaint(torch.zeros(1, 3), torch.zeros(1, 3)), "wide": 2}, "must match|y is"),
        ({"reward": OBSERVED, "wide": 3, "gamma": 0.0}, "gamma must be above 0"),
    ],
)
def test_refusals(change, message):
    options = {"path": LINEAR, "base_std": 1.0, "data_std": 0.5, "particles": 1} | change
    wide, times = options.pop("wide", 2), options.pop("times", [0.0, 0.5, 1.0])
    reward = options.pop("reward", NOTHING)
    x = torch.randn(4, wide, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=message):
        steer(lambda x, s, t, y: x, x, times, reward, noise=lambda k: x, uniform=lambda k: torch.rand(1), **options)


@pytest.mark.parametrize("bad", [{"std": 0.0}, {"std": math.nan}, {"gain": 0.0}])
def test_a_measurement_needs_positive_numbers(bad):
    with pytest.raises(ValueError, match="positive"):
        replace(OBSERVED, **bad)


def test_adjoints():
    """<A x, y> = <x, A^T y> and A A^T = c where something is seen."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 1, 8, 8, generator=g) > 0.5).double()
    for made in (inpaint(torch.zeros(1, 2, 8, 8).double(), mask), downsample(torch.zeros(1, 2, 2, 2).double(), 4)):
        x, y = (
            torch.randn(3, *like.shape[1:], generator=g, dtype=torch.float64)
            for like in (torch.zeros(1, 2, 8, 8), made.y)
        )
        assert ((made.forward(x) * y).sum() - (x * made.adjoint(y)).sum()).abs() < 1e-12
        seen = made.forward(x)
        torch.testing.assert_close(made.forward(made.adjoint(seen)), made.gain * seen)


def test_mixtures_sample_what_they_say():
    m = Mixture(
        torch.tensor([0.25, 0.75]).double(),
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(),
        torch.eye(2).double().expand(2, 2, 2),
    )
    x = m.sample(20_000, torch.Generator().manual_seed(0))
    assert (x.mean(dim=0) - torch.tensor([0.25, 1.5]).double()).abs().max() < 0.04
