"""The distance of ConvNeXt V2's features, on a small network in transformers' files."""

import sys

import pytest
import torch

from flowmaps import UserError
from flowmaps.metrics.convnext import convnext

transformers = pytest.importorskip("transformers")
SMALL = {"depths": [1, 1, 2, 1], "hidden_sizes": [4, 8, 12, 16]}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A classifier as the published ones are, with every weight random, and its folder."""
    torch.manual_seed(0)
    made = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**SMALL)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("convnext")
    made.save_pretrained(folder)
    return made, folder


@pytest.mark.parametrize("channels", [1, 3])
def test_the_distance_is_that_of_what_the_classifier_sees(network, channels):
    made, folder = network
    x, y = torch.rand(2, 3, channels, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen = []
    made.classifier.register_forward_hook(lambda layer, inputs, y: seen.append(inputs[0]))
    for image in (x, y):
        made(image.expand(-1, 3, -1, -1))
    expected = (seen[0] - seen[1]).square().sum(dim=1).detach()
    distance = convnext(str(folder))
    torch.testing.assert_close(distance(x, y), expected)
    assert distance(x, x).abs().max() == 0 and expected.min() > 0
    (gradient,) = torch.autograd.grad(distance(x.requires_grad_(), y).sum(), x)
    assert gradient.abs().max() > 0


def test_other_weights_are_refused_by_name(network, tmp_path):
    with pytest.raises(UserError, match=r"^convnext_weights=.*: is not a directory or hub id of a ConvNextV2") as error:
        convnext(str(tmp_path))
    assert "\n" not in str(error.value)
    transformers.ConvNextModel(transformers.ConvNextConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^convnext_weights=.*: (lacks weights of|is not a)") as error:
        convnext(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^convnext_weights=folder: needs transformers: pip install transformers"):
        convnext("folder")
