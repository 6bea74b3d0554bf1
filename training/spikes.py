"""Which gradients are far longer than usual."""

import statistics
from collections.abc import Iterable

WINDOW = 128  # steps whose gradients say what is usual


class Spikes:
    """Remembers the norms of the last gradients: a guard for objectives whose gradient has rare large outliers.

    The window is that of OLMo's optimiser (Walsh et al. 2025, arXiv 2501.00656, section 3.4), the median in the place
    of mean and deviation, which the outliers would move. Outliers are remembered too, so that a lasting change is
    usual after half a window.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.norms = list(norms)  # latest last; kept in a checkpoint
        self.count = 0  # since the start or resume

    def is_one(self, norm: float, factor: float) -> bool:
        """Whether ``norm`` is more than ``factor`` times the median of a full window before it; never at factor 0."""
        if not factor:
            return False
        found = len(self.norms) == WINDOW and norm > factor * statistics.median(self.norms)
        self.norms = [*self.norms, norm][-WINDOW:]
        self.count += found
        return found
