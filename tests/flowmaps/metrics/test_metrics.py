"""Metrics against closed forms, torch-fidelity and brute force."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.makers import Items
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flowmaps import UserError
from flowmaps.data import open_dataset
from flowmaps.images import from_uint8
from flowmaps.metrics import FeatureStats, board_kl, frechet_distance, sliced_w2
from flowmaps.metrics.classifier import CLASSIFIERS, ClassifierOptions, OwnExtractor, own_file, own_name
from flowmaps.metrics.extractors import EXTRACTORS, extractor_file, load_extractor
from flowmaps.metrics.memorisation import memorisation, nearest
from flowmaps.metrics.stats import Origin


def stats_of(mean, cov, n=1000):
    """Statistics with exactly this mean and covariance."""
    stats = FeatureStats(len(mean))
    stats.n, stats.mean = n, torch.tensor(mean, dtype=torch.float64)
    stats.scatter = torch.tensor(cov, dtype=torch.float64) * (n - 1)
    return stats


def random_features(n, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g) @ torch.randn(dim, dim, generator=g) + torch.randn(dim, generator=g)


@pytest.mark.parametrize(("smallest", "tolerance"), [(0.5, 1e-9), (0.0, 1e-7)])
def test_frechet_distance_of_two_gaussians(smallest, tolerance):
    """Commuting covariances: |dmu|^2 + sum (sqrt a - sqrt b)^2, whatever the basis.

    A zero eigenvalue is only known to 1e-16, so its root, which enters the sum, only to 1e-8.
    """
    a, b = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, smallest]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    expected = 3 * 0.25 + (a.sqrt() - b.sqrt()).square().sum().item()
    cov_a, cov_b = ((turn @ torch.diag(v) @ turn.T).tolist() for v in (a, b))
    distance = frechet_distance(stats_of([0.0] * 3, cov_a), stats_of([0.5] * 3, cov_b))
    assert distance == pytest.approx(expected, rel=tolerance)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """2 x 2: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det A det B))."""
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    cross = ((a @ b).trace() + 2 * (torch.det(a) * torch.det(b)).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert frechet_distance(stats_of([0, 0], a.tolist()), stats_of([0, 0], b.tolist())) == pytest.approx(expected)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("rank", [96, 40])
def test_frechet_distance_of_steep_and_singular_covariances(power, rank, monkeypatch):
    """Commuting covariances with eigenvalues k^-power, one of them of lower rank, to 1e-8 of the two traces.

    Small eigenvalues lose their digits to rounding, so that steep ones are left to singular values.
    """
    dim, used = 96, []
    values = scipy.linalg.svdvals
    monkeypatch.setattr(scipy.linalg, "svdvals", lambda m: (used.append(m.shape), values(m))[1])
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    a = torch.arange(1, dim + 1, dtype=torch.float64) ** -power
    b = 4 * a * (torch.arange(dim) < rank)
    samples = {"n": 1000}, {"n": min(1000, rank + 1)}
    first, second = (
        stats_of([0.0] * dim, (turn @ torch.diag(v) @ turn.T).tolist(), **n)
        for v, n in zip((a, b), samples, strict=True)
    )
    expected, traces = (a.sqrt() - b.sqrt()).square().sum().item(), (a + b).sum().item()
    for pair in ((first, second), (second, first)):
        assert frechet_distance(*pair) == pytest.approx(expected, abs=1e-8 * traces)
    assert bool(used) == (power == 5.0)
    for stats in (first, second):
        assert 0 <= frechet_distance(stats, stats) <= 1e-8 * traces


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
@example(3539)  # where the route by eigenvalues of the product was 2e-9 off
def test_frechet_distance_is_symmetric_and_zero_on_itself(seed):
    a, b = (FeatureStats(5).update(random_features(40, 5, seed + i)) for i in range(2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=5))
def test_moments_do_not_depend_on_the_split(cuts):
    f = random_features(100, 6) + 1000  # far from 0, where naive sums of squares lose digits
    whole = FeatureStats(6).update(f)
    edges = [0, *sorted(cuts), 100]
    parts = FeatureStats(6)
    for k, (start, stop) in enumerate(pairwise(edges)):
        part = f[start:stop]
        parts = parts.update(part) if k % 2 else parts.merge(FeatureStats(6).update(part))
    assert parts.n == 100
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.cov, torch.cov(f.double().T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [7, 64])
def test_distance_equals_torch_fidelity_through_the_same_extractor(tmp_path, batch):
    """Their calculate_metrics with our digits classifier registered as an extractor, on the real scans."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    extractor = load_extractor("digits")

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, x):
            return (extractor.embed(x),)

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

    torch_fidelity.register_feature_extractor("flowmaps-digits", Registered)
    try:
        a, b = open_dataset("digits").x[:400], open_dataset("digits", "heldout").x
        theirs = torch_fidelity.calculate_metrics(
            input1=Items(a), input2=Items(b), fid=True, feature_extractor="flowmaps-digits", cuda=False,
            batch_size=50, cache=False, verbose=False, save_cpu_ram=True,
        )  # fmt: skip
    finally:
        torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY.pop("flowmaps-digits")
    ours = frechet_distance(*(extractor.stats(torch.split(x, batch)) for x in (a, b)))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_statistics_file_round_trip_and_provenance(tmp_path):
    origin = Origin(extractor="digits", weights="abc", resize="none", data="digits", split="train")
    stats = FeatureStats(4, origin).update(random_features(50, 4))
    stats.save(tmp_path / "s.npz")
    again = FeatureStats.load(tmp_path / "s.npz")
    assert again.origin == origin and again.n == 50 and again.sha256() == stats.sha256()
    assert frechet_distance(again, stats) == pytest.approx(0, abs=1e-9)
    for field in ("extractor", "weights", "resize"):
        other = FeatureStats(4, Origin(**(vars(origin) | {field: "other"}))).update(random_features(50, 4))
        with pytest.raises(UserError, match=field):
            frechet_distance(stats, other)
    with pytest.raises(UserError, match="size"):
        frechet_distance(stats, FeatureStats(5, origin).update(random_features(50, 5)))


def test_broken_statistics_are_refused_by_name(tmp_path):
    good = {"mu": np.zeros(3), "sigma": np.eye(3), "n": 10, **dict.fromkeys(vars(Origin()), "")}
    broken = {
        "missing": {k: v for k, v in good.items() if k != "sigma"},
        "shape": good | {"sigma": np.eye(4)},
        "nan": good | {"mu": np.full(3, np.nan)},
        "asymmetric": good | {"sigma": np.array([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]])},
        "negative": good | {"sigma": -np.eye(3)},
        "indefinite": good | {"sigma": np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])},
        "slightly": good | {"sigma": np.diag([1.0, 1, -1e-9])},
        "complex": good | {"sigma": np.eye(3) + 0j},
        "huge": good | {"mu": np.full(3, 1e80)},
        "empty": good | {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "flat": good | {"mu": np.zeros((3, 1))},
        "fraction": good | {"n": 2.5},
        "several": good | {"n": np.array([10, 10])},
        "endless": good | {"n": 2**60},
        "number": good | {"extractor": 3},
        "words": good | {"n": "many"},
        "none": good | {"n": 0},
        "strings": good | {"mu": np.array(["a", "b", "c"])},
        "pickle": good | {"mu": np.array([object()], dtype=object)},
    }
    for name, arrays in broken.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.savez(tmp_path / "whole.npz", **good)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-50])
    (tmp_path / "whole.npz").unlink()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=file.name):
            FeatureStats.load(file)
    with pytest.raises(UserError, match=r"gone\.npz"):
        FeatureStats.load(tmp_path / "gone.npz")


@pytest.mark.parametrize("stored", [np.float64, np.float32])
def test_a_covariance_with_errors_of_rounding_alone_is_read(tmp_path, stored):
    """From sums, as EDM's fid.py keeps them: features that never change get a variance such as -1e-17."""
    f = torch.rand(1000, 64, generator=torch.Generator().manual_seed(0)).double()
    f[:, :8] = f[0, :8]
    mu = sum(part.sum(0) for part in f.split(64)) / 1000
    sigma = (sum(part.T @ part for part in f.split(64)) - 1000 * mu.outer(mu)) / 999
    sigma[0, 0] = -1e-17
    origin = dict.fromkeys(vars(Origin()), "")
    np.savez(tmp_path / "s.npz", mu=mu.numpy(), sigma=sigma.numpy().astype(stored), n=1000, **origin)
    loaded = FeatureStats.load(tmp_path / "s.npz")
    assert frechet_distance(loaded, FeatureStats(64).update(f)) == pytest.approx(0, abs=1e-4)


def test_statistics_are_read_whatever_their_name(tmp_path):
    stats = FeatureStats(4, Origin(extractor="digits")).update(random_features(50, 4))
    stats.save(tmp_path / "held")
    assert FeatureStats.load(tmp_path / "held").sha256() == stats.sha256()
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


def test_a_distance_that_is_not_finite_is_refused():
    a, b = (FeatureStats(2).update(scale * random_features(9, 2).double()) for scale in (1, 1e200))
    with pytest.raises(UserError, match="have no distance"):
        frechet_distance(a, b)


def test_nan_features_and_too_few_samples_are_refused():
    with pytest.raises(UserError, match="not finite"):
        FeatureStats(2).update(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(UserError, match="at least 2"):
        _ = FeatureStats(2).update(torch.zeros(1, 2)).cov


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_extractors(name):
    extractor = load_extractor(name)
    options = CLASSIFIERS[name]
    images = torch.randint(0, 256, (5, options.channels, options.size, options.size), dtype=torch.uint8)
    assert extractor.embed(images).shape == (5, extractor.dim)
    assert extractor.metric == f"FD-{name}"  # never FID
    assert extractor_file(name).stat().st_size < 2**21
    with pytest.raises(UserError, match="shape"):
        extractor.embed(images[..., :-1])


def test_digits_extractor_knows_its_digits():
    from safetensors.torch import load_file

    network = CLASSIFIERS["digits"].build().eval()
    network.load_state_dict(load_file(extractor_file("digits")))
    x, label = open_dataset("digits", "heldout").fetch(torch.arange(449))
    x = from_uint8(x)
    assert (network(x).argmax(dim=1) == label).float().mean() > 0.98


def own_extractor(file, name="mine", **options):
    network = ClassifierOptions(**{"channels": 3, "size": 16, "classes": 2, "width": 4, "features": 8} | options)
    weights = {k: v.contiguous() for k, v in ClassifierOptions(3, 16, 2, 4, 8).build().state_dict().items()}
    save_file(weights, file, OwnExtractor(name, network, "classes").metadata())
    return str(file)


def test_an_extractor_is_a_file_with_its_name_and_network(tmp_path):
    extractor = load_extractor(own_extractor(tmp_path / "a.safetensors"))
    assert extractor.metric == "FD-mine" and extractor.dim == 8
    assert extractor.embed(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 8)
    with pytest.raises(UserError, match=r"'mine' takes images of shape \(3, 16, 16\), got \(3, 8, 8\)"):
        extractor.embed(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "inception"}, "cannot be the name"),  # its distance would be called FID
        ({"name": "a/b"}, "cannot be the name"),
        ({"size": 10**9}, "size must lie in 1 .. 4,096"),
        ({"classes": 0}, "classes must lie in"),
        ({"width": 1000}, "does not fit the extractor"),
    ],
)
def test_a_file_that_claims_another_extractor_is_refused(change, reason, tmp_path):
    file = own_extractor(tmp_path / "a.safetensors", **change)
    with pytest.raises(UserError, match=reason):
        load_extractor(file)


def test_a_file_that_is_not_an_extractor_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for name, reason in (("a", "is not an extractor"), ("none", "none.safetensors")):
        with pytest.raises(UserError, match=reason) as error:
            load_extractor(f"{tmp_path}/{name}.safetensors")
        assert error.value.field == "extractor"
    with pytest.raises(UserError, match="leave it out"):
        load_extractor(own_extractor(tmp_path / "b.safetensors"), tmp_path / "a.safetensors")


def test_an_extractor_has_the_name_of_its_data_and_lies_beside_them(tmp_path):
    for data, file, name in (
        ("faces", "faces", "faces"),
        ("faces.zip", "faces", "faces"),
        ("my faces (1)", "my faces (1)", "my-faces-1-"),
        ("digits", "digits", "my-digits"),
        ("inception", "inception", "my-inception"),
    ):
        assert own_file(tmp_path / data) == tmp_path / f"{file}.extractor.safetensors"
        assert own_name(tmp_path / data) == name


@pytest.mark.parametrize("name", EXTRACTORS)
def test_wrong_weight_files_are_refused(name, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Hostile(), tmp_path / "hostile.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for file in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(UserError, match=file.name) as error:
            load_extractor(name, file)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="no such file"):
        load_extractor(name, tmp_path / "gone.pth")


def test_inception_offline_says_what_to_do(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"fetch https://.* where there is a network and pass its file as weights"):
        load_extractor("inception")


def test_unknown_extractor():
    with pytest.raises(UserError, match=r"inception, .*, digits"):
        load_extractor("vgg")


def test_sliced_w2_of_shifted_gaussians():
    """Between x and x + d the distance along a unit u is |u . d|: root mean square |d| / sqrt(dim)."""
    x, d = torch.randn(4000, 2), torch.tensor([3.0, 4.0])
    assert sliced_w2(x, x + d, projections=4000) == pytest.approx(5 / math.sqrt(2), rel=0.03)
    assert sliced_w2(x, x[torch.randperm(4000)]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="equal size"):
        sliced_w2(x, x[:10])


def test_board_kl_by_hand():
    """4 bins: uniform samples on the full square cost log 2; the pseudo-count bounds what a missing half costs."""
    centres = torch.cartesian_prod(*[torch.arange(4) * 0.5 - 0.75] * 2)
    everywhere = centres.repeat(1000, 1)
    assert board_kl(everywhere, bins=4) == pytest.approx(math.log(2), abs=1e-3)
    even = ((centres + 0.75) * 2).round().sum(dim=1) % 2 == 0
    assert board_kl(centres[even].repeat(1000, 1), bins=4) == pytest.approx(0, abs=2e-3)
    half = centres[even][:4].repeat(1000, 1)
    expected = 0.5 * math.log((1 / 8) / (1000.5 / 4008.5)) + 0.5 * math.log((1 / 8) / (0.5 / 4008.5))
    assert board_kl(half, bins=4) == pytest.approx(expected, rel=1e-6)
    outside = torch.full((8000, 2), 5.0)
    assert board_kl(torch.cat([centres[even].repeat(1000, 1), outside]), bins=4) == pytest.approx(math.log(2), abs=2e-3)
    with pytest.raises(ValueError, match="multiple of 4"):
        board_kl(half, bins=50)


def test_true_samples_of_the_board_score_the_floor():
    x = open_dataset("checkerboard", "heldout").x
    assert 0 < board_kl(x[:32768]) < 0.05 and board_kl(x[:500_000]) < 0.003


def test_memorisation_by_construction():
    g = torch.Generator().manual_seed(0)
    train, heldout, fresh = (torch.rand(300, 1, 4, 4, generator=g) for _ in range(3))
    copied = memorisation(train + 0.001, train, heldout)
    learnt = memorisation(fresh, train, heldout)
    assert copied.ratio < 0.02 and copied.samples_to_heldout > 10 * copied.samples_to_train
    assert 0.9 < learnt.ratio < 1.1
    brute = (fresh[:, None] - train[None]).square().flatten(2).mean(dim=2).sqrt().amin(dim=1)
    torch.testing.assert_close(nearest(fresh, train, batch=7), brute, rtol=1e-3, atol=1e-4)
