"""The suites of benchmark.py whose records the documents quote: they run, and do not run again what is there."""

import json
import math
import os
import subprocess
import sys

import pytest
from benchmarks.composition import COMPOSITIONS, FITTED
from benchmarks.learning import best_rates, optimiser_curves
from benchmarks.rows import TRANSFORMERS, row_config
from helpers import ROOT, run_script

from flowmaps import UserError
from training.config import Optimizer


def run(file, *flags):
    done = run_script("scripts/benchmark.py", f"--json={file}", "--threads=1", *flags, check=True)
    return done.stdout.strip().splitlines(), json.loads(file.read_text())["records"]


@pytest.mark.slow
def test_mid_training(tmp_path):
    flags = ["--suite=mid_training", "--rows=checkerboard", "--train_steps=8"]
    lines, records = run(tmp_path / "m.json", *flags)
    rows = [r["row"] for r in records]
    starts = ("random", "drift", "mid-training")
    assert rows == [
        f"checkerboard, {method} from {start}"
        for method in ("lagrangian", "mean_flow", "consistency")
        for start in starts
    ]
    seen = {name.partition("@")[2] for name in records[0]["scores"]}
    assert len(seen) == 5 and all(record["scores"].keys() == records[0]["scores"].keys() for record in records)
    again, _ = run(tmp_path / "m.json", *flags)
    assert again == lines[-len(again) :]


@pytest.mark.slow
def test_bellman(tmp_path):
    flags = ["--suite=bellman", "--rows=narrow,checkerboard", "--train_steps=2", "--num=32", "--seeds=3"]
    lines, records = run(tmp_path / "b.json", *flags)
    scores = {(r["row"], r["seed"]): r["scores"] for r in records}
    assert len(scores) == len(records)
    assert scores["narrow, Bellman, end", 0]["W2@4"] < 0.5 * scores["narrow, equal steps", 0]["W2@4"]
    for row in (
        "equal steps",
        "Bellman, local_root",
        "straightened, Bellman, end",
        "straightened, Bellman, end, LoRA 4, all at once",
        "reflow, equal steps",
        "map, Bellman, end",
    ):
        assert set(scores[f"checkerboard, {row}", 3]) == {f"{m}@{k}" for m in ("KL", "error") for k in (2, 4, 6, 8)}
    again, _ = run(tmp_path / "b.json", *flags)
    assert again == lines[-len(again) :]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["plane", "digits", "classes"])
def test_steering(tmp_path, row):
    flags = ["--suite=steering", f"--rows={row}", "--num=16", "--seeds=1"]
    plot = [f"--plot={tmp_path}/s.png"] if row == "digits" else []
    lines, records = run(tmp_path / "s.json", *flags, *plot)
    assert all(math.isfinite(value) for record in records for value in record["scores"].values())
    assert {"plane": 11, "digits": 10, "classes": 13}[row] == len(records) and bool(plot) == (
        tmp_path / "s.png"
    ).exists()
    again, _ = run(tmp_path / "s.json", *flags)
    assert again == lines[-len(again) :]


@pytest.mark.slow
def test_guidance(tmp_path):
    flags = ["--suite=guidance", "--train_steps=10", "--num=64", "--seeds=1"]
    lines, records = run(tmp_path / "g.json", *flags)
    assert [record["row"] for record in records] == ["mixed", "unmixed"] and lines[-1].startswith("| unmixed | 10 |")
    assert all(0 <= records[0]["scores"][f"asked %, w={w}@{n}"] <= 100 for w in (1, 2, 4) for n in (1, 4))
    assert records[0]["scores"] != records[1]["scores"]


@pytest.mark.slow
def test_optimisers(tmp_path):
    flags = ["--suite=optimisers", "--rows=lagrangian+small_DiT", "--train_steps=8", "--num=32", "--seeds=0"]
    lines, records = run(tmp_path / "o.json", *flags, "--rates=1e-3,1e-2", f"--plot={tmp_path}/o.png")
    rates = [f"{name}, lr {rate}" for name in ("radam", "adamw", "muon") for rate in ("0.001", "0.01")]
    assert [record["row"] for record in records] == [f"lagrangian+small_DiT+{rate}" for rate in rates]
    assert len([line for line in lines if line.startswith("| lagrangian")]) == 3 and (tmp_path / "o.png").exists()


def test_of_each_optimiser_the_best_rate_is_shown():
    def record(row, *ends):
        return {"row": row, "seed": 0, "scores": {f"FD, steps=1@{64 * k}": x for k, x in enumerate(ends, start=1)}}

    records = [
        record("a+DiT+adamw, lr 0.1", 1.0, math.nan),
        record("a+DiT+adamw, lr 0.01", 5.0, 4.0),
        record("a+DiT+adamw, lr 0.01", 5.0, 3.0),  # another seed
        record("a+DiT+adamw, lr 0.001", 5.0, 3.6),
        record("a+DiT+muon, lr 0.001", 2.0, 3.0),
        record("a+muon, lr 0.1", 2.0, 9.0),
    ]
    assert best_rates(records) == [records[k] for k in (1, 2, 4, 5)]
    assert optimiser_curves(records)[-3:] == [
        ("muon", "a+DiT: FD, steps=1", 128, 3.0),
        ("muon", "a: FD, steps=1", 64, 2.0),
        ("muon", "a: FD, steps=1", 128, 9.0),
    ]


SPEED = {
    "profile": ("DiT", "lagrangian@matrix products, convolutions"),
    "ema": ("lagrangian", "share of a step@3"),
    "resume": ("flow_matching+DiT", "read / step"),
    "layout": ("EDM2UNet", "forward"),
    "sample": ("UNet", "sampler / forward@1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SPEED)
def test_speed(suite, tmp_path):
    row, ratio = SPEED[suite]
    lines, records = run(tmp_path / "s.json", f"--suite={suite}", f"--rows={row}")
    assert [record["row"] for record in records] == [row] and 0 < records[0]["scores"][ratio] < 1.5
    assert {"processor", "cores", "device", "threads", "torch", "flowmaps"} < records[0]["machine"].keys()
    assert ratio in lines[-3] and lines[-1].startswith(f"| {row} |")


@pytest.mark.slow
def test_folders(tmp_path):
    _, records = run(tmp_path / "f.json", "--suite=folders", "--num=640")
    scores = {record["row"]: record["scores"] for record in records}
    assert scores["jpeg64"]["flowmaps / torchvision"] > 1 and scores["jpeg256"]["flowmaps / torchvision"] > 1
    assert scores["opening"]["again, s"] < scores["opening"]["first, s"]


@pytest.mark.slow
def test_sources(tmp_path):
    _, records = run(tmp_path / "s.json", "--suite=sources", "--num=640")
    assert [record["row"] for record in records] == ["folder", "hf", "wds", "datasets", "webdataset"]
    assert all(record["scores"]["images/CPU s"] > 1 for record in records)


@pytest.mark.slow
def test_compositions(tmp_path):
    flags = ["--suite=composition", "--train_steps=4", "--num=32", "--seeds=1"]
    _, records = run(tmp_path / "c.json", *flags)
    names = list(COMPOSITIONS)
    names.insert(names.index(FITTED) + 1, f"{FITTED}, Bellman steps")
    assert [record["row"] for record in records] == [f"digits, {name}" for name in names]
    assert all(record["train_steps"] == 4 and "map@1" in record["scores"] for record in records)
    found = {record["row"]: record["scores"] for record in records}
    plain, fitted = found[f"digits, {FITTED}"], found[f"digits, {FITTED}, Bellman steps"]
    assert plain["map@1"] == fitted["map@1"] and plain["euler@64"] == fitted["euler@64"]  # no step sizes to fit


@pytest.mark.slow
def test_segments(tmp_path):
    """Just before the end hardly any error is left to be made, and at the start one step of the drift is far off."""
    _, records = run(tmp_path / "s.json", "--suite=segments", "--rows=assets/digits", "--num=200")
    first, last = records[0]["scores"], records[-1]["scores"]
    assert [record["row"] for record in records][3] == "assets/digits, from t = 0.75"
    assert abs(last["Euler, steps of 1/64"] / last["the images"] - 1) < 0.05
    assert first["Euler, one step"] > 2 * first["map, one jump"]


TRAINED = ("composition", "mid_training", "bellman", "guidance")


@pytest.mark.parametrize("suite", [*TRAINED, "ema", "folders", "resume", "sample", "segments", "sources", "step"])
def test_unknown_rows_are_named(suite):
    done = run_script("scripts/benchmark.py", f"--suite={suite}", "--rows=moon")
    assert done.returncode == 2 and "--rows=moon" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_part_of_a_row_is_named():
    done = run_script("scripts/benchmark.py", "--suite=step", "--rows=lagrangian+sgd")
    assert done.returncode == 2 and "unknown variant 'sgd'" in done.stderr and "small_DiT" in done.stderr


@pytest.mark.slow
def test_three_processes_write_records_into_one_file(tmp_path):
    """None of them is lost, and a process that starts again finds all."""
    code = (
        "import sys; sys.path.insert(0, 'scripts'); from benchmarks.record_files import add_record\n"
        "for seed in range(20): add_record(sys.argv[1], 's', {'num': 3}, {'row': sys.argv[2], 'seed': seed, "
        "'scores': {'FD@1': float('nan')}})"
    )
    file = str(tmp_path / "r.json")
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    started = [subprocess.Popen([sys.executable, "-c", code, file, row], **options) for row in "abc"]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert sorted((r["row"], r["seed"]) for r in records) == [(row, seed) for row in "abc" for seed in range(20)]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("content", ["{", '{"suite": 3}', '{"suite": "step", "budget": {}, "records": [1]}'])
def test_a_file_that_is_not_of_records_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content.replace("{", '{"written_by": "flowmaps", ', 1))
    done = run_script("scripts/benchmark.py", "--suite=step", f"--json={tmp_path}/r.json")
    assert done.returncode == 2 and "--json=" in done.stderr and done.stderr.count("\n") == 1


def test_settings_of_a_row():
    config = row_config("imf+smoke+muon+network.head_depth=0+optim.lr=1e-3", base_std=0.25)
    assert (config.network.head_depth, config.optim.lr, config.base_std) == (0, 1e-3, 0.25)
    assert (config.optim.name, config.batch) == (Optimizer.muon, 16)
    assert row_config("lagrangian+garment_DiT+cpu", "configs/fashion_mnist.py").network is TRANSFORMERS["garment_DiT"]
    assert row_config("pmf+network.prediction=velocity").network.prediction == "velocity"


@pytest.mark.parametrize("part", ["optim.rate=1", "optim", "smal", "seed.x=1"])
def test_settings_that_do_not_exist(part):
    with pytest.raises(UserError, match="--rows=lagrangian"):
        row_config(f"lagrangian+{part}")
