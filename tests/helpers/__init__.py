"""The closed-form flow map of Gaussian data: the ground truth of most tests."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmaps import FlowMap, FlowMapInfo
from flowmaps.interpolants import INTERPOLANTS
from samplers import Trajectory, uniform_times
from samplers.callables import expand

ROOT = Path(__file__).resolve().parent.parent.parent


class GaussianNetwork(nn.Module):
    """Exact v_{s,t}(x) for data N(mean, std^2), independent coordinates, plus errors ``wrong`` + ``bent`` (t - s) x.

    With m_t = beta(t) mean and var_t = alpha(t)^2 base_std^2 + beta(t)^2 std^2, the map is
    X_{s,t}(x) = m_t + sqrt(var_t / var_s) (x - m_s) and the drift m'_t + var'_t / (2 var_t) (x - m_t).

    ``mean`` is [dim], or [n, dim]: a row for each class, or the matrix that a condition of n numbers is multiplied by.
    """

    def __init__(self, mean: Tensor, std: Tensor, interpolant: str, base_std: float, wrong: float = 0.0) -> None:
        super().__init__()
        self.bent = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.path, self.base_std = INTERPOLANTS[interpolant], base_std
        self.mean, self.std = mean.double(), std.double()
        self.wrong = nn.Parameter(torch.tensor(wrong, dtype=torch.float64))

    def mean_of(self, label: Tensor | None) -> Tensor:  # [dim] or [B, dim]
        if label is None:
            return self.mean
        return label[:, : len(self.mean)] @ self.mean if label.is_floating_point() else self.mean[label]

    def moments(self, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = self.path.alpha(t)[:, None], self.path.beta(t)[:, None]
        return b * self.mean_of(label), a**2 * self.base_std**2 + b**2 * self.std**2

    def drift(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        mean = self.mean_of(label)
        a, b = self.path.alpha(t)[:, None], self.path.beta(t)[:, None]
        da, db = self.path.d_alpha(t)[:, None], self.path.d_beta(t)[:, None]
        m, var = self.moments(t, label)
        return db * mean + (a * da * self.base_std**2 + b * db * self.std**2) / var * (x - m)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        (m_s, var_s), (m_t, var_t) = self.moments(s, label), self.moments(t, label)
        same = (s == t)[:, None]
        gap = torch.where(same, 1.0, expand(t - s, x))
        jump = (m_t + (var_t / var_s).sqrt() * (x - m_s) - x) / gap
        error = self.wrong + self.bent * expand(t - s, x) * x
        return torch.where(same, self.drift(x, t, label), jump) + error


CASES = [
    ("linear", 1.0, False),
    ("linear", 0.5, True),
    ("trigonometric", 1.0, False),
    ("trigonometric", 0.7, True),
    ("linear", 0.7, "condition"),
]


def gaussian_map(
    interpolant: str = "linear", base_std: float = 1.0, classes: bool | str = False, wrong: float = 0.0
) -> FlowMap:
    """A FlowMap that is exact for anisotropic Gaussian data in 3 dimensions.

    Optionally with one mean per class, or a mean that is a linear function of a "condition".
    """
    mean = torch.tensor([[0.3, -0.5, 1.0], [-1.0, 0.2, 0.4]]) if classes else torch.tensor([0.3, -0.5, 1.0])
    network = GaussianNetwork(mean, torch.tensor([0.4, 1.0, 2.0]), interpolant, base_std, wrong)
    told = {False: {}, True: {"num_classes": 2}, "condition": {"condition": (2,)}}[classes]
    info = FlowMapInfo(shape=(3,), **told)
    return FlowMap(network, interpolant, base_std, info)


def gaussian_data(fm: FlowMap, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """``n`` samples of the data that ``fm`` is exact for, with labels."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2 if fm.info.num_classes else None
    if fm.info.condition:
        label = torch.randn(n, *fm.info.condition, generator=generator(n), dtype=torch.float64)
    return fm.network.mean_of(label) + fm.network.std * torch.randn(n, 3, generator=g, dtype=torch.float64), label


def generator(seed: int = 0) -> torch.Generator:
    """A fresh stream of random numbers."""
    return torch.Generator().manual_seed(seed)


def exact_paths(fm, paths=12, steps=5):
    """The true states of ``paths`` trajectories of the closed-form map."""
    times, (_, label) = uniform_times(steps), gaussian_data(fm, paths)
    x0 = fm.base_std * torch.randn(paths, 3, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        states = [fm.network(x0, torch.zeros(paths).double(), t.expand(paths), label) for t in times]
        states = [x0 + t * v for t, v in zip(times, states, strict=True)]
    return Trajectory(times, torch.stack(states), label)


@dataclass
class Done:
    """Exit code and output of a script."""

    returncode: int
    stdout: str
    stderr: str


# A server process imports the heavy modules once; each script then runs in a fork of it: fresh, but at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["training.loop", "flowmaps.pipeline", "sklearn.datasets", "ml_collections.config_flags"])


def _script(arguments: list[str], out: str) -> None:
    os.chdir(ROOT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_script(
    *arguments: str | Path, check: bool = False, timeout: float = 300, kill: Callable[[], bool] | None = None
) -> Done:
    """Run a script of this repository, in a separate process, as ``python scripts/x.py --flag=value`` would.

    It is killed (SIGKILL) as soon as ``kill`` returns true.
    """
    with tempfile.TemporaryDirectory() as out:
        process = _FORKS.Process(target=_script, args=([str(a) for a in arguments], out))
        process.start()
        while kill and process.is_alive() and not kill():
            process.join(0.01)
        if kill:
            process.kill()
        process.join(timeout)
        assert process.exitcode is not None, f"{arguments} did not end within {timeout} s"
        read = {name: (Path(out) / name).read_text() for name in ("stdout", "stderr")}
        done = Done(process.exitcode, **read)
    assert not check or done.returncode == 0, f"{arguments} exited with {done.returncode}:\n{done.stderr}"
    return done


def run_two(*arguments: str | Path, check: bool = False, timeout: float = 300) -> Done:
    """Run a script in two processes that work together: ``torchrun --nproc_per_node=2 -- scripts/x.py ...``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", *map(str, arguments)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or ran.returncode == 0, f"{arguments} exited with {ran.returncode}:\n{ran.stderr}"
    return Done(ran.returncode, ran.stdout, ran.stderr)
