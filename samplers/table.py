"""The one table of samplers: adding one means writing a function and a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplers.map_samplers import rollout, stochastic
from samplers.solvers import dpm_solver, euler, heun, midpoint


@dataclass(frozen=True)
class Sampler:
    """A sampler and the facts that others need about it.

    Every ``run`` has the signature ``run(model, x, times, label=None, callback=None, **options) -> x``, where ``model``
    is a map X(x, s, t, label) or a drift b(x, t, label), as ``of`` says.
    """

    run: Callable[..., Tensor]
    of: Literal["map", "drift"]
    nfe: int  # evaluations of the model per step
    order: int  # of convergence in the step size; 0 for a map, whose jumps are not a discretisation
    summary: str  # for help texts
    linear: bool = False  # defined for the linear path alone
    renoises: bool = False  # takes the options ``path``, ``noise`` and ``gamma`` of ``stochastic``


SAMPLERS: dict[str, Sampler] = {
    "map": Sampler(rollout, "map", nfe=1, order=0, summary="jump with the map"),
    "stochastic": Sampler(stochastic, "map", nfe=1, order=0, summary="jump, adding fresh noise", renoises=True),
    "euler": Sampler(euler, "drift", nfe=1, order=1, summary="Euler's method"),
    "heun": Sampler(heun, "drift", nfe=2, order=2, summary="Heun's method"),
    "dpm_solver": Sampler(dpm_solver, "drift", nfe=1, order=3, summary="DPM-Solver++, linear path only", linear=True),
    "midpoint": Sampler(midpoint, "drift", nfe=2, order=2, summary="explicit midpoint"),
}
