"""Conditions in place of a class: their form as rows, every network that takes one, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers.small_networks import CONDITIONED, SMALL, inputs, small

from flowmaps import FlowMapInfo, UserError
from flowmaps.labels import labels_for
from flowmaps.networks import DiT, UNet
from flowmaps.networks.conditioning import soft_label, split_label, with_guidance, without_label
from flowmaps.networks.conditions import condition_rows


@pytest.mark.parametrize("name", CONDITIONED)
def test_every_number_of_a_condition_changes_the_result(name):
    fm = small(name).double()
    x, s, t, condition = inputs(fm, 2, torch.float64)
    v = fm.velocity(x, s, t, condition.requires_grad_())
    (gradient,) = torch.autograd.grad(v.square().sum(), condition)
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", CONDITIONED)
def test_no_condition_is_one_learned_value_for_all_and_zero_for_images(name):
    fm = small(name).eval()
    fm.info = replace(fm.info, label_dropout=0.1)
    x, s, t, condition = inputs(fm, 3)
    size = fm.info.label_size
    nothing, had = without_label(condition_rows(condition, fm.info.condition), size)
    with torch.no_grad():
        absent = fm.velocity(x, s, t, nothing)
        assert had.all() and not without_label(nothing, size)[1].any()
        torch.testing.assert_close(fm.velocity(x, s, t), absent, rtol=0, atol=0)
        zeros = fm.velocity(x, s, t, torch.zeros_like(condition))
        assert torch.equal(zeros, absent) == name.endswith("image")


@pytest.mark.parametrize("name", CONDITIONED)
def test_one_condition_serves_all_rows_and_rows_do_not_mix(name):
    fm = small(name).eval()
    x, s, t, condition = inputs(fm, 3)
    with torch.no_grad():
        all_rows = fm.velocity(x, s, t, condition)
        alone = fm.velocity(x[1:2], s[1:2], t[1:2], condition[1:2])
        torch.testing.assert_close(all_rows[1:2], alone, rtol=1e-4, atol=1e-5)
        same = fm.velocity(x, s, t, condition[0])
        torch.testing.assert_close(same, fm.velocity(x, s, t, condition[:1].expand_as(condition)), rtol=0, atol=0)


def test_rows_carry_augmentation_and_guidance_and_are_split_again():
    condition, augmentation = torch.randn(4, 2, 3), torch.randn(4, 5)
    w = torch.rand(4, 3)
    rows = with_guidance(soft_label(condition_rows(condition, (2, 3)), augmentation, 6), w, 6)
    parts = split_label(rows, torch.zeros(4), 6, 5, guidance=True, interval=True)
    assert torch.equal(parts.rows, torch.cat([condition.flatten(1), torch.zeros(4, 1)], dim=1))
    assert torch.equal(parts.augmentation, augmentation)
    assert torch.equal(torch.stack([parts.guidance, parts.low, parts.high], dim=1), w)
    assert condition_rows(rows, (2, 3)) is rows and condition_rows(None, (2, 3)) is None


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (
            UNet,
            {"condition": (4, 3)},
            r"condition=\(4, 3\): must be \(dim,\), \(channels, image_size, image_size\),",
        ),
        (UNet, {"condition": (1, 4, 4)}, "must be"),
        (UNet, {"condition": (0,)}, "must be"),
        (DiT, {"condition": (4, 3, 2, 1)}, r"or \(tokens, dim\)"),
        (DiT, {"condition": (4,), "num_classes": 3}, "a network has classes or a condition"),
    ],
)
def test_shapes_that_are_refused(cls, options, said):
    with pytest.raises(ValueError, match=said):
        cls(**{**SMALL[cls.__name__][1], "num_classes": 0, "guidance": False, **options})


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, r"label: missing: this model needs a condition of shape \[n, 3\]"),
        (torch.arange(2), r"label: must be floats of shape \[n, 3\], not torch.int64"),
        (1, r"label: must be floats of shape \[n, 3\], not int"),
        (torch.randn(2, 2), r"label: must be floats of shape \[n, 3\], got \[2, 2\]"),
        (torch.randn(5, 3), r"label: has 5 rows for 2 samples"),
    ],
)
def test_conditions_that_do_not_fit_are_one_line(label, said):
    fm = small("UNet vector").eval()
    x, s, t, _ = inputs(fm, 2)
    with pytest.raises(UserError, match=said):
        fm.velocity(x, s, t, label)


def test_samples_take_conditions_in_turn():
    info = FlowMapInfo(shape=(1, 8, 8), condition=(3,))
    given = torch.randn(3, 3)
    assert torch.equal(labels_for(info, 4, given, start=1), given[[1, 2, 0, 1]])
    assert torch.equal(labels_for(info, 2, given[0]), given[[0, 0]])
    with pytest.raises(UserError, match="num_classes 0"):
        FlowMapInfo(num_classes=2, condition=(3,))
