"""The module that distributed wrappers and torch.compile see."""

from torch import Tensor, nn

from flowmaps import FlowMap
from flowmaps.objectives import Draws, Loss, Objective


class LossModule(nn.Module):
    """The whole loss of one step as a module's forward, derivatives included.

    DDP and FSDP synchronise gradients only for what runs inside the forward of the module they wrap: a jvp of
    ``ddp.module`` outside it would skip the all-reduce without a word. Likewise torch.compile compiles this module,
    since a jvp of a compiled network runs eagerly without a word.
    """

    def __init__(self, fm: FlowMap, objective: Objective, weight: nn.Module | None = None) -> None:
        super().__init__()
        self.fm, self.objective, self.weight = fm, objective, weight

    def forward(self, x1: Tensor, label: Tensor | None, draws: Draws) -> Loss:
        return self.objective.loss(self.fm, x1, label, draws, weight=self.weight)
