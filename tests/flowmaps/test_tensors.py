"""Safetensors that are damaged or of another model."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save

from flowmaps import UserError
from flowmaps.tensors import check_shapes, merged, model_files, read_header, read_tensors

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


def named(*parts):
    return [f"diffusion_pytorch_model{part}.safetensors" for part in parts]


@pytest.mark.parametrize(
    ("there", "found", "variant"),
    [
        (named(""), named(""), ""),
        (named("", ".fp16"), named(""), ""),
        (named(".fp16"), named(".fp16"), "fp16"),
        (named("-00001-of-00002", "-00002-of-00002"), named("-00001-of-00002", "-00002-of-00002"), ""),
        (named(".a-00001-of-00001"), named(".a-00001-of-00001"), "a"),
    ],
)
def test_weights_in_one_file_in_shards_or_of_a_variant(tmp_path, there, found, variant):
    for name in there:
        (tmp_path / name).touch()
    files, of = model_files(tmp_path, "remedy")
    assert [file.name for file in files] == found and of == variant


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ([], r"diffusion_pytorch_model\.safetensors is missing: the checkpoint is incomplete$"),
        (["diffusion_pytorch_model.bin"], r"there: diffusion_pytorch_model\.bin"),
        (named(".fp16", ".bf16"), r"more than one variant; there: .*bf16.*fp16.*: remedy"),
        (named("-00001-of-00002"), "incomplete set"),
        (named("-00001-of-00002", "-00002-of-00003"), "incomplete set"),
        (named("", "-00001-of-00001"), "incomplete set"),
        (named("-00000-of-00001"), "incomplete set"),
    ],
)
def test_weights_that_are_not_all_there_are_listed(tmp_path, there, reason):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=reason):
        model_files(tmp_path, "remedy")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    assert merged([{"a": 1}, {"b": 2}], tmp_path, "remedy") == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="a is in two files: remedy"):
        merged([{"a": 1}, {"a": 1}], tmp_path, "remedy")
