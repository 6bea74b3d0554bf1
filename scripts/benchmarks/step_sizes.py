"""Bench of step sizes: fitted grids and straightening, on drifts in closed form and on trained drifts and maps."""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.metrics import sliced_w2
from flowmaps.objectives.straightening import Straightening, TrainPoint
from flowmaps.step_sizes import FINE, Solution, costs, end_errors, fine_solutions
from samplers import Schedule, euler, heun, uniform_times
from samplers.bellman import solve_all
from training.config import Config, Trajectories
from training.config_rows import load_row
from training.teacher_trajectories import TrajectorySolver, write_trajectories
from training.trainer import Trainer

STEPS = (2, 4, 6, 8)
SEED = 5  # of the noise that is scored; grids are fitted on that of seed 1, straightened drifts on that of seed 3
RANK = 4

Grids = dict[int, Tensor]


class Sizes(NamedTuple):
    """Sizes of a data set's experiment."""

    num: int  # samples to score
    noises: int  # paths that grids are fitted on
    paths: int  # paths to straighten on
    batch: int = 80  # rows per step of straightening, at least
    variant: str = ""  # of the rows in configs/
    steps: int = 0  # to train drift and map; 0: those of the row
    straighten: int = 200  # steps of straightening
    each: bool = True  # also straighten for each number of steps separately


SETTINGS = {
    "checkerboard": Sizes(32_768, 512, 4096, batch=640, straighten=400),
    "digits": Sizes(2000, 128, 1024),
    "fashion_mnist": Sizes(1000, 32, 128, variant=",cpu", steps=1000, each=False),
}


class Mixture(nn.Module):
    """v_{t,t}: the exact drift of the linear path from N(0, 1) to Gaussians at ``means`` [n, dim], ``std`` wide."""

    def __init__(self, means: Tensor, std: Tensor) -> None:
        super().__init__()
        self.means, self.std = nn.Parameter(means.double()), nn.Parameter(std.double())  # [n, dim], [dim]

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        t = t[:, None].double()
        variance = (1 - t) ** 2 + t**2 * self.std**2  # [B, dim]
        away = x[:, None] - t[:, :, None] * self.means  # [B, n, dim]
        share = torch.softmax(-(away.square() / variance[:, None]).sum(dim=2) / 2, dim=1)
        slope = ((t - 1) + t * self.std**2) / variance
        return (share[:, :, None] * (self.means + slope[:, None] * away)).sum(dim=1)


def _ring(radius: float) -> Mixture:
    angle = torch.arange(8) * math.pi / 4
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], dim=1), torch.full((2,), 0.05))


EXACT: dict[str, Callable[[], Mixture]] = {
    "gaussian": lambda: Mixture(torch.tensor([[0.3, -0.5, 1.0]]), torch.tensor([0.4, 1.0, 2.0])),
    "narrow": lambda: Mixture(torch.tensor([[0.3, 0.0]]), torch.tensor([0.05, 0.1])),
    "ring-0.3": lambda: _ring(0.3),
    "ring-1": lambda: _ring(1.0),
    "ring-2": lambda: _ring(2.0),
    "ring-4": lambda: _ring(4.0),
}
ROWS = [*EXACT, *SETTINGS]


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the data sets named by --rows."""
    if unknown := [row for row in rows if row not in ROWS]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=bellman they are {', '.join(ROWS)}")
    return list(rows)


def fitted(fm: FlowMap, sampler: str, noises: int) -> dict[str, Grids]:
    """Return equal steps and the solved grids of each cost, whichever is better."""
    grids, walk = {"equal steps": {steps: uniform_times(steps) for steps in STEPS}}, uniform_times(FINE[sampler])
    for name, cost in costs(fm, sampler, noises=noises).items():
        solved = solve_all(cost, max(STEPS))
        grids[f"Bellman, {name}"] = {steps: walk[solved[steps][0]] for steps in STEPS}
    return grids


def exact_records(name: str) -> Iterator[dict[str, Any]]:
    """Yield distances at data from Euler's method with an exact drift to a fine solution, on 4,096 other noises."""
    network = EXACT[name]()
    fm = FlowMap(network, info=FlowMapInfo(shape=(network.means.shape[1],), kind="drift"))
    x = fm.noise(4096, SEED)
    with torch.no_grad():
        end = heun(fm.drift, x, uniform_times(1000))
        for row, grids in fitted(fm, "euler", noises=512).items():
            scores = {}
            for steps, times in grids.items():
                made = euler(fm.drift, x, times)
                scores[f"error@{steps}"] = float((made - end).square().sum(dim=1).mean().sqrt())
                scores[f"W2@{steps}"] = sliced_w2(made, end)
            yield {"row": f"{name}, {row}", "seed": 0, "scores": scores}


class Bench:
    """Scores few steps from noise that no fit has seen: distance to data, and to the drift's own fine solution."""

    def __init__(self, data: str, drift: FlowMap, num: int) -> None:
        self.num, self.reference = num, open_reference(f"{data}:heldout", device=torch.device("cpu"))
        self.x0, classes = drift.noise(min(256, num), SEED), drift.info.num_classes
        self.label = torch.arange(len(self.x0)) % classes if classes else None

    def solutions(self, fm: FlowMap) -> list[Solution]:
        """Return where the first 256 noises end on the drift of ``fm``."""
        return list(fine_solutions(fm.drift, [(self.x0, self.label)]))

    def scores(self, fm: FlowMap, sampler: str, grids: Grids, solutions: list[Solution]) -> dict[str, float]:
        """Return the distance and the error of the grids."""
        record = evaluate(
            fm,
            self.reference,
            steps=tuple(grids),
            num=self.num,
            seeds=(SEED,),
            sampler=sampler,
            schedule=Schedule(grids),
            batch=256,
        )
        metric = record["metric"]
        found = {f"{metric}@{row['steps']}": row[metric] for row in record["results"]}
        errors = end_errors(fm, fm.drift, sampler, solutions, [grids])[0]
        return found | {f"error@{steps}": error for steps, error in errors.items()}


def trained(data: str, method: str, seed: int, train_steps: int | None) -> FlowMap:
    """Train a row of the data set's config."""
    config = load_row(f"configs/{data}.py", method + SETTINGS[data].variant)
    config.seed, config.steps = seed, train_steps or SETTINGS[data].steps or config.steps
    return run(config)


def run(config: Config) -> FlowMap:
    trainer = Trainer.build(config)
    for step in range(config.steps):
        trainer.step(step)
    return trainer.averaged(config.steps).requires_grad_(False)


def straightened(
    data: str,
    seed: int,
    folder: Path,
    steps: tuple[int, ...],
    how: tuple[TrainPoint, str, int],
    train_steps: int | None,
) -> FlowMap:
    """Fine-tune the drift in ``folder`` on the paths there for ``steps``; ``how``: state, schedule, rank of LoRA."""
    state, schedule, lora = how
    config = load_row(f"configs/{data}.py", "straightening" + SETTINGS[data].variant)
    config.objective = Straightening(steps=steps, schedule=schedule, state=state)
    config.teacher = config.init_from = str(folder / "drift")
    config.trajectories = Trajectories(steps=FINE["euler"], files=str(folder / "paths"))
    config.seed, config.lora = seed, lora
    config.batch = -(-SETTINGS[data].batch // sum(steps)) * sum(steps)
    config.steps = train_steps or SETTINGS[data].straighten
    config.optim.warmup, config.optim.lr = 50, config.optim.lr * (3 if lora else 1)
    return run(config)


def records(
    data: str, seed: int, train_steps: int | None = None, num: int | None = None, done: Collection[tuple[str, int]] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a record for each way to spend 2, 4, 6 and 8 steps: distance to data, error against the fine solution."""
    if data in EXACT:
        yield from () if (f"{data}, equal steps", 0) in done else exact_records(data)
        return
    if (f"{data}, map, Bellman, local_root", seed) in done:
        return
    setting = SETTINGS[data]
    noises, paths = num or setting.noises, num or setting.paths
    drift = trained(data, "flow_matching", seed, train_steps)
    bench = Bench(data, drift, num or setting.num)
    grids, ends = fitted(drift, "euler", noises), bench.solutions(drift)
    found = {row: bench.scores(drift, "euler", tried, ends) for row, tried in grids.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drift.save_pretrained(folder / "drift")
        (folder / "schedule.json").write_text(Schedule(grids["Bellman, end"], sampler="euler").to_json())
        solver = TrajectorySolver(drift, Trajectories(steps=FINE["euler"]))
        for _ in write_trajectories(folder / "paths", solver, paths, seed=3):
            pass
        fitted_file = str(folder / "schedule.json")
        for row, how in {
            "straightened, Bellman, end": (TrainPoint.path, fitted_file, 0),
            f"straightened, Bellman, end, LoRA {RANK}": (TrainPoint.path, fitted_file, RANK),
            "straightened, equal steps": (TrainPoint.path, "", 0),
            "reflow, equal steps": (TrainPoint.chord, "", 0),
        }.items():
            tried = grids["Bellman, end" if how[1] else "equal steps"]
            for steps in STEPS if setting.each else ():
                fm = straightened(data, seed, folder, (steps,), how, train_steps)
                found[row] = found.get(row, {}) | bench.scores(fm, "euler", {steps: tried[steps]}, ends)
            fm = straightened(data, seed, folder, STEPS, how, train_steps)
            found[f"{row}, all at once"] = bench.scores(fm, "euler", tried, ends)
    fm = trained(data, "lagrangian", seed, train_steps)
    ends = bench.solutions(fm)  # a map is compared with the path of the same network's drift
    for row, tried in fitted(fm, "map", noises).items():
        found[f"map, {row}"] = bench.scores(fm, "map", tried, ends)
    yield from ({"row": f"{data}, {row}", "seed": seed, "scores": scores} for row, scores in found.items())


def curves(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    """Return (row, panel, steps, score) of what is fitted for one number of steps, with separate panels for maps."""
    found = []
    for record in records:
        data, _, row = record["row"].partition(", ")
        for name, value in record["scores"].items() if not row.endswith("all at once") else ():
            metric, _, steps = name.partition("@")
            panel = f"{data}{', map' if row.startswith('map, ') else ''}: {metric}"
            found.append((row.removeprefix("map, "), panel, int(steps), value))
    return found
