"""gpu_check.py without a GPU: the look for one, and how parts are run, resumed and stopped."""

import json
import os
import subprocess
import sys
import time

import gpu.process
import pytest
import torch
from gpu import worker
from gpu.order import Item, Order, Unavailable
from gpu.runner import Call, run
from helpers import ROOT, run_script

from flowmaps.files import to_json

# The process of a part, without any package; its second item takes SECOND seconds, or dies if that is negative.
PROCESS = """
import os, sys, time
from gpu.order import Order
order, items = Order.received(), {"first": 0, "second": SECOND, "third": 0}
order.emit(names=list(items))
for name in [name for name in items if name not in order.skip]:
    order.emit(start=name, limit=LIMIT)
    if items[name] < 0:
        sys.exit("no such kernel")
    time.sleep(items[name])
    order.emit(name=name, status="ok", seconds=items[name])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [[], ["-S"]], ids=["installed", "bare"])
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(flags, tmp_path):
    """Also in an interpreter without any package."""
    command = [sys.executable, *flags, "scripts/gpu_check.py", f"--out={tmp_path / 'out'}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert done.stdout.startswith("No CUDA GPU") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--parts=ax", "--parts=aa", "--parts=", "--minutes=0", "--device=cpu"])
def test_a_wrong_argument_is_one_line(flag, tmp_path):
    done = run_script("scripts/gpu_check.py", flag, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and flag in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_make_gpu_installs_nothing_and_takes_the_given_interpreter():
    command = ["make", "-n", "gpu", "PYTHON=python9", "PARTS=ab", "OUT=there"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "python9 scripts/gpu_check.py --parts=ab --out=there --data=data --minutes=8\n"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run parts whose second item takes ``second`` seconds; returns the exit code and the file of results."""

    def made(parts="b", second=0.0, limit=30.0, seconds=60.0):
        code = PROCESS.replace("SECOND", str(second)).replace("LIMIT", str(limit))
        monkeypatch.setattr(gpu.process, "COMMANDS", {part: ["-c", code] for part in "bcd"})
        code = run(Call(parts, tmp_path, seconds, tmp_path, smoke=True))
        return code, json.loads((tmp_path / "gpu.json").read_text())

    monkeypatch.setattr("gpu.runner.machine", dict)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return made


def statuses(content, part="b"):
    return {name: result["status"] for name, result in content["results"][part].items()}


def test_only_the_chosen_parts_run(call):
    code, content = call("cb")
    assert code == 0 and list(content["results"]) == ["c", "b"] and content["left"] == {"c": [], "b": []}


def test_an_item_that_ends_its_process_has_failed_and_the_others_go_on(call, capsys):
    code, content = call(second=-1)
    assert code == 1 and statuses(content) == {"first": "ok", "second": "failed", "third": "ok"}
    failed = content["results"]["b"]["second"]
    assert failed["error"] == "the process ended with exit code 1" and "no such kernel" in failed["traceback"]
    assert "b  failed   second: error the process ended" in capsys.readouterr().out


def test_a_second_call_does_what_failed_and_nothing_else(call):
    call(second=-1)
    code, content = call()
    calls = {name: result["call"] for name, result in content["results"]["b"].items()}
    assert code == 0 and len(content["calls"]) == 2 and calls == {"first": 0, "second": 1, "third": 0}


def test_an_item_that_takes_longer_than_its_limit_has_failed(call):
    code, content = call(second=60, limit=0.5)
    assert code == 1 and statuses(content) == {"first": "ok", "second": "failed", "third": "ok"}
    assert content["results"]["b"]["second"]["error"] == "no result within 0.5 s"


def test_at_the_end_of_the_time_it_stops_and_says_what_is_left(call, capsys):
    start = time.time()
    code, content = call(second=60, seconds=2)
    assert code == 0 and time.time() - start < 20
    assert statuses(content) == {"first": "ok"} and content["left"]["b"] == ["second", "third"]
    assert "left for another call with the same --out: 2 items, first second" in capsys.readouterr().out


def test_a_part_without_time_to_begin_is_left(call):
    code, content = call(parts="bc", seconds=0.01)
    assert code == 0 and content["left"] == {"b": ["all"], "c": ["all"]}


RESULTS = {"run": "0123abcd", "calls": [], "results": {}, "left": {}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "flowmaps did not write it"),
        (to_json({"run": 3}), "is missing"),
        (to_json(RESULTS | {"run": "../../home"}), "run is '../../home'"),
        (to_json(RESULTS | {"results": {"a": {"b": {}}}}), "b: status is None"),
        (b'{"written_by": "flowmaps"' + b"[" * 9999, "not readable JSON"),
    ],
)
def test_another_file_is_not_overwritten(content, said, call, tmp_path, capsys):
    (tmp_path / "gpu.json").write_bytes(content)
    assert run(Call("b", tmp_path, 60, tmp_path, smoke=True)) == 2
    error = capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_bytes() == content and said in error and error.count("\n") == 1


def absent(error):
    raise error


def test_a_worker_explains_errors_and_stops_after_a_failure(monkeypatch):
    """A missing package or data set is not a failure; after a failure, the runner starts another process."""
    items = {
        "done": Item(1.0, lambda: {}),
        "good": Item(1.0, lambda: {"images": 3}),
        "package": Item(1.0, lambda: absent(ModuleNotFoundError("", name="torch_fidelity"))),
        "data": Item(1.0, lambda: absent(Unavailable("no files"))),
        "bad": Item(1.0, lambda: absent(ZeroDivisionError("by\nzero"))),
        "never": Item(1.0, lambda: {}),
    }
    monkeypatch.setattr("importlib.import_module", lambda name: type("Part", (), {"items": lambda order: items}))
    read, write = os.pipe()
    worker.work(Order("b", ["done"], time.time() + 60, True, "", "", "", write))
    os.close(write)
    with os.fdopen(read) as events:
        received = [json.loads(line) for line in events]
    assert received[0]["names"] == list(items)
    ended = {e["name"]: e for e in received if "status" in e}
    assert {name: e["status"] for name, e in ended.items()} == {
        "good": "ok",
        "package": "skipped",
        "data": "skipped",
        "bad": "failed",
    }
    assert (ended["package"]["reason"], ended["data"]["reason"]) == ("needs torch_fidelity", "no files")
    assert ended["bad"]["error"] == "ZeroDivisionError: by zero" and "Traceback" in ended["bad"]["traceback"]
