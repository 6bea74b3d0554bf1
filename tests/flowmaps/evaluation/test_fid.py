"""Scores on Inception features against torch-fidelity's own, whatever the batch size and the number of processes."""

import json

import pytest
import torch
from helpers import run_script, run_two
from helpers.makers import Items, archive, small_inception, write_inception

from flowmaps.metrics.extractors import load_extractor
from flowmaps.metrics.scores import METRICS as TABLE

METRICS = [name for name, metric in TABLE.items() if metric.of in ("images", "inception")]
NAMES = {
    "FID": "frechet_inception_distance",
    "KID": "kernel_inception_distance_mean",
    "KID std": "kernel_inception_distance_std",
    "IS": "inception_score_mean",
    "IS std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


def theirs(samples, reference, weights, kid_subset, batch=50):
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Items(samples), input2=Items(reference), fid=True, kid=True, isc=True, prc=True, cuda=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), batch_size=batch,
        kid_subset_size=kid_subset, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    return {ours: found[name] for ours, name in NAMES.items()}


def assert_same_scores(row, expected):
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4), name
    assert expected["FID"] > 0.01 and expected["KID std"] > 0 and expected["IS"] > 1.01
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of photographs as sample.py writes images, weights of Inception, and torch-fidelity's scores.

    Inception sees 75 x 75 pixels instead of 299 x 299 here, in both packages: a sixteenth of the time.
    """
    base = tmp_path_factory.mktemp("fid")
    weights = write_inception(base / "inception.pth")
    samples, reference = archive(base / "samples.npz", 150, 2000), archive(base / "real.npz", 130, 0)
    with small_inception(base):
        features = load_extractor("inception", weights).stats(torch.split(samples, 50))
        assert features.cov.diagonal().mean().sqrt() > 0.01  # they vary over images
        return base, weights, theirs(samples, reference, weights, 100)


@pytest.mark.parametrize(
    ("run", "batch"),
    [
        (run_script, 7),
        pytest.param(run_script, 64, marks=pytest.mark.slow),
        pytest.param(run_two, 7, marks=pytest.mark.slow),
        pytest.param(run_two, 64, marks=pytest.mark.slow),
    ],
)
def test_scores_equal_torch_fidelity(sets, run, batch, tmp_path):
    base, weights, expected = sets
    flags = [f"--samples={base}/samples.npz", f"--reference={base}/real.npz", f"--weights={weights}"]
    flags += [f"--metrics={','.join(METRICS)}", "--kid_subset=100", f"--batch={batch}", f"--json={tmp_path}/a.json"]
    done = run(base / "fid.py", *flags, check=True)
    assert_same_scores(json.loads((tmp_path / "a.json").read_text())["results"][0], expected)
    assert done.stdout.count("FID") == 1  # one process speaks


@pytest.mark.slow
def test_scores_equal_torch_fidelity_at_full_size(tmp_path):
    """The same at Inception's own 299 x 299, through the script itself."""
    weights = write_inception(tmp_path / "inception.pth", size=299)
    samples, reference = archive(tmp_path / "samples.npz", 60, 2000), archive(tmp_path / "real.npz", 50, 0)
    expected = theirs(samples, reference, weights, 40)
    for run, batch in ((run_script, 7), (run_two, 64)):
        flags = [f"--samples={tmp_path}/samples.npz", f"--reference={tmp_path}/real.npz", f"--weights={weights}"]
        flags += [f"--metrics={','.join(METRICS)}", "--kid_subset=40", f"--batch={batch}", f"--json={tmp_path}/a.json"]
        run("scripts/fid.py", *flags, check=True)
        assert_same_scores(json.loads((tmp_path / "a.json").read_text())["results"][0], expected)
