"""Images of the user's own, in folders and zip files."""

import io
import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from helpers.makers import encoded, photograph, write_folder, write_zip, zoo
from PIL import Image

from flowmaps import UserError
from flowmaps.data import open_dataset, open_images
from flowmaps.data.file_source import Folder
from flowmaps.data.image_io import BACKGROUNDS, inspect
from flowmaps.data.prepare import write_images


def test_every_kind_of_image_is_used_and_everything_else_is_named(tmp_path, capfd):
    """Truncated, grey, CMYK, 16-bit, empty and foreign files and a link in a circle: each named, nothing lost."""
    good, bad = zoo()
    root = write_folder(tmp_path / "zoo", good | bad | {"notes.txt": b"hello"})
    (root / "dog" / "loop").symlink_to(root)
    (root / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(UserError) as caught:
        open_images(root, 16)
    message = str(caught.value)
    assert f"{len(bad)} files" in message and "skip_corrupt" in message and "\n" not in message
    assert all(name in message for name in bad) and not any(name in message for name in good)
    data = open_images(root, 16, skip_corrupt=True)
    assert sorted(data.names) == sorted(good) and data.shape == (3, 16, 16)
    said = capfd.readouterr().err
    for named in [*bad, "notes.txt", "dog/loop (a link back", "gone.png (a broken link"]:
        assert named in said and any(named in line for line in data.left_out)
    x, label = data.fetch(torch.arange(len(data)))
    assert x.shape == (len(good), 3, 16, 16) and x.dtype == torch.uint8
    assert data.classes == ("cat", "dog") and label.tolist() == [int(name.startswith("dog")) for name in data.names]
    assert x.float().flatten(1).std(dim=1).min() > 10  # no picture came out blank


def test_a_zip_equals_the_folder(tmp_path):
    good, bad = zoo()
    folder = open_images(write_folder(tmp_path / "zoo", good), 16)
    for top in ("", "zoo/"):  # zip -r of a folder puts its name in front
        packed = write_zip(tmp_path / f"zoo{len(top)}.zip", good | bad | {"notes.txt": b"hello"}, top)
        with pytest.raises(UserError, match=r"half\.jpg"):
            open_images(packed, 16)
        data = open_images(packed, 16, skip_corrupt=True)
        index = torch.arange(len(data))
        assert all(torch.equal(a, b) for a, b in zip(data.fetch(index), folder.fetch(index), strict=True))
        assert data.class_names == data.classes == folder.classes


def test_a_damaged_entry_of_a_zip_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{i}.png": encoded(photograph(i), "png") for i in range(3)})
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)  # within the first entry: its checksum differs
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1 files .* 0\.png"):
        open_images(path, 8)
    path.write_bytes(content[:500])
    with pytest.raises(UserError, match="not a readable zip file"):
        open_images(path, 8)


def test_labels_from_dataset_json(tmp_path):
    files = {f"{i // 2:05d}/img{i}.png": encoded(photograph(i), "png") for i in range(4)}
    labels = [[name, 3 - i] for i, name in enumerate(files)]
    for make in (
        lambda content: write_folder(tmp_path / "f", files | {"dataset.json": content}),
        lambda content: write_zip(tmp_path / "f.zip", files | {"dataset.json": content}),
    ):
        data = open_images(make(json.dumps({"labels": labels}).encode()), 8)
        assert data.label.tolist() == [3, 2, 1, 0] and data.num_classes == 4 and not data.left_out
        assert data.class_names == ()  # numbers only
        data = open_images(make(b'{"labels": null}'), 8)
        assert data.label is None and data.num_classes == 0
        for wrong in (b"{", b"{}", b"[]", b'{"labels": [["a.png", 1]]}', b'{"labels": 3}', b'{"labels": [["x", -1]]}'):
            with pytest.raises(UserError, match=r"dataset\.json"):
                open_images(make(wrong), 8)


def test_there_are_no_labels_if_an_image_lies_outside_the_folders(tmp_path):
    png = encoded(photograph(0), "png")
    for i, names in enumerate([("a.png", "b.png"), ("x/a.png", "b.png"), ("x/a.png", "x/b.png")]):
        root = write_folder(tmp_path / str(i), dict.fromkeys(names, png))
        data = open_images(root, 8)
        assert data.fetch(torch.tensor([0]))[1] is None and data.num_classes == 0


def test_grey_folders_have_one_channel(tmp_path):
    root = write_folder(tmp_path, {f"{i}.png": encoded(photograph(i).convert("L"), "png") for i in range(3)})
    assert open_images(root, 8).shape == (1, 8, 8)
    write_folder(tmp_path, {"colour.png": encoded(photograph(3), "png")})
    data = open_images(root, 8)
    x, _ = data.fetch(torch.arange(4))
    assert data.shape == (3, 8, 8) and torch.equal(x[0, 0], x[0, 2]) and not torch.equal(x[3, 0], x[3, 2])


def test_images_are_checked_once_and_again_after_a_change(tmp_path, monkeypatch):
    root = write_folder(tmp_path, {f"{i}.png": encoded(photograph(i), "png") for i in range(3)})
    looks = count_looks(monkeypatch)
    for expected in (3, 3):
        open_images(root, 8)
        assert len(looks) == expected
    seen = (root / "2.png").stat()
    os.utime(root / "2.png", ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))  # same bytes, but who knows
    open_images(root, 8)
    assert len(looks) == 6
    (root / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1\.png \(not an image\)"):
        open_images(root, 8)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_check_that_was_cut_short_is_not_cached(tmp_path, monkeypatch, failure):
    root = write_folder(tmp_path, {f"{i}.png": encoded(photograph(i), "png") for i in range(3)})
    read = Folder.read

    def failing(source, name):
        if name == "2.png":
            raise failure("now")
        return read(source, name)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
        patch.setattr(Folder, "read", failing)
        open_images(root, 8)
    looks = count_looks(monkeypatch)
    assert len(open_images(root, 8)) == 3 and len(looks) == 3


def count_looks(monkeypatch):
    """A list that grows by each image that is checked."""
    looks = []

    def look(content):
        looks.append(1)
        return inspect(content)

    monkeypatch.setattr("flowmaps.data.image_check.inspect", look)
    return looks


def test_a_folder_is_listed_as_pathlib_sees_it(tmp_path):
    """Order, links, shadows, odd names: the listing equals one by definition, from three looks at each path."""
    png = encoded(photograph(0), "png")
    names = ["b.png", "a/z.PNG", "a/.png", "a-b/x.png", "a.png", "A/x.jpeg", "a/b/c.tif", "._a.png", "a/..png"]
    names += [
        "__MACOSX/x.png",
        "a/@eaDir/x.png",
        ".thumbnails/x.png",
        "a/.ipynb_checkpoints/z.png",
        "a/__MACOSX.png",
        "x.txt",
        "a/dataset.json",
        "dataset.json",
        "a/é.png",
        "noext",
        "png",
    ]
    root = write_folder(tmp_path / "all", dict.fromkeys(names, png))
    (root / "empty").mkdir()
    (root / "link.png").symlink_to(root / "b.png")
    (root / "folder.png").symlink_to(root / "a")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "a" / "up").symlink_to(root)
    (root / "gone").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.png")
    found, left_out = {}, []

    def walk(folder, above):
        for path in sorted(folder.iterdir()):
            name, real = path.relative_to(root).as_posix(), os.path.realpath(path)
            if path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir"):
                left_out.append(name)
            elif path.is_dir() and real not in above:
                walk(path, (*above, real))
            elif path.is_file() and path.suffix.lower() in (".png", ".jpeg", ".tif"):
                found[name] = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
            elif path.name != "dataset.json":
                left_out.append(name)

    walk(root, (os.path.realpath(root),))
    listed, others = Folder(root).listing()
    assert list(listed.items()) == list(found.items()) and len(found) > 10
    assert [name.partition(" (")[0] for name in others] == left_out


def test_threads_change_neither_images_nor_refusals(tmp_path):
    files = {f"{i % 3}/{i:02d}.png": encoded(photograph(i, 20 + i, 30), "png") for i in range(40)}
    data = open_images(write_folder(tmp_path, files), 16)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    (one, label), threads = data.fetch(index), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = data.fetch(index)
        assert torch.equal(one, several[0]) and torch.equal(label, several[1]) and several[0].is_contiguous()
        for name in ("0/03.png", "1/31.png"):
            (tmp_path / name).write_bytes(b"")
        first = next(data.names[i] for i in index.tolist() if data.names[i] in ("0/03.png", "1/31.png"))
        with pytest.raises(UserError, match=f"{first} is now unreadable"):
            data.fetch(index)
    finally:
        torch.set_num_threads(threads)


def test_wrong_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_dataset("folder", root=str(tmp_path / "nowhere"), size=8)
    with pytest.raises(UserError, match="has no images"):
        open_dataset("folder", root=str(tmp_path), size=8)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    for name, place in (("folder", "x.zip"), ("zip", ".")):
        with pytest.raises(UserError, match="choose folder or zip"):
            open_dataset(name, root=str(tmp_path / place), size=8)
    write_folder(tmp_path / "bad", {"a.png": b""})
    with pytest.raises(UserError, match="has no intact image"):
        open_images(tmp_path / "bad", 8, skip_corrupt=True)


def test_without_a_size_images_must_have_one_shape(tmp_path):
    root = write_folder(tmp_path, {"a.png": encoded(photograph(0), "png"), "b.png": encoded(photograph(1), "png")})
    data = open_images(root)
    assert data.shape == (3, 40, 30)
    raw = np.asarray(Image.open(io.BytesIO((root / "b.png").read_bytes())))
    assert np.array_equal(data.fetch(torch.tensor([1]))[0][0].permute(1, 2, 0).numpy(), raw)
    write_folder(tmp_path, {"c.png": encoded(photograph(2, 20, 20), "png")})
    with pytest.raises(UserError, match=r"c\.png has shape .* size=64"):
        open_images(root).fetch(torch.arange(3))


def test_files_that_macos_adds_to_a_zip_are_neither_images_nor_classes(tmp_path):
    files = {f"pets/{kind}/{i}.png": encoded(photograph(i), "png") for i, kind in enumerate(("cat", "dog"))}
    shadows = {f"__MACOSX/pets/{kind}/._{i}.png": b"shadow" for i, kind in enumerate(("cat", "dog"))}
    data = open_images(write_zip(tmp_path / "a.zip", files | shadows | {"pets/cat/._0.png": b"x"}), 8)
    assert data.classes == ("cat", "dog") and data.label.tolist() == [0, 1]
    assert data.left_out == ("__MACOSX (hidden)", "pets/cat/._0.png (hidden)")


def test_dataset_json_in_the_top_folder_of_a_zip(tmp_path):
    files = {f"0000{i}/img.png": encoded(photograph(i), "png") for i in range(2)}
    labels = {"labels": [[name, 1 - i] for i, name in enumerate(files)]}
    path = write_zip(tmp_path / "a.zip", files | {"dataset.json": json.dumps(labels).encode()}, top="ds/")
    data = open_images(path, 8)
    assert data.label.tolist() == [1, 0] and not data.left_out


def test_labels_of_used_images_must_be_integers(tmp_path):
    files = {name: encoded(photograph(0), "png") for name in ("a.png", "b.png")} | {"c.png": b""}
    for values, fine in (((0, 1), True), ((0.9, 1), False), ((True, 0), False), ((0, 10**9), False)):
        listed = {"labels": [[name, value] for name, value in zip(files, values, strict=False)]}
        root = write_folder(tmp_path, files | {"dataset.json": json.dumps(listed).encode()})
        if fine:  # the skipped file needs no label
            assert open_images(root, 8, skip_corrupt=True).label.tolist() == [0, 1]
        else:
            with pytest.raises(UserError, match="not an integer"):
                open_images(root, 8, skip_corrupt=True)


def test_a_repaired_zip_is_checked_again(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{i}.png": encoded(photograph(i), "png") for i in range(2)})
    whole = path.read_bytes()
    for start in (60, 45):  # a wrong checksum, or a stream that zlib refuses: both are named
        path.write_bytes(whole[:start] + bytes(30) + whole[start + 30 :])
        with pytest.raises(UserError, match=r"1 files .* 0\.png"):
            open_images(path, 8)
        path.write_bytes(whole)
        assert len(open_images(path, 8)) == 2


def test_a_path_may_be_text(tmp_path):
    root = write_folder(tmp_path / "i", {"a.png": encoded(photograph(0), "png")})
    assert (
        open_images(str(root), 8).digest() == open_images(root, 8).digest() == open_dataset(str(root), size=8).digest()
    )


FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n%%EOF\n",
    "gif": encoded(photograph(0).quantize(8), "gif"),
    "pcx": encoded(photograph(0), "pcx"),
    "ico": encoded(photograph(0), "ico"),
}


@pytest.mark.parametrize("suffix", ["png", "JPEG", "tif"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_only_the_formats_of_the_suffixes_are_read(tmp_path, monkeypatch, kind, suffix):
    """Pillow chooses a reader by content, and the one of EPS starts Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    files = {f"a.{suffix}": FOREIGN[kind], "b.png": encoded(photograph(1), "png")}
    for root in (write_folder(tmp_path / "i", files), write_zip(tmp_path / "i.zip", files)):
        with pytest.raises(UserError, match=rf"1 files .* a\.{suffix} \(not an image\)"):
            open_images(root, 8)
        with pytest.raises(UserError, match=rf"a\.{suffix} is not an intact image \(not an image\)"):
            list(write_images(tmp_path / f"out-{root.name}", root, 8))


def png_header(width, height):
    """A PNG file that claims a size and has pixels for none of it."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))))
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(10**8, 1), (1, 10**8), (10**4, 10**4), (2**31 - 1, 2**31 - 1), (8193, 8192)])
def test_sizes_are_compared_with_a_limit_before_anything_is_allocated(tmp_path, size):
    root = write_folder(tmp_path, {"a.png": png_header(*size), "b.png": encoded(photograph(1), "png")})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"1 files .* a\.png \(.* pixels"):
            open_images(root, 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="size=100000: must lie in"):
        open_images(root, 100_000)


def test_a_narrow_picture_is_not_blown_up(tmp_path):
    root = write_folder(tmp_path, {"a.png": encoded(Image.new("L", (30_000, 1)), "png")})
    with pytest.raises(UserError, match=r"a\.png is not an intact image \(30000 x 1 pixels are too narrow"):
        list(write_images(tmp_path / "out", root, 64))
    assert open_images(root, 64).fetch(torch.tensor([0]))[0].shape == (1, 1, 64, 64)


@pytest.mark.parametrize("packed", [True, False])
def test_files_too_large_are_not_read(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("flowmaps.data.file_source.LARGEST_FILE", 5000)
    files = {"a.png": bytes(5001), "b.png": encoded(photograph(1), "png")}
    root = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path / "a", files)
    with pytest.raises(UserError, match=r"1 files .* a\.png \('?5,001 bytes, more than 5,000"):
        open_images(root, 8)


@pytest.mark.parametrize("way", ["pipe", "device"])
@pytest.mark.parametrize("name", ["dataset.json", "x.png", "all.zip"])
def test_pipes_and_devices_are_not_read(tmp_path, name, way):
    root = write_folder(tmp_path / "i", {f"{i}.png": encoded(photograph(i), "png") for i in range(2)})
    os.mkfifo(root / name) if way == "pipe" else (root / name).symlink_to("/dev/zero")
    if name == "x.png":
        assert open_images(root, 8).left_out == ("x.png (a broken link or not a file)",)
    else:
        with pytest.raises(UserError, match=name + r".*a pipe or a device, not a file"):
            open_images(root / name if name == "all.zip" else root, 8)


def test_a_picture_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    data = open_images(write_folder(tmp_path, {"0.png": encoded(photograph(0), "png")}), 8)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png is now unreadable \(a pipe"):
        data.fetch(torch.tensor([0]))


@pytest.mark.parametrize("packed", [True, False])
def test_other_pictures_under_the_same_names_are_other_data_and_copies_are_not(tmp_path, packed):
    def make(name, *seeds):
        files = {f"{i}.png": encoded(photograph(seed), "png") for i, seed in enumerate(seeds)}
        root = write_zip(tmp_path / f"{name}.zip", files) if packed else write_folder(tmp_path / name, files)
        return open_images(root, 8)

    first, copy = make("a", 0, 1, 2), make("b", 0, 1, 2)
    assert first.digest() == copy.digest() and first.content() == copy.content()
    for other in (make("a", 0, 1, 3), make("a", 1, 0, 2)):
        assert other.digest() != first.digest() and other.content() != first.content()


def labelled(root, labels):
    files = {f"{i}.png": encoded(photograph(i), "png") for i in range(len(labels))}
    listed = {"labels": [[f"{i}.png", label] for i, label in enumerate(labels)]}
    return write_folder(root, files | {"dataset.json": json.dumps(listed).encode()})


def test_classes_without_an_image(tmp_path, capfd):
    """Labels counted from 1 would make one; gaps are named."""
    with pytest.raises(UserError, match=r"dataset\.json .* begin at 1, so that class 0 has no image: count from 0"):
        open_images(labelled(tmp_path, [1, 2, 1]), 8)
    assert open_images(labelled(tmp_path, [0, 4, 2]), 8).num_classes == 5
    assert "classes without an image: 1, 3\n" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"labels": [["0.png", 1' + 10_000 * b"0" + b"]]}", b"\xff\xfe"])
def test_hostile_labels_are_one_line(tmp_path, content):
    root = write_folder(tmp_path, {"0.png": encoded(photograph(0), "png"), "dataset.json": content})
    with pytest.raises(UserError, match=r"dataset\.json is not readable JSON") as caught:
        open_images(root, 8)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_hidden_folders_are_named_beside_many_other_files(tmp_path, capfd):
    files = dict.fromkeys([f"{i}.txt" for i in range(30)] + ["b/@eaDir/0.png", "b/0\n.bak"], b"x")
    root = write_folder(tmp_path, files | {f"{c}/0.png": encoded(photograph(0), "png") for c in "ab"})
    data = open_images(root, 8)
    assert (
        data.classes == ("a", "b") and data.left_out[0] == "b/@eaDir (hidden)" and "30 files with .txt" in data.left_out
    )
    assert capfd.readouterr().err.count("\n") == 1
    list(write_images(tmp_path / "out", root / "b", 8))
    assert "@eaDir (hidden)" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"has no images .*left out: \.a\.png \(hidden\)"):
        open_images(write_folder(tmp_path / "none", {".a.png": b"x"}), 8)


def test_many_foreign_files_are_counted_by_suffix(tmp_path):
    files = {f"{i}.{suffix}": b"text" for i in range(15) for suffix in ("txt", "json")}
    root = write_folder(tmp_path, files | {"a.png": encoded(photograph(0), "png")})
    assert set(open_images(root, 8).left_out) == {"15 files with .json", "15 files with .txt"}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_padding_keeps_all_of_a_picture_and_adds_the_background(background, tmp_path):
    """The padded square has the picture's sum plus that of the added pixels; a square picture does not change."""
    grey = BACKGROUNDS[background]
    tall = np.asarray(photograph(0, 40, 20))
    data = open_images(
        write_folder(tmp_path, {"a.png": encoded(photograph(0, 40, 20), "png")}), 40, False, "pad", background
    )
    x = data.fetch(torch.arange(1))[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(x[:, 10:30], tall) and np.all(x[:, :10] == grey) and np.all(x[:, 30:] == grey)
    assert "padded to a square" in data.crop and (background in data.crop) == (background != "white")
    small = open_images(tmp_path, 10, fit="pad", background=background).fetch(torch.arange(1))[0][0].permute(1, 2, 0)
    assert np.array_equal(small.numpy(), np.rint(x.reshape(10, 4, 10, 4, 3).mean((1, 3), dtype=np.float64)))
    assert data.content() != open_images(tmp_path, 40).content()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_transparent_pixels_show_the_background(background, tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (10, 20, 30, 255)
    files = {"a.png": encoded(Image.fromarray(clear), "png"), "b.png": encoded(Image.new("LA", (4, 4), (9, 0)), "png")}
    data = open_images(write_folder(tmp_path, files), background=background)
    x = data.fetch(torch.arange(2))[0]
    assert torch.all(x[0, :, 2:] == BACKGROUNDS[background]) and torch.all(x[1] == BACKGROUNDS[background])
    assert x[0, :, 0, 0].tolist() == [10, 20, 30]


def test_the_way_to_a_square_is_one_of_two(tmp_path):
    write_folder(tmp_path, {"a.png": encoded(photograph(0), "png")})
    with pytest.raises(UserError, match="fit=squeeze: choose one of crop, pad"):
        open_images(tmp_path, 8, fit="squeeze")
    write_folder(tmp_path, {"a.png": encoded(Image.new("L", (9000, 2)), "png")})
    with pytest.raises(UserError, match="9000 x 2 pixels are too many to be padded to a square"):
        open_images(tmp_path, 8, fit="pad").fetch(torch.arange(1))
