"""Names of objectives by kind, for tests that run over the table."""

from flowmaps.objectives import OBJECTIVES, TrajectoryObjective

LIVE = [name for name, cls in OBJECTIVES.items() if not issubclass(cls, TrajectoryObjective)]  # that learn from data
RELATIVES = {"improved_mean_flow", "shortcut", "terminal_velocity"}  # of methods whose long tests always run
MAPS = [name for name in LIVE if OBJECTIVES[name]().kind == "map"]
ANCHORED = [name for name, cls in OBJECTIVES.items() if cls().diagonal]  # with rows that regress the drift
