"""References: published files as they are, refusals in one line, and statistics that are computed once."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import run_script, run_two
from helpers.makers import archive, encoded, photograph, small_inception, write_folder, write_inception
from PIL import Image

from flowmaps import UserError
from flowmaps.data import open_dataset
from flowmaps.data.registry import builtin_name
from flowmaps.evaluation.real_images import cached_stats, source_stats
from flowmaps.evaluation.references import open_reference
from flowmaps.files import cache_directory
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.extractors import load_extractor
from flowmaps.metrics.features import Extractor
from flowmaps.metrics.published import fold_batch_norms
from flowmaps.metrics.scores import check_metrics, check_reference
from flowmaps.metrics.stats import Origin


class Hostile:
    """A pickle of it opens a file for writing when it is read carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Published formats, files that look like them, samples, and a fid.py whose Inception sees 75 pixels."""
    base = tmp_path_factory.mktemp("published")
    weights = write_inception(base / "inception.pth")
    samples, real = archive(base / "samples.npz", 40, 2000), archive(base / "real.npz", 30, 0)
    with small_inception(base):
        extractor = load_extractor("inception", weights)
        stats = extractor.stats([real], data="real", split="all")
        mine = extractor.stats([samples])
        moments = {"mu": stats.mean.numpy(), "sigma": stats.cov.numpy()}
        np.savez(base / "edm.npz", **moments)
        with (base / "edm2.pkl").open("wb") as file:
            pickle.dump({"fid": moments, "fd_dinov2": {"mu": np.zeros(3), "sigma": np.eye(3)}}, file)
        with (base / "hostile.pkl").open("wb") as file:
            pickle.dump({"fid": Hostile(base / "ran")}, file)
        images = {"arr_0": real.permute(0, 2, 3, 1).numpy(), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
        np.savez(base / "adm.npz", **images, **moments | {"mu": moments["mu"].astype(np.float32)})
        np.savez(base / "big.npz", arr_0=np.zeros((9, 64, 64, 3), np.uint8), **moments)
        np.savez(base / "no_sigma.npz", mu=moments["mu"])
        np.savez(base / "narrow.npz", mu=moments["mu"][:64], sigma=moments["sigma"][:64, :64])
        np.savez(base / "crossed.npz", mu=moments["mu"], sigma=moments["sigma"][:64, :64])
        stats.save(base / "ours.npz")
        arrays = {**moments, "n": 30, **vars(stats.origin)}
        np.savez(base / "resize.npz", **arrays | {"resize": "bicubic, antialias"})
        np.savez(base / "weights.npz", **arrays | {"weights": "0" * 64})
        np.savez(base / "extractor.npz", **arrays | {"extractor": "vgg"})
        np.savez(base / "old.npz", **{k: v for k, v in arrays.items() if k != "size"})
        rows = torch.randn(30, 2048).numpy()
        np.savez(base / "rows.npz", **arrays, features=rows[:29])
        return base, weights, frechet_distance(mine, stats)


def fid(place, reference, *more):
    base, weights, _ = place
    [file] = [file for file in base.glob(f"{reference}.*") if file.suffix in (".npz", ".pkl")]
    flags = [f"--samples={base}/samples.npz", f"--reference={file}", f"--weights={weights}"]
    return run_script(base / "fid.py", *flags, f"--json={base}/{reference}.json", *more)


@pytest.mark.parametrize("name", ["edm", "edm2", "adm", "ours"])
def test_published_files_are_read_as_they_are(place, name):
    base, _, expected = place
    done = fid(place, name)
    assert done.returncode == 0, done.stderr
    found = json.loads((base / f"{name}.json").read_text())
    assert found["results"][0]["FID"] == pytest.approx(expected, rel=1e-4)
    reference = found["reference"]
    if name == "ours":
        assert reference["n"] == 30 and reference["weights"] == found["extractor"]["weights"] and not done.stderr
    else:
        assert reference["n"] is None and reference["weights"] == "" and reference["data"].startswith(f"{name}.")
        assert done.stderr.startswith("warning: reference=") and len(done.stderr.splitlines()) == 1
    assert reference["size"] == {"edm": "", "edm2": "", "adm": "24x24", "ours": "24x24"}[name]


@pytest.mark.slow
def test_precision_of_adm_files_is_that_of_their_images(place):
    base, _, expected = place
    metrics = ["--metrics=fid,kid,prc", "--kid_subset=20"]
    rows = []
    for name in ("adm", "real"):
        assert fid(place, name, *metrics).returncode == 0
        rows.append(json.loads((base / f"{name}.json").read_text())["results"][0])
    assert rows[0]["FID"] == pytest.approx(expected, rel=1e-4)
    for score in ("KID", "precision", "recall"):
        assert rows[0][score] == pytest.approx(rows[1][score], rel=1e-4)
    line = fid(place, "edm", *metrics).stderr.splitlines()[-1]
    assert "only moments" in line and "stats.py --features" in line


REFUSED = {
    "big": "images differ in size (24x24 against 64x64)",
    "no_sigma": "no_sigma.npz has no sigma",
    "narrow": "narrow.npz has mu of shape (64,)",
    "crossed": "crossed.npz: mu of shape (2048,) and sigma of shape (64, 64) do not fit",
    "resize": "features differ in resize",
    "weights": "features differ in weights",
    "extractor": "was made with the extractor 'vgg': give its file",
    "old": "old.npz has no size",
    "hostile": "not a file of EDM2's reference statistics",
    "rows": "rows.npz: features must be 30 x 2048",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(place, name):
    done = fid(place, name)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert done.returncode == 2 and len(lines) == 1 and REFUSED[name] in lines[0], done.stderr
    assert not (place[0] / f"{name}.json").exists() and not (place[0] / "ran").exists()


def test_names_of_data_sets():
    assert (
        builtin_name("cifar10")
        == builtin_name("cifar10-train")
        == builtin_name("cifar10:train")
        == ("cifar10", "train")
    )
    assert builtin_name("digits-heldout") == ("digits", "heldout")
    assert builtin_name("cifar100") is None and builtin_name("digits/heldout") is None and builtin_name(".") is None


def counting(extractor):
    """The same extractor, and a list of how many images it has seen."""
    seen = []

    def embed(images):
        seen.append(len(images))
        return extractor.embed(images)

    return Extractor(embed, extractor.dim, extractor.origin), seen


def test_a_reference_is_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    extractor, seen = counting(load_extractor("digits"))
    first = source_stats("digits:heldout", extractor, "")
    again = source_stats("digits-heldout", extractor, "")
    assert sum(seen) == 449 and again.sha256() == first.sha256() and again.origin == first.origin
    kept = cached_stats(open_dataset("digits:heldout"), extractor, keep=True)
    assert sum(seen) == 2 * 449 and kept.features.shape == (449, 64)  # were not kept before
    cached_stats(open_dataset("digits:heldout"), extractor, keep=True)
    source_stats("digits:heldout", extractor, "")
    assert sum(seen) == 2 * 449
    other = Extractor(extractor.embed, 64, Origin(**vars(extractor.origin) | {"weights": "other"}))
    source_stats("digits:heldout", other, "")
    assert sum(seen) == 3 * 449
    [damaged, _] = sorted((cache_directory() / "stats").iterdir(), key=lambda file: file.stat().st_mtime)
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert source_stats("digits:heldout", extractor, "").sha256() == first.sha256()
    assert sum(seen) == 4 * 449


def test_the_memory_of_a_folder_follows_its_content(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extractor, seen = counting(load_extractor("digits"))
    pictures = {f"{i}.png": encoded(photograph(i, 8, 8).convert("L"), "png") for i in range(5)}
    root = write_folder(tmp_path / "set", pictures)
    first = source_stats(str(root), extractor, "")
    shutil.copytree(root, tmp_path / "elsewhere" / "set")
    assert source_stats(str(tmp_path / "elsewhere/set"), extractor, "").sha256() == first.sha256()
    assert sum(seen) == 5  # the same pictures in another place
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "3.png")
    assert source_stats(str(root), extractor, "").sha256() != first.sha256()
    assert sum(seen) == 10


@pytest.mark.slow
def test_cifar10_train_by_two_processes_equals_one(data_root, tmp_path, monkeypatch):
    """300 images of the true format; the second call finds what the first one left in the cache."""
    small = write_inception(tmp_path / "inception.pth")
    with small_inception(tmp_path):
        alone = open_reference("cifar10-train", "inception", small, data_root, device=CPU, keep=True).stats
    flags = ["--data=cifar10-train", f"--root={data_root}", f"--weights={small}", f"--out={tmp_path}/two.npz"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_two(tmp_path / "stats.py", *flags, "--features", check=True)
    both = FeatureStats.load(tmp_path / "two.npz")
    assert both.n == alone.n == 300 and both.origin == alone.origin and both.origin.split == "train"
    for found, expected in ((both.mean, alone.mean), (both.cov, alone.cov), (both.features, alone.features)):
        assert (found - expected).norm() < 1e-5 * expected.norm()
    [cached] = (tmp_path / "cache/flowmaps/stats").iterdir()
    assert FeatureStats.load(cached).sha256() == both.sha256()


def test_scores_that_cannot_be_had():
    digits = load_extractor("digits")
    inception = Extractor(digits.embed, 64, digits.origin, logits=lambda x: x)
    check_metrics(["fid"], [digits], 2)
    for metrics, extractor, num, message in (
        (["kid"], digits, 5000, "only fid is defined on the features of digits"),
        (["fid", "fid"], digits, 5000, "different ones of fid, kid, is, prc"),
        ([], digits, 5000, "different ones"),
        (["sfid"], inception, 5000, "different ones"),
        (["kid"], inception, 999, "needs 1000 images, there are 999: give more, or a smaller kid_subset"),
        (["is"], inception, 9, "needs 10 images"),
        (["prc"], inception, 3, "needs 4 images"),
        (["fid"], inception, 1, "needs 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            check_metrics(metrics, [extractor], num)
    kept = FeatureStats(64, keep=True).update(torch.randn(500, 64))
    check_reference(["kid", "prc"], kept, 500)
    with pytest.raises(UserError, match="kid_subset=1000: the reference has only 500 images"):
        check_reference(["kid"], kept)
    with pytest.raises(UserError, match="only moments"):
        check_reference(["prc"], FeatureStats(64).update(torch.randn(500, 64)))


def test_batch_norms_folded_into_convolutions_change_nothing(tmp_path):
    """Every pair of torch-fidelity's Inception, in float64: outputs on noise before and after, and no pair is left."""
    from torch_fidelity.utils import create_feature_extractor

    file = str(write_inception(tmp_path / "inception.pth"))
    options = {"cuda": False, "feature_extractor_weights_path": file, "verbose": False}
    pairs = [
        layer
        for layer in create_feature_extractor("inception-v3-compat", ["2048"], **options).double().modules()
        if isinstance(getattr(layer, "bn", None), torch.nn.BatchNorm2d)
    ]
    assert len(pairs) == 94
    for layer in pairs:
        x = torch.randn(1, layer.conv.in_channels, 9, 9, dtype=torch.float64)
        before = layer(x)
        fold_batch_norms(layer)
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
        assert isinstance(layer.bn, torch.nn.Identity)


ORDER = {  # cheap refusals come before the extractor's weights, which may have to be downloaded
    "no such data": (["stats.py", "--data=MISSING", "--out={tmp}/a.npz"], "--data=MISSING"),
    "no images": (["stats.py", "--data={tmp}/none", "--out={tmp}/a.npz"], "has no images"),
    "file of the user": (["stats.py", "--data={tmp}/none", "--out={tmp}/mine"], "--out="),
    "no such extractor": (["stats.py", "--data={tmp}/none", "--out={tmp}/a", "--extractor=vgg"], "--extractor=vgg"),
    "no such weights": (["stats.py", "--data={tmp}/none", "--out={tmp}/a", "--weights={tmp}/w"], "--weights="),
    "size": (["stats.py", "--data={tmp}/none", "--out={tmp}/a", "--size=100000"], "--size=100000"),
    "metrics": (["fid.py", "--samples={tmp}/none", "--reference={tmp}/none", "--metrics=fd"], "--metrics=fd"),
    "a pipe": (["fid.py", "--samples=digits", "--reference={tmp}/pipe.npz"], "pipe.npz is a pipe"),
    "a pickled pipe": (["fid.py", "--samples=digits", "--reference={tmp}/pipe.pkl"], "pipe.pkl is a pipe"),
    "steps": (["sample.py", "--checkpoint={tmp}/none", "--out={tmp}/o", "--steps=1000000000"], "--steps=1000000000"),
    "out": (["sample.py", "--checkpoint={tmp}/none", "--out={tmp}/mine"], "--out="),
}


@pytest.mark.parametrize(("arguments", "named"), ORDER.values(), ids=ORDER)
def test_cheap_refusals_come_first(tmp_path, arguments, named):
    (tmp_path / "none").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("pipe.npz", "pipe.pkl"):
        os.mkfifo(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    script, *flags = (argument.format(tmp=tmp_path) for argument in arguments)
    done = run_script(f"scripts/{script}", *flags)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reference_of_any_name(tmp_path):
    """What stats.py --out=held writes, fid.py --reference=held reads; sample.py's archive is images."""
    stats = cached_stats(open_dataset("digits", "heldout"), load_extractor("digits"))
    stats.save(tmp_path / "held")
    assert open_reference(tmp_path / "held").stats.sha256() == stats.sha256()
