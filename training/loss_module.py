"""The module that distributed wrappers and torch.compile see."""

from torch import Tensor, nn

from flowmaps import FlowMap
from flowmaps.objectives import Draws, Loss, Objective


class LossModule(nn.Module):
    """The whole loss of one step as a module's forward, derivatives included.

    DDP and FSDP synchronise gradients only for what runs inside the forward of the module they wrap: a jvp of
    ``ddp.module`` outside it would skip the all-reduce without a word. Likewise torch.compile compiles this module,
    since a jvp of a compiled network runs eagerly without a word. ``teacher``, a frozen flow map, is no part of the
    module: it is neither trained nor synchronised.
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

    def forward(self, x1: Tensor, label: Tensor | None, draws: Draws) -> Loss:
        drift = None if self.teacher is None else self.teacher.drift
        return self.objective.loss(self.fm, x1, label, draws, teacher=drift, weight=self.weight)
