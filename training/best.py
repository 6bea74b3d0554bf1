"""The best model of a run by a score, computed while it trains."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, Latents, iterate
from flowmaps.distributed import ALONE, Team
from flowmaps.evaluation.evaluate import NotFinite, generated
from flowmaps.evaluation.references import reference_stats
from flowmaps.generate import generate
from flowmaps.metrics import FeatureStats, board_kl, frechet_distance, sliced_w2
from flowmaps.metrics.extractors import EXTRACTORS, METRIC_OF, POINTS, load_extractor
from samplers import uniform_times
from training.config import Best

EXTRACTOR_OF = {METRIC_OF.get(name, f"FD-{name}"): name for name in EXTRACTORS if name != POINTS}
POINT_METRICS = ("KL", "W2")


def check_best(best: Best, shape: tuple[int, ...]) -> None:
    """Refuse, before any slow work, what ``Judge`` cannot do for samples of ``shape``."""
    known = tuple(EXTRACTOR_OF) if len(shape) == 3 else POINT_METRICS
    if best.metric not in known:
        raise UserError(f"--config.best.metric={best.metric}: choose one of {', '.join(known)}")
    for name, file in (("reference", best.reference), ("weights", best.weights)):
        if file and not Path(file).is_file():
            raise UserError(f"--config.best.{name}={file}: no such file")


class Judge:
    """Scores a model by the metric of ``Best``, lower being better; made once, since it holds the reference.

    The processes of a team make shares of the samples, and all know the score.
    """

    def __init__(self, best: Best, data: DataSet, seed: int, device: torch.device, team: Team = ALONE) -> None:
        check_best(best, data.shape)
        self.best, self.seed, self.team = best, seed, team
        self.name = f"{best.metric}@{best.steps}"  # as in the log: metric at a number of sampling steps
        self.facts: dict[str, Any] = {"metric": best.metric, "steps": best.steps, "num": best.num, "seed": seed}
        self.distance = self._features(data, device) if len(data.shape) == 3 else self._points(data)

    def __call__(self, fm: FlowMap) -> float:
        """The score of ``fm``; a model whose samples are not finite scores infinity."""
        return self.team.told(self.distance(fm))

    def _batches(self, fm: FlowMap) -> Iterator[tuple[Tensor, Tensor | None]]:
        share, grid = self.team.share(self.best.num), uniform_times(self.best.steps)
        made = generate(fm, grid, len(share), self.seed, sampler=fm.info.sampler, first=share.start)
        return ((fm.decode(x), label) for x, label in made)

    def _features(self, data: DataSet, device: torch.device) -> Callable[[FlowMap], float]:
        best, name = self.best, EXTRACTOR_OF[self.best.metric]
        try:
            if best.reference:
                reference, extractor = reference_stats(best.reference, name, best.weights or None, "", device)
            else:
                if isinstance(data, Latents):
                    raise UserError("--reference is missing: latents are no images to compare with (see stats.py)")
                extractor = load_extractor(name, best.weights or None, device)
                share = self.team.share(len(data))
                reference = self.team.merged(extractor.stats(rows for rows, _ in iterate(data, share)))
        except UserError as error:
            message = re.sub(r"--(reference|weights|extractor)\b", r"--config.best.\1", str(error))
            raise UserError(message.replace("best.extractor", "best.metric")) from None
        self.facts |= {"reference": reference.sha256(), "weights": extractor.origin.weights}

        def distance(fm: FlowMap) -> float:
            try:
                mine = extractor.stats(generated(self._batches(fm)))
            except NotFinite:
                mine = FeatureStats(reference.dim, reference.origin)
            whole = self.team.merged(mine)
            return frechet_distance(whole, reference) if whole.n == best.num else math.inf

        return distance

    def _points(self, data: DataSet) -> Callable[[FlowMap], float]:
        true = data.fetch(torch.arange(min(len(data), self.best.num)))[0]

        def distance(fm: FlowMap) -> float:
            x = self.team.joined(torch.cat([x for x, _ in self._batches(fm)]).cpu())
            if not bool(torch.isfinite(x).all()):
                return math.inf
            return board_kl(x) if self.best.metric == "KL" else sliced_w2(x, true)

        return distance

    def lowest(self, workdir: Path) -> float:
        """The score of the run's checkpoints/best, infinity if it has none that was judged in the same way."""
        try:
            state = json.loads((workdir / "checkpoints" / "best" / "state.json").read_text())
            return float(state["score"]) if state["judge"] == self.facts else math.inf
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf
