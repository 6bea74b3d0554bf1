"""ImageNet on disk: ADM's crop, shards that a kill does not hurt, and the moments of a VAE."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, generator, run_script, run_two
from helpers.makers import encoded, photograph, write_folder, write_imagenet, write_vae, write_zip
from safetensors.torch import load_file

from flowmaps import UserError
from flowmaps.data import Latents, Loader, PreparedImages, ShuffledOrder, as_samples, open_dataset
from flowmaps.data.image_io import adm_center_crop, decode
from flowmaps.data.shard_writing import start_writing, write_missing
from flowmaps.images import from_uint8
from flowmaps.vae import moments, open_vae


def cubic(x):
    """Keys' kernel with a = -1/2, as Pillow has it."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def resampling(source, target, kernel, support):
    """[target, source]: the weights of a kernel stretched to the reduction, normalised: the definition, in float64."""
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - support * stretch + 0.5).astype(int), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(int), source)
    pixel = np.arange(source)
    weight = kernel((pixel + 0.5 - centre[:, None]) / stretch)
    weight = np.where((pixel >= first[:, None]) & (pixel < last[:, None]), weight, 0)
    return weight / weight.sum(axis=1, keepdims=True)


def whole_levels(x):
    return np.floor(x + 0.5 + 1e-9).clip(0, 255)


def defined(pixels, size):
    """ADM's centre crop from its definition: halve by boxes, bicubic to ``size``, cut; bytes after each, halves up."""
    x = pixels.astype(float)

    def resized(x, height, width, kernel, support):
        across = np.einsum("hwc,vw->hvc", x, resampling(x.shape[1], width, kernel, support))
        down = np.einsum("hwc,vh->vwc", whole_levels(across), resampling(x.shape[0], height, kernel, support))
        return whole_levels(down)

    while min(x.shape[:2]) >= 2 * size:
        x = resized(x, x.shape[0] // 2, x.shape[1] // 2, box, 0.5)
    ratio = size / min(x.shape[:2])
    x = resized(x, round(x.shape[0] * ratio), round(x.shape[1] * ratio), cubic, 2.0)
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(37, 53), (64, 64), (65, 127), (129, 301), (131, 128), (517, 333), (20, 31), (256, 259)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_equals_adms_on_odd_sizes(shape, channels):
    rough = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    smooth = np.asarray(photograph(1, *shape))[..., :channels]
    for pixels in (rough, smooth):
        made = adm_center_crop(pixels, 64)
        assert made.shape == (64, 64, channels) and made.dtype == np.uint8
        assert np.abs(made - defined(pixels, 64)).max() <= 1


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("shape", [(63, 101), (47, 35), (33, 59), (94, 126), (122, 70)])
def test_crop_of_a_ramp_is_a_ramp(shape, down):
    """Integer levels on a ramp stay a ramp under every mean: in closed form, the level at each new pixel's centre."""
    height, width = shape
    row, column = np.mgrid[:height, :width]
    plane = lambda y, x: 20 + (y if down else x)  # noqa: E731
    made = adm_center_crop(plane(row, column).astype(np.uint8)[..., None], 32)[..., 0].astype(float)
    h, w, y, x = height, width, 1.0, 1.0  # old pixels a new pixel
    while min(h, w) >= 64:
        y, x, h, w = y * h / (h // 2), x * w / (w // 2), h // 2, w // 2
    high, wide = round(h * 32 / min(h, w)), round(w * 32 / min(h, w))
    y, x = y * h / high, x * w / wide
    inner = np.arange(2, 30)  # the border pixels' windows are cut off
    rows = ((high - 32) // 2 + inner + 0.5) * y - 0.5
    columns = ((wide - 32) // 2 + inner + 0.5) * x - 0.5
    level = np.broadcast_to(plane(rows[:, None], columns[None]), (28, 28))
    assert np.abs(made[2:30, 2:30] - level).max() <= 1


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """1,000 synsets of one JPEG each."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae", levels=3)


def prepare(command, src, out, *more):
    return run_script("scripts/prepare_data.py", command, f"--src={src}", f"--out={out}", *more)


@pytest.fixture(scope="module")
def whole(imagenet, tmp_path_factory):
    """The tree at 64 x 64, prepared without a stop."""
    out = tmp_path_factory.mktemp("prepared") / "whole"
    assert prepare("imagenet", imagenet, out, "--shard=100").returncode == 0
    return out


def same_files(a, b):
    names = sorted(file.name for file in a.iterdir())
    assert names == sorted(file.name for file in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_labels_are_the_order_of_the_synsets_and_images_are_the_crops(imagenet, whole):
    data = open_dataset("prepared", root=str(whole))
    assert isinstance(data, PreparedImages) and len(data) == 1000 and data.num_classes == 1000
    assert data.shape == (3, 64, 64) and data.facts["classes"][7] == "n01441443"
    index = torch.tensor([999, 3, 5, 7, 8, 0])  # grey, CMYK, PNG by content, marked as turned
    images, label = data.fetch(index)
    assert torch.equal(label, index) and images.dtype == torch.uint8
    for image, i in zip(images, index.tolist(), strict=True):
        file = next((imagenet / data.facts["classes"][i]).iterdir())
        pixels = decode(file.read_bytes(), upright=False)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.broadcast_to(adm_center_crop(pixels, 64), (64, 64, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_and_resumed_run_writes_the_same_bytes(imagenet, whole, tmp_path, workers):
    flags = [f"--src={imagenet}", f"--out={tmp_path / 'out'}", "--shard=100", f"--workers={workers}"]
    command = [sys.executable, "scripts/prepare_data.py", "imagenet", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 120
    while not (tmp_path / "out/shard-00002.safetensors").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/checksums.json").exists()
    with pytest.raises(UserError, match="not a complete set"):
        open_dataset("prepared", root=str(tmp_path / "out"))
    before = (tmp_path / "out/shard-00000.safetensors").stat().st_mtime_ns
    run_script("scripts/prepare_data.py", "imagenet", *flags, check=True)
    for leftover in (tmp_path / "out").glob(".*.tmp"):  # of the killed process
        leftover.unlink()
    assert same_files(tmp_path / "out", whole)
    assert (tmp_path / "out/shard-00000.safetensors").stat().st_mtime_ns == before


def test_a_damaged_shard_is_named_and_made_again(imagenet, whole, tmp_path):
    out = tmp_path / "out"
    prepare("imagenet", imagenet, out, "--shard=100")
    file = out / "shard-00004.safetensors"
    content = bytearray(file.read_bytes())
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-00004\.safetensors is missing or damaged: run .* imagenet"):
        open_dataset("prepared", root=str(out))
    content[-1] ^= 1  # of the right size, but not what was written
    file.write_bytes(content)
    assert prepare("imagenet", imagenet, out, "--shard=100").returncode == 0
    assert same_files(out, whole)


@pytest.mark.slow
def test_two_processes_share_the_work(imagenet, whole, tmp_path):
    out = tmp_path / "out"
    run_two("scripts/prepare_data.py", "imagenet", f"--src={imagenet}", f"--out={out}", "--shard=100", check=True)
    assert same_files(out, whole)


def test_latents_are_the_moments_of_the_crops_and_of_their_mirror_images(tmp_path, vae_folder):
    src = write_imagenet(tmp_path, classes=5, each=3)
    flags = [f"--vae={vae_folder}", "--size=64", "--shard=4", "--batch=3", "--flip"]
    assert prepare("latents", src, tmp_path / "a", *flags).returncode == 0
    assert prepare("imagenet", src, tmp_path / "b").returncode == 0
    data, images = (open_dataset("prepared", root=tmp_path / name) for name in "ab")
    assert isinstance(data, Latents) and len(data) == 30 and data.shape == (4, 16, 16) and data.num_classes == 5
    x, label = images.fetch(torch.arange(15))
    made, known = data.fetch(torch.tensor([0, 3, 4, 7, 8, 29]))  # shards of 4 images, then their 4 mirror images
    assert known.tolist() == label[[0, 3, 0, 3, 4, 14]].tolist()
    sources = torch.stack([x[0], x[3], x[0].flip(-1), x[3].flip(-1), x[4], x[14].flip(-1)])
    expected = moments(open_vae(str(vae_folder)), from_uint8(sources))
    assert made.dtype == torch.float16
    torch.testing.assert_close(made.float(), expected, rtol=2e-3, atol=1e-3)
    shard = load_file(tmp_path / "a/shard-00003.safetensors")
    assert shard["moments"].shape == (6, 2, 4, 16, 16) and shard["label"].tolist() == 2 * [4] * 3
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    (tmp_path / "a/shard-00001.safetensors").unlink()
    (tmp_path / "a/checksums.json").unlink()
    assert prepare("latents", src, tmp_path / "a", *flags, "--workers=2").returncode == 0
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}


def test_drawn_latents_have_the_stored_mean_and_standard_deviation(tmp_path, vae_folder):
    src = write_imagenet(tmp_path, classes=2, each=1)
    prepare("latents", src, tmp_path / "a", f"--vae={vae_folder}", "--size=32")
    data = open_dataset("prepared", root=str(tmp_path / "a"))
    stored, _ = data.fetch(torch.zeros(4000, dtype=torch.int64))
    g = generator()
    x = as_samples(data, stored, lambda shape: torch.randn(shape, generator=g))
    mean, std = stored[0].float()
    torch.testing.assert_close(x.mean(dim=0), 0.18215 * mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(dim=0), 0.18215 * std, rtol=0.06, atol=1e-4)
    data.facts.update(latent_shift=[1.0, 2.0, 3.0, 4.0], latent_scale=[0.5, 0.25, 1.0, 2.0])
    moved = data.draw(stored[:1], torch.zeros(1, 4, 8, 8))[0]
    assert torch.equal(moved[1], (mean[1] - 2) * 0.25) and torch.equal(moved[3], (mean[3] - 4) * 2)


@pytest.mark.slow
def test_files_that_are_not_images(tmp_path):
    src = write_imagenet(tmp_path, classes=3, each=4)
    broken = sorted(src.rglob("*.JPEG"))[5]
    broken.write_bytes(broken.read_bytes()[:200])
    for workers in (0, 1):
        done = prepare("imagenet", src, tmp_path / f"out{workers}", "--shard=4", f"--workers={workers}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert str(broken.relative_to(src)) in done.stderr and "skip_corrupt" in done.stderr
    assert prepare("imagenet", src, tmp_path / "out0", "--shard=4", "--skip_corrupt").returncode == 0
    data = open_dataset("prepared", root=str(tmp_path / "out0"))
    known = json.loads((tmp_path / "out0/checksums.json").read_text())
    assert len(data) == 11 and known["shard-00001.safetensors"]["left_out"] == [str(broken.relative_to(src))]
    _, label = data.fetch(torch.arange(11))
    assert label.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_a_zip_and_a_set_without_labels(tmp_path):
    files = {f"{i}.png": encoded(photograph(i), "png") for i in range(5)}
    assert prepare("imagenet", write_zip(tmp_path / "a.zip", files), tmp_path / "out", "--size=16").returncode == 0
    data = open_dataset("prepared", root=str(tmp_path / "out"))
    images, label = data.fetch(torch.arange(5))
    assert label is None and data.num_classes == 0 and images.shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("command", "flags", "reason"),
    [
        ("imagenet", ["--out={tmp}/out"], "--src: missing"),
        ("imagenet", ["--src={tmp}/tree"], "--out: missing"),
        ("imagenet", ["--src={tmp}/nowhere", "--out={tmp}/out"], "--src={tmp}/nowhere: no such folder"),
        ("latents", ["--src={tmp}/tree", "--out={tmp}/out"], "--vae: missing"),
        ("latents", ["--src={tmp}/tree", "--out={tmp}/out", "--vae={tmp}/none"], "--vae={tmp}/none"),
        ("latents", ["--src={tmp}/tree", "--out={tmp}/out", "--vae={vae}", "--size=30"], "--size=30: must be a"),
        ("imagenet", ["--src={tmp}/tree", "--out={tmp}/begun", "--size=32"], "images of another shape"),
        ("latents", ["--src={tmp}/tree", "--out={tmp}/begun", "--vae={vae}"], "another kind of set"),
    ],
)
def test_mistakes_are_one_line(command, flags, reason, tmp_path, vae_folder):
    write_folder(tmp_path / "tree", {f"{c}/0.png": encoded(photograph(0), "png") for c in "ab"})
    prepare("imagenet", tmp_path / "tree", tmp_path / "begun", "--size=16")
    fill = {"tmp": tmp_path, "vae": vae_folder}
    done = run_script("scripts/prepare_data.py", command, *(flag.format(**fill) for flag in flags))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason.format(**fill) in done.stderr
    assert not list(Path(tmp_path).glob("out/shard*"))


def test_sets_are_not_taken_for_folders(whole, tmp_path):
    with pytest.raises(UserError, match=r"root=.*set name=prepared"):
        open_dataset("folder", root=str(whole))
    with pytest.raises(UserError, match="not a complete set of images"):
        open_dataset("prepared", root=str(tmp_path))
    with pytest.raises(UserError, match=r"no such directory; create it with scripts/prepare_data\.py imagenet"):
        open_dataset("prepared", root=str(tmp_path / "nowhere"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_memory_stays_flat_over_epochs(tmp_path):
    """Files are mapped, so the system can drop them: the memory of the process does not grow with the data read."""
    shards, rows = 8, 256
    facts = {"shape": [4, 32, 32], "num_classes": 10, "latent_shift": 4 * [0.0], "latent_scale": 4 * [1.0]}

    def make(number):
        return {"moments": torch.randn(rows, 2, 4, 32, 32), "label": torch.arange(rows) % 10}, []  # float32: 64 MiB

    list(write_missing(start_writing(tmp_path, "latents", facts, shards), make))
    data = open_dataset("prepared", root=str(tmp_path))
    loader = Loader(data, lambda k: ShuffledOrder(len(data), 0).indices(64 * k, 64), workers=0)

    def own():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    loader.batch(0)
    before = own()
    for k in range(2 * len(data) // 64):
        loader.batch(k)
    assert own() - before < 16
