"""The tables of results in README and docs are what scripts/results.py writes from the records in assets/."""

import json
import shutil

import pytest
from benchmarks.pages import CHECKPOINTS, MARKED, SECTIONS, with_tables
from helpers import ROOT, run_script

from flowmaps import UserError
from scripts.results import PAGES

ASSETS = ROOT / "assets"


@pytest.mark.parametrize("page", PAGES)
def test_tables_in_the_pages_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert MARKED.search(text) and with_tables(text, ASSETS) == text, "run python scripts/results.py"


def test_results_md_has_every_table():
    names = [found[2] for found in MARKED.finditer((ROOT / "docs/results.md").read_text())]
    assert sorted(names) == sorted([*CHECKPOINTS, *SECTIONS])


def page(name):
    return f"Before.\n\n<!-- results: {name} -->\n<!-- end of results -->\n\nAfter.\n"


MACHINE = {"processor": "AMD EPYC", "threads": 1, "torch": "2.14.1+cpu"}
SCORES = {"map@1": 1.5, "euler@64": None, "floor": 0.5}  # null: not finite


@pytest.mark.parametrize(
    ("name", "suite", "row", "scores", "flags"),
    [
        ("digits_imf.json", "digits", "imf+network.head_depth=0", SCORES, "--rows=imf+network.head_depth=0"),
        ("composition-digits.json", "composition", "digits, drift, soflow", SCORES, "--rows=digits"),
        ("pixels.json", "learning", "pmf, lr 0.001", {"FD@8": 3.0}, "--rates=0.001 --rows=pmf"),
    ],
)
def test_a_record_becomes_a_section_with_its_command_and_machine(tmp_path, name, suite, row, scores, flags):
    """Until its file exists, its place is empty."""
    assert with_tables(page(name), tmp_path) == page(name)
    budget = {"train_steps": None, "cpu_minutes": 6.0, "num": 1000}
    records = [{"row": row, "seed": seed, "train_steps": 1000, "scores": scores, "machine": MACHINE} for seed in (0, 1)]
    (tmp_path / name).write_text(json.dumps({"suite": suite, "budget": budget, "records": records}))
    made = with_tables(page(name), tmp_path)
    budget = f"--cpu_minutes=6 --num=1000 --threads=1 --json=assets/{name}"
    assert f"\n    python scripts/benchmark.py --suite={suite} {flags} --seeds=0,1 {budget}\n" in made
    assert f"### {SECTIONS[name].title}" in made and "Mean of 2 seeds" in made and "AMD EPYC, 1 thread, torch" in made
    assert f"\n| {row} | 1,000 | {next(iter(scores.values())):.3g} ± 0 |" in made and "floor" not in made
    assert made.startswith("Before.") and made.endswith("After.\n") and with_tables(made, tmp_path) == made


def test_a_changed_record_changes_the_page(tmp_path):
    shutil.copytree(ASSETS / "results", tmp_path / "results")
    text = (ROOT / "README.md").read_text()
    file = tmp_path / "results" / "digits-map.json"
    record = json.loads(file.read_text())
    record["results"][0]["FD-digits"] = 123.0
    file.write_text(json.dumps(record))
    assert "| 123 |" in with_tables(text, tmp_path)


def test_an_unknown_table_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"results: nothing: choose from checkpoints, fashion_mnist"):
        with_tables(page("nothing"), ASSETS)


def test_the_script_leaves_pages_that_are_up_to_date():
    assert run_script("scripts/results.py", check=True).stdout.count("up to date") == len(PAGES)
