"""The figures of the documents are drawn by scripts/figures.py, and the pages that show them name its command."""

import math
import re

import pytest
import torch
from drawing import objectives, quality
from helpers import ROOT, run_script
from PIL import Image

FOLDER = ROOT / "assets/figures"
NAMES = [path.stem for path in (ROOT / "scripts/drawing").glob("[!_]*.py") if path.stem != "style"]


def test_every_figure_is_shown_with_its_command_under_it():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.png" for name in NAMES}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 600_000
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in NAMES:
        shown = re.search(rf"\(\.\./assets/figures/{name}\.png\)(.*?)(?=!\[|\Z)", pages, re.DOTALL)
        assert shown and f"scripts/figures.py --only={name}" in shown[1][:600], name


def test_a_figure_is_written_to_the_folder_asked_for(tmp_path):
    run_script("scripts/figures.py", "--only=quality", f"--out={tmp_path}", check=True)
    with Image.open(tmp_path / "quality.png") as made, Image.open(FOLDER / "quality.png") as shipped:
        assert made.size == shipped.size


def test_an_unknown_figure_is_refused():
    done = run_script("scripts/figures.py", "--only=qualities")
    assert done.returncode == 2 and "--only=qualities: choose from" in done.stderr
    assert all(name in done.stderr for name in NAMES)


def test_the_records_behind_the_figure_of_quality_cover_its_ticks():
    for data in quality.DRAWN:
        assert quality.curve(data, "euler", "euler")[0] == [1, 2, 4, 8, 64]
        assert quality.curve(data, "map", "map")[0] == [1, 2, 4, 8]


def test_the_map_of_the_figure_of_objectives_is_wrong_and_the_exact_one_is_not():
    """The exact map keeps the law's distribution function; the drawn one has the right drift on the diagonal."""

    def below(x, t):
        std = math.hypot(1 - t, objectives.STD * t)
        return sum(float(torch.special.ndtr(torch.tensor((x - mean * t) / std))) / 2 for mean in (-1, 1))

    s, t, x = objectives.S, objectives.T, objectives.X
    end = objectives.exact(x, s, t)
    assert below(end, t) == pytest.approx(below(x, s), abs=2e-5)
    assert objectives.jump(x, s, t) < end - 0.1
    h = 1e-2
    assert (objectives.jump(x, s, s + h) - x) / h == pytest.approx(objectives.velocity(x, s), abs=0.02)
