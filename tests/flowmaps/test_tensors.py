"""Safetensors that are damaged or of another model."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save

from flowmaps import UserError
from flowmaps.tensors import check_shapes, read_header, read_tensors

GOOD = save({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, {"step": "3"})


def header(text):
    return struct.pack("<Q", len(text)) + text.encode()


def test_a_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(GOOD)
    shapes, facts = read_header(tmp_path / "a", "remedy")
    assert shapes == {"weight": (2, 3), "bias": (2,)} and facts == {"step": "3"}
    assert torch.equal(read_tensors(tmp_path / "a", "remedy")["weight"], torch.ones(2, 3))
    check_shapes(torch.nn.Linear(3, 2), shapes, tmp_path / "a", "it")


CLAIMED = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
DAMAGED = [
    b"", b"text", GOOD[:-1], GOOD[:20], header("[]"), header("{"), header("{" * 99_999),
    struct.pack("<Q", 10**15), header(json.dumps({"a": CLAIMED})) + bytes(8),
    header(json.dumps({"a": CLAIMED | {"data_offsets": [0, 8]}})) + bytes(8),
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_that_promises_more_than_it_has_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    for read in (read_header, read_tensors):
        with pytest.raises(UserError, match=r"a is damaged .*: remedy") as error:
            read(tmp_path / "a", "remedy")
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["gone", "pipe", "directory"])
def test_only_regular_files_are_opened(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a")
    elif kind == "directory":
        (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="remedy"):
        read_tensors(tmp_path / "a", "remedy")


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (torch.nn.Linear(4, 2), "weight is"),
        (torch.nn.Linear(3, 2, bias=False), "bias is"),
        (torch.nn.ReLU(), "bias is"),
    ],
)
def test_weights_of_another_network(tmp_path, network, named):
    with pytest.raises(UserError, match=f"a does not fit it: {named}"):
        check_shapes(network, {"weight": (2, 3), "bias": (2,)}, tmp_path / "a", "it")
