"""fid.py as a gate: limits, an earlier record, averages, repeats, the reports, and the workflow of the documents."""

import copy
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, run_script, run_two

from flowmaps import FlowMap, UserError
from flowmaps.evaluation.gate import Limits, check_outputs, finish
from flowmaps.evaluation.record import read_record
from flowmaps.evaluation.verdicts import junit, summary
from flowmaps.files import write_json

TRAIN = [
    "--config=configs/digits.py:lagrangian",
    "--config.network.width=16",
    "--config.steps=120",
    "--config.batch=32",
]
TRAIN += ["--config.optim.lr=5e-3", "--config.optim.warmup=10"]
WAYS = ["--steps=1,2", "--num=300", "--batch=100"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of seconds on digits, the same network untrained, and a record of the run."""
    base = tmp_path_factory.mktemp("gate")
    run_script("scripts/train.py", *TRAIN, f"--workdir={base}/run", check=True)
    fm = FlowMap.from_pretrained(base / "run")
    torch.manual_seed(0)
    type(fm)(type(fm.network)(**fm.network.config), fm.interpolant_name, fm.base_std, fm.info).save_pretrained(
        base / "untrained"
    )
    fid(base, "run", *WAYS, "--json={base}/before.json", check=True)
    return base


def fid(base, name, *more, **options):  # {base} in an argument is the folder of the fixture
    flags = [f"--checkpoint={base}/{name}", "--reference=digits:heldout"]
    return run_script("scripts/fid.py", *flags, *[a.format(base=base) for a in more], **options)


def rows(base):
    return json.loads((base / "before.json").read_text())["results"]


def test_a_trained_model_passes_and_an_untrained_one_fails(place):
    limit = 1.5 * max(row["FD-digits"] for row in rows(place))
    gate = [f"--max_fid={limit}", "--max_regression={base}/before.json", "--tolerance=0.001"]
    assert fid(place, "run", *WAYS, *gate).returncode == 0
    done = fid(place, "untrained", *WAYS, *gate, "--junit={base}/a.xml", "--json={base}/after.json")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gate failed: FD-digits") and "(map, 1 step, uniform" in done.stderr
    assert "max_fid=" in done.stderr and "max_regression=" in done.stderr
    found = ET.parse(place / "a.xml").getroot()
    assert found.attrib == {"tests": "2", "failures": "2", "errors": "0"}
    failures = [failure.text for failure in found.findall("testsuite/testcase/failure")]
    assert len(failures) == 2 and all("max_fid" in text and "max_regression" in text for text in failures)
    assert json.loads((place / "after.json").read_text())["results"][0]["FD-digits"] > limit


def test_the_summary_page_of_github_actions(place, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    (tmp_path / "page.md").write_text("what other steps wrote\n")
    command = ["scripts/fid.py", f"--checkpoint={place}/run", "--reference=digits-heldout", *WAYS, "--max_fid=1e-3"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("what other steps wrote\n### FD-digits of ") and "/run: failed" in page
    assert "| FD-digits |" in page and "- images: 300" in page and "**FD-digits" in page


def mistake(place, change):
    """The record, changed, as a file."""
    record = json.loads((place / "before.json").read_text())
    change(record)
    (place / "changed.json").write_text(json.dumps(record))
    return "--max_regression={base}/changed.json"


def test_a_gate_that_cannot_judge_exits_with_2(place):
    changes = {
        "another num": lambda r: r.update(num=50_000),
        "another seeds": lambda r: r.update(seeds=[7]),
        "another label_policy": lambda r: r.update(label_policy="random"),
        "another extractor": lambda r: r["extractor"].update(weights="0"),
        "another metric": lambda r: r.update(metric="FID", results=[{**row, "FID": 1.0} for row in r["results"]]),
        "another reference": lambda r: r["reference"].update(content="0"),
        "with another reference": lambda r: r["reference"].update(content="", sha256="0"),
        "has no row for map, 2 steps, uniform": lambda r: r["results"].pop(),
        "not a record": lambda r: r.pop("results"),
    }
    for message, change in changes.items():
        done = fid(place, "run", *WAYS, mistake(place, change), "--json={base}/never.json", "--junit={base}/never.xml")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    for flags, message in (
        (["--max_regression={base}/gone.json"], "gone.json"),
        (["--metrics=is", "--max_fid=1"], "need fid"),
        (["--metrics=kid"], "only fid is defined"),
        (["--ema=0.5"], "--ema=0.5"),
        (["--ema=raw,raw"], "different"),
        (["--sampler=map,magic"], "magic"),
    ):
        done = fid(place, "run", *WAYS, *flags, "--json={base}/never.json")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not list(place.glob("never.*"))


def test_every_way_in_one_command_equals_each_alone(place):
    """Averages x samplers x schedules x step counts."""
    (place / "grid.json").write_text(json.dumps({"grids": {"1": [0, 1], "2": [0, 0.4, 1]}}))
    many = ["--ema=raw,0.99", "--sampler=map,heun", "--schedule=uniform,{base}/grid.json", *WAYS]
    fid(place, "run", *many, "--json={base}/many.json", check=True)
    found = json.loads((place / "many.json").read_text())["results"]
    assert len(found) == 16 and [row["nfe"] for row in found[:8]] == [1, 2, 1, 2, 2, 4, 2, 4]
    assert found[3]["times"] == [0, 0.4, 1] and found[3]["grid"].endswith("grid.json")
    assert [row["ema"] for row in found] == 8 * [None] + 8 * [0.99]
    assert len({row["weights"] for row in found}) == 2 and len({row["FD-digits"] for row in found}) == 12
    for i, flags in ((5, ["--ema=raw", "--sampler=heun"]), (9, ["--ema=0.99"])):
        fid(place, "run", *flags, *WAYS, "--json={base}/one.json", check=True)
        alone = json.loads((place / "one.json").read_text())["results"][1]
        assert alone["FD-digits"] == pytest.approx(found[i]["FD-digits"], rel=1e-9)


def test_repeats_are_the_mean_over_seeds(place):
    done = fid(
        place, "run", "--steps=1", "--num=200", "--seed=3", "--repeats=3", "--json={base}/three.json", check=True
    )
    record = json.loads((place / "three.json").read_text())
    [row] = record["results"]
    values = [repeat["FD-digits"] for repeat in row["repeats"]]
    assert record["seeds"] == [3, 4, 5] and len(set(values)) == 3
    assert row["FD-digits"] == pytest.approx(sum(values) / 3)
    assert row["spread"]["FD-digits"] == pytest.approx((max(values) - min(values)) / 2) and " ± " in done.stdout
    fid(place, "run", "--steps=1", "--num=200", "--seed=4", "--json={base}/four.json", check=True)
    assert json.loads((place / "four.json").read_text())["results"][0]["FD-digits"] == values[1]


@pytest.mark.slow
def test_two_processes_judge_as_one(place):
    """Only the first of them has the reference, and compares."""
    flags = [f"--checkpoint={place}/run", "--reference=digits:heldout", *WAYS, f"--max_regression={place}/before.json"]
    assert run_two("scripts/fid.py", *flags, "--tolerance=0.001", check=True).stdout.count("FD-digits") == 1


def test_limits_at_their_edges(place, tmp_path):
    report = json.loads((place / "before.json").read_text())
    worst = max(row["FD-digits"] for row in report["results"])
    assert not any(verdict.reasons for verdict in Limits(max_fid=worst).judge(report))
    baseline = copy.deepcopy(report)
    report["results"][0]["FD-digits"] *= 1.04
    within = Limits.read(None, str(place / "before.json"), 0.05)
    within.check(report)
    assert not any(verdict.reasons for verdict in within.judge(report))
    beyond = Limits(None, "before.json", 0.03, baseline)
    first, second = beyond.judge(report)
    assert "tolerance=0.03" in first.reasons[0] and not second.reasons
    report["results"][1]["FD-digits"] = float("nan")
    assert beyond.judge(report)[1].reasons  # a value that is not a number is not below a limit
    written = finish(report, beyond, None, str(tmp_path / "a.xml"), str(tmp_path / "a.md"))
    assert written == 1 and "failed" in (tmp_path / "a.md").read_text()
    assert b'failures="2"' in junit(report, beyond.judge(report))
    assert "passed" in summary(baseline, Limits().judge(baseline))
    with pytest.raises(UserError, match="not a record"):
        Limits.read(None, str(tmp_path / "a.xml"), 0.0)


def paired(value, shift=0.0, noise=0.0, influence=True):
    """A record of one distance, whose blocks differ from those of ``paired(...)`` by ``noise``."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(100, generator=g) + noise * torch.randn(100, generator=g)
    row = {"ema": None, "sampler": "map", "grid": "uniform", "steps": 1, "FD-digits": value + shift}
    more = {"se": {"FD-digits": 0.1}, "influence": {"FD-digits": [blocks.tolist()]}}
    return {"metric": "FD-digits", "results": [row | more if influence else row]}


JUDGED = {  # change, noise, tolerance, confidence -> passed, words
    "the same": (0.0, 0.0, 0.0, 0.99, True, "difference +0 ± 0.001 (+0.0%), no significant worsening: passed"),
    "rounding": (0.0005, 0.0, 0.0, 0.99, True, "no significant worsening: passed"),
    "small but seen": (0.03, 0.1, 0.0, 0.99, False, "± 0.0093 (+3.0%), significantly worse (tolerance=0): failed"),
    "within the tolerance": (0.03, 0.1, 0.05, 0.99, True, "significantly worse (tolerance=0.05): passed"),
    "above, by chance": (0.1, 1.0, 0.05, 0.99, True, "no significant worsening: passed"),
    "above, with less confidence": (0.1, 0.5, 0.05, 0.9, False, "failed"),
    "better": (-0.1, 0.1, 0.0, 0.99, True, "baseline 1, difference -0.1"),
    "not a number": (float("nan"), 0.1, 0.0, 0.99, False, "failed"),
}


@pytest.mark.parametrize("case", JUDGED.values(), ids=JUDGED)
def test_a_worsening_fails_if_it_is_significant_and_above_the_tolerance(case):
    change, noise, tolerance, confidence, passed, words = case
    limits = Limits(None, "before.json", tolerance, paired(1.0), confidence)
    [verdict] = limits.judge(paired(1.0, change, noise))
    assert (not verdict.reasons) == passed and words in verdict.comparison, verdict
    assert verdict.comparison.startswith("baseline 1, difference ")


@pytest.mark.parametrize("known", [(True, False), (False, True)], ids=["before", "after"])
def test_without_standard_errors_the_tolerance_alone_decides(known):
    """A record of an earlier version has none."""
    before, after = known
    baseline = paired(1.0, influence=before)
    for tolerance, passed in ((0.02, False), (0.05, True)):
        [verdict] = Limits(None, "before.json", tolerance, baseline).judge(paired(1.0, 0.03, influence=after))
        assert (not verdict.reasons) == passed and "(+3.0%), standard error unknown" in verdict.comparison


def test_a_baseline_is_replaced_by_one_command(place):
    """Whatever the old scores were, unless ``--max_fid`` is exceeded."""
    shutil.copy(place / "before.json", place / "base.json")
    update = ["--max_regression={base}/base.json", "--update_baseline"]
    assert fid(place, "untrained", *WAYS, *update, "--max_fid=0.001").returncode == 1
    assert json.loads((place / "base.json").read_text())["results"] == rows(place)
    done = fid(place, "untrained", *WAYS, *update, check=True)
    assert f"{place}/base.json is the new baseline" in done.stdout
    row = json.loads((place / "base.json").read_text())["results"][0]
    assert row["FD-digits"] > rows(place)[0]["FD-digits"] and len(row["influence"]["FD-digits"][0]) == 100
    done = fid(place, "run", *WAYS, "--max_regression={base}/base.json", "--tolerance=0", check=True)
    assert done.stdout.count("no significant worsening: passed") == 2 and "baseline" in done.stdout
    for flags, named in (
        (["--update_baseline"], "needs --max_regression"),
        ([*update, "--tolerance=0.1"], "--tolerance"),
        ([*update, "--confidence=0.9"], "--confidence"),
    ):
        done = fid(place, "run", *WAYS, *flags)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_confidence_without_a_meaning(confidence):
    with pytest.raises(UserError, match=r"^confidence="):
        Limits(confidence=confidence)


RECORD = ROOT / "assets/results/digits-map.json"


def put(name, value):
    """A change of a record: ``value`` in place of results.0.times, say; "delete" removes it."""

    def change(record):
        *path, last = name.split(".")
        for key in path:
            record = record[int(key) if key.isdigit() else key]
        if value == "delete":
            record.pop(last)
        else:
            record[last] = value

    return change


DAMAGE = {
    "NaN": (put("results.0.FD-digits", float("nan")), "NaN"),
    "infinity": (put("results.0.FD-digits", float("inf")), "Infinity"),
    "null": (put("results.0.FD-digits", None), r"results\[0\]: FD-digits is null|expected float"),
    "text": (put("results.0.FD-digits", "1.3"), "FD-digits"),
    "negative": (put("results.0.FD-digits", -1.0), "negative"),
    "without a score": (put("results.0.FD-digits", "delete"), "missing or negative"),
    "another score": (put("results.0.KID", None), "KID"),
    "no rows": (put("results", []), "no rows"),
    "rows twice": (lambda record: record["results"].append(record["results"][0]), "two rows"),
    "rows of a number": (put("results", 3), "results"),
    "times": (put("results.0.times", "all"), "times"),
    "steps": (put("results.0.steps", 1.5), "steps"),
    "seeds": (put("seeds", {}), "seeds"),
    "reference": (put("reference.n", "many"), "reference: n"),
    "unknown": (put("reference.colour", 1), "colour"),
    "device": (put("device", "delete"), "device"),
    "standard error": (put("results.0.se", {"FD-digits": "small"}), "se"),
    "influence": (put("results.0.influence", {"FD-digits": [[0.0] * 99]}), "influence of FD-digits must have 100"),
    "influence of two seeds": (put("results.0.influence", {"FD-digits": [[0.0] * 100] * 2}), "for each seed"),
}


@pytest.mark.parametrize(("change", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_refused_by_the_part(tmp_path, change, named):
    record = json.loads(RECORD.read_text())
    change(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=named) as error:
        read_record(tmp_path / "r.json")
    assert error.value.field == "record" and "\n" not in str(error.value)


@pytest.mark.parametrize("file", sorted((ROOT / "assets/results").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_records_are_read(file):
    assert read_record(file)["results"]


def test_a_record_of_an_earlier_version_was_balanced(tmp_path):
    record = json.loads(RECORD.read_text())
    record.pop("label_policy", None)
    for name in ("se", "bias", "influence"):  # nor did it have these
        record["results"] = [{key: value for key, value in row.items() if key != name} for row in record["results"]]
    for seeds, policy in (([0], "balanced"), ([], None)):  # of a model, of images
        (tmp_path / "r.json").write_text(json.dumps(record | {"seeds": seeds}))
        assert read_record(tmp_path / "r.json")["label_policy"] == policy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["max_fid", "tolerance"])
def test_limits_that_limit_nothing(name, value):
    with pytest.raises(UserError, match=f"^{name}="):
        Limits(**{name: value})


@pytest.mark.parametrize("way", ["copy", "move", "link", "hard link"])
def test_the_record_of_a_failed_run_never_becomes_a_baseline(tmp_path, way):
    """However it gets to the baseline's place; scored again without a limit, it may."""
    report = json.loads(RECORD.read_text())
    limits = Limits(max_fid=0.1)
    assert finish(report, limits, str(tmp_path / "new.json"), None, None) == 1
    new, base = tmp_path / "new.json", tmp_path / "base.json"
    {"copy": shutil.copy, "move": shutil.move, "link": os.symlink, "hard link": os.link}[way](new, base)
    with pytest.raises(UserError, match=r"a run that failed its gate .*max_fid=0\.1"):
        Limits.read(None, str(base), 0.05)
    assert finish(report, Limits(), str(base), None, None) == 0
    assert Limits.read(None, str(base), 0.05).baseline["results"] == report["results"]


def test_outputs_that_are_something_else_of_flowmaps(tmp_path):
    """A config, a statistics file or a verdict is not replaced by a record, nor a record by a verdict."""
    write_json(tmp_path / "config.json", {"steps": 3})
    finish(json.loads(RECORD.read_text()), Limits(), str(tmp_path / "r.json"), str(tmp_path / "v.xml"), None)
    check_outputs(str(tmp_path / "r.json"), str(tmp_path / "v.xml"), None)
    for json_file, junit_file in (("config.json", None), ("v.xml", None), (None, "r.json"), (None, "config.json")):
        files = [file and str(tmp_path / file) for file in (json_file, junit_file)]
        with pytest.raises(UserError, match="another kind of file"):
            check_outputs(*files, None)
    with pytest.raises(UserError, match="GITHUB_STEP_SUMMARY"):
        check_outputs(None, None, str(tmp_path))


IDLE = {
    "tolerance": ["--tolerance=0.1", "--max_fid=3"],
    "kid_subset": ["--kid_subset=10"],
    "num": ["--num=10"],
    "sampler": ["--sampler=euler"],
    "repeats": ["--repeats=2"],
    "label_policy": ["--label_policy=random"],
}


@pytest.mark.parametrize(("name", "arguments"), IDLE.items(), ids=IDLE)
def test_a_flag_that_applies_to_nothing_is_refused(name, arguments):
    done = run_script("scripts/fid.py", "--samples=none.npz", "--reference=digits", *arguments)
    assert done.returncode == 2 and f"--{name}=" in done.stderr and "needs" in done.stderr


@pytest.mark.slow
def test_the_workflow_of_the_documents(tmp_path):
    """Each command of docs/fid-gate.yml runs as it is written, in a copy of what it uses; installing is make's part."""
    steps = yaml.safe_load((ROOT / "docs/fid-gate.yml").read_text())["jobs"]["gate"]["steps"]
    for name in ("configs", "scripts", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = tmp_path / "page.md"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(page)}
    commands = {step["name"]: step["run"] for step in steps if "run" in step}
    assert list(commands) == ["Install", "Train", "Reference", "Gate"] and "pip install" in commands.pop("Install")
    for name, command in commands.items():
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
    [shown] = [step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact")]
    assert {file.name for file in tmp_path.glob(shown)} == {"fid.json", "fid.xml"} and "passed" in page.read_text()
