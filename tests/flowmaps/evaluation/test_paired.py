"""Paired distances: the value by hand, the order of the pairs, two processes, and images of another shape."""

import pytest
import torch
from helpers import generator

from flowmaps import UserError
from flowmaps.data import ArrayData
from flowmaps.distributed import ALONE
from flowmaps.evaluation import paired
from flowmaps.evaluation.paired import Pairs

TRUE = torch.randint(256, (5, 1, 16, 16), generator=generator(), dtype=torch.uint8)


def by_hand(x):
    mse = (x.double() - TRUE[torch.arange(len(x)) % 5].double()).square().mean(dim=(1, 2, 3)) / 255**2
    return (-10 * mse.log10()).clamp(max=100)


@pytest.mark.parametrize("batch", [1, 4, 12])
def test_sample_i_is_compared_with_picture_i_mod_n(batch):
    x = torch.randint(256, (12, 1, 16, 16), generator=generator(1), dtype=torch.uint8)
    x[5:7] = TRUE[:2]  # equal: 100 dB
    pairs = Pairs(ArrayData(TRUE), (1, 16, 16), range(12), "", torch.device("cpu"))
    assert torch.equal(torch.cat(list(pairs.watch(x.split(batch)))), x)
    assert pairs.scores(ALONE)["PSNR"] == pytest.approx(by_hand(x).mean().item())
    list(pairs.watch([x[:2]]))  # the next row starts anew
    assert pairs.scores(ALONE)["PSNR"] == pytest.approx(by_hand(x[:2]).mean().item())


def test_the_part_of_a_process_begins_at_its_first_sample():
    x = torch.randint(256, (12, 1, 16, 16), generator=generator(1), dtype=torch.uint8)
    pairs = Pairs(ArrayData(TRUE), (1, 16, 16), range(7, 12), "", torch.device("cpu"))
    list(pairs.watch([x[7:]]))
    assert pairs.scores(ALONE)["PSNR"] == pytest.approx(by_hand(x)[7:].mean().item())


def test_lpips_sees_both_pictures_in_minus_one_to_one(monkeypatch):
    monkeypatch.setattr(paired, "lpips", lambda folder, device: lambda x, y: (x - y).abs().mean(dim=(1, 2, 3)))
    x = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    pairs = Pairs(ArrayData(TRUE), (1, 16, 16), range(3), "weights", torch.device("cpu"))
    list(pairs.watch([x]))
    expected = (2 * TRUE[:3].double() / 255).mean().item()
    assert pairs.scores(ALONE)["LPIPS"] == pytest.approx(expected, rel=1e-5)


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"has images of shape \(1, 16, 16\), the samples \(1, 8, 8\)"):
        Pairs(ArrayData(TRUE), (1, 8, 8), range(3), "", torch.device("cpu"))
