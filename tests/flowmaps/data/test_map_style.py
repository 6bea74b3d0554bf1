"""Data sets of the user's own, from Python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.makers import encoded, photograph, write_folder
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from flowmaps import UserError
from flowmaps.data import ArrayData, Loader, ShuffledOrder, as_dataset, iterate, open_dataset


class Pictures(Dataset):
    """The image files of a folder, opened by Pillow, with the number of their folder."""

    def __init__(self, root):
        self.files = sorted(Path(root).rglob("*.png"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return Image.open(self.files[i]), "ab".index(self.files[i].parent.name)


@pytest.fixture
def folder(tmp_path):
    files = {f"{'ab'[i % 2]}/{i}.png": encoded(photograph(i).crop((0, 0, 24, 24)), "png") for i in range(10)}
    return write_folder(tmp_path / "pictures", files)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_the_same_through_a_folder_and_through_a_dataset(folder, workers):
    ours, theirs = as_dataset(Pictures(folder)), open_dataset(folder)
    assert (
        (len(ours), ours.shape, ours.num_classes)
        == (len(theirs), theirs.shape, theirs.num_classes)
        == (10, (3, 24, 24), 2)
    )
    order = ShuffledOrder(10, seed=0)
    loader = Loader(ours, lambda k: order.indices(4 * k, 4), workers)
    for k in (0, 1, 2, 5):
        x, label = loader.batch(k)
        expected = theirs.fetch(order.indices(4 * k, 4))
        assert torch.equal(x, expected[0]) and torch.equal(label, expected[1])


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["ant", "bee"], ("ant", "bee")),
        (("ant", "bee"), ("ant", "bee")),
        (["0", "1"], ()),
        (["ant"], ()),
        ([("ant", "emmet"), ("bee",)], ()),
        ("ab", ()),
        (None, ()),
    ],
)
def test_class_names_are_those_of_torchvision(folder, classes, names):
    pictures = Pictures(folder)
    pictures.classes = classes
    assert as_dataset(pictures).class_names == names


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (2,)])
@pytest.mark.parametrize("labelled", [True, False])
def test_tensors_are_the_same_as_in_memory(shape, labelled):
    x = torch.rand(12, *shape) if len(shape) == 1 else torch.randint(256, (12, *shape), dtype=torch.uint8)
    label = torch.arange(12) % 3 if labelled else None
    memory = ArrayData(x, label, 3 if labelled else 0)
    for given in (
        TensorDataset(x, label) if labelled else TensorDataset(x),
        list(zip(x, label, strict=True)) if labelled else x,
    ):
        data = as_dataset(given)
        assert (len(data), data.shape, data.num_classes) == (12, memory.shape, memory.num_classes)
        assert (data.split, data.crop, data.content()) == ("", "none", data.digest())
        for (a, la), (b, lb) in zip(iterate(data, batch=5), iterate(memory, batch=5), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
            assert la is lb is None or (torch.equal(la, lb) and la.dtype == torch.int64)


def test_digest_depends_on_items_labels_and_order():
    x, label = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8), torch.arange(6) % 2
    digest = as_dataset(TensorDataset(x, label)).digest()
    assert as_dataset(list(zip(x.clone(), label.tolist(), strict=True)), num_classes=5).digest() == digest
    brighter = x.clone()
    brighter[5, 0, 3, 3] ^= 1
    for other in (
        TensorDataset(brighter, label),
        TensorDataset(x, 1 - label),
        TensorDataset(x.flip(0), label),
        TensorDataset(x),
    ):
        assert as_dataset(other).digest() != digest


def test_data_sets_are_returned_as_they_are():
    data = open_dataset("digits")
    assert as_dataset(data) is data


def test_classes_may_be_more_than_there_are_labels():
    data = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    assert as_dataset(data, num_classes=10).num_classes == 10
    assert as_dataset([(PIXELS, 1), (PIXELS, 2)], num_classes=3).num_classes == 3
    with pytest.raises(UserError, match="num_classes=3: the largest label is 3"):
        as_dataset(data, num_classes=3)


PIXELS = torch.zeros(1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "at least one item"),
        (iter([PIXELS]), "map-style"),
        ([PIXELS / 255], r"item 0 is float32 \[1, 4, 4\]: .*without ToTensor"),
        ([torch.zeros(3, dtype=torch.float64)], r"float64 \[3\]"),
        ([np.zeros((4, 4, 3), np.uint8)], "item 0 is ndarray"),
        ([{"image": PIXELS}], "item 0 is dict"),
        ([PIXELS, torch.zeros(1, 5, 5, dtype=torch.uint8)], r"item 1 is uint8 \[1, 5, 5\], item 0 uint8 \[1, 4, 4\]"),
        ([(PIXELS, 0), PIXELS], "item 1 has no label"),
        ([(PIXELS, "cat")], "label of item 0 is 'cat'"),
        ([(PIXELS, 0.5)], r"label of item 0 is 0\.5"),
        ([(PIXELS, -1)], "label of item 0 is -1"),
        ([(PIXELS, 10**12)], "label of item 0 is 1000000000000"),
        ([(PIXELS, 2), (PIXELS, 1)], "begin at 1, so class 0 has no item: count from 0, or pass num_classes"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(data, reason):
    with pytest.raises(UserError, match=reason) as error:
        as_dataset(data)
    assert "\n" not in str(error.value)
