"""The app: its computations, and the whole of it through gradio's client where gradio is installed."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from helpers.small_networks import small
from PIL import Image

from flowmaps import FlowMap, UserError
from flowmaps.deployment.app import ALL, Sampling, build
from flowmaps.deployment.space import SPACES, write_space
from flowmaps.evaluation import open_reference
from flowmaps.images import sample_grid, to_pil
from samplers import rollout, uniform_times

needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs gradio, the extra app: pip install 'flowmaps[app]'"
)


def digits():
    return FlowMap.from_pretrained("digits")


def test_pictures_are_those_of_the_samplers():
    fm = digits()
    found = Sampling(fm).draw(2, label="3", schedule="uniform", seed=5, num=4)
    with torch.no_grad():
        x = rollout(fm, fm.noise(4, seed=5), uniform_times(2), torch.full((4,), 3))
    assert np.array_equal(found[0], to_pil(sample_grid([x], 8))) and len(found) == 2
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0: must be a whole number from 1 to 128"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": None}, "steps: must be a whole number"),
        ({"steps": 1, "label": "boot"}, "not the name of a class"),
        ({"steps": 1, "num": 65}, "num=65: must be a whole number up to 64"),
        ({"steps": 1, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_a_message(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(digits()).draw(**values)


def test_controls_follow_from_the_model():
    fm = small("UNet").eval()
    assert Sampling(fm).samplers == ("map", "euler") and not Sampling(fm).guided
    fm.info = replace(fm.info, kind="drift", label_dropout=0.1)
    assert Sampling(fm).samplers == ("euler",) and Sampling(fm).guided
    assert len(Sampling(fm).draw(2, guidance=3.0, num=2)) == 1
    points = FlowMap.from_pretrained(ROOT / "assets" / "checkerboard")
    assert Sampling(points).draw(1)[0].size == (100, 100)


def test_distances_are_those_of_fid():
    app = Sampling(digits(), open_reference(ROOT / "assets/references/digits.npz"))
    told = app.distances(1, ALL, None, "uniform")
    assert told.startswith("FD-digits of 500 samples in 1 step: map 0.") and "euler" in told
    with pytest.raises(UserError, match="start the app with a reference"):
        Sampling(digits()).distances(1)


def test_a_space_has_the_app_and_the_model(tmp_path):
    fm, folder = digits(), tmp_path / "space"
    for _ in range(2):  # the second replaces the first
        write_space(fm, folder, "Digits", "apache-2.0")
    SPACES.check(folder)
    assert FlowMap.from_pretrained(folder / "model").fingerprint() == fm.fingerprint()
    head = (folder / "README.md").read_text().split("---")[1]
    assert "title: Digits\nsdk: gradio\n" in head and "app_file: app.py\nlicense: apache-2.0\n" in head
    assert "flowmaps[app] @ git+https://" in (folder / "requirements.txt").read_text()
    compile((folder / "app.py").read_text(), "app.py", "exec")
    fm.info = replace(fm.info, num_classes=0, class_names=(), condition=(3,))
    with pytest.raises(UserError, match="no control for a condition"):
        write_space(fm, folder, "Digits")
    fm = digits()
    (folder / "mine.py").touch()
    with pytest.raises(UserError, match="flowmaps did not write"):
        write_space(fm, folder, "Digits")


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_command_says_what_to_install():
    done = run_script("scripts/app.py", "--checkpoint=digits")
    assert done.returncode == 2 and "the app needs gradio: pip install gradio" in done.stderr


@pytest.mark.slow
@needs_gradio
@pytest.mark.filterwarnings("default")  # of gradio and pandas
def test_the_app_answers_gradios_client(tmp_path):
    """As a browser would: two pictures come back, and bad input is a message."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    reference = open_reference(ROOT / "assets/references/digits.npz")
    blocks = build(digits(), reference)
    _, url, shared = blocks.launch(prevent_thread_lock=True, share=False, quiet=True)
    try:
        client = Client(url, verbose=False)
        found = client.predict(1, "3", 1, "stored", 0, 16, api_name="/sample")
        pictures = [np.asarray(Image.open(path)) for path in found]
        expected = Sampling(digits()).draw(1, "3", None, "stored", 0, 16)
        assert shared is None and all(np.array_equal(a, b) for a, b in zip(pictures, expected, strict=True))
        with pytest.raises(AppError, match="seed=-1"):
            client.predict(1, "3", 1, "stored", -1, 16, api_name="/sample")
        assert "FD-digits" in client.predict(1, ALL, 1, "uniform", api_name="/distances")
    finally:
        blocks.close()


@pytest.mark.slow
@needs_gradio
def test_the_app_of_a_space_runs(tmp_path):
    write_space(digits(), tmp_path / "space", "Digits")
    code = (tmp_path / "space" / "app.py").read_text().replace(".launch()", ".launch(prevent_thread_lock=True)")
    (tmp_path / "space" / "app.py").write_text(code)
    ran = subprocess.run([sys.executable, tmp_path / "space" / "app.py"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and "http://127.0.0.1:" in ran.stdout
