"""DINOv2, CLIP and Inception's spatial features: weights of the true format, numbers of other packages."""

import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.makers import Items, archive, write_clip, write_dinov2
from torch.nn import functional as F

from flowmaps import UserError
from flowmaps.evaluation import open_references
from flowmaps.importers.torchscript import read_torchscript
from flowmaps.metrics import frechet_distance
from flowmaps.metrics.extractors import load_extractor
from flowmaps.metrics.features import extract
from flowmaps.metrics.published import WEIGHTS
from flowmaps.metrics.scores import scores
from flowmaps.metrics.vit import build, resized

DINOV2, CLIP = "dinov2-vit-s-14", "clip-vit-b-32"


SMALL = {DINOV2: {"width": 64, "depth": 2}, CLIP: {"width": 64, "depth": 2, "projection": 32}}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load`")  # of torch-fidelity


def write(base, full=False):
    """Two sets of photographs and the published files of DINOv2 and CLIP, random; small or as they are."""
    known = {}
    for name, small in SMALL.items():
        sizes = WEIGHTS[name].sizes
        known[name] = replace(WEIGHTS[name], sizes=sizes if full else replace(sizes, **small))
    sets = archive(base / "samples.npz", 24, 2000), archive(base / "real.npz", 20, 0)
    write_dinov2(base / known[DINOV2].files[0], known[DINOV2].sizes)
    write_clip(base / known[CLIP].files[1], known[CLIP].sizes)
    return base, sets, known


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base, sets, known = write(tmp_path_factory.mktemp("published"))
    with pytest.MonkeyPatch.context() as patch:
        for name, row in known.items():
            patch.setitem(WEIGHTS, name, row)
        yield base, sets


class Hub(torch.nn.Module):
    """DINOv2 as torch.hub gives it: transformers' network with the published weights."""

    def __init__(self, file, sizes):
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        config = {"hidden_size": sizes.width, "num_hidden_layers": sizes.depth, "image_size": sizes.pixels}
        self.network = Dinov2Model(Dinov2Config(**config, num_attention_heads=sizes.width // 64)).eval()
        stored, found = torch.load(file, weights_only=True), {}
        for name, value in stored.items():
            q = name.replace("cls_token", "embeddings.cls_token").replace("mask_token", "embeddings.mask_token")
            q = q.replace("patch_embed.proj", "embeddings.patch_embeddings.projection").replace(
                "blocks.", "encoder.layer."
            )
            q = q.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
            q = q.replace("attn.proj.", "attention.o_proj.")
            q = f"layernorm.{q[5:]}" if q.startswith("norm.") else q
            if "attn.qkv" in q:
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    found[q.replace("attn.qkv", f"attention.{part}_proj")] = rows
            elif q == "pos_embed":
                grid = value[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
                grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
                grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
                found["embeddings.position_embeddings"] = torch.cat([value[:, :1], grid], dim=1)
            else:
                found[q] = value
        self.network.load_state_dict(found)

    def forward(self, x):
        return self.network(x).pooler_output


def compare(monkeypatch, name, base, samples, real):
    """Features and distance by torch-fidelity and by us.

    Theirs are its preprocessing and, of CLIP, its network. It fetches DINOv2 as code, for which transformers' network
    stands in.
    """
    from torch_fidelity import calculate_metrics
    from torch_fidelity.utils import create_feature_extractor

    file = base / WEIGHTS[name].files[-1]
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: Hub(file, WEIGHTS[name].sizes))
    given = {"feature_extractor_weights_path": str(file)} if name == CLIP else {}
    theirs = create_feature_extractor(name, ["clip" if name == CLIP else "dinov2"], cuda=False, verbose=False, **given)
    ours = load_extractor(name, base)
    with torch.no_grad():
        expected, features = theirs(samples[:5])[0], ours.embed(samples[:5])
    assert features.shape == (5, ours.dim) and (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (features[0] - features[1]).norm() > 0.01 * features[0].norm()
    if real is None:
        return
    found = calculate_metrics(
        input1=Items(samples), input2=Items(real), fid=True, cuda=False, feature_extractor=name, batch_size=10,
        cache=False, verbose=False, save_cpu_ram=True, **given,
    )  # fmt: skip
    a, b = (ours.stats(torch.split(images, 7)) for images in (samples, real))
    assert frechet_distance(a, b) == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
    assert ours.metric == f"FD-{name}" and a.origin.resize == "TF1 bilinear, 224"


@pytest.mark.parametrize("name", SMALL)
def test_features_and_distance_equal_torch_fidelity(place, monkeypatch, name):
    compare(monkeypatch, name, place[0], *place[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_features_of_networks_of_full_size_equal_torch_fidelity(tmp_path, monkeypatch, name):
    base, (samples, _), _ = write(tmp_path, full=True)
    compare(monkeypatch, name, base, samples, None)


def test_cmmd_equals_the_definition(place):
    """Against sums over all pairs, in float64; the paper's constants."""
    base, (samples, real) = place
    extractor = load_extractor(CLIP, base)
    ours, theirs = (extractor.stats(torch.split(images, 7), keep=True) for images in (samples, real))
    found = scores(ours, theirs, extractor, ["cmmd"])["CMMD"]
    x, y = (
        (stats.features.double() / stats.features.double().norm(dim=1, keepdim=True)).numpy()
        for stats in (ours, theirs)
    )

    def mean(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=2) / (2 * 10**2)).mean()

    assert found == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6) and found > 1e-3
    assert scores(ours, ours, extractor, ["cmmd"])["CMMD"] == pytest.approx(0, abs=1e-9)


def test_edm2s_dinov2_is_resized_as_theirs(place, tmp_path):
    """Bicubic with antialiasing, then the network of DINOv2; a file of another size of it does not fit."""
    row = WEIGHTS[DINOV2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WEIGHTS, "dinov2", row)
        extractor, other = load_extractor("dinov2", place[0]), load_extractor(DINOV2, place[0])
    images = place[1][0][:3]
    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = build(row.sizes, torch.load(place[0] / row.files[0], weights_only=True))
    with torch.no_grad():
        expected, found = network((x - mean) / deviation), extractor.embed(images)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (found - other.embed(images)).abs().max() > 1e-3 * expected.abs().max()
    assert extractor.metric == "FD-DINOv2" and extractor.origin.resize == "bicubic, antialias, 224"
    with pytest.raises(UserError, match=r"not a weight file of dinov2-vit-b-14: .* expected"):
        load_extractor("dinov2-vit-b-14", place[0] / row.files[0])


def test_positions_keep_their_places_at_the_size_they_were_learnt():
    positions = torch.randn(37**2 + 1, 4)
    assert resized(positions, 37) is positions
    assert resized(torch.ones(37**2 + 1, 4), 16).sub(1).abs().max() < 1e-5


def test_a_torchscript_archive_is_read_without_its_program(place, tmp_path):
    """The tensors of torch.jit.load; damaged and hostile archives are refused in one line."""
    file = place[0] / WEIGHTS[CLIP].files[1]
    expected, found = torch.jit.load(str(file)).state_dict(), read_torchscript(file)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    content = file.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("no archive")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:-2] if "/data/3" in entry.filename else data)
    for name in ("half", "text", "short", "gone"):
        with pytest.raises(UserError) as error:
            read_torchscript(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)


def test_several_extractors_see_the_same_images_once(place):
    """The statistics of one pass are those of each alone, whatever the batches; every batch is asked for once."""
    base, (samples, _) = place
    extractors = [load_extractor(name, base) for name in SMALL]
    asked = []

    def batches(size):
        for part in torch.split(samples, size):
            asked.append(len(part))
            yield part

    together = extract(extractors, batches(7), [True, False])
    assert asked == [7, 7, 7, 3]
    for extractor, stats in zip(extractors, together, strict=True):
        alone = extractor.stats(torch.split(samples, 24))
        assert stats.origin == alone.origin and stats.n == 24
        assert (stats.mean - alone.mean).norm() < 1e-5 * alone.mean.norm()
        assert (stats.cov - alone.cov).norm() < 1e-4 * alone.cov.norm()
    assert together[0].features.shape == (24, 64) and together[1].features is None


def test_what_does_not_go_together_is_refused(place, tmp_path):
    base, _ = place
    file = base / WEIGHTS[CLIP].files[1]
    for names, weights, message in (
        ([CLIP, DINOV2], file, "is one file, and the extractors are"),
        ([CLIP, CLIP], base, "give different ones"),
        ([CLIP, "checkerboard"], base, "points have no other features"),
        ([CLIP, "dinov2-vit-l-15"], base, "did you mean dinov2-vit-l-14"),
        ([CLIP, "inception"], base, f"has no {WEIGHTS['inception'].files[0]}: fetch https"),
        (["nowhere:at_all"], None, "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            open_references(base / "real.npz", names, weights)


@pytest.mark.slow
def test_one_pass_costs_what_its_extractors_cost(place):
    """At most 5 % more than the time of the two one by one; least CPU times of interleaved rounds."""
    base, (samples, _) = place
    extractors, times = [load_extractor(name, base) for name in SMALL], {}
    for _ in range(8):
        for name, group in (("first", extractors[:1]), ("second", extractors[1:]), ("both", extractors)):
            start = time.process_time()
            stats = extract(group, torch.split(samples, 8), [False] * len(group))
            times.setdefault(name, []).append(time.process_time() - start)
            assert all(each.features is None for each in stats)  # memory streams
    first, second, both = (min(values) for values in times.values())
    print(f"one by one {first + second:.3f} s, in one pass {both:.3f} s: {both / (first + second) - 1:+.1%}")
    assert both <= 1.05 * (first + second)
