"""``evaluate`` from Python, and stats.py and fid.py as a CI job calls them."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import gaussian_map, run_script
from PIL import Image

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.data import iterate, open_dataset
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.evaluation.real_images import open_for_scoring
from flowmaps.evaluation.record import read_record
from flowmaps.evaluation.samples import samples
from flowmaps.evaluation.scoring import NotFinite
from flowmaps.metrics import FeatureStats, board_kl
from flowmaps.networks import UNet

MODULE = sys.modules["flowmaps.evaluation.evaluate"]  # the package's attribute of that name is the function


def network():
    torch.manual_seed(0)
    return UNet(
        image_size=8, channels=1, width=8, channel_mult=(1,), blocks=1, attention_resolutions=(), num_classes=10
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An untrained map of digits, a drift, one that gives NaN, and reference statistics made by stats.py."""
    base = tmp_path_factory.mktemp("scoring")
    info = FlowMapInfo(shape=(1, 8, 8), num_classes=10)
    FlowMap(network(), base_std=0.5, info=info).save_pretrained(base / "map")
    FlowMap(network(), info=FlowMapInfo(shape=(1, 8, 8), num_classes=10, kind="drift")).save_pretrained(base / "drift")
    broken = network()
    torch.nn.init.constant_(broken.head[-1].bias, float("nan"))
    FlowMap(broken, info=info).save_pretrained(base / "nan")
    run_script("scripts/stats.py", "--data=digits:heldout", f"--out={base}/ref.npz", check=True)
    real = open_dataset("digits").x[:300]
    np.savez(base / "real.npz", samples=real.permute(0, 2, 3, 1).numpy())
    (base / "folder").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image[0].numpy()).save(base / "folder" / f"{i:04d}.png")
    np.savez(base / "float.npz", samples=np.full((9, 8, 8, 1), np.nan, np.float32))
    np.savez(base / "neither.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    stats = FeatureStats.load(base / "ref.npz")
    arrays = {"mu": stats.mean.numpy(), "sigma": stats.cov.numpy(), "n": 449, **vars(stats.origin)}
    np.savez(base / "size.npz", **(arrays | {"mu": np.zeros(3), "sigma": np.eye(3)}))
    np.savez(base / "keys.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    np.savez(base / "other.npz", **(arrays | {"weights": "0" * 64}))
    np.savez(base / "nanstats.npz", **(arrays | {"mu": np.full(64, np.nan)}))
    (base / "cut.npz").write_bytes((base / "ref.npz").read_bytes()[:-100])
    (base / "cutsamples.npz").write_bytes((base / "real.npz").read_bytes()[:-100])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(base / "odd.png")
    return base


def test_a_class_by_name_is_recorded_by_its_number(place):
    fm = FlowMap.from_pretrained(place / "map")
    fm.info = replace(fm.info, class_names=tuple("abcdefghij"))
    named, numbered = (evaluate(fm, str(place / "ref.npz"), num=100, label=label) for label in ("D", 3))
    assert named["label"] == 3 and named["results"] == numbered["results"]


def test_label_policies(place, tmp_path):
    """A file of the balanced labels gives the balanced scores; random ones do not depend on the batch."""
    fm, reference = FlowMap.from_pretrained(place / "map"), str(place / "ref.npz")
    (tmp_path / "labels.json").write_text(json.dumps([i % 10 for i in range(150)]))
    made = {
        (policy, batch): evaluate(fm, reference, num=120, label_policy=policy, batch=batch, errors=True)
        for policy in ("balanced", "random", tmp_path / "labels.json")
        for batch in (7, 120)
    }
    rows = {key: record["results"][0] for key, record in made.items()}
    for policy in ("balanced", "random", tmp_path / "labels.json"):
        one, other = rows[policy, 7], rows[policy, 120]
        assert one["FD-digits"] == pytest.approx(other["FD-digits"], rel=1e-6)
        assert one["se"]["FD-digits"] == pytest.approx(other["se"]["FD-digits"], rel=1e-4)
    assert rows["balanced", 7] == rows[tmp_path / "labels.json", 7]
    assert made["balanced", 7]["label_policy"] == "balanced" and made["random", 7]["label_policy"] == "random"
    assert made[tmp_path / "labels.json", 7]["label_policy"].startswith("sha256:")
    for policy, label, named in (("random", 3, "given label"), ("sorted", None, "balanced or random")):
        with pytest.raises(UserError, match=named):
            evaluate(fm, reference, num=120, label_policy=policy, label=label)


def fid(place, *arguments, **options):  # {base} in an argument is the folder of the fixture
    return run_script("scripts/fid.py", *[a.format(base=place) for a in arguments], **options)


def test_real_images_score_low_and_every_source_agrees(place):
    values = []
    for source in ("{base}/real.npz", "{base}/folder"):
        for reference in ("digits:heldout", "{base}/ref.npz"):
            record = f"--json={place}/real.json"
            done = fid(place, f"--samples={source}", f"--reference={reference}", record, check=True)
            assert "FD-digits" in done.stdout and "FID" not in done.stdout
            values.append(json.loads((place / "real.json").read_text())["results"][0]["FD-digits"])
    assert max(values) - min(values) < 1e-6 * values[0]
    untrained = place / "untrained.json"
    fid(
        place,
        "--checkpoint={base}/map",
        "--reference={base}/ref.npz",
        "--steps=1",
        "--num=300",
        f"--json={untrained}",
        check=True,
    )
    assert json.loads(untrained.read_text())["results"][0]["FD-digits"] > 20 * values[0]


def test_record_has_every_fact_that_moves_the_number(place):
    record = place / "record.json"
    fid(
        place, "--checkpoint={base}/drift", "--reference={base}/ref.npz", "--steps=1,2", "--num=50", "--sampler=heun",
        "--seed=5", "--memorisation=false", f"--json={record}", check=True,
    )  # fmt: skip
    found = json.loads(record.read_text())
    assert [(row["sampler"], row["steps"], row["nfe"]) for row in found["results"]] == [("heun", 1, 2), ("heun", 2, 4)]
    assert found["num"] == 50 and found["seeds"] == [5] and found["metric"] == "FD-digits"
    assert found["reference"]["n"] == 449 and found["reference"]["split"] == "heldout"
    assert found["reference"]["size"] == "8x8" and found["reference"]["crop"] == "none"
    row = found["results"][1]
    assert row["times"] == [0, 0.5, 1] and row["grid"] == "uniform" and row["ema"] is None
    assert len(row["weights"]) == len(found["extractor"]["weights"]) == len(found["reference"]["sha256"]) == 64
    assert {"torch", "flowmaps", "torch-fidelity"} <= found["versions"].keys()
    assert found["command"].startswith("scripts/fid.py --checkpoint=") and found["device"] == "cpu"


def test_evaluate_returns_the_record_that_fid_writes(place):
    """The same keys in the same order and the same values, but for the command; a gate reads it."""
    written = place / "written.json"
    fid(place, "--checkpoint={base}/map", "--reference=digits:heldout", "--steps=1,2", "--num=60", "--seed=3",
        "--repeats=2", "--sampler=map,heun", f"--json={written}", check=True)  # fmt: skip
    expected = read_record(written)
    found = evaluate(
        FlowMap.from_pretrained(place / "map"), "digits:heldout", steps=(1, 2), num=60, seeds=(3, 4),
        sampler=("map", "heun"), source=f"{place}/map",
    )  # fmt: skip
    assert list(found) == list(expected) and [list(row) for row in found["results"]] == [
        list(row) for row in expected["results"]
    ]
    assert {**found, "command": ""} == {**expected, "command": ""}
    again = place / "again.json"
    again.write_text(json.dumps(found))
    assert read_record(again) == found


def test_evaluate_takes_images_of_every_kind_and_an_open_reference(place, monkeypatch):
    reference = open_reference("digits:heldout")
    monkeypatch.setattr(MODULE, "open_references", None)  # nothing is opened again
    data = open_dataset("digits")
    kinds = (data, data.x, "digits:train")
    records = [evaluate(images, reference, memorisation=images is data) for images in kinds]
    rows = [record["results"][0] for record in records]
    assert len({row["FD-digits"] for row in rows}) == 1 and records[0]["num"] == len(data)
    assert rows[0]["FD-digits"] == rows[0]["floor"] and rows[0]["memorisation_ratio"] == 0
    few = [evaluate(images, reference)["results"][0]["FD-digits"] for images in (place / "real.npz", data.x[:300])]
    assert few[0] == pytest.approx(few[1], rel=1e-6)  # the memory layout of images moves the last digits of features


def test_evaluate_refuses_before_it_samples(place, monkeypatch):
    fm, reference = FlowMap.from_pretrained(place / "map"), open_reference("digits:heldout")
    with pytest.raises(NotFinite, match="NaN"):
        evaluate(FlowMap.from_pretrained(place / "nan"), reference, num=9)
    monkeypatch.setattr(MODULE, "sample_batches", None)
    for options, message in (
        ({"steps": 0}, "^steps=0"),
        ({"sampler": "magic"}, "^sampler=magic"),
        ({"schedule": "gone.json"}, r"schedule=gone\.json"),
        ({"label": 11}, "label"),
        ({"guidance": 2.0}, "guidance"),
        ({"num": 1}, "^metrics=fid: needs 2 images"),
        ({"metrics": ("kid",)}, "^metrics=kid: only fid"),
        ({"seeds": ()}, "^seeds"),
        ({"extractor": "digits"}, "^extractor"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(fm, reference, **{"num": 9, **options})
    for options in ({"reference": reference.stats}, {"reference": reference.stats, "floor": "digits:train"}):
        with pytest.raises(UserError, match="memorisation: needs"):
            evaluate(fm, **options, num=9, memorisation=True, before_sampling=pytest.fail)
    with pytest.raises(UserError, match="memorisation: needs"):
        evaluate(fm, str(place / "folder"), num=9, extractor="digits", memorisation=True)
    with pytest.raises(UserError, match="uint8"):
        evaluate(torch.rand(9, 1, 8, 8), reference)


def test_number_does_not_depend_on_the_batch_size(place):
    values = []
    for batch in (7, 64):
        record = place / f"batch-{batch}.json"
        fid(
            place,
            "--checkpoint={base}/map",
            "--reference={base}/ref.npz",
            "--steps=2",
            "--num=100",
            f"--batch={batch}",
            f"--json={record}",
            check=True,
        )
        values.append(json.loads(record.read_text())["results"][0]["FD-digits"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_memorisation_columns(place):
    done = fid(
        place,
        "--samples={base}/real.npz",
        "--reference=digits:heldout",
        "--memorisation",
        f"--json={place}/m.json",
        check=True,
    )
    row = json.loads((place / "m.json").read_text())["results"][0]
    assert row["memorisation_ratio"] == 0  # training images are copies of themselves
    assert 0 < row["floor"] < 2 and "floor" in done.stdout


def test_memorisation_of_own_images_takes_the_held_out_ones_from_floor(place, tmp_path):
    """Two folders with the splits of a built-in data set give the numbers that its name gives."""
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        for i, pixels in enumerate(open_dataset("digits", split).x[:, 0].numpy()):
            Image.fromarray(pixels).save(tmp_path / split / f"{i:04}.png")
    images = open_dataset("digits").x[:200]
    options = {"extractor": "digits", "memorisation": True}
    own = evaluate(images, str(tmp_path / "train"), floor=str(tmp_path / "heldout"), **options)
    named = evaluate(images, "digits:train", **options)["results"][0]
    assert own["results"][0]["floor"] == pytest.approx(own["floor"]["FD-digits"], rel=1e-6)
    assert {key: own["results"][0][key] for key in named} == pytest.approx(named, rel=1e-6)


def test_gate(place):
    scored = ["--samples={base}/real.npz", "--reference={base}/ref.npz"]
    assert fid(place, *scored, "--max_fid=50").returncode == 0
    above = fid(place, *scored, "--max_fid=0.0001")
    assert above.returncode == 1
    assert above.stderr.strip().splitlines()[-1].startswith("gate failed: FD-digits") and "max_fid=" in above.stderr


MISTAKES = {
    "feature size": (["--samples={base}/real.npz", "--reference={base}/size.npz"], "size"),
    "truncated reference": (["--samples={base}/real.npz", "--reference={base}/cut.npz"], "cut.npz"),
    "truncated samples": (["--samples={base}/cutsamples.npz", "--reference={base}/ref.npz"], "cutsamples.npz"),
    "missing keys": (["--samples={base}/real.npz", "--reference={base}/keys.npz"], "extractor"),
    "other weights": (["--samples={base}/real.npz", "--reference={base}/other.npz"], "weights"),
    "other extractor": (
        ["--samples={base}/real.npz", "--reference={base}/ref.npz", "--extractor=inception"],
        "--extractor",
    ),
    "NaN statistics": (["--samples={base}/real.npz", "--reference={base}/nanstats.npz"], "NaN"),
    "NaN images": (["--samples={base}/float.npz", "--reference={base}/ref.npz"], "uint8"),
    "NaN model": (["--checkpoint={base}/nan", "--reference={base}/ref.npz", "--steps=1", "--num=9"], "NaN"),
    "no images in archive": (["--samples={base}/neither.npz", "--reference={base}/ref.npz"], "samples"),
    "missing reference": (["--samples={base}/real.npz", "--reference={base}/gone.npz"], "gone.npz"),
    "unknown data set": (["--samples={base}/real.npz", "--reference=cifar99"], "cifar99"),
    "unknown split": (["--samples={base}/real.npz", "--reference=digits:middle"], "middle"),
    "points": (["--samples={base}/real.npz", "--reference=checkerboard", "--extractor=digits"], "points"),
    "nothing to score": (["--reference={base}/ref.npz"], "--checkpoint or --samples"),
    "both": (["--samples={base}/real.npz", "--checkpoint={base}/map", "--reference={base}/ref.npz"], "either"),
    "no reference": (["--samples={base}/real.npz"], "--reference"),
    "drift as map": (["--checkpoint={base}/drift", "--reference={base}/ref.npz", "--steps=1", "--num=9"], "euler"),
    "missing data": (["--samples={base}/real.npz", "--reference=fashion_mnist", "--root={base}"], "--root"),
    "wrong shape": (["--samples={base}/real.npz", "--reference=digits", "--extractor=fashion_mnist"], "shape"),
    "memorisation": (["--samples={base}/real.npz", "--reference={base}/ref.npz", "--memorisation"], "--memorisation"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_cannot_judge_is_exit_code_2_and_one_line(place, arguments, named):
    done = fid(place, *arguments, f"--json={place}/never.json")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert named in lines[0]
    assert not (place / "never.json").exists()


def image_batches(folder):
    return iterate(open_for_scoring(str(folder), ""))


def test_broken_folders(place, tmp_path):
    (tmp_path / "a.png").write_bytes((place / "folder" / "0000.png").read_bytes())
    (tmp_path / "b.png").write_bytes((place / "odd.png").read_bytes())
    with pytest.raises(UserError, match=r"b\.png has shape"):
        list(image_batches(tmp_path))
    (tmp_path / "b.png").write_bytes((place / "folder" / "0001.png").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"b\.png \("):
        list(image_batches(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="has no images"):
        list(image_batches(empty))


def test_fingerprint_follows_the_weights():
    a, b = gaussian_map(), gaussian_map(wrong=0.1)
    assert a.fingerprint() == gaussian_map().fingerprint() != b.fingerprint()


def test_points_are_scored_by_the_kl_from_their_density(tmp_path):
    """fid.py's KL of a checkpoint of points is board_kl of its samples, and a gate; images and points do not mix."""
    run, scores = tmp_path / "run", tmp_path / "kl.json"
    run_script("scripts/train.py", "--config=configs/checkerboard.py:lagrangian,smoke", f"--workdir={run}", check=True)
    score = [f"--checkpoint={run}", "--steps=1,2", "--num=3000"]
    board = [*score, "--reference=checkerboard:heldout"]
    run_script("scripts/fid.py", *board, "--batch=700", f"--json={scores}", check=True)
    made = samples(FlowMap.from_pretrained(run), 2, 3000, 0)
    record = json.loads(scores.read_text())
    assert record["metric"] == "KL" and record["results"][1]["KL"] == pytest.approx(board_kl(made), abs=1e-9)
    assert run_script("scripts/fid.py", *board, f"--max_regression={scores}").returncode == 0
    assert run_script("scripts/fid.py", *board, "--max_fid=0.01").returncode == 1
    for flags, message in (
        (["--reference=digits:heldout"], "points, not images"),
        (["--reference=checkerboard:heldout", "--extractor=digits"], "points, not images"),
        (["--reference=checkerboard:heldout", "--metrics=fid"], "only kl"),
        (["--reference=checkerboard:heldout", "--memorisation"], "for images"),
    ):
        refused = run_script("scripts/fid.py", *score, *flags)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
