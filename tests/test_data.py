import pytest
import torch
from helpers import write_fashion_mnist

from flowmaps import UserError
from flowmaps.images import from_uint8, grid, points_to_image, to_uint8
from training.data import DATA, Order, load_data


def test_order_visits_every_item_once_an_epoch_and_depends_on_position_alone():
    order = Order(10, seed=3)
    whole = order.indices(0, 35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    for start, count in [(0, 1), (7, 9), (9, 21), (30, 5), (3, 2)]:
        assert torch.equal(Order(10, seed=3).indices(start, count), whole[start : start + count])
    assert not torch.equal(Order(10, seed=4).indices(0, 35), whole)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A root with the files of every data set that has any."""
    root = tmp_path_factory.mktemp("data")
    write_fashion_mnist(root)
    return str(root)


@pytest.mark.parametrize("name", DATA)
def test_splits_are_fixed_and_disjoint(name, files):
    train, heldout = load_data(name, root=files), load_data(name, "heldout", files)
    assert torch.equal(train.x, load_data(name, root=files).x)
    assert train.shape == heldout.shape and train.num_classes == heldout.num_classes
    seen = {x.numpy().tobytes() for x in train.x[:2000]}
    assert not any(x.numpy().tobytes() in seen for x in heldout.x[:2000])
    x, label = train.fetch(torch.arange(500))
    assert x.dtype == torch.float32 and x.abs().max() <= 1
    assert (label is None) == (train.num_classes == 0)
    if label is not None:
        assert label.dtype == torch.int64 and 0 <= label.min() and label.max() < train.num_classes


def test_fashion_mnist_packed_or_not_and_padded(files, tmp_path):
    write_fashion_mnist(tmp_path, packed=False)
    packed, plain = load_data("fashion_mnist", root=files), load_data("fashion_mnist", root=str(tmp_path))
    assert torch.equal(packed.x, plain.x) and torch.equal(packed.label, plain.label)
    assert packed.shape == (1, 32, 32) and len(packed) == 600
    assert packed.x[..., :2, :].max() == 0 and packed.x[..., 2:30, 2:30].max() == 255


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="--config\\.data\\.root"):
        load_data("fashion_mnist", root=str(tmp_path))
    write_fashion_mnist(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for broken in (content[:1000], b"", b"no gzip at all"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
            load_data("fashion_mnist", root=str(tmp_path))


def test_digits_are_the_real_scans():
    train, heldout = load_data("digits"), load_data("digits", "heldout")
    assert len(train) == 1348 and len(heldout) == 449 and train.shape == (1, 8, 8)
    assert train.x.min() == 0 and train.x.max() == 255


def test_checkerboard_fills_its_cells_evenly():
    x, _ = load_data("checkerboard").fetch(torch.arange(200_000))
    cell = ((x + 1) * 2).long().clamp(0, 3)
    assert bool((cell.sum(dim=1) % 2 == 0).all())
    count = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    assert (count > 0).sum() == 8
    assert (count[count > 0] - 25_000).abs().max() < 800  # five standard deviations
    assert abs(x.std().item() - 0.577) < 0.002


def test_unknown_data_set():
    with pytest.raises(UserError, match="checkerboard"):
        load_data("nonsense")


def test_uint8_round_trip_is_exact_and_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_grid_and_point_pictures():
    picture = grid([torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], scale=2)
    assert picture.shape == (1, 2 * 20, 3 * 20)
    corner = points_to_image(torch.tensor([[1.2, 1.2]]), size=10)  # up and right
    assert corner[0, 0, 9] == 255 and corner.sum() == 255
