"""The times at which residuals are large: in a step, in the log of a run, and on the terminal."""

import json

import pytest
import torch
from helpers.runs import tiny

from configs.checkerboard import get_config as checkerboard
from training.config_rows import METHODS
from training.log import Log
from training.loop import train
from training.loss_module import BINS, GAPS, add_terms, largest, table
from training.trainer import Trainer


def test_each_cell_has_the_rows_of_its_times():
    """One row in the middle of each cell that rows can be in, with residual 2^k."""
    times = {}
    for i in range(BINS):
        s = (i + 0.5) / BINS
        for gap, t in enumerate((s, s + 0.05, s + 0.3, s + 0.6)):
            if t <= 1:
                times[gap, i] = (s, t)
    cells = sorted(times)
    s, t = torch.tensor([times[cell] for cell in cells]).mT
    residuals = 2.0 ** torch.arange(len(cells))
    found = table(residuals, s, t, BINS)
    expected = torch.zeros(len(GAPS), BINS)
    for cell, value in zip(cells, residuals, strict=True):
        expected[cell] = value / (BINS if cell[0] == 0 else len(cells) - BINS)
    assert torch.equal(found, expected)


def test_borders_belong_to_the_cell_above_and_the_ends_of_time_to_the_outer_ones():
    s = torch.tensor([1.0, 0.0, 0.25, 0.5, 0.0])
    t = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0])
    found = table(torch.tensor([1.0, 2.0, 3.0, 6.0, 9.0]), s, t, 1)
    expected = torch.zeros(len(GAPS), BINS)
    expected[0, 4], expected[1, 0], expected[2, 1], expected[3, 2], expected[3, 0] = 1, 0.5, 0.75, 1.5, 2.25
    assert torch.equal(found, expected)  # the second has a gap of 0 and is not a diagonal row


@pytest.mark.parametrize("row", [*METHODS, "huber"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cells_sum_to_the_terms_of_every_objective(row, accumulate):
    """Every row of facm has both terms; the cells are of the map alone."""
    config = checkerboard("consistency,smoke" if row == "huber" else f"{row},smoke")
    config.accumulate = accumulate
    if row == "huber":
        config.objective.huber, config.objective.adaptive = 0.3, 0.5
    logged = Trainer.build(config).step(0)
    sums = logged["residuals"].sum(dim=1)
    terms = {term: logged[term].item() if term in logged else 0.0 for term in ("diagonal", "off_diagonal")}
    assert sums[1:].sum().item() == pytest.approx(terms["off_diagonal"], rel=1e-5)
    assert sums[0].item() == pytest.approx(0.0 if row == "facm" else terms["diagonal"], rel=1e-5)


def test_the_largest_row_is_that_of_the_step():
    rows = torch.tensor([[1.0, 0.1, 0.2], [3.0, 0.3, 0.4], [2.0, 0.5, 0.6]])
    assert torch.equal(largest(rows), rows[1])
    rows[2, 0] = float("nan")  # as large as can be
    assert largest(rows)[1] == 0.5
    logged = {}
    for row in rows[:2]:
        add_terms(logged, {"largest": row, "loss": row[0]}, 2)
    assert torch.equal(logged["largest"], rows[1]) and logged["loss"] == 2


S, T = 0.3, 0.9  # of the row with the large residual: the second of 5 bins, a gap above 1/2


def inject(monkeypatch, size, at):
    """Give the last row of step ``at`` the times S, T, and multiply its residual by ``size``."""
    objective, calls = tiny().objective, []
    cls = type(objective)
    draw, losses = cls.draw, cls.row_losses

    def drawn(self, fm, x1, generator, step=0):
        draws = draw(self, fm, x1, generator, step)
        calls.append(step)
        if step == at:
            draws.s[-1], draws.t[-1] = S, T
        return draws

    def row_losses(self, *args):
        found = losses(self, *args)
        factor = torch.ones(len(found))
        factor[-1] = size if calls[-1] == at else 1
        args[-1]["off_diagonal"] = args[-1]["off_diagonal"] + (found[-1] * (factor[-1] - 1)).detach() / (
            len(found) - self.diagonal_rows(len(found))
        )
        return found * factor

    monkeypatch.setattr(cls, "draw", drawn)
    monkeypatch.setattr(cls, "row_losses", row_losses)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_names_the_times_of_a_large_residual(tmp_path, monkeypatch):
    inject(monkeypatch, 1e10, at=2)
    train(tiny(), tmp_path)
    for row in rows_of(tmp_path):
        residuals = row["residuals"]
        assert list(residuals) == [*GAPS, "largest"] and sum(residuals["diagonal"]) == pytest.approx(row["diagonal"])
        off = [residuals[gap] for gap in GAPS[1:]]
        assert sum(map(sum, off)) == pytest.approx(row["off_diagonal"])
        found = residuals["largest"][1:] == pytest.approx([S, T])
        assert found is (row["step"] == 4)  # the interval of the third step
        if found:
            assert off[2][1] / row["off_diagonal"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("size", "norm"), [(float("nan"), "nan"), (1e10, "inf|[0-9.e+]+")])
def test_a_skipped_step_says_where(tmp_path, monkeypatch, capsys, size, norm):
    monkeypatch.setattr("training.optim.WINDOW", 3)
    inject(monkeypatch, size, at=4)
    config = tiny()
    config.optim.spike = 20.0
    train(config, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if " skipped: " in line]
    assert len(said) == 1 and said[0].endswith(" at s=0.300 t=0.900") and len(said[0]) <= 120
    assert said[0].startswith("step 5/6 skipped: gradient norm ")


def test_tensorboard_has_each_cell(tmp_path):
    written = {}
    log = Log(tmp_path, 1, 0)
    log.trackers.open["tensorboard"].log = lambda values, step: written.update(values)
    cells = torch.arange(len(GAPS) * BINS).float().view(len(GAPS), BINS)
    log.add({"loss": torch.ones(()), "residuals": cells, "largest": torch.tensor([9.0, S, T])})
    log.interval(1, 1, lr=1.0)
    log.close()
    assert written["residuals/diagonal/4"] == 4 and written["residuals/gap_to_1/0"] == 15
    assert [written[f"residuals/largest/{i}"] for i in range(3)] == pytest.approx([9, S, T])
