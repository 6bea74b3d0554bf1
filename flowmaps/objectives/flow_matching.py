"""Flow matching: learn the drift alone."""

from dataclasses import dataclass, field

from flowmaps.objectives.base import Objective


@dataclass(frozen=True)
class FlowMatching(Objective):
    """E || v_{t,t}(I_t) - dI_t/dt ||^2 with t uniform: every row is diagonal.

    Lipman et al. 2023 (arXiv 2210.02747); Albergo and Vanden-Eijnden 2023 (arXiv 2209.15571). The trained network is
    a drift: sample it with an ODE solver.
    """

    diagonal: float = field(default=1.0, init=False)

    @property
    def kind(self) -> str:
        return "drift"
