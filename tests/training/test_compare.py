"""compare.py and train.py --seeds: several runs, and one page about them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from helpers import run_script
from helpers.runs import assert_same, tiny, weights
from PIL import Image

from training.cli.compare import differing, quantities, read, runs_in, side_by_side, summary
from training.loop import train

ROW = "--config=configs/checkerboard.py:lagrangian,smoke"
SHORT = ("--config.steps=6", "--config.log_every=2", "--config.sample_every=3")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "seeds"
    return place, run_script("scripts/train.py", ROW, *SHORT, f"--workdir={place}", "--seeds=3,1", check=True)


def test_each_seed_is_the_run_that_its_own_command_makes(seeds, tmp_path):
    place, done = seeds
    assert sorted(path.name for path in place.iterdir()) == ["seed-1", "seed-3"]
    run_script("scripts/train.py", ROW, *SHORT, f"--workdir={tmp_path}", "--config.seed=3", check=True)
    assert_same(weights(place / "seed-3"), weights(tmp_path))
    assert f"next     python scripts/compare.py {place}\n" in done.stderr
    again = run_script("scripts/train.py", ROW, *SHORT, f"--workdir={place}", "--seeds=3,1", check=True)
    assert again.stderr.count("complete already") == 2


@pytest.mark.parametrize("flags", [("--seeds=1,1",), ("--seeds=a",), ("--seeds=-1",), ("--seeds=0", "--dry_run")])
def test_wrong_seeds_are_one_line(flags, tmp_path):
    done = run_script("scripts/train.py", ROW, f"--workdir={tmp_path / 'w'}", *flags)
    assert done.returncode == 2 and done.stderr.startswith("train.py: error: --seeds=") and done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_page_has_curves_samples_numbers_and_differences(seeds, tmp_path):
    place, _ = seeds
    out = tmp_path / "page.html"
    done = run_script("scripts/compare.py", place, f"--out={out}", check=True)
    assert done.stdout == f"wrote    {out}: 2 runs\n"
    page = out.read_text()
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r"base64,([^\"]+)", page)]
    assert len(pictures) == 2 and all(np.asarray(picture).std() > 5 for picture in pictures)
    assert "Samples after 6 steps" in page and "<td>seed-1</td><td>6</td>" in page
    assert re.search(r"<th>field</th><th>seed-1</th><th>seed-3</th></tr>\n<tr><td>seed</td><td>1</td><td>3</td>", page)
    assert run_script("scripts/compare.py", place, f"--out={out}").returncode == 0  # replaces its own page


def test_numbers_are_those_of_the_log(seeds):
    place, _ = seeds
    runs = [read(name, folder) for name, folder in runs_in(place).items()]
    rows = [json.loads(line) for line in (place / "seed-1" / "log.jsonl").read_text().splitlines()]
    assert runs[0].series["loss"] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert quantities(runs)[:3] == ["loss", "diagonal", "off_diagonal"] and "skipped" not in quantities(runs)
    _, table = summary(runs)
    assert table[0][1:3] == ["6", f"{rows[-1]['loss']:.4g}" if "loss" in rows[-1] else table[0][2]]
    assert [row[0] for row in differing(runs)[1]] == ["seed"]
    said, picture = side_by_side([runs[0], runs[1]._replace(samples={3: runs[1].samples[3]})])
    assert said == "after 3 steps" and picture.width == 2 * 482


def test_scores_are_drawn_and_the_best_is_listed(tmp_path):
    config = tiny()
    config.best.metric, config.best.num, config.best.every = "W2", 64, 2
    train(config, tmp_path / "a")
    (run,) = [read(name, folder) for name, folder in runs_in(tmp_path / "a").items()]
    columns, ((*_, best, _),) = summary([run])
    step, value = min(((step, value) for step, value in run.series["W2@1"]), key=lambda point: point[1])
    assert columns[3] == "best W2@1" and best == f"{value:.4g} at {step}" and len(run.series["W2@1"]) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name the directories of runs"),
        (("{}/none",), "is not a run, nor a directory of runs"),
        (("{}", "--out={}/new/log.jsonl/x.html"), "is not a run"),
    ],
)
def test_what_is_no_run_is_one_line(arguments, reason, tmp_path):
    done = run_script("scripts/compare.py", *(text.format(tmp_path) for text in arguments))
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1
