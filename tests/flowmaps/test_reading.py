"""Damaged, hostile and foreign files are refused by name before they cost time or memory."""

import enum
import io
import os
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from flowmaps.errors import UserError
from flowmaps.reading import LARGEST_JSON, npz_shapes, parse, parse_json, read_bytes, read_json, read_npz, regular_file


class Colour(enum.Enum):
    red = "r"


@dataclass
class Inner:
    count: int
    share: float = 0.5


@dataclass
class Outer:
    name: str
    inner: Inner
    shape: tuple[int, ...] = ()
    pair: tuple[int, str] | None = None
    table: dict[str, list[Inner]] = field(default_factory=dict)
    colour: Colour = Colour.red
    kind: Literal["a", "b"] = "a"
    number: int | str = 0
    anything: Any = None


GOOD = {"name": "x", "inner": {"count": 1, "share": 1}, "shape": [1, 2], "pair": [1, "b"], "colour": "red", "kind": "b"}
GOOD |= {"table": {"k": [{"count": 2}]}, "number": "s", "anything": [None]}


def test_a_value_becomes_its_dataclass():
    found = parse(Outer, GOOD, "f.json")
    table = {"k": [Inner(2)]}
    assert found == Outer("x", Inner(1, 1.0), (1, 2), (1, "b"), table, Colour.red, "b", "s", [None])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": 3}, "f.json: name is 3, expected str"),
        ({"name": None}, "f.json: name is None, expected str"),
        ({"inner": []}, r"f.json: inner is \[\], expected Inner"),
        ({"inner": {}}, "f.json: inner: count is missing"),
        ({"inner": {"count": True}}, "f.json: inner: count is True, expected int"),
        ({"inner": {"count": 1.0}}, "f.json: inner: count is 1.0, expected int"),
        ({"inner": {"count": 1, "share": "1"}}, "f.json: inner: share is '1', expected float"),
        ({"inner": {"count": 1, "share": 10**400}}, "expected float"),
        ({"shape": [1, None]}, r"f.json: shape\[1\] is None, expected int"),
        ({"shape": 3}, "f.json: shape is 3"),
        ({"pair": [1]}, "f.json: pair is"),
        ({"table": {"k": [{"count": "y"}]}}, r"f.json: table: k\[0\]: count is 'y'"),
        ({"colour": "blue"}, "f.json: colour is 'blue', expected Colour"),
        ({"kind": "c"}, "f.json: kind is 'c'"),
        ({"number": []}, "expected int or str"),
        ({"more": 1}, "f.json: more is unknown"),
    ],
)
def test_a_part_of_another_type_is_named(change, named):
    with pytest.raises(UserError, match=named):
        parse(Outer, GOOD | change, "f.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "9" * 10_000, '{"a": NaN}', "-Infinity", "1e999", b"\xff\xfe\x00", '{"a": ' * 5000],
    ids=lambda text: str(text[:9]),
)
def test_what_is_not_json_is_one_line(text):
    with pytest.raises(UserError, match=r"^f.json is not readable JSON \(.*\): make it again$") as error:
        parse_json(text, "f.json", "make it again")
    assert len(str(error.value)) < 300


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, reason in (
        ("pipe", "a pipe"),
        ("", "a directory"),
        ("link", "a pipe or a device"),
        ("no", "No such file"),
    ):
        with pytest.raises(UserError, match=reason):
            regular_file(tmp_path / name)
    with pytest.raises(UserError, match="more than"):
        read_bytes(tmp_path / "large")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            read_json(tmp_path / name, "make it again")


def hostile(path, shape, content=b"", compressed=False):
    """Write an .npz whose header claims ``shape``."""
    header = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.writestr("mu.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)


def test_an_array_is_not_larger_than_its_file(tmp_path):
    hostile(tmp_path / "a.npz", (10**12,))
    with pytest.raises(UserError, match="claims 8,000,000,000,000 bytes"):
        read_npz(tmp_path / "a.npz", "make it again")
    assert npz_shapes(tmp_path / "a.npz", "make it again") == {"mu": (10**12,)}
    hostile(tmp_path / "zeros.npz", (2**26,), bytes(2**29), compressed=True)
    with pytest.raises(UserError, match="claims 536,870,912 bytes"):
        read_npz(tmp_path / "zeros.npz", "make it again")


def test_arrays_that_are_packed_well_are_read(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(10**6), b=np.arange(3))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    assert read_npz(tmp_path / "a.npz", "", {"b"})["b"].tolist() == [0, 1, 2]
    assert len(read_npz(tmp_path / "a.npz", "")["a"]) == 10**6
