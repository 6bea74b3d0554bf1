"""WebDataset's tar shards: local ones, and those of a web server."""

import functools
import http.server
import threading

import pytest
import torch
from helpers.collections import NAMES, pictures, write_shards, write_tar
from helpers.makers import write_folder

from flowmaps import UserError
from flowmaps.data import open_dataset, open_images
from flowmaps.data.prepare import write_images
from flowmaps.data.tars import shards_of

ALL = torch.arange(12)


@pytest.fixture(scope="module")
def images():
    return pictures(12)


@pytest.fixture(scope="module")
def place(tmp_path_factory, images):
    base = tmp_path_factory.mktemp("wds")
    write_shards(base / "shards", images, each=5)
    write_folder(base / "folder", {f"{i:06d}.png": image for i, image in enumerate(images)})
    return base


@pytest.mark.parametrize("pattern", ["shards", "shards/train-*.tar", "shards/train-{000..002}.tar"])
def test_samples_are_the_pictures_of_a_folder_in_order(pattern, place):
    data, folder = open_dataset("wds", root=str(place / pattern), size=16), open_images(place / "folder", 16)
    for rows in (ALL, ALL.flip(0)):
        x, label = data.fetch(rows)
        assert torch.equal(x, folder.fetch(rows)[0]) and torch.equal(label, rows % 3)
    assert data.class_names == NAMES and data.name == "shards"
    assert data.file_of(5) == f"{place / 'shards'}/train-001.tar/000005.png"


def test_an_index_is_made_once_and_again_when_a_shard_changes(place, images, tmp_path, monkeypatch):
    write_shards(tmp_path / "s", images, each=6)
    first = open_dataset(f"wds:{tmp_path / 's'}", size=16)
    with monkeypatch.context() as patch:
        patch.setattr("flowmaps.data.tars._walk", pytest.fail)
        assert open_dataset(f"wds:{tmp_path / 's'}", size=16).digest() == first.digest()
    write_shards(tmp_path / "s", images[::-1], each=6)
    assert open_dataset(f"wds:{tmp_path / 's'}", size=16).digest() != first.digest()


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("http://a/{00..02}.tar", ["http://a/00.tar", "http://a/01.tar", "http://a/02.tar"]),
        ("https://a/{x,y}-{8..10}.tar", [f"https://a/{x}-{n}.tar" for x in "xy" for n in (8, 9, 10)]),
    ],
)
def test_patterns_of_urls(pattern, files):
    assert shards_of(pattern) == files


@pytest.mark.parametrize(
    ("files", "address", "reason"),
    [
        ({"a.png": 0, "a.seg.png": 1}, "", r"a has several images \(png, seg\.png\): choose one of them, as in #png"),
        ({"a.png": 0, "b.png": 1, "b.cls": b"1"}, "", "1 items have no label, such as t.tar/a.png"),
        ({"a.png": 0, "a.cls": b"1"}, "", "the labels begin at 1"),
        ({"a.png": 0}, "#png,txt", r"no sample has a label \.txt"),
        ({"a.txt": b"words"}, "", "has no images"),
        ({"a.png": b"no picture"}, "", r"1 files that are not intact images: t\.tar/a\.png"),
    ],
)
def test_what_cannot_be_used_is_one_line(files, address, reason, tmp_path, images):
    made = {name: images[content] if isinstance(content, int) else content for name, content in files.items()}
    with pytest.raises(UserError, match=reason) as caught:
        open_dataset(f"wds:{write_tar(tmp_path / 't.tar', made)}{address}")
    assert "\n" not in str(caught.value)


def test_extensions_may_be_named_and_samples_without_an_image_are_left_out(tmp_path, images, capfd):
    files = {"a.rgb.png": images[0], "a.seg.png": images[1], "a.txt": b"dog", "b.json": b"{}", "._c.rgb.png": b""}
    data = open_dataset(f"wds:{write_tar(tmp_path / 't.tar', files)}#rgb.png,txt", size=16)
    assert len(data) == 1 and data.classes == ("dog",) and "t.tar/b (no image)" in capfd.readouterr().err
    assert torch.equal(
        data.fetch(ALL[:1])[0], open_images(write_folder(tmp_path / "f", {"a.png": images[0]}), 16).fetch(ALL[:1])[0]
    )


@pytest.mark.parametrize("damage", ["cut", "header", "gzip", "other"])
def test_a_damaged_shard_is_named(damage, tmp_path, images):
    path = write_tar(tmp_path / "t.tar", {f"{i}.png": image for i, image in enumerate(images[:3])})
    content = path.read_bytes()
    if damage == "header":  # of the second member: reading would end there without a word
        start = 512 + -(-len(images[0]) // 512) * 512
        content = content[:start] + b"x" * 512 + content[start + 512 :]
    path.write_bytes(
        {"cut": content[:1000], "gzip": b"\x1f\x8b" + content, "other": b"text" * 200}.get(damage, content)
    )
    with pytest.raises(UserError, match=r"t\.tar is not an intact tar file without compression .*: create it again"):
        open_dataset(f"wds:{path}")


def test_shards_of_one_name_are_refused(tmp_path, images):
    for folder in "ab":
        write_tar(tmp_path / folder / "t.tar", {"0.png": images[0]})
    with pytest.raises(UserError, match=r"two shards are called t\.tar"):
        open_dataset(f"wds:{tmp_path}/{{a,b}}/t.tar")


@pytest.mark.parametrize("name", ["nothing", "nothing-{0..3}.tar", "none*.tar"])
def test_missing_shards_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read|no tar file there"):
        open_dataset(f"wds:{tmp_path / name}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.asked.append(self.path)


@pytest.fixture
def server(place):
    handler = functools.partial(Quiet, directory=place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_shards_of_a_server_are_fetched_once_and_equal_local_ones(server, place):
    url = f"http://127.0.0.1:{server.server_port}/shards/train-{{000..002}}.tar"
    local = open_dataset(f"wds:{place / 'shards'}", size=16)
    for _ in range(2):
        data = open_dataset(f"wds:{url}", size=16)
        assert data.digest() == local.digest() and torch.equal(data.fetch(ALL)[0], local.fetch(ALL)[0])
    assert len(server.asked) == 3 and data.name == "shards"
    with pytest.raises(UserError, match=r"train-007\.tar cannot be downloaded \(HTTP Error 404"):
        open_dataset(f"wds:{url.replace('{000..002}', '007')}")


def test_prepared_crops_are_those_of_the_folder(place, tmp_path):
    for name, source in (("a", f"wds:{place / 'shards'}"), ("b", place / "folder")):
        list(write_images(tmp_path / name, source, 16, shard=8))
    a, b = (open_dataset(tmp_path / name) for name in "ab")
    assert torch.equal(a.fetch(ALL)[0], b.fetch(ALL)[0]) and a.class_names == NAMES
