"""The demo and the benchmark, end to end with a handful of training steps."""

import json
import re

import pytest
import torch
from benchmarks.objectives import COSTS, network_costs, peak_memory
from helpers import run_script
from PIL import Image

from flowmaps.objectives import OBJECTIVES, MidTraining, Shortcut, Straightening, TerminalVelocity


def test_demo_writes_a_self_contained_report(tmp_path):
    command = ["scripts/demo.py", f"--workdir={tmp_path}", "--steps=3", "--num=80"]
    done = run_script(*command, check=True)
    assert "FD-digits" in done.stdout and "floor" in done.stdout
    for picture in ("grid.png", "distance.png", "loss.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 300
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # grid, distance, loss
    assert page.count("<tr>") == 7 and "<td>32</td>" in page and page.count("<li>") >= 3
    assert "the flow map" in done.stdout and f"--checkpoint={tmp_path}/lagrangian \\\n    --steps=1,2,4,8" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is fetched
    assert "scripts/sample.py" in page and "&quot;steps&quot;: 3" in page and "FD-digits" in page
    again = run_script(*command, check=True)
    assert again.stdout == done.stdout and "step" not in again.stderr  # finished runs are used again
    other = run_script(*command, "--steps=4")
    assert other.returncode == 2 and "--steps" in other.stderr and len(other.stderr.strip().splitlines()) == 1


def test_benchmark_tables(tmp_path):
    short = ["--suite=checkerboard", "--seeds=0,1", "--train_steps=2", "--num=500"]
    done = run_script("scripts/benchmark.py", *short, f"--json={tmp_path}/b.json", check=True)
    records = json.loads((tmp_path / "b.json").read_text())["records"]
    assert [(r["row"], r["seed"], r["train_steps"]) for r in records] == [
        ("flow_matching", 0, 2), ("flow_matching", 1, 2), ("lagrangian", 0, 2), ("lagrangian", 1, 2),
    ]  # fmt: skip
    table = done.stdout.strip().splitlines()[-5:]
    files = [f"--json={tmp_path}/b.json", f"--plot={tmp_path}/b.png"]
    again = run_script("scripts/benchmark.py", *short, *files, check=True)
    assert again.stdout.strip().splitlines() == table  # nothing is run again
    with Image.open(tmp_path / "b.png") as image:
        assert image.width > 1000  # two panels
    assert "KL@1" in table[0] and table[2].startswith("| flow_matching | 2 |") and "±" in table[3]
    assert "0.086" in table[4]  # the paper's row
    other = run_script("scripts/benchmark.py", *short, "--train_steps=3", f"--json={tmp_path}/b.json")
    assert other.returncode == 2 and "--json" in other.stderr


def test_benchmark_mistakes():
    for arguments, named in (
        (["--suite=nothing"], "--suite"),
        (["--suite=digits", "--seeds=x"], "--seeds"),
        (["--suite=digits", "--rows="], "--rows"),
        (["--suite=networks", "--plot=a.png"], "--plot"),
        (["--suite=networks", "--rows=VAE"], "--rows"),
        (["--suite=learning"], "--rates"),
        (["--suite=digits", "--rates=1e-3"], "--rates"),
        ([], "--suite"),
    ):
        done = run_script("scripts/benchmark.py", *arguments)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_benchmark_costs_cover_every_objective():
    """One round on a tiny batch: every method that has a row in the table is timed, relative to flow matching."""
    rows = dict(network_costs("DiT", rounds=1, batch=4))
    assert rows["DiT, flow_matching"]["time / flow_matching"] == 1
    assert all(scores["images/s"] > 0 and scores["GiB"] > 0 for scores in rows.values())
    timed = {type(objective) for objective in COSTS.values()}
    assert timed >= set(OBJECTIVES.values()) - {
        MidTraining,
        Straightening,
        Shortcut,
        TerminalVelocity,
    }  # a plain pass and a teacher; what their parents do


def test_peak_memory_is_the_most_at_a_time():
    def work():
        a = torch.zeros(2**20)
        a = a + 1  # two of 4 MiB here
        del a
        b = torch.zeros(2**20)
        del b

    assert 2 * 2**22 <= peak_memory(work, torch.device("cpu")) < 2 * 2**22 + 2**20
