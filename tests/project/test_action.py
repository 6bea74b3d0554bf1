"""The GitHub Action, snippets for CI, the citation: against their schemas, and their steps run as they are written."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, run_script

ACTION = ROOT / "action" / "action.yml"
RULES = (
    "{extends: default, rules: {line-length: {max: 120}, document-start: disable, truthy: disable, comments: disable}}"
)
KINDS = {
    "action/action.yml": "vendor.github-actions",
    "docs/fid-gate.yml": "vendor.github-workflows",
    "docs/fid-gate.gitlab.yml": "vendor.gitlab-ci",
    "CITATION.cff": "vendor.citation-file-format",
}


@pytest.mark.parametrize("name", KINDS)
def test_files_for_others_follow_their_schemas(name):
    for linter in (["check_jsonschema", "--builtin-schema", KINDS[name]], ["yamllint", "--strict", "-d", RULES]):
        done = subprocess.run([sys.executable, "-m", *linter, ROOT / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


class Runner:
    """Runs the ``run`` steps of the action in a folder, as GitHub does; steps that use other actions are skipped."""

    def __init__(self, folder, **inputs):
        self.folder, self.action = folder, yaml.safe_load(ACTION.read_text())
        self.values = {f"inputs.{name}": row.get("default", "") for name, row in self.action["inputs"].items()}
        self.values |= {f"inputs.{name.replace('_', '-')}": value for name, value in inputs.items()}
        self.used, self.code = [], 0

    def text(self, source):
        def value(match):
            expression = match[1].strip()
            if call := re.fullmatch(r"hashFiles\((.*)\)", expression):
                file = self.folder / self.values[call[1]]
                return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
            return self.values[expression]

        return re.sub(r"\$\{\{(.*?)\}\}", value, str(source))

    def wanted(self, step):
        if "if" not in step:
            return not self.code
        name, value = re.fullmatch(r"([\w.-]+) != '(.*)'", step["if"]).groups()
        return not self.code and self.values[name] != value

    def run(self):
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        environment |= {"GITHUB_OUTPUT": str(self.folder / "out"), "GITHUB_STEP_SUMMARY": str(self.folder / "page.md")}
        for step in filter(self.wanted, self.action["runs"]["steps"]):
            if "uses" in step:
                self.used.append(step["uses"].partition("@")[0])
                assert all(self.text(value) for value in step["with"].values())
                continue
            (self.folder / "out").write_text("")
            own = {name: self.text(value) for name, value in step.get("env", {}).items()}
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            done = subprocess.run(command, cwd=self.folder, env=environment | own, capture_output=True, text=True)
            self.code = self.code or done.returncode
            for line in (self.folder / "out").read_text().splitlines():
                name, _, value = line.partition("=")
                self.values[f"steps.{step['id']}.outputs.{name}"] = value
        return self.code


@pytest.fixture
def place(tmp_path):
    """The shipped digits, and a record of them."""
    for name in ("digits", "references/digits.npz"):
        (tmp_path / Path(name).name).symlink_to(ROOT / "assets" / name)
    flags = [f"--checkpoint={tmp_path}/digits", f"--reference={tmp_path}/digits.npz", "--steps=1", "--num=200"]
    run_script("scripts/fid.py", *flags, f"--json={tmp_path}/baseline.json", check=True)
    return tmp_path


@pytest.mark.slow
def test_steps_of_the_action(place):
    """An unchanged checkpoint passes; a baseline that was better fails it, and the reports are there all the same."""
    inputs = {
        "checkpoint": "digits",
        "reference": "digits.npz",
        "num": "200",
        "baseline": "baseline.json",
        "install": "",
    }
    passing = Runner(place, **inputs, flags="--batch=100 --seed=0")
    assert passing.run() == 0 and passing.values["steps.gate.outputs.passed"] == "true"
    assert passing.used == ["actions/cache", "actions/upload-artifact"]
    assert re.fullmatch(r"flowmaps-[0-9a-f]{16}", passing.values["steps.key.outputs.key"])
    out = place / "flowmaps-fid"
    comment = (out / "comment.md").read_text()
    assert "| row | distance | before | after |" in comment and "| passed |" in comment and "grid.png" in comment
    assert (out / "grid.png").is_file() and (out / "fid.xml").is_file() and "passed" in (place / "page.md").read_text()
    for output in passing.action["outputs"].values():
        assert passing.text(output["value"]) in ("true", "flowmaps-fid/fid.json", "flowmaps-fid/comment.md")
    record = json.loads((place / "baseline.json").read_text())
    record["results"][0]["FD-digits"] *= 0.5
    (place / "better.json").write_text(json.dumps(record))
    failing = Runner(place, **inputs | {"baseline": "better.json", "out": "second"})
    assert failing.run() == 1 and failing.values["steps.gate.outputs.passed"] == "false"
    assert "| failed |" in (place / "second/comment.md").read_text() and (place / "second/grid.png").is_file()
    assert failing.used == passing.used
    broken = Runner(place, **inputs | {"reference": "gone.npz", "out": "third"})
    assert broken.run() == 2 and not (place / "third/grid.png").exists()
