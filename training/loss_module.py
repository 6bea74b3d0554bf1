"""The module that distributed training and torch.compile wrap, and the times at which its residuals are large."""

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

    def forward(self, x1: Tensor, label: Tensor | None, draws: Draws | Segments, share: Tensor) -> Loss:
        """Compute ``objective.loss`` with the rows weighted by ``share`` [B], ones for the loss itself.

        Its terms have two more: "residuals", a ``table``, and "largest", the ``largest`` row.
        """
        drift = None if self.teacher is None else self.teacher.drift
        per_sample, residuals, terms = self.objective.per_sample(self.fm, x1, label, draws, drift, self.weight)
        terms["residuals"] = table(residuals, draws.s, draws.t, self.objective.diagonal_rows(len(residuals)))
        terms["largest"] = largest(torch.stack([residuals, draws.s, draws.t], dim=1))
        return Loss((per_sample * share).mean(), terms)


GAPS = ("diagonal", "gap_below_0.25", "gap_below_0.5", "gap_to_1")  # of t - s: the rows of a ``table``
BINS = 5  # of s, its columns


def table(residuals: Tensor, s: Tensor, t: Tensor, diagonal: int) -> Tensor:
    """Return what rows at each (s, t) add to the mean squared residuals: [GAPS, BINS].

    The first row sums to the mean over the first ``diagonal`` of all rows, the others to the mean over the rest.

    Args:
        residuals: Squared residual of each row [B], the diagonal ones first.
        s: Start times [B] in [0, 1].
        t: End times [B].
        diagonal: Number of diagonal rows.
    """
    first = torch.arange(len(s), device=s.device) < diagonal
    gap = torch.where(first, 0, 1 + (t - s >= 1 / 4).long() + (t - s >= 1 / 2).long())
    cell = BINS * gap + (BINS * s).long().clamp(0, BINS - 1)
    part = residuals / torch.where(first, diagonal, len(s) - diagonal)
    cells = torch.arange(len(GAPS) * BINS, device=s.device)
    # Not scatter_add, whose order of summation, and so the last bit, is open on CUDA.
    return torch.where(cell[:, None] == cells, part[:, None], 0).sum(dim=0).view(len(GAPS), BINS)


def largest(rows: Tensor) -> Tensor:
    """Return the row (residual, s, t) of ``rows`` [n, 3] with the largest residual, or the first that is NaN: [3]."""
    return rows.index_select(0, rows[:, 0].argmax(dim=0, keepdim=True))[0]


def add_terms(logged: dict[str, Tensor], terms: dict[str, Tensor], parts: int) -> None:
    """Add the terms of one of ``parts`` micro-steps to those of the step: the mean of each, and of "largest" that."""
    for name, value in terms.items():
        if name == "largest":
            rows = [logged[name], value] if name in logged else [value]
            logged[name] = largest(torch.stack(rows))
        else:
            logged[name] = logged.get(name, 0) + value / parts
