"""The server of examples/: it needs no PyTorch, and draws waiting requests together."""

import io
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from flowmaps import FlowMap
from flowmaps.deployment.graphs import graphs
from flowmaps.deployment.onnx_files import write_onnx


@pytest.mark.slow
def test_server_answers_many_at_once_and_refuses_a_wrong_label(tmp_path):
    source = (ROOT / "examples" / "server.py").read_text()
    assert not re.search(r"^(import|from) (torch|flowmaps)", source, re.MULTILINE)
    fm, file = FlowMap.from_pretrained("digits"), tmp_path / "one_step.onnx"
    write_onnx(graphs(fm)[1], fm, file, "float16")
    command = [sys.executable, ROOT / "examples" / "server.py", file, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = server.stdout.readline().strip().removesuffix("label=0")

            def image(label):
                with urllib.request.urlopen(f"{address}label={label}", timeout=60) as answer:
                    return np.asarray(Image.open(io.BytesIO(answer.read())))

            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(image, [i % 10 for i in range(40)]))
            assert {one.shape for one in found} == {(8, 8)} and len({one.tobytes() for one in found}) > 30
            for wrong in ("10", "-1", "boot"):
                with pytest.raises(urllib.error.HTTPError, match="400"):
                    image(wrong)
        finally:
            server.terminate()
