"""The files for clusters: checked by a linter and schemas; their scripts run, with a stand-in for Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers import ROOT, run_script
from helpers.runs import assert_same, weights

PLACE = ROOT / "examples" / "cluster"
ROW = ["--config=configs/checkerboard.py:lagrangian,smoke", "--config.log_every=1", "--config.steps=150"]
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


@pytest.mark.parametrize("name", ["train.slurm", "until_done.sh"])
def test_the_scripts_pass_shellcheck(name):
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ran = subprocess.run([tool, "--severity=style", "--external-sources", PLACE / name], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0, ran.stdout.decode()


def test_the_job_fits_the_schema_of_kubernetes():
    job = yaml.safe_load((PLACE / "kubernetes.yaml").read_text())
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    job["spec"]["complete"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="complete"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    command, config, *flags = container["args"]
    assert command == "train" and flags[-1] == "--seeds=$(JOB_COMPLETION_INDEX)"
    wrong = run_script("scripts/train.py", config, *flags)  # up to the last flag all are right
    assert wrong.returncode == 2 and "--seeds=$(JOB_COMPLETION_INDEX): give different whole numbers" in wrong.stderr


def test_the_dockerfile_copies_what_the_wheel_is_made_of():
    """hadolint needs a binary that no package index has: here are the instructions, and that what is copied exists."""
    text = re.sub(r"\\\n", " ", (PLACE / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} == INSTRUCTIONS and [line[0] for line in lines][:2] == ["ARG", "FROM"]
    copied = [name for kind, rest in lines if kind == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'^"([\w/]+)" = "flowmaps/', project, re.MULTILINE)
    needed += re.search(r"packages = \[(.*)\]", project)[1].replace('"', "").split(", ")
    assert set(needed) <= set(copied)
    extras = re.search(r"\.\[([\w,]+)\]", text)[1].split(",")
    assert set(extras) <= set(re.findall(r"^(\w+) = \[", project, re.MULTILINE))


@pytest.mark.parametrize(("signals", "code"), [((), 3), ((signal.SIGTERM,), 75)])
def test_a_stop_is_told_from_an_end(signals, code, tmp_path):
    """The command ends with 3 by itself, with 0 when it is stopped; it takes a while to do so."""
    inner = f"trap 'sleep 0.2; exit 0' TERM; touch {tmp_path}/on; for _ in $(seq 20); do sleep 0.05; done; exit 3"
    run = subprocess.Popen(["bash", PLACE / "until_done.sh", "bash", "-c", inner])
    while not (tmp_path / "on").exists():
        time.sleep(0.01)
    for number in signals:
        run.send_signal(number)
    assert run.wait(60) == code


@pytest.mark.slow
def test_a_job_of_slurm_is_queued_again_until_its_run_is_complete(tmp_path):
    """The limit comes after some steps; the second job resumes and ends, with the weights of an undisturbed run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", PLACE / "train.slurm", *ROW, f"--workdir={tmp_path}/runs"]
    run, log = subprocess.Popen(command, cwd=ROOT, env=environment), tmp_path / "runs" / "seed-2" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n")):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(300) == 75 and (tmp_path / "asked").read_text() == "requeue 7\n"
    assert '"event": "stopped"' in log.read_text()
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=600).returncode == 0
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    run_script("scripts/train.py", *ROW, f"--workdir={tmp_path}/one", "--config.seed=2", check=True)
    assert_same(weights(tmp_path / "runs" / "seed-2"), weights(tmp_path / "one"))


def test_the_options_of_slurm_are_known():
    """Slurm has no schema: here are the options of sbatch that the script may use."""
    found = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (PLACE / "train.slurm").read_text(), re.MULTILINE)
    known = "job-name array nodes ntasks gpus-per-node cpus-per-task time signal requeue open-mode output".split()
    assert [name for name, _ in found] == known
    assert re.fullmatch(r"B:TERM@\d+", dict(found)["signal"])
