"""The module that distributed training and torch.compile wrap."""

from torch import Tensor, nn

from flowmaps import FlowMap
from flowmaps.objectives import Draws, Loss, Objective
from flowmaps.objectives.base import Segments


class LossModule(nn.Module):
    """The complete loss of one step as a module's forward, derivatives included.

    DDP and FSDP synchronise gradients only for what runs inside the forward of the module they wrap: a jvp of
    ``ddp.module`` outside it would silently skip the all-reduce. For the same reason torch.compile compiles this
    module: a jvp of a compiled network silently runs eagerly. ``teacher``, a frozen flow map, is not a submodule: it
    is neither trained nor synchronised.
    """

    def __init__(
        self, fm: FlowMap, objective: Objective, weight: nn.Module | None = None, teacher: FlowMap | None = None
    ) -> None:
        super().__init__()
        self.fm, self.objective, self.weight = fm, objective, weight
        self._hidden = (teacher,)  # a tuple hides it from parameters() and state_dict()

    @property
    def teacher(self) -> FlowMap | None:
        return self._hidden[0]

    def forward(self, x1: Tensor, label: Tensor | None, draws: Draws | Segments, share: Tensor) -> Loss:
        """Compute ``objective.loss`` with the rows weighted by ``share`` [B], ones for the loss itself."""
        drift = None if self.teacher is None else self.teacher.drift
        per_sample, terms = self.objective.per_sample(self.fm, x1, label, draws, drift, self.weight)
        return Loss((per_sample * share).mean(), terms)
