"""Hugging Face datasets: parquet, Arrow and image files, opened by an address."""

import pickle

import pytest
import torch
from helpers.collections import NAMES, pictures, table, write_parquet
from helpers.makers import encoded, photograph, write_folder

from flowmaps import UserError
from flowmaps.data import open_dataset, open_images
from flowmaps.data.prepare import write_images
from flowmaps.data.tables import Address, address

ALL = torch.arange(12)


@pytest.fixture(scope="module")
def images():
    return pictures(12)


@pytest.fixture(scope="module")
def place(tmp_path_factory, images):
    base = tmp_path_factory.mktemp("hf")
    write_parquet(base / "parquet", images)
    write_parquet(base / "parquet", images[:4], split="test")
    table(images).save_to_disk(base / "saved")
    table(images[:5]).to_parquet(base / "one.parquet")
    write_folder(base / "files", {f"train/{NAMES[i % 3]}/{i:02d}.png": image for i, image in enumerate(images)})
    write_folder(base / "folder", {f"{NAMES[i % 3]}/{i:02d}.png": image for i, image in enumerate(images)})
    return base


@pytest.mark.parametrize("source", ["parquet", "saved", "files"])
def test_rows_are_the_pictures_of_the_files_in_order(source, place, images):
    """Whatever the format: bytes in an Arrow table, or paths in it (imagefolder)."""
    data, folder = open_dataset(f"hf:{place / source}", size=16), open_images(place / "folder", 16)
    order = torch.tensor([int(name.rpartition("/")[2][:2]) for name in folder.names])
    rows = order if source != "files" else ALL  # by the library in order of folders
    (x, label), (wanted, number) = data.fetch(rows), folder.fetch(ALL)
    assert torch.equal(x, wanted) and torch.equal(label, number)
    assert data.class_names == NAMES and data.num_classes == 3 and data.shape == (3, 16, 16)
    assert data.file_of(3) == f"{place / source}/3"


def test_a_second_opening_finds_the_check_of_the_first(place, monkeypatch):
    first = open_dataset("hf", root=str(place / "parquet"), size=16)
    monkeypatch.setattr("flowmaps.data.image_check.inspect", pytest.fail)
    second = open_dataset("hf", root=str(place / "parquet"), size=16)
    assert first.digest() == second.digest() and first.sha256
    worker = pickle.loads(pickle.dumps(second))  # as a worker that is not forked has it
    assert torch.equal(worker.fetch(ALL)[0], first.fetch(ALL)[0])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ylecun/mnist", ("ylecun/mnist", "", "", "", "")),
        ("a/b:small@test", ("a/b", "small", "test", "", "")),
        ("a/b@train[:90%]#img", ("a/b", "", "train[:90%]", "img", "")),
        ("a/b:c-1@s#img,fine_label", ("a/b", "c-1", "s", "img", "fine_label")),
    ],
)
def test_an_address_has_a_config_a_split_and_columns(text, parts):
    assert address(text) == Address(*parts)


def test_an_existing_path_is_taken_as_it_stands(tmp_path):
    odd = tmp_path / "odd:name@x#y"
    odd.mkdir()
    assert address(str(odd)).place == str(odd)


def test_splits_and_parts_of_splits(place):
    counts = {"": 12, "@test": 4, "@train[:50%]": 6, "@train[50%:]": 6}
    assert {text: len(open_dataset(f"hf:{place / 'parquet'}{text}")) for text in counts} == counts
    assert len(open_dataset(f"hf:{place / 'one.parquet'}")) == 5


def test_columns_are_guessed_or_named(tmp_path, images):
    write_parquet(tmp_path / "a", images, image="img", label="fine")
    assert open_dataset(f"hf:{tmp_path / 'a'}").class_names == NAMES
    both = table(images, image="x", label="fine").add_column("y", [{"bytes": b"", "path": None}] * 12)
    both = both.add_column("label", [i % 2 for i in range(12)])
    (tmp_path / "b").mkdir()
    both.to_parquet(tmp_path / "b" / "train.parquet")
    data = open_dataset(f"hf:{tmp_path / 'b'}#x,label")
    assert data.label.tolist() == [i % 2 for i in range(12)] and data.class_names == () and data.num_classes == 2
    assert open_dataset(f"hf:{tmp_path / 'b'}#x").class_names == NAMES  # class labels go before integers


def test_labels_may_be_missing_all_but_not_in_part(tmp_path, images):
    write_parquet(tmp_path / "bare", images, names=None)
    assert open_dataset(f"hf:{tmp_path / 'bare'}").fetch(ALL)[1] is None
    for name, given in (("none", 12 * [-1]), ("some", [-1, *11 * [0]])):  # -1: as published test splits have
        features = table(images).features
        data = table(images).remove_columns("label").add_column("label", given).cast(features)
        data.save_to_disk(tmp_path / name)
    assert open_dataset(f"hf:{tmp_path / 'none'}").num_classes == 0
    with pytest.raises(UserError, match="1 items have no label, such as 0: label all or none"):
        open_dataset(f"hf:{tmp_path / 'some'}")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("parquet@dev", 'Unknown split "dev"'),
        ("nothing", "Couldn't find any data file"),
        ("parquet#foo", "no column foo: choose one of image, label"),
        ("parquet#label", "the column label of .* holds no images"),
        ("files/train/cat/00.png", "a file must be one of .parquet, .arrow"),
    ],
)
def test_what_cannot_be_opened_is_one_line(address, reason, place):
    with pytest.raises(UserError, match=reason) as caught:
        open_dataset(f"hf:{place / address}")
    assert "\n" not in str(caught.value)


def test_a_damaged_row_is_named_by_its_number(tmp_path, images):
    write_parquet(tmp_path / "bad", [*images[:3], images[3][:-60], b"", *images[4:]])
    with pytest.raises(UserError, match=r"2 files that are not intact images: 3 \(.*\), 4 \(the file is empty\)"):
        open_dataset(f"hf:{tmp_path / 'bad'}")
    data = open_dataset(f"hf:{tmp_path / 'bad'}", skip_corrupt=True, size=16)
    assert len(data) == 11 and data.fetch(ALL[:4])[1].tolist() == [0, 1, 2, 2]


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "flowmaps\[datasets\]"'):
        open_dataset("hf:a/b")


def test_prepared_crops_are_those_of_the_folder(place, tmp_path):
    found = []
    for name, source in (("a", f"hf:{place / 'files'}"), ("b", place / "folder")):
        list(write_images(tmp_path / name, source, 16, shard=8))
        found.append(open_dataset(tmp_path / name))
    (x, label), (wanted, number) = (data.fetch(ALL) for data in found)
    assert torch.equal(x, wanted) and torch.equal(label, number)
    assert found[0].class_names == found[1].class_names == NAMES


def test_grey_and_transparent_pictures_keep_their_channels(tmp_path):
    grey = [encoded(photograph(i).convert("LA"), "png") for i in range(3)]
    write_parquet(tmp_path / "grey", grey)
    assert open_dataset(f"hf:{tmp_path / 'grey'}", size=8, background="black").shape == (1, 8, 8)
