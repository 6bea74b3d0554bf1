"""Names of objectives by kind, for tests that run over the table."""

from flowmaps.objectives import OBJECTIVES, TrajectoryObjective
from flowmaps.objectives.base import Objective

LIVE = [name for name, cls in OBJECTIVES.items() if not issubclass(cls, TrajectoryObjective)]  # that learn from data
RELATIVES = {"improved_mean_flow", "shortcut", "terminal_velocity", "soflow"}  # of methods whose long tests always run
MAPS = [name for name in LIVE if OBJECTIVES[name]().kind == "map"]
ANCHORED = [name for name, cls in OBJECTIVES.items() if cls().diagonal]  # with rows that regress the drift
SMALL_STEPS = ["soflow", "alpha_flow"]
PLAIN = [name for name in LIVE if OBJECTIVES[name].adapted is Objective.adapted]  # with the adaptive weight of all


def expected(fm, x1, label, draws):
    """An interpolant that gives I_s of ``draws``, and in place of dI_s/ds its mean given I_s."""
    x_s = fm.interpolant.point(draws.x0, x1, draws.s)

    class Expected(type(fm.interpolant)):
        def point(self, x0, x1, t):
            return x_s

        def conditional_velocity(self, x0, x1, t):
            return fm.drift(x_s, draws.s, label).detach()

    return Expected()
