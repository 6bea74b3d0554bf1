"""The module that distributed training and torch.compile wrap."""

import torch
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

    def forward(self, x1: Tensor, label: Tensor | None, draws: Draws | Segments) -> Loss:
        drift = None if self.teacher is None else self.teacher.drift
        return self.objective.loss(self.fm, x1, label, draws, teacher=drift, weight=self.weight)

    def gradient_norms(self, x1: Tensor, label: Tensor | None, draws: Draws | Segments) -> dict[str, Tensor]:
        """Return the norms of the contributions of diagonal and off-diagonal rows to the gradient of ``forward``."""
        drift = None if self.teacher is None else self.teacher.drift
        per_sample, _ = self.objective.per_sample(self.fm, x1, label, draws, drift, self.weight)
        rows, norms = self.objective.diagonal_rows(len(x1)), {}
        parameters = [p for p in self.parameters() if p.requires_grad]
        for name, part in (("diagonal", per_sample[:rows]), ("off_diagonal", per_sample[rows:])):
            if len(part):
                value = part.sum() / len(x1)
                gradients = torch.autograd.grad(value, parameters, retain_graph=name == "diagonal", allow_unused=True)
                norms[f"grad_norm_{name}"] = nn.utils.get_total_norm(g for g in gradients if g is not None)
        return norms
