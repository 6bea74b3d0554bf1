"""Prepared sets: their files are believed only as far as they are checked, and nothing else is touched."""

import json
import os
import shutil

import pytest
import torch
from helpers.makers import encoded, photograph, write_folder
from safetensors.torch import save

from flowmaps import UserError
from flowmaps.data import Latents, PreparedImages, TrajectoryFiles, open_dataset, shard_files
from flowmaps.data.prepare import write_images
from flowmaps.data.shard_files import sign
from flowmaps.data.shard_writing import check_directory, start_writing, write_missing
from flowmaps.files import sha256

SCALE = {"latent_shift": [0.0], "latent_scale": [1.0]}
FACTS = {
    "images": {"shape": [3, 4, 4], "num_classes": 2},
    "latents": {"shape": [1, 4, 4], "num_classes": 2, **SCALE},
    "trajectories": {"shape": [2], "num_classes": 2, "times": [0.0, 1.0], "interpolant": "linear", "base_std": 1.0}
    | {"teacher": "x", "guidance": None, "made": {"steps": 1}},
}
CLASSES = {"images": PreparedImages, "latents": Latents, "trajectories": TrajectoryFiles}


def rows(kind, number=0, count=3):
    g = torch.Generator().manual_seed(number)
    if kind == "images":
        return {"images": torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=g)}
    if kind == "latents":
        return {"moments": torch.rand(count, 2, 1, 4, 4, generator=g)}
    return {"states": torch.rand(count, 2, 2, generator=g)}


def write(out, kind="images", shards=2, **more):
    writing = start_writing(out, kind, FACTS[kind] | more, shards)
    label = {"label": torch.arange(3) % 2}
    list(write_missing(writing, lambda number: (rows(kind, number) | label, [])))
    return writing


def edit(file, change):
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_class_names_are_kept(tmp_path, kind):
    write(tmp_path / "named", kind, classes=["ant", "bee"])
    write(tmp_path / "plain", kind)
    assert CLASSES[kind].open(tmp_path / "named").class_names == ("ant", "bee")
    assert CLASSES[kind].open(tmp_path / "plain").class_names == ()


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_written_is_read(tmp_path, kind):
    write(tmp_path / "set", kind)
    data = CLASSES[kind].open(tmp_path / "set")
    x, label = data.fetch(torch.tensor([4, 0]))
    made = [next(iter(rows(kind, number).values())) for number in (1, 0)]
    assert torch.equal(x, torch.stack([made[0][1], made[1][0]])) and label.tolist() == [1, 0] and len(data) == 6
    assert data.digest() == CLASSES[kind].open(str(tmp_path / "set")).digest()


@pytest.mark.parametrize("where", [-1, -60, 40])  # the last row, another one, the header
@pytest.mark.parametrize("kind", CLASSES)
def test_a_flipped_bit_is_found_before_a_row_is_read(tmp_path, kind, where):
    write(tmp_path, kind)
    file = tmp_path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[where] ^= 64
    file.write_bytes(content)
    data = CLASSES[kind].open(tmp_path)
    data.fetch(torch.tensor([0]))  # of the intact file
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged, its checksum differs: run .*again"):
        data.fetch(torch.tensor([0, 3]))


def test_a_file_is_compared_once_until_it_changes(tmp_path, monkeypatch):
    write(tmp_path)
    looks = []
    monkeypatch.setattr(shard_files, "sha256", lambda file: looks.append(file.name) or sha256(file))
    for _ in range(3):  # as in later runs
        PreparedImages.open(tmp_path).fetch(torch.arange(6))
    assert looks == ["shard-00000.safetensors", "shard-00001.safetensors"]
    file = tmp_path / looks[1]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    PreparedImages.open(tmp_path).fetch(torch.arange(6))
    assert looks[2:] == ["shard-00001.safetensors"]


@pytest.mark.parametrize(
    "name", ["../mine/shard-00002.safetensors", "/etc/passwd", "mine.txt", "shard-00003.safetensors"]
)
def test_checksums_name_the_shards_and_nothing_else(tmp_path, name):
    write(out := tmp_path / "set")
    mine = write_folder(tmp_path / "mine", {"shard-00002.safetensors": b"mine"}) / "shard-00002.safetensors"
    entry = {"rows": 0, "bytes": 4, "sha256": "0", "left_out": []}
    edit(out / "checksums.json", lambda content: content.update({name: entry}))
    for use in (PreparedImages.open, write):
        with pytest.raises(UserError, match=r"checksums\.json lists .* in place of shard-00002\.safetensors"):
            use(out)
    assert mine.read_bytes() == b"mine"


def without(name):
    return lambda content: content.pop(name) and None


def setting(name, value):
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        *(("trajectories", without(name), f"{name} is missing") for name in ("times", "made", "shape", "teacher")),
        ("latents", without("latent_scale"), "latent_scale is missing"),
        ("latents", setting("latent_scale", [1, 2]), "2 numbers for 1 channels"),
        ("latents", setting("latent_scale", [0]), "latent_scale has a 0"),
        ("latents", setting("vae", 3), "vae is 3, expected str"),
        ("images", setting("shape", "big"), "shape is 'big'"),
        ("images", setting("shape", []), "shape is"),
        ("images", setting("shape", [3, -4, 4]), "shape is"),
        ("images", setting("shape", [10**9, 10**9]), "shape is"),
        ("images", setting("num_classes", 10**12), "num_classes is 1000000000000"),
        ("images", setting("num_classes", True), "num_classes is True"),
        ("images", setting("other", 1), "other is unknown"),
        ("images", setting("format", 3), "has format 3, this version reads 4"),
        ("images", lambda content: [content], "expected ImageFacts"),
        ("images", setting("classes", ["ant"]), "classes has 1 names for num_classes 2"),
        ("trajectories", setting("times", [0, 0.7, 0.3]), "times must be"),
        ("trajectories", setting("times", [0]), "times must be"),
        ("trajectories", setting("made", None), "made is None"),
    ],
)
def test_a_card_is_checked_as_a_whole(tmp_path, kind, change, said):
    write(tmp_path, kind)
    edit(tmp_path / f"{kind}.json", change)
    for use in (CLASSES[kind].open, lambda out: write(out, kind)):
        with pytest.raises(UserError, match=rf"{kind}\.json.*{said}"):
            use(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"rows": 1' + 10_000 * "0" + "}", "{", "", "NaN", "null", "3", '{"a": 1}']
)
@pytest.mark.parametrize("name", ["images.json", "checksums.json"])
def test_damaged_json_is_one_line(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name) as caught:
        PreparedImages.open(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "value"), [("rows", -1), ("rows", "3"), ("bytes", None), ("sha256", 3), ("left_out", 1)]
)
def test_an_entry_of_the_checksums_is_checked(tmp_path, name, value):
    write(tmp_path)
    edit(tmp_path / "checksums.json", lambda content: content["shard-00001.safetensors"].update({name: value}))
    with pytest.raises(UserError, match=rf"shard-00001\.safetensors.*{name} is"):
        PreparedImages.open(tmp_path)


@pytest.mark.parametrize("way", ["directory", "pipe", "device", "gone"])
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "images.json", "checksums.json"])
def test_something_else_in_the_place_of_a_file_is_one_line(tmp_path, name, way):
    write(tmp_path)
    file = tmp_path / name
    file.unlink()
    if way == "directory":
        file.mkdir()
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=name):
        PreparedImages.open(tmp_path)
    if way != "gone":
        with pytest.raises(UserError, match=rf"{name}|flowmaps did not write"):
            write(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "label": torch.zeros(3).long()},
            r"images U8 \[2, 3, 4, 4\]",
        ),
        (
            {"images": torch.zeros(3, 3, 4, 4), "label": torch.zeros(3).long()},
            r"images F32 .* expected U8 \[3, 3, 4, 4\]",
        ),
        (rows("images") | {"label": torch.tensor([0, 1, 2])}, "labels that are not 3 of 2 classes"),
        (rows("images") | {"label": torch.tensor([0, -1, 1])}, "labels that are not 3 of 2 classes"),
        (rows("images") | {"label": torch.zeros(1, dtype=torch.int64)}, "labels that are not 3 of 2 classes"),
        (rows("images"), "is damaged"),
        ({"label": torch.zeros(3).long()}, "is damaged"),
    ],
)
def test_a_shard_must_hold_what_the_card_says(tmp_path, tensors, said):
    write(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    file.write_bytes(save(tensors, sign("x", [])))
    entry = {"rows": 3, "bytes": file.stat().st_size, "sha256": sha256(file), "left_out": []}
    edit(tmp_path / "checksums.json", lambda content: content.update({file.name: entry}))
    with pytest.raises(UserError, match=said):
        PreparedImages.open(tmp_path).fetch(torch.tensor([3]))


@pytest.mark.parametrize("name", ["notes.txt", "sub/x.png", "shard-00000.safetensors", "checksums.json"])
def test_a_directory_with_files_of_others_is_refused(tmp_path, name):
    write_folder(tmp_path / "out", {name: b"mine"})
    with pytest.raises(UserError, match=f"out=.*flowmaps did not write .*{name.rpartition('/')[2]}"):
        write(tmp_path / "out")
    assert [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()] == [b"mine"]


def test_only_shards_of_the_set_are_replaced(tmp_path):
    write(tmp_path)
    expected = (tmp_path / "shard-00001.safetensors").read_bytes()
    (tmp_path / "shard-00001.safetensors").write_bytes(expected[:-5] + b"wrong")  # a damaged one is made again
    write(tmp_path)
    assert (tmp_path / "shard-00001.safetensors").read_bytes() == expected
    (tmp_path / "shard-00001.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors exists and flowmaps did not write it"):
        write(tmp_path)
    assert (tmp_path / "shard-00001.safetensors").read_bytes() == b"mine"
    (tmp_path / "shard-00001.safetensors").unlink()
    write(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):
        write(tmp_path)


def test_a_linked_directory_is_written_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "disk")
    write(tmp_path / "set")
    assert len(PreparedImages.open(tmp_path / "set")) == 6
    with pytest.raises(UserError, match="not a directory"):
        check_directory(tmp_path / "disk" / "images.json", "images")


def test_two_at_once_with_the_same_arguments_leave_one_complete_set(tmp_path):
    write(tmp_path / "alone")
    makes = [write_missing(start_writing(tmp_path / "out", "images", FACTS["images"], 2), made) for _ in range(2)]
    while makes:  # they take turns by shards
        makes = [make for make in makes if next(make, None)]
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def made(number):
    return rows("images", number) | {"label": torch.arange(3) % 2}, []


def test_two_at_once_with_other_arguments_never_mix(tmp_path):
    """Neither sees the other's card in time: the first is refused at its end, the second completes at the next try."""
    first = write_missing(start_writing(out := tmp_path / "out", "images", FACTS["images"], 2), made)
    next(first)
    (out / "images.json").unlink()
    second = write_missing(start_writing(out, "images", FACTS["images"] | {"num": 7}, 2), made)
    [next(make) for make in (second, second, first, first, second)]
    for make in (first, second):
        with pytest.raises(UserError, match="another command has written here at the same time"):
            list(make)
    assert not (out / "checksums.json").exists()
    write(out, num=7)
    write(tmp_path / "alone", num=7)
    assert PreparedImages.open(out).digest() == PreparedImages.open(tmp_path / "alone").digest()


def test_pictures_that_have_changed_are_noticed(tmp_path):
    src = write_folder(tmp_path / "src", {f"{i}.png": encoded(photograph(i), "png") for i in range(4)})
    list(write_images(str(tmp_path / "out"), str(src), 8, shard=2))
    list(write_images(tmp_path / "out", src, 8, shard=2))  # complete, and the same
    (src / "3.png").write_bytes(encoded(photograph(9), "png"))
    with pytest.raises(UserError, match=r"out=.*images of pictures that have changed since, in size or time"):
        list(write_images(tmp_path / "out", src, 8, shard=2))
    shutil.copytree(src, tmp_path / "copy", copy_function=shutil.copy)  # other times, the same content
    sets = [tmp_path / "a", tmp_path / "b"]
    for root, out in zip([src, tmp_path / "copy"], sets, strict=True):
        list(write_images(out, root, 8, shard=2))
    assert len({open_dataset(out).digest() for out in sets}) == 1


def test_a_repaired_picture_does_not_cost_the_work_so_far(tmp_path):
    files = {f"{i}.png": encoded(photograph(i), "png") for i in range(6)}
    src = write_folder(tmp_path / "src", files | {"5.png": b"damaged"})
    with pytest.raises(UserError, match=r"5\.png is not an intact image"):
        list(write_images(tmp_path / "out", src, 8, shard=2))
    seen = [(tmp_path / "out" / f"shard-0000{i}.safetensors").stat().st_mtime_ns for i in range(2)]
    write_folder(src, {"5.png": files["5.png"], "2.png": files["3.png"]})
    list(write_images(tmp_path / "out", src, 8, shard=2))
    again = [(tmp_path / "out" / f"shard-0000{i}.safetensors").stat().st_mtime_ns for i in range(2)]
    assert again[0] == seen[0] and again[1] > seen[1]
    list(write_images(tmp_path / "alone", src, 8, shard=2))
    assert open_dataset(tmp_path / "out").digest() == open_dataset(tmp_path / "alone").digest()


def test_shards_too_large_or_too_many_are_refused_before_any_work(tmp_path):
    src = write_folder(tmp_path / "src", {"0.png": encoded(photograph(0), "png")})
    with pytest.raises(UserError, match="shard=1000000: makes files of"):
        list(write_images(tmp_path / "out", src, 256, shard=10**6))
    with pytest.raises(UserError, match="size=100000"):
        list(write_images(tmp_path / "out", src, 100_000))
    with pytest.raises(UserError, match="shard: makes 1,000,000,000 files"):
        start_writing(tmp_path / "out", "images", FACTS["images"], 10**9)
    assert not (tmp_path / "out").exists()
