import gzip
import os
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.makers import encoded, photograph, write_cifar10, write_fashion_mnist, write_folder

from flowmaps import UserError
from flowmaps.data import DATASETS, Loader, ShuffledOrder, download, open_dataset, open_images
from flowmaps.images import from_uint8, grid, points_to_image, to_uint8


def test_order_visits_every_item_once_an_epoch_and_depends_on_position_alone():
    order = ShuffledOrder(10, seed=3)
    whole = order.indices(0, 35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    for start, count in [(0, 1), (7, 9), (9, 21), (30, 5), (3, 2)]:
        assert torch.equal(ShuffledOrder(10, seed=3).indices(start, count), whole[start : start + count])
    assert not torch.equal(ShuffledOrder(10, seed=4).indices(0, 35), whole)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("digits", "0", "9"), ("fashion_mnist", "T-shirt/top", "Ankle boot"), ("cifar10", "airplane", "truck")],
)
def test_classes_have_names(name, first, last, data_root):
    for split in ("train", "heldout"):
        names = open_dataset(name, split, root=str(data_root)).class_names
        assert (names[0], names[-1], len(names)) == (first, last, 10)
    assert open_dataset("checkerboard").class_names == ()


@pytest.mark.parametrize("name", DATASETS)
def test_splits_are_fixed_and_disjoint(name, data_root):
    files = str(data_root)
    train, heldout = open_dataset(name, root=files), open_dataset(name, "heldout", root=files)
    assert torch.equal(train.x, open_dataset(name, root=files).x)
    assert train.shape == heldout.shape and train.num_classes == heldout.num_classes
    seen = {x.numpy().tobytes() for x in train.x[:2000]}
    assert not any(x.numpy().tobytes() in seen for x in heldout.x[:2000])
    x, label = train.fetch(torch.arange(300))
    assert x.dtype == torch.uint8 or (x.dtype == torch.float32 and x.abs().max() <= 1)
    assert (label is None) == (train.num_classes == 0)
    if label is not None:
        assert label.dtype == torch.int64 and 0 <= label.min() and label.max() < train.num_classes


def test_fashion_mnist_is_read_compressed_or_not_and_padded(data_root, tmp_path):
    write_fashion_mnist(tmp_path, packed=False)
    packed, plain = (open_dataset("fashion_mnist", root=root) for root in (data_root, tmp_path))
    assert torch.equal(packed.x, plain.x) and torch.equal(packed.label, plain.label)
    assert packed.shape == (1, 32, 32) and len(packed) == 600
    assert packed.x[..., :2, :].max() == 0 and packed.x[..., 2:30, 2:30].max() == 255


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^root="):
        open_dataset("fashion_mnist", root=str(tmp_path))
    write_fashion_mnist(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    labels = (tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz").read_bytes()
    flipped = content[:40] + bytes([content[40] ^ 255]) + content[41:]
    for broken in (content[:1000], b"", b"no gzip at all", labels, flipped):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
            open_dataset("fashion_mnist", root=str(tmp_path))


def test_cifar10_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    """Files with Python 2's opcodes; torchvision's own reader, its checksums set to these files', gives the same."""
    import hashlib

    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)

    def summed(parts):
        return [(name, hashlib.md5((tmp_path / CIFAR10.base_folder / name).read_bytes()).hexdigest()) for name in parts]

    monkeypatch.setattr(CIFAR10, "train_list", summed([f"data_batch_{i}" for i in range(1, 6)]))
    monkeypatch.setattr(CIFAR10, "test_list", summed(["test_batch"]))
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for split in ("train", "heldout"):
        ours, theirs = open_dataset("cifar10", split, root=str(tmp_path)), CIFAR10(tmp_path, train=split == "train")
        assert torch.equal(ours.x, torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
        assert ours.label.tolist() == theirs.targets


def test_cifar10_executes_no_pickle_and_names_damaged_files(tmp_path):
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    for broken in (content[:5000], b"", b"text", pickle.dumps(Evil()), pickle.dumps({"data": 1}), pickle.dumps([1])):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="data_batch_3 is damaged"):
            open_dataset("cifar10", root=str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=r"^root=.*data\.download"):
        open_dataset("cifar10", root=str(tmp_path))


def packed_zeros(path):
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">BBBBIII", 0, 0, 8, 3, 10**6, 28, 28))
        file.writelines(bytes(1 << 20) for _ in range(100))


@pytest.mark.parametrize("way", ["pipe", "device", "directory", "large"])
@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-batches-py/data_batch_3"), ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz")],
)
def test_only_files_of_a_sensible_size_are_read(tmp_path, name, file, way):
    write_cifar10(tmp_path), write_fashion_mnist(tmp_path)
    (path := tmp_path / file).unlink()
    if way == "pipe":
        os.mkfifo(path)
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "directory":
        path.mkdir()
    elif name == "fashion_mnist":
        packed_zeros(path)
    else:
        with path.open("wb") as sparse:
            sparse.truncate(1 << 40)
    with pytest.raises(UserError, match=Path(file).stem) as caught:
        open_dataset(name, root=str(tmp_path))
    assert "download the data set again" in str(caught.value) and "\n" not in str(caught.value)


def test_an_array_of_any_size_in_a_pickle_allocates_nothing(tmp_path):
    class Array:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (1 << 33,), b"b")

    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({"data": Array(), "labels": [0]}))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="data_batch_3 is damaged"):
            open_dataset("cifar10", root=str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_download_offline_is_one_clear_message(tmp_path, monkeypatch):
    """torchvision's own downloader runs, with every address unreachable."""
    import socket

    def refuse(*arguments, **options):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("cifar10", "fashion_mnist"):
        with pytest.raises(UserError, match=f"cannot download {name} .*copy its folder"):
            download(name, str(tmp_path))
    with pytest.raises(UserError, match="digits cannot be downloaded"):
        download("digits", str(tmp_path))


def test_digits_are_the_real_scans():
    train, heldout = open_dataset("digits"), open_dataset("digits", "heldout")
    assert len(train) == 1348 and len(heldout) == 449 and train.shape == (1, 8, 8)
    assert train.x.min() == 0 and train.x.max() == 255


def test_checkerboard_fills_its_cells_evenly():
    x, _ = open_dataset("checkerboard").fetch(torch.arange(200_000))
    cell = ((x + 1) * 2).long().clamp(0, 3)
    assert bool((cell.sum(dim=1) % 2 == 0).all())
    count = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    assert (count > 0).sum() == 8
    assert (count[count > 0] - 25_000).abs().max() < 800  # five standard deviations
    assert abs(x.std().item() - 0.577) < 0.002


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_order_with_and_without_workers(data_root, workers):
    """Also after a jump, as a resume makes, and without touching torch's global generator."""
    data = open_images(data_root / "folder", size=8)
    order = ShuffledOrder(len(data), seed=1)
    loader = Loader(data, lambda k: order.indices(5 * k, 5), workers)
    state = torch.get_rng_state()
    for k in (0, 1, 2, 7, 8, 3):
        x, label = loader.batch(k)
        expected = data.fetch(order.indices(5 * k, 5))
        assert torch.equal(x, expected[0]) and torch.equal(label, expected[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_damaged_later_is_named_in_one_line_also_from_a_worker(data_root, tmp_path):
    shutil.copytree(data_root / "folder", tmp_path / "folder")
    data = open_images(tmp_path / "folder", size=8)
    (tmp_path / "folder" / "a" / "4.png").write_bytes(b"")
    for workers in (0, 1):
        loader = Loader(data, lambda k: torch.arange(12), workers)
        with pytest.raises(UserError, match=r"a/4\.png is now unreadable") as caught:
            loader.batch(0)
        assert "\n" not in str(caught.value)


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(UserError, match=r"name=nonsense: .*checkerboard"):
        open_dataset("nonsense")
    with pytest.raises(UserError, match="unknown split 'middle' of digits"):
        open_dataset("digits:middle")
    with pytest.raises(UserError, match="split=heldout"):
        open_dataset(Path(__file__).parent, "heldout")


def test_names_with_a_split(tmp_path, monkeypatch):
    """A name of the table is always the built-in data set; NAME-split gives way to a file, and so does any Path."""
    heldout = open_dataset("digits", "heldout")
    for name in ("digits:heldout", "digits-heldout"):
        data = open_dataset(name)
        assert (data.name, data.split, data.crop) == ("digits", "heldout", "none")
        assert torch.equal(data.x, heldout.x) and data.content() == heldout.content()
    monkeypatch.chdir(tmp_path)
    image = encoded(photograph(0), "png")
    for folder in ("digits", "digits-heldout"):
        write_folder(tmp_path / folder, {"1.png": image, "2.png": image})
    assert len(open_dataset("digits")) == 1348
    assert len(open_dataset("digits-heldout")) == len(open_dataset(Path("digits"))) == 2


def test_uint8_round_trip_is_exact_and_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_grid_and_point_pictures():
    picture = grid([torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], scale=2)
    assert picture.shape == (1, 2 * 20, 3 * 20)
    corner = points_to_image(torch.tensor([[1.2, 1.2]]), size=10)  # up and right
    assert corner[0, 0, 9] == 255 and corner.sum() == 255
