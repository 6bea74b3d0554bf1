"""Models of other conventions as drifts: on Gaussian data the denoiser and the noise prediction are known in full."""

import math

import pytest
import torch

from flowmaps.guidance import Autoguided, Guided
from flowmaps.parametrisations import (
    PARAMETRISATIONS,
    ConvertedDrift,
    Parametrisation,
    denoiser_drift,
    edm,
    noise_drift,
    parametrisation,
)

MEAN, STD = 0.3, 0.7  # of the data


def exact(x, t, base_std):
    """b_t(x) = E[x1 - x0 | I_t = x] for x1 ~ N(MEAN, STD^2)."""
    t = t[:, None]
    variance = ((1 - t) * base_std) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t) * base_std**2) / variance * (x - t * MEAN)


def denoise(y, sigma, label=None):
    sigma = sigma[:, None]
    return (STD**2 * y + sigma**2 * MEAN) / (STD**2 + sigma**2)


def kept():
    """DDPM's products of 1 - beta, one by one."""
    product, table = 1.0, []
    for k in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        table.append(product)
    return table


def predict_noise(z, k, label=None):
    """E[e | sqrt(a) x1 + sqrt(1 - a) e = z], a between two times by ln sigma."""
    table = torch.tensor([math.log((1 - a) / a) / 2 for a in kept()], dtype=z.dtype)
    low = k.floor().long().clamp(max=998)
    sigma = torch.lerp(table[low], table[low + 1], k - low).exp()[:, None]
    a = 1 / (1 + sigma**2)
    return (1 - a).sqrt() * (z - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)


def raw_edm(y, level, label=None, data_std=0.5):
    """The network inside EDM's preconditioning of ``denoise``."""
    sigma = (4 * level).exp()[:, None]
    c_in = (sigma**2 + data_std**2).rsqrt()
    c_skip, c_out = data_std**2 * c_in**2, sigma * data_std * c_in
    y = y / c_in
    return (denoise(y, sigma[:, 0]) - c_skip * y) / c_out


def times(low, high):
    near = 10.0 ** -torch.arange(2.0, 8.0, dtype=torch.float64)
    t = torch.cat([torch.linspace(low, high, 101, dtype=torch.float64), low + near, 1 - near])
    return t[(t >= low) & (t <= high)]


@pytest.mark.parametrize("base_std", [0.5, 1.0])
@pytest.mark.parametrize("form", ["denoiser", "edm", "noise"])
def test_analytic_models_become_the_closed_form_drift(form, base_std):
    """Within 1e-6 in float64 from the least time on; up to 1 for EDM, to the least noise level for DDPM."""
    drift = {
        "denoiser": denoiser_drift(denoise, base_std, (1e-8, 80.0)),
        "edm": ConvertedDrift(raw_edm, Parametrisation(edm, (1e-8, 80.0)), base_std, 0.5),
        "noise": noise_drift(predict_noise, base_std),
    }[form]
    low, high = drift.t_range
    largest = {"denoiser": 80.0, "edm": 80.0, "noise": math.sqrt((1 - kept()[-1]) / kept()[-1])}[form]
    assert low == pytest.approx(base_std / (base_std + largest), rel=1e-9)
    t = times(low, high)
    x = torch.randn(len(t), 4, dtype=torch.float64) * 2
    assert len(t) > 100 and (drift(x, t) - exact(x, t, base_std)).abs().max() <= 1e-6
    for end, nearest in ((0.0, low), (1.0, high)):
        at = torch.full_like(t, end)
        assert torch.equal(drift(x, at), drift(x, torch.full_like(t, nearest)))
        assert drift(x, at).isfinite().all()


def test_edm_without_cancellation_keeps_its_digits_in_float32():
    drift = ConvertedDrift(raw_edm, PARAMETRISATIONS["edm"], 0.5, 0.5)
    low, high = drift.t_range
    assert (low, high) == (0.5 / 80.5, 0.5 / 0.502)
    t = times(low, high).float()
    reading = PARAMETRISATIONS["edm"](t, 0.5, 0.5)
    wide = PARAMETRISATIONS["edm"](t.double(), 0.5, 0.5)
    for mine, theirs in zip(reading, wide, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_learned_variance_is_left_out_and_rectified_flow_counts_999ths():
    drift = noise_drift(lambda z, k, y: torch.cat([predict_noise(z, k), torch.full_like(z, 9)], dim=1))
    t, x = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(drift(x, t), noise_drift(predict_noise)(x, t))
    reading = PARAMETRISATIONS["rectified_flow"](torch.tensor([0.0, 0.5, 1.0]), 1.0)
    torch.testing.assert_close(reading.c_noise, torch.tensor([0.999, 499.5, 999.0]))
    reading = PARAMETRISATIONS["noise_at_one"](torch.tensor([0.0, 0.25, 1.0]), 1.0)
    assert [part.tolist() for part in reading] == [[1, 1, 1], [1, 0.75, 0], [0, 0, 0], [-1, -1, -1]]
    for name in ("velocity", "noise_at_one"):
        assert PARAMETRISATIONS[name].t_range(1.0) == (0.0, 1.0)


def test_guidance_is_that_of_the_denoiser_and_leaves_rows_without_label_alone():
    def labelled(y, sigma, label):
        return denoise(y, sigma) * (1 + 0.1 * label[:, None])

    t, x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    label, w = torch.tensor([1, 4, 3]), 2.5
    guided = Guided(denoiser_drift(labelled), w, label_size=4)(x, t, label)

    def together(y, sigma, label):
        without = labelled(y, sigma, torch.full_like(label, 4))
        return without + w * (labelled(y, sigma, label) - without)

    torch.testing.assert_close(guided, denoiser_drift(together)(x, t, label))
    torch.testing.assert_close(guided[1], denoiser_drift(labelled)(x, t, label)[1])
    good, weak = denoiser_drift(labelled), denoiser_drift(lambda y, s, c: 0.5 * labelled(y, s, c))
    torch.testing.assert_close(
        Autoguided(good, weak, w)(x, t, label), w * good(x, t, label) - (w - 1) * weak(x, t, label)
    )


@pytest.mark.parametrize("base_std", [0.5, 1.0])
@pytest.mark.parametrize("predicts", ["noise", "velocity", "data"])
@pytest.mark.parametrize("schedule", ["linear:1000:0.0001:0.02", "squaredcos_cap_v2:1000", "betas:0.1:0.2:0.6"])
def test_every_prediction_becomes_the_closed_form_drift(schedule, predicts, base_std):
    """E[e], E[x1] and E[a e - s x1] of Gaussian data, at any noise level and at the ends."""
    row = parametrisation(f"ddpm:{predicts}:{schedule}")
    table = row.read.keywords["table"]

    def predict(z, k, label=None):
        low = k.floor().long().clamp(max=len(table) - 2)
        sigma = torch.lerp(table[low], table[low + 1], k - low).exp()[:, None]
        a = (1 + sigma**2).rsqrt()
        x1 = denoise(z / a, sigma[:, 0])
        noise = (z / a - x1) / sigma
        return {"noise": noise, "data": x1, "velocity": a * (noise - sigma * x1)}[predicts]

    drift = ConvertedDrift(predict, row, base_std)
    t = times(*drift.t_range)
    x = torch.randn(len(t), 4, dtype=torch.float64)
    assert len(t) > 100 and (drift(x, t) - exact(x, t, base_std)).abs().max() <= 1e-6
    assert drift(x, 0 * t).isfinite().all() and drift(x, 0 * t + 1).isfinite().all()


def test_a_noise_prediction_is_not_read_where_there_is_only_noise():
    """Above DDPM's own last level, 157, its errors would be amplified more; the others have no such factor."""
    cosine = [parametrisation(f"ddpm:{name}:squaredcos_cap_v2:1000") for name in ("noise", "velocity", "data")]
    assert [round(row.noise[1]) for row in cosine] == [157, 20291, 20291]


@pytest.mark.parametrize(
    "name",
    [
        *("", "edn", "edm:1", "ddpm:", "ddpm:noise", "ddpm:score:squaredcos_cap_v2:1000", "ddpm:noise:sigmoid:1000"),
        *("ddpm:noise:linear:1000", "ddpm:noise:linear:1000:0.1:1.5", "ddpm:noise:linear:1e12:0.1:0.2"),
        *("ddpm:noise:linear:2.5:0.1:0.2", "ddpm:noise:squaredcos_cap_v2:1000:0.1", "ddpm:noise:betas:0.1"),
        *("ddpm:noise:betas:0.1:nan", "ddpm:noise:betas", "consistency:a", "consistency:-1", "consistency:0.1:0.2"),
    ],
)
def test_names_that_are_not_conventions(name):
    with pytest.raises(ValueError, match="convention must be one of velocity, noise_at_one"):
        parametrisation(name)
