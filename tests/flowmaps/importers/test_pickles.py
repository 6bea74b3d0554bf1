"""Pickles of NVIDIA's and files of torch.save that lie about their sizes, or that share objects in each other."""

import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import released, released_edm2
from helpers.released_state_dicts import NCSNpp, Transformer

from flowmaps import UserError
from flowmaps.importers import import_checkpoint
from flowmaps.importers.pickles import read_objects
from flowmaps.importers.torch_files import read_tensors


@pytest.fixture(params=[2, 3, 5])
def protocol(request, monkeypatch):
    class Pickle:
        """Python's pickle, with this protocol for everything."""

        def dumps(self, content, protocol=None):
            return pickle.dumps(content, request.param)

    monkeypatch.setattr(released, "pickle", Pickle())
    return request.param


def test_every_protocol_gives_the_same_network(protocol, tmp_path):
    net = released_edm2.edm2(tmp_path / "a")
    fm = import_checkpoint("edm2", tmp_path / "a")
    assert fm.info.latent_scale[1] == pytest.approx(0.5 / 4.62)
    for mine, theirs in (("stem", "enc.16x16_conv"), ("middle.0.qkv", "dec.8x8_in0.attn_qkv"), ("head", "out_conv")):
        mine, theirs = fm.network.get_submodule(mine).weight, net.unet.get_submodule(theirs).weight
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(protocol, order, tmp_path):
    array = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    (tmp_path / "a").write_bytes(pickle.dumps({"x": array, "n": np.float32(3), "e": np.empty((0, 2))}, protocol))
    found = read_objects(tmp_path / "a")
    assert np.array_equal(found["x"].value, array) and found["n"] == 3 and found["e"].value.shape == (0, 2)


def test_numbers_in_another_order_of_bytes_are_refused(tmp_path):
    for protocol in (2, 4, 5):
        (tmp_path / "a").write_bytes(pickle.dumps(np.arange(3, dtype=">f8"), protocol))
        with pytest.raises(UserError, match=r"order of bytes|numbers of type"):
            read_objects(tmp_path / "a")


def doubled(depth):
    """A module whose two children are one module, and so on: 2^depth paths."""
    module = torch.nn.ModuleDict()
    for _ in range(depth):
        module = torch.nn.ModuleDict({"a": module, "b": module})
    return module


def nested(depth):
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


class Meta(dict):
    """Pickles as a record of persistence."""

    def __reduce__(self):
        return released._reconstruct_persistent_obj, (dict(self),)


SHARED = {
    "names": {"type": "class", "class_name": nested(60)},
    "states": {"type": "class", "class_name": "EDMPrecond", "state": nested(60)},
}


@pytest.mark.parametrize("kind", ["modules", "names", "states"])
def test_shared_objects_are_visited_once(kind, tmp_path):
    start, file = time.monotonic(), tmp_path / "net.pkl"
    net = released.edm("ddpm++", file)
    if kind == "modules":
        net.model.map_layer0 = doubled(60)
        released.dump({"ema": net}, file)
    else:
        released.dump({"ema": Meta(SHARED[kind])}, file)
    with pytest.raises(UserError, match=r"^src=\S+net\.pkl: is not a checkpoint") as refused:
        import_checkpoint("edm", file)
    assert time.monotonic() - start < 5 and len(str(refused.value)) < 900


def keyed(depth):
    """A pickle of a dictionary whose key is tuples shared in each other; Python cannot make it, nor load it."""
    return b"\x80\x02})" + depth * b"q\x00h\x00\x86" + b"K\x01s."


def test_a_key_of_shared_tuples_is_refused_at_once(tmp_path):
    start = time.monotonic()
    (tmp_path / "a").write_bytes(keyed(200))
    with pytest.raises(UserError, match="unhashable"):
        read_objects(tmp_path / "a")
    torch.save({"ema": torch.ones(1)}, tmp_path / "b")
    repack(tmp_path / "b", {"data.pkl": keyed(200)})
    with pytest.raises(UserError, match="unhashable"):
        read_tensors(tmp_path / "b")
    assert time.monotonic() - start < 5


def repack(path, changes):
    """Replace entries of a zip file by the ends of their names."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, changes.get(name.partition("/")[2], content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 43),  # bytes
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 43),  # text
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 43),  # a bytearray
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 43),  # a frame
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1),  # an integer
    ],
)
def test_more_bytes_than_the_file_has(content, tmp_path):
    (tmp_path / "a").write_bytes(content + b"x.")
    with pytest.raises(UserError, match=r"it ends before the [\d,]+ bytes"):
        read_objects(tmp_path / "a")


def test_the_same_bytes_over_and_over_again(tmp_path):
    text = b"X" + struct.pack("<I", 10000) + 10000 * b"a"
    head = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    (tmp_path / "a").write_bytes(head + 1000 * b"h\x00h\x01h\x02\x86R" + b".")
    with pytest.raises(UserError, match="same bytes many times"):
        read_objects(tmp_path / "a")


def wrong(size, stride):
    """A tensor whose pickle says ``size`` and ``stride`` of two stored numbers."""

    class Tensor:
        def __reduce__(self):
            two = torch.storage.TypedStorage(
                wrap_storage=torch.ones(2).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (two, 0, size, stride, False, {})

    return Tensor()


WRONG = [((1 << 20, 1 << 20), (1 << 20, 1)), ((3,), (1,)), ((2, 2), (0, 1)), ((2, 2), (1, 1)), ((-1,), (1,))]


@pytest.mark.parametrize(("size", "stride"), WRONG)
def test_a_tensor_with_fewer_numbers_than_its_shape(size, stride, tmp_path):
    file = tmp_path / "net"
    net = released.edm("ddpm++", file)
    net.model.map_layer0._buffers["x"] = wrong(size, stride)
    released.dump({"ema": net}, file)
    with pytest.raises(UserError, match=r"too few numbers|whole numbers"):
        import_checkpoint("edm", file)
    for zipped in (True, False):
        torch.save({"ema": {"x": wrong(size, stride)}}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"too few numbers|whole numbers"):
            read_tensors(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_larger_than_the_file(zipped, tmp_path):
    """The pickle inside says 8 TB; torch would allocate them, or read beyond the entry's end."""
    torch.save({"ema": torch.ones(77)}, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    for numbers in (78, 2**31 - 1):
        told, true = b"J" + struct.pack("<i", numbers), b"K\x4d"
        if zipped:
            torch.save({"ema": torch.ones(77)}, tmp_path / "a")
            with zipfile.ZipFile(tmp_path / "a") as archive:
                pickled = archive.read("a/data.pkl")
            repack(tmp_path / "a", {"data.pkl": pickled.replace(true, told, 1)})
        else:
            content = io.BytesIO()
            torch.save({"ema": torch.ones(77)}, content, _use_new_zipfile_serialization=False)
            (tmp_path / "a").write_bytes(content.getvalue().replace(true, told, 1))
        with pytest.raises(UserError, match="too few numbers"):
            read_tensors(tmp_path / "a")


def test_views_transposed_and_shared_tensors_are_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {"a": base.T, "b": base[1:3, 2:5], "c": base, "d": torch.empty(0, 3), "e": torch.tensor(3.0)}
    for zipped in (True, False):
        torch.save(content, tmp_path / "a", _use_new_zipfile_serialization=zipped)
        assert all(torch.equal(content[name], w) for name, w in read_tensors(tmp_path / "a").items())


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for form in ("edm", "edm2", "dit", "sit", "rectified_flow"):
        size = 32 if form == "rectified_flow" else None
        for file in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(UserError, match="is a pipe or a device"):
                import_checkpoint(form, file, image_size=size)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        os.mkfifo(folder / name)
        if name != "config.json":
            (folder / "config.json").write_text(
                '{"block_out_channels": [128], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}'
            )
        with pytest.raises(UserError, match="is a pipe or a device"):
            import_checkpoint("diffusers_unet", folder)


def test_out_of_memory_is_not_a_damaged_file(monkeypatch, tmp_path):
    torch.save(Transformer().w, tmp_path / "net")

    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        import_checkpoint("dit", tmp_path / "net")


@pytest.mark.parametrize("prefix", ["module.module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_rectified_flows(prefix, tmp_path):
    model = NCSNpp()
    weights = {f"{prefix}{name}": tensor for name, tensor in model.w.items()}
    shadow = [tensor.bfloat16() for tensor in model.w.values()]
    torch.save({"model": weights, "ema": {"shadow_params": shadow}}, tmp_path / "net")
    assert import_checkpoint("rectified_flow", tmp_path / "net", image_size=32).info.shape == (3, 32, 32)
