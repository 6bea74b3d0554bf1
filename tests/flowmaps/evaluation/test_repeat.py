"""A record repeated: the same flags, the same numbers, and what differs by name."""

import copy
import json

import pytest
from helpers import ROOT, run_script

from flowmaps import FlowMap, UserError
from flowmaps.evaluation import evaluate
from flowmaps.evaluation.repeat import differences, flags_of

DIGITS = ROOT / "assets/digits"


@pytest.fixture(scope="module")
def record():
    """Of the shipped digits: one grid is stored, the other one is uniform since none is stored."""
    fm = FlowMap.from_pretrained(DIGITS)
    made = evaluate(
        fm, "digits:heldout", steps=(1, 2), num=150, seeds=(3, 4), source=str(DIGITS), label_policy="random"
    )
    assert [row["grid"] for row in made["results"]] == ["uniform", "stored"]
    return json.loads(json.dumps(made))


def fid(file, *flags, **options):
    return run_script("scripts/fid.py", f"--from_record={file}", *flags, **options)


def changed(record, tmp_path, **facts):
    (tmp_path / "record.json").write_text(json.dumps(record | facts))
    return tmp_path / "record.json"


def test_the_command_repeats_a_record(record, tmp_path):
    file = changed(record, tmp_path)
    done = fid(file, f"--json={tmp_path}/again.json", check=True)
    assert f"{file} is repeated: all numbers agree to 1e-06" in done.stdout and "differs" not in done.stdout
    again = json.loads((tmp_path / "again.json").read_text())
    for old, new in zip(record["results"], again["results"], strict=True):
        assert new["FD-digits"] == pytest.approx(old["FD-digits"], rel=1e-6) and new["times"] == old["times"]
    assert again["seeds"] == [3, 4] and again["label_policy"] == "random" and len(again["results"]) == 2


def test_numbers_and_environment_that_differ_are_named(record, tmp_path):
    rows = copy.deepcopy(record["results"])
    rows[1]["FD-digits"] *= 1.0001
    file = changed(record, tmp_path, results=rows, versions=record["versions"] | {"torch": "1.13"}, device="cuda")
    done = fid(file)
    assert done.returncode == 1 and done.stderr == f"{file} is not repeated: 1 difference above 1e-06\n"
    lines = [line for line in done.stdout.splitlines() if line.startswith("differs: ")]
    assert len(lines) == 3 and "map, stored, 2: FD-digits" in lines[0]
    assert "device cuda in the record" in done.stdout and "versions.torch 1.13 in the record" in done.stdout


REFUSED = {
    "another number of samples": ({}, ["--num=7"], "--num=7"),
    "a gate": ({}, ["--max_fid=3"], "--max_fid=3"),
    "labels of a file": ({"label_policy": "sha256:00"}, [], "--label_policy"),
    "a reference that is a file": ({"reference": "elsewhere"}, [], "--reference"),
    "a grid of Python": ({"grid": "given"}, [], "from Python"),
}


@pytest.mark.parametrize(("facts", "flags", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_repeated_is_refused(record, tmp_path, facts, flags, named):
    facts = dict(facts)
    if "reference" in facts:
        facts["reference"] = record["reference"] | {"data": facts["reference"]}
    if "grid" in facts:
        facts = {"results": [row | {"grid": facts["grid"]} for row in record["results"]]}
    done = fid(changed(record, tmp_path, **facts), *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and named in done.stderr, done.stderr


def test_flags_of_a_record(record):
    found = flags_of(record)
    assert found["steps"] == "1,2" and found["schedule"] == "stored" and found["repeats"] == "2"
    assert found["reference"] == "digits:heldout" and found["extractors"] == "digits" and "ema" not in found
    rows = [row | {"ema": ema, "KID": 0.1} for ema in (None, 0.99) for row in record["results"]]
    more = flags_of(record | {"results": rows, "guidance": 2.0, "guidance_interval": [0.1, 0.5], "kid_subset": 20})
    assert more["ema"] == "raw,0.99" and more["guidance"] == "2.0" and more["guidance_interval"] == "0.1,0.5"
    assert more["metrics"] == "fid,kid" and more["kid_subset"] == "20"
    images = flags_of(record | {"seeds": [], "source": "a.npz", "results": [{"FD-digits": 1.0}], "label_policy": None})
    assert images["samples"] == "a.npz" and "num" not in images and "checkpoint" not in images
    with pytest.raises(UserError, match="from Python"):
        flags_of(record | {"results": [row | {"grid": "given"} for row in rows]})


def test_differences_of_rows(record):
    now = copy.deepcopy(record)
    now["reference"]["sha256"] = "rounded"  # of the same images
    assert differences(record, now) == ([], [])
    now["results"][0]["weights"] = "other"
    now["results"][0]["FD-digits"] *= 1 + 1e-7
    now["results"].pop()
    numbers, facts = differences(record, now)
    assert numbers == ["0.999, map, stored, 2: not scored now"] and len(facts) == 1 and "weights" in facts[0]
