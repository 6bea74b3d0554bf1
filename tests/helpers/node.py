"""The page's engine under Debian's nodejs."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from flowmaps.deployment.page import HERE

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node: apt-get install nodejs")
RUN = """
const fs = require("fs"), read = (name) => fs.readFileSync(`${__dirname}/${name}`);
const run = load(JSON.parse(read("program.json")), new Uint8Array(read("weights")));
const given = JSON.parse(read("inputs.json")), times = [];
let out;
for (let i = 0; i < 9; i++) {
  const start = performance.now();
  out = run(given);
  times.push(performance.now() - start);
}
console.log(JSON.stringify({ out: Array.from(out), ms: times.sort((a, b) => a - b)[4] }));
"""


def run_engine(program, weights, inputs):
    """The output of a program for ``inputs``, flat, and the milliseconds of one run (median of nine)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.json").write_text(json.dumps(program))
        (Path(folder) / "weights").write_bytes(weights)
        values = {name: value.flatten().tolist() for name, value in inputs.items()}
        (Path(folder) / "inputs.json").write_text(json.dumps(values))
        (Path(folder) / "run.js").write_text((HERE / "engine.js").read_text() + RUN)
        ran = subprocess.run([NODE, f"{folder}/run.js"], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    return torch.tensor(found["out"]), found["ms"]


def parts(page):
    """The model and the weights inside a page."""
    model = re.search(r'id="model">(.*?)</script>', page, re.DOTALL)[1]
    weights = re.search(r'id="weights">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(model), base64.b64decode(weights)
