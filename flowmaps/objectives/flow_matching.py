"""Flow matching: learn the drift alone."""

from dataclasses import dataclass

from torch import Tensor

from flowmaps.flow_map import FlowMap
from flowmaps.objectives.base import Draws
from flowmaps.objectives.self_distillation import DriftObjective
from flowmaps.objectives.time_sampling import TimeSampling
from samplers.callables import Drift


@dataclass
class FlowMatching(TimeSampling, DriftObjective):
    """$r = v_{t,t}(I_t) - dI_t/dt$ with t uniform: every row is diagonal.

    Lipman et al. 2023 (arXiv 2210.02747); Albergo and Vanden-Eijnden 2023 (arXiv 2209.15571). The trained network is
    a drift: sample it with an ODE solver.
    """

    @property
    def diagonal(self) -> float:
        return 1.0

    @property
    def kind(self) -> str:
        return "drift"

    def row_losses(
        self,
        fm: FlowMap,
        x1: Tensor,
        label: Tensor | None,
        draws: Draws,
        teacher: Drift | None,
        terms: dict[str, Tensor],
    ) -> Tensor:
        x_t, velocity, label = self.conditional(fm, x1, label, draws)
        return self.drift_losses(fm, x_t, draws.t, label, velocity, terms)
