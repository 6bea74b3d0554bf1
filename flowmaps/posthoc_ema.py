"""Averages of any width after training, from snapshots of a few widths: Karras et al. 2024 (EDM2, arXiv 2312.02696).

    WORKDIR/snapshots/step-00001000.safetensors   tensors "WIDTH/NAME", their SHA-256 in the metadata

A power-function average of exponent gamma after t steps has the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)
on [0, t] (``training.ema``: exactly, not in the limit). The wanted profile is approximated by a linear combination
of the stored ones, by least squares over tau; the same combination of the snapshots is the average. Unlike theirs, the
coefficients sum to 1, so that weights which never moved are reproduced exactly, and snapshots are float32: late in a
run the averages differ by less than float16 resolves.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.files import write_file
from flowmaps.tensors import read_header, read_tensors

WIDEST = 12**-0.5  # relative width of a power-function average of tau^0: the plain mean of all steps
REMEDY = "delete it to use the other snapshots"
Profile = tuple[float, float]  # (t, width): when the average was taken, and its relative standard deviation


def exponent(width: float) -> float:
    """Return gamma of the power function tau^gamma on [0, t] with standard deviation ``width`` t.

    It is the largest root of (gamma + 1) = width^2 (gamma + 2)^2 (gamma + 3); Karras et al. 2024 (EDM2, arXiv
    2312.02696), section 3.1.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def inner(a: Profile, b: Profile) -> float:
    """Return the integral over tau of the product of two profiles."""
    (t, gamma), (u, delta) = sorted((profile[0], exponent(profile[1])) for profile in (a, b))
    return float((gamma + 1) * (delta + 1) / (gamma + delta + 1) * (t / u) ** delta / u)


def coefficients(kept: list[Profile], wanted: Profile) -> list[float]:
    """Return the coefficients, of sum 1, of the ``kept`` profiles in the best approximation of the ``wanted`` one."""
    size = len(kept)
    gram = np.array([[inner(a, b) for b in kept] for a in kept])
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of length 1: late and narrow ones are long
    system, target = np.zeros((size + 1, size + 1)), np.ones(size + 1)
    system[:size, :size] = gram * scale * scale[:, None]
    system[size, :size] = system[:size, size] = scale  # a Lagrange multiplier
    target[:size] = [inner(a, wanted) for a in kept] * scale
    return [float(c) for c in np.linalg.lstsq(system, target, rcond=1e-12)[0][:size] * scale]


def write_snapshot(workdir: Path, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
    """Write the averages after ``step`` steps, given by width and parameter name."""
    tensors = {f"{width}/{name}": value for width, state in averages.items() for name, value in state.items()}
    facts = {"step": str(step), "sha256": _digest(tensors)}
    (workdir / "snapshots").mkdir(exist_ok=True)
    write_file(workdir / "snapshots" / f"step-{step:08d}.safetensors", save(tensors, facts), check=False)


def list_snapshots(workdir: Path) -> list[Path]:
    """List the snapshots of a run, oldest first."""
    found = (workdir / "snapshots").glob("step-*.safetensors")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}\.safetensors", path.name))


def reconstruct(workdir: Path, width: float) -> dict[str, Tensor]:
    """Return the average of relative ``width``, in (0, WIDEST), at the last snapshot of the run in ``workdir``.

    Raises:
        UserError: A snapshot is damaged, or of other parameters than the first.
    """
    files = list_snapshots(workdir)
    shapes = [_shapes(path) for path in files]
    for path, found in zip(files, shapes, strict=True):
        if any(parameters != next(iter(shapes[0].values())) for parameters in found.values()):
            raise _damaged(path, f"its parameters are not those of {files[0].name}")
    profiles = [(path, (_step(path), width)) for path, found in zip(files, shapes, strict=True) for width in found]
    step = max(profile[0] for _, profile in profiles)
    shares = coefficients([profile for _, profile in profiles], (step, width))
    average: dict[str, Tensor] = {}
    for path in files:
        tensors = _read(path)
        mine = {profile[1]: share for (source, profile), share in zip(profiles, shares, strict=True) if source == path}
        for key, value in tensors.items():
            kept, _, name = key.partition("/")
            if value.is_floating_point():
                average[name] = average.get(name, torch.zeros((), dtype=torch.float64)) + mine[float(kept)] * value
            else:
                average[name] = value
    return {k: v.float() if v.is_floating_point() else v for k, v in average.items()}


def _shapes(path: Path) -> dict[float, dict[str, tuple[int, ...]]]:
    """Read from a snapshot's header the shapes of its parameters, by width and name."""
    shapes, facts = read_header(path, REMEDY)
    found: dict[float, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        kept, _, name = key.partition("/")
        if not re.fullmatch(r"0?\.\d{1,20}", kept) or not 0 < float(kept) < WIDEST or str(float(kept)) != kept:
            raise _damaged(path, f"it has a tensor {key!r}, which has no width")
        found.setdefault(float(kept), {})[name] = shape
    if not found or not _step(path) or facts.get("step") != str(_step(path)):
        raise _damaged(path, f"it says step {facts.get('step')}")
    return found


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _read(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path, REMEDY)
    if _digest(tensors) != read_header(path, REMEDY)[1].get("sha256"):
        raise _damaged(path, "its checksum differs")
    return tensors


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): {REMEDY}")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
