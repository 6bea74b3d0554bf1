"""Several extractors in one pass: scores, statistics files, the floor, own functions, the gate, a repetition."""

import json
import pickle

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script, run_two
from helpers.makers import archive, small_inception, write_inception
from torch import nn

from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.evaluation import evaluate, open_reference, open_references
from flowmaps.evaluation.gate import Limits
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics import published as PUBLISHED_MODULE
from flowmaps.metrics.extractors import load_extractor
from flowmaps.metrics.published import BATCH
from flowmaps.metrics.stored import PUBLISHED_DIMS

DIGITS = ROOT / "assets/digits"
FUNCTIONS = """
import torch

def means(images):
    return images.float().flatten(2).mean(dim=2).repeat(1, 2) / 255 + torch.tensor([0.0, 1.0])

class Rows:
    __name__ = "rows"

    def __call__(self, images):
        return images.float().mean(dim=(1, 3)) / 255
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An importable module with two functions, and a record of digits by three extractors in one pass."""
    base = tmp_path_factory.mktemp("several")
    (base / "mine.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(base))
        patch.setenv("PYTHONPATH", f"{base}:{ROOT}")
        fid(base, "--label_policy=random", "--repeats=2", f"--json={base}/record.json", check=True)
        yield base


EXTRACTORS = ["digits", "mine:means", "mine:Rows"]


def fid(base, *more, run=run_script, **options):
    flags = [f"--checkpoint={DIGITS}", "--reference=digits:heldout", f"--extractors={','.join(EXTRACTORS)}"]
    return run("scripts/fid.py", *flags, "--steps=1", "--num=150", "--floor=digits:train", *more, **options)


def load(base, name="record"):
    return json.loads((base / f"{name}.json").read_text())


def test_one_pass_gives_the_scores_of_each_extractor_alone(place):
    """In the record under each one's name; the first one's keys are where they have always been."""
    record, fm = load(place), FlowMap.from_pretrained(DIGITS)
    row = record["results"][0]
    assert record["metric"] == "FD-digits" and record["extractor"]["extractor"] == "digits"
    assert [part["metric"] for part in record["representations"]] == ["FD-digits", "FD-means", "FD-rows"]
    for name, part in zip(EXTRACTORS, record["representations"], strict=True):
        options = {"steps": 1, "num": 150, "seeds": (0, 1), "label_policy": "random", "errors": True}
        alone = evaluate(fm, "digits:heldout", extractor=name, **options)
        only, metric = alone["results"][0], part["metric"]
        assert row[metric] == pytest.approx(only[metric], rel=1e-6) and "representations" not in alone
        assert row["influence"][metric] == only["influence"][metric] and part["reference"] == alone["reference"]


@pytest.mark.parametrize("run", [run_script, pytest.param(run_two, marks=pytest.mark.slow)])
def test_batches_and_processes_change_nothing(place, run):
    fid(place, "--batch=7", "--label_policy=random", "--repeats=2", f"--json={place}/other.json", run=run, check=True)
    for name, value in load(place)["results"][0].items():
        if name.startswith("FD-"):
            assert load(place, "other")["results"][0][name] == pytest.approx(value, rel=1e-5), name


def test_the_floor_is_the_distance_of_real_images(place):
    record = load(place)
    row, floor = record["results"][0], record["floor"]
    stats = [open_reference(f"digits:{split}", "mine:means") for split in ("train", "heldout")]
    assert floor["FD-means"] == pytest.approx(frechet_distance(stats[0].stats, stats[1].stats), rel=1e-9)
    assert floor["source"] == "digits:train" and floor["n"] == 1348
    for name in ("FD-digits", "FD-means", "FD-rows"):
        assert row[f"{name} ratio"] == pytest.approx(row[name] / floor[name])
    with pytest.raises(UserError, match="floor=nowhere"):
        evaluate(FlowMap.from_pretrained(DIGITS), "digits:heldout", num=9, floor="nowhere")


def test_a_record_of_several_is_repeated_and_judged(place):
    """A function is not imported because a record names it: it has to be given again."""
    refused = run_script("scripts/fid.py", f"--from_record={place}/record.json")
    assert refused.returncode == 2 and "--extractors: give them" in refused.stderr
    flags = [f"--from_record={place}/record.json", f"--extractors={','.join(EXTRACTORS)}"]
    again = run_script("scripts/fid.py", *flags)
    assert again.returncode == 0 and "is repeated: all numbers agree" in again.stdout, again.stdout + again.stderr
    record = load(place)
    [first, means, rows] = Limits(None, "before.json", 0.0, record).judge(record)
    assert first.name == (row := "map, 1 step, uniform, ema 0.999") and means.name == f"{row}, FD-means"
    assert all(verdict.comparison.endswith("no significant worsening: passed") for verdict in (first, means, rows))
    worse = json.loads(json.dumps(record))
    worse["results"][0]["FD-means"] *= 2
    assert [bool(v.reasons) for v in Limits(None, "b", 0.0, record).judge(worse)] == [False, True, False]
    del worse["representations"][1]
    with pytest.raises(UserError, match="has no FD-means: make it again with the same extractors"):
        Limits(None, "b", 0.0, worse).check(record)


def test_a_module_of_torch_is_an_extractor():
    """In eval mode, on any reference; its features must have one row per image and the reference's number."""

    class Net(nn.Module):
        def __init__(self, dim=5):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.drop = nn.Linear(64, dim), nn.Dropout(0.5)

        def forward(self, images):
            return self.drop(self.layer(images.flatten(1).float() / 255))

    images, net = open_dataset("digits", "heldout").x, Net()
    record = evaluate(images[:200], "digits:heldout", extractor=[net, "digits"])
    assert list(record["results"][0])[:2] == ["FD-Net", "FD-digits"] and not net.training
    stats = open_reference("digits:heldout", net).stats
    assert stats.dim == 5 and evaluate(images[:200], stats, extractor=net)["results"][0]["FD-Net"] == pytest.approx(
        record["results"][0]["FD-Net"], rel=1e-6
    )
    with pytest.raises(UserError, match=r"must return features \[200, 5\], it returned \[200, 6\]"):
        evaluate(images[:200], stats, extractor=Net(6))
    with pytest.raises(UserError, match="give its file, or the function"):
        evaluate(images[:200], stats)
    for broken, message in ((lambda images: images, "cannot be the name"), (nn.Identity(), "must return features")):
        with pytest.raises(UserError, match=message):
            open_reference("digits:heldout", broken)


def test_a_statistics_file_of_several_extractors(place, tmp_path):
    """The first one is the default, and each is found by its name."""
    flags = [f"--extractors={','.join(EXTRACTORS)}", f"--out={tmp_path}/all.npz"]
    done = run_script("scripts/stats.py", "--data=digits:heldout", *flags, check=True)
    assert "64 features of digits, 2 features of means, 8 features of rows" in done.stdout
    whole = open_references("digits:heldout", EXTRACTORS)
    found = open_references(tmp_path / "all.npz", EXTRACTORS)
    for a, b in zip(whole, found, strict=True):
        assert a.stats.sha256() == b.stats.sha256() and a.stats.origin == b.stats.origin
    assert FeatureStats.load(tmp_path / "all.npz").sha256() == whole[0].stats.sha256()
    assert open_reference(tmp_path / "all.npz", "mine:Rows").stats.dim == 8
    with pytest.raises(UserError, match=r"extractor=inception: .*all.npz was made with digits, means, rows"):
        open_reference(tmp_path / "all.npz", "inception")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Two sets of photographs, Inception at 75 pixels, and its spatial features by hand: 3 x 3 places of 7 channels."""
    base = tmp_path_factory.mktemp("spatial")
    weights = write_inception(base / "inception.pth")
    sets = archive(base / "samples.npz", 40, 2000), archive(base / "real.npz", 30, 0)
    with small_inception(base), pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED_DIMS, "inception-spatial", 63)
        yield base, weights, sets


def spatial_by_hand(weights, images):
    """Layer by layer through torch-fidelity's network, whose batch norms are not folded."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    x = (tf1(images.float(), size=(75, 75), align_corners=False) - 128) / 128
    for name in "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2".split():
        x = getattr(net, name)(x)
    for name in "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c".split():
        x = getattr(net, name)(x)
    return net.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)


def test_sfid_is_the_distance_of_spatial_features_of_the_same_pass(inception, monkeypatch):
    base, weights, (samples, real) = inception
    monkeypatch.setitem(BATCH, "cpu", 7)
    names = ["inception", "inception-spatial"]
    references = open_references(base / "real.npz", names, weights)
    network, calls = PUBLISHED_MODULE._Inception, []
    inner = load_extractor("inception", weights)
    assert inner.metric == "FID" and load_extractor("inception-spatial", weights).metric == "sFID"
    forward = network.forward

    def counted(self, images):
        calls.append(self._last is not None and self._last[0] is images)
        return forward(self, images)

    monkeypatch.setattr(network, "forward", counted)
    row = evaluate(samples, references)["results"][0]
    assert calls == [False, True]  # the second extractor uses what the first one computed
    with torch.no_grad():
        mine, theirs = (FeatureStats(63).update(spatial_by_hand(weights, x)) for x in (samples, real))
    assert row["sFID"] == pytest.approx(frechet_distance(mine, theirs), rel=1e-4) and row["FID"] > 0.01


@pytest.mark.slow
def test_edm2s_and_adms_files_have_two_representations(inception):
    base, weights, (_, real) = inception
    names = ["inception", "inception-spatial"]
    pool, spatial = (reference.stats for reference in open_references(base / "real.npz", names, weights))
    moments = {"mu": pool.mean.numpy(), "sigma": pool.cov.numpy()}
    dino = {"mu": np.zeros(1024), "sigma": np.eye(1024)}
    with (base / "edm2.pkl").open("wb") as file:
        pickle.dump({"fid": moments, "fd_dinov2": dino}, file)
    assert FeatureStats.load(base / "edm2.pkl", "dinov2").cov.trace() == 1024
    assert FeatureStats.load(base / "edm2.pkl").sha256() == pool.sha256()
    images = real.permute(0, 2, 3, 1).numpy()
    np.savez(base / "adm.npz", arr_0=images, mu_s=spatial.mean.numpy(), sigma_s=spatial.cov.numpy(), **moments)
    found = open_references(base / "adm.npz", names, weights)
    assert found[1].stats.sha256() == spatial.sha256() and found[1].extractor.metric == "sFID"
    assert found[1].stats.origin.size == "24x24" and found[1].stats.n is None
    with pytest.raises(UserError, match=r"edm2.pkl was made with inception, dinov2"):
        FeatureStats.load(base / "edm2.pkl", "inception-spatial")
