"""Writers replace only what flowmaps wrote, completely or not at all."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flowmaps.errors import LONGEST_LINE, UserError, shorten
from flowmaps.files import (
    Layout,
    _swap,
    check_new_file,
    is_ours,
    new_directory,
    new_file,
    to_json,
    write_file,
    write_json,
)
from flowmaps.images import write_png

LAYOUT = Layout("index.json", b'"mine"', ("index.json", "weights/*"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, number):
    with new_directory(path, LAYOUT) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "a").write_text(str(number))
        (folder / "index.json").write_text('{"mine": 1}')


def test_a_directory_is_replaced_by_the_next_of_its_kind(tmp_path):
    for number in range(2):
        write(tmp_path / "a", number)
        assert (tmp_path / "a" / "weights" / "a").read_text() == str(number)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["keep.txt", ".hidden", "index.json", "other/x", "weights"])
@pytest.mark.parametrize("first", [False, True])
def test_a_directory_with_a_file_of_the_users_is_refused(tmp_path, name, first):
    """Alone, or among what flowmaps wrote."""
    if first:
        write(tmp_path / "a", 0)
        if name in ("index.json", "weights"):
            return
    mine = tmp_path / "a" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=mine.name):
        write(tmp_path / "a", 1)
    assert mine.read_text() == "mine" and names(tmp_path) == ["a"]


def test_a_file_that_appears_during_the_writing_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"keep\.txt"), new_directory(tmp_path / "a", LAYOUT) as folder:
        (folder / "index.json").write_text('{"mine": 1}')
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "keep.txt").write_text("mine")
    assert names(tmp_path / "a") == ["keep.txt"] and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_directory_is_not_written_over_a_file_or_through_a_link(tmp_path, kind):
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("mine")
    else:
        (tmp_path / "b").mkdir()
        target.symlink_to("b")
    with pytest.raises(UserError, match="not a directory"):
        write(target, 0)


def test_without_an_exchange_by_the_system_a_kill_between_two_renames_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr("flowmaps.files._swap", lambda a, b: False)
    for number in range(2):
        write(tmp_path / "a", number)
    assert (tmp_path / "a" / "weights" / "a").read_text() == "1" and names(tmp_path) == ["a"]
    (tmp_path / "a").rename(tmp_path / ".a.old")  # where a kill leaves it
    write(tmp_path / "a", 2)
    assert (tmp_path / "a" / "weights" / "a").read_text() == "2" and names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_two_directories_change_places_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert _swap(tmp_path / "a", tmp_path / "b") and names(tmp_path / "a") == ["b"]


WRITERS = {
    "x.json": lambda path: write_json(path, {"a": 1}),
    "list.json": lambda path: write_json(path, [{"a": 1}]),
    "x.png": lambda path: write_png(Image.new("L", (2, 2)), path),
    "x.npz": lambda path: _npz(path),
}


def _npz(path):
    with new_file(path) as beside, beside.open("wb") as file:
        np.savez(file, a=np.zeros(9), written_by="flowmaps")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_by_a_newer_one_and_nothing_of_the_users_is(tmp_path, name):
    path = tmp_path / name
    for _ in range(2):
        WRITERS[name](path)
        assert is_ours(path)
    link = tmp_path / "link"
    link.symlink_to(name)
    WRITERS[name](link)
    assert link.is_symlink() and is_ours(path)
    path.write_text('{"flowmaps": "mentioned by a user"}')
    for target in (path, link):
        with pytest.raises(UserError, match="did not write it"):
            WRITERS[name](target)
    assert path.read_text() == '{"flowmaps": "mentioned by a user"}'
    assert names(tmp_path) == ["link", name]


def test_an_error_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(RuntimeError), new_file(tmp_path / "a.json") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_bytes() == before and names(tmp_path) == ["a.json"]


def test_names_that_a_killed_process_left_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from flowmaps.files import new_file\n"
        "with new_file(Path(sys.argv[1]) / 'a') as f: f.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == 1
    with new_file(tmp_path / "b") as living:
        living.write_text("b")
        write_file(tmp_path / "c", b"c")
        assert living.exists()
    assert names(tmp_path) == ["b", "c"]


@pytest.mark.parametrize("kind", ["pipe", "/dev/null", "directory"])
def test_a_target_that_is_not_a_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / "a" if kind != "/dev/null" else "/dev/null"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(UserError, match=r"exists and flowmaps did not write it|is a directory"):
        check_new_file(tmp_path / path)


def test_a_check_makes_nothing(tmp_path):
    check_new_file(tmp_path / "new" / "folder" / "a.json")
    assert not names(tmp_path)


def test_numbers_that_json_does_not_have_become_null():
    values = {"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": (-float("inf"),)}}
    written_by = {"written_by": "flowmaps"}
    assert json.loads(to_json(values)) == written_by | {"a": None, "b": [None, 1.0], "c": {"d": [None]}}


def test_values_are_shortened_and_printed_in_one_line():
    error = UserError("is too long", "name", "x" * 10_000 + "\x00\n")
    assert len(str(error)) < 250 and "\n" not in str(error) and "[10,000 characters]" in str(error)
    assert len(shorten("y" * 10_000, LONGEST_LINE)) == LONGEST_LINE
    assert shorten("two\nlines") == "two lines"
