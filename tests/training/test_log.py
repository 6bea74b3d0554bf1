"""The lines of log.jsonl."""

import json
import shutil

import pytest
import torch
from helpers.runs import tiny

from flowmaps.run_weights import list_checkpoints
from training.log import Log, read_log
from training.loop import train


def test_numbers_that_json_lacks_are_null(tmp_path):
    log = Log(tmp_path, 1, 0)
    log.add({"loss": torch.tensor(float("inf")), "x": torch.tensor(float("nan"))})
    log.interval(1, 1, lr=1.0)
    log.score(1, "W2@1", float("inf"))
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] is rows[0]["x"] is rows[1]["W2@1"] is None and rows == read_log(tmp_path / "log.jsonl")


def test_another_number_of_threads_is_logged(tmp_path):
    threads = torch.get_num_threads()
    train(tiny(), tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    torch.set_num_threads(threads + 1)
    try:
        train(tiny(), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert {"event": "threads", "step": 3, "before": threads, "now": threads + 1} in read_log(tmp_path / "log.jsonl")
