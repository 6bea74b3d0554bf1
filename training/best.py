"""Keep the best model of a run by a score that is computed during training."""

import math
from pathlib import Path
from typing import Any

import torch

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, Latents, iterate
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import within
from flowmaps.evaluation import Reference, evaluate, open_reference
from flowmaps.evaluation.samples import sample_batches
from flowmaps.evaluation.scoring import NotFinite
from flowmaps.metrics import board_kl, sliced_w2
from flowmaps.metrics.classifier import own_file, read_own
from flowmaps.metrics.extractors import EXTRACTORS, load_extractor
from flowmaps.metrics.features import METRIC_OF, POINTS
from samplers import uniform_times
from training.checkpoint import read_state
from training.config import Best

EXTRACTOR_OF = {METRIC_OF.get(name, f"FD-{name}"): name for name in EXTRACTORS if name != POINTS}
POINT_METRICS = ("KL", "W2")


def check_best(best: Best, shape: tuple[int, ...], root: str = "") -> None:
    """Refuse, before any slow work, settings that ``BestModel`` cannot use for samples of ``shape``."""
    with within("best"):
        if len(shape) == 3:
            _extractor(best, root)
        elif best.metric not in POINT_METRICS:
            raise UserError(f"choose one of {', '.join(POINT_METRICS)}", field="metric", value=best.metric)
        for name, file in (("reference", best.reference), ("weights", best.weights)):
            if file and not Path(file).is_file():
                raise UserError("no such file", field=name, value=file)


def _extractor(best: Best, root: str) -> tuple[str, str | None]:
    """Return the extractor of ``best.metric``, by name or file, and its weights if they are not the default ones."""
    if best.metric in EXTRACTOR_OF:
        return EXTRACTOR_OF[best.metric], best.weights or None
    own = Path(best.weights) if best.weights else own_file(root)
    names = list(EXTRACTOR_OF)
    if own.is_file():
        names.append(f"FD-{read_own(own).name}")
    if best.metric != names[-1]:
        remedy = "" if own.is_file() else ", or FD-NAME of an extractor file in best.weights"
        raise UserError(f"choose one of {', '.join(names)}{remedy}", field="metric", value=best.metric)
    return str(own), None


class BestModel:
    """Scores models by the metric of a run's ``Best`` section (lower is better) and knows the best score so far.

    Make it once per run, since it holds the reference. The processes of a team share the samples and all get the score.
    """

    def __init__(
        self, best: Best, data: DataSet, seed: int, device: torch.device, team: Team = ALONE, root: str = ""
    ) -> None:
        """``root`` is where the data are; their own extractor may be next to it."""
        check_best(best, data.shape, root)
        self.best, self.data, self.seed, self.team = best, data, seed, team
        self.name = f"{best.metric}@{best.steps}"  # as in the log: metric at a number of sampling steps
        self.facts: dict[str, Any] = {"metric": best.metric, "steps": best.steps, "num": best.num, "seed": seed}
        self.reference: Reference | None = None  # of images
        if len(data.shape) == 3:
            with within("best"):
                self.reference = self._open_reference(device, root)
            stats, extractor, _ = self.reference
            self.facts |= {"reference": stats.sha256(), "weights": extractor.origin.weights}

    def _open_reference(self, device: torch.device, root: str) -> Reference:
        best, (name, weights) = self.best, _extractor(self.best, root)
        if best.reference:
            return open_reference(best.reference, name, weights, device=device)
        if isinstance(self.data, Latents):
            raise UserError(
                "missing: latents are not images to compare with, give statistics (stats.py)", field="reference"
            )
        extractor = load_extractor(name, weights, device)
        batches = (rows for rows, _ in iterate(self.data, self.team.split(len(self.data))))
        return Reference(self.team.all_reduce_stats(extractor.stats(batches)), extractor)

    def score(self, fm: FlowMap) -> float:
        """Return the score of ``fm`` in every process; infinity if its samples are not finite."""
        return self.team.broadcast(self._points(fm) if self.reference is None else self._images(fm, self.reference))

    def _images(self, fm: FlowMap, reference: Reference) -> float:
        best = self.best
        try:
            record = evaluate(
                fm,
                reference,
                steps=(best.steps,),
                num=best.num,
                seeds=(self.seed,),
                schedule="uniform",
                team=self.team,
            )
        except NotFinite:
            return math.inf
        return float(record["results"][0][best.metric]) if record else math.nan  # which broadcast replaces

    def _points(self, fm: FlowMap) -> float:
        batches = sample_batches(fm, uniform_times(self.best.steps), self.team.split(self.best.num), self.seed)
        x = self.team.all_gather(torch.cat([x for x, _ in batches]).cpu())
        if not bool(torch.isfinite(x).all()):
            return math.inf
        if self.best.metric == "KL":
            return board_kl(x)
        return sliced_w2(x, self.data.fetch(torch.arange(min(len(self.data), self.best.num)))[0])

    def best_score(self, workdir: Path) -> float:
        """Return the score of the run's checkpoints/best; infinity if there is none that was scored in the same way."""
        try:
            state = read_state(workdir / "checkpoints" / "best")
        except UserError:
            return math.inf
        return state.score if state.score is not None and state.judge == self.facts else math.inf
