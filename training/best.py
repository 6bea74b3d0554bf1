"""Keep the best model of a run by a score that is computed during training, and log others."""

import math
from pathlib import Path
from typing import Any

import torch

from flowmaps import FlowMap, UserError
from flowmaps.data import DataSet, Latents, iterate
from flowmaps.distributed import ALONE, Team
from flowmaps.errors import blame, within
from flowmaps.evaluation import Reference, evaluate, open_references
from flowmaps.evaluation.samples import sample_batches
from flowmaps.evaluation.scoring import NotFinite
from flowmaps.metrics import board_kl, sliced_w2
from flowmaps.metrics.classifier import SUFFIX, own_file, read_own
from flowmaps.metrics.extractors import EXTRACTORS, check_extractors, load_extractor, weights_of
from flowmaps.metrics.features import METRIC_OF, POINTS, extract
from flowmaps.metrics.scores import LARGER_IS_BETTER, check_metrics, compares, needs_reference_features
from samplers import uniform_times
from training.checkpoint import read_state
from training.config import Best

EXTRACTOR_OF = {METRIC_OF.get(name, f"FD-{name}"): name for name in EXTRACTORS if name != POINTS}
SCORES = {  # other scores of images: the extractor, and the metric that reports them
    **{"KID": ("inception", "kid"), "IS": ("inception", "is"), "CMMD": ("clip-vit-l-14", "cmmd")},
    **dict.fromkeys(("precision", "recall"), ("inception", "prc")),
}
POINT_METRICS = ("KL", "W2")


def check_best(best: Best, shape: tuple[int, ...], root: str = "") -> None:
    """Refuse, before any slow work, settings that ``BestModel`` cannot use for samples of ``shape``."""
    with within("best"):
        for field, name in (("metric", best.metric), *(("also", name) for name in best.also)):
            if len(shape) == 3:
                _measure(name, best, root, field)
            elif name not in POINT_METRICS:
                raise UserError(f"choose one of {', '.join(POINT_METRICS)}", field=field, value=name)
        if best.reference and not Path(best.reference).is_file():
            raise UserError("no such file", field="reference", value=best.reference)
        if best.weights and not Path(best.weights).exists():
            raise UserError("no such file or folder", field="weights", value=best.weights)


def _measure(name: str, best: Best, root: str, field: str = "metric") -> tuple[str, str]:
    """Return the extractor of the score ``name``, by name or file, and the metric that reports it."""
    if name in SCORES or name in EXTRACTOR_OF:
        return SCORES.get(name) or (EXTRACTOR_OF[name], "fid")
    own = Path(best.weights) if best.weights.endswith(SUFFIX) else own_file(root)
    names = [*EXTRACTOR_OF, *SCORES]
    if own.is_file():
        names.append(f"FD-{read_own(own).name}")
    if name != names[-1]:
        remedy = "" if own.is_file() else ", or FD-NAME of an extractor file in best.weights"
        raise UserError(f"choose one of {', '.join(names)}{remedy}", field=field, value=name)
    return str(own), "fid"


class BestModel:
    """Scores models by the metrics of a run's ``Best`` section and knows the best score by the first one so far.

    Make it once per run, since it holds the references. The processes of a team share the samples and all get the
    scores.
    """

    def __init__(
        self, best: Best, data: DataSet, seed: int, device: torch.device, team: Team = ALONE, root: str = ""
    ) -> None:
        """``root`` is where the data are; their own extractor may be next to it."""
        check_best(best, data.shape, root)
        self.best, self.data, self.seed, self.team = best, data, seed, team
        self.scores = list(dict.fromkeys((best.metric, *best.also)))
        self.sign = -1 if best.metric in LARGER_IS_BETTER else 1  # so that the least is the best
        self.facts: dict[str, Any] = {"metric": best.metric, "steps": best.steps, "num": best.num, "seed": seed}
        self.references: tuple[Reference, ...] = ()  # of images
        if len(data.shape) == 3:
            measures = [_measure(name, best, root) for name in self.scores]
            self.metrics = list(dict.fromkeys(metric for _, metric in measures))
            with within("best"):
                self.references = self._open(list(dict.fromkeys(name for name, _ in measures)), device)
            with within("best"), blame("num", best.num):
                check_metrics(self.metrics, [reference.extractor for reference in self.references], best.num)
            stats, extractor, _ = self.references[0]
            self.facts |= {"reference": stats.sha256(), "weights": extractor.origin.weights}

    def _open(self, names: list[str], device: torch.device) -> tuple[Reference, ...]:
        best, several, keep = self.best, len(names) > 1, needs_reference_features(self.metrics)
        weights = None if not best.weights or best.weights in names else best.weights
        if best.reference:
            return open_references(best.reference, names, weights, device=device, keep=keep)
        if isinstance(self.data, Latents):
            raise UserError(
                "missing: latents are not images to compare with, give statistics (stats.py)", field="reference"
            )
        check_extractors(names, weights)
        extractors = [load_extractor(name, weights_of(name, weights, several), device) for name in names]
        batches = (rows for rows, _ in iterate(self.data, self.team.split(len(self.data))))
        kept = [keep and compares(extractor) for extractor in extractors]
        found = [self.team.all_reduce_stats(stats) for stats in extract(extractors, batches, kept)]
        return tuple(map(Reference, found, extractors))

    def score(self, fm: FlowMap) -> dict[str, float]:
        """Return the scores of ``fm`` by name in every process; the worst there are if its samples are not finite."""
        return self.team.broadcast(self._images(fm) if self.references else self._points(fm))

    def _worst(self) -> dict[str, float]:
        return {name: -math.inf if name in LARGER_IS_BETTER else math.inf for name in self.scores}

    def _images(self, fm: FlowMap) -> dict[str, float]:
        best = self.best
        try:
            record = evaluate(
                fm,
                self.references,
                steps=(best.steps,),
                num=best.num,
                metrics=self.metrics,
                seeds=(self.seed,),
                schedule="uniform",
                team=self.team,
            )
        except NotFinite:
            return self._worst()
        row = record["results"][0] if record else dict.fromkeys(self.scores, math.nan)  # which broadcast replaces
        return {name: float(row[name]) for name in self.scores}

    def _points(self, fm: FlowMap) -> dict[str, float]:
        batches = sample_batches(fm, uniform_times(self.best.steps), self.team.split(self.best.num), self.seed)
        x = self.team.all_gather(torch.cat([x for x, _ in batches]).cpu())
        if not bool(torch.isfinite(x).all()):
            return self._worst()
        real = self.data.fetch(torch.arange(min(len(self.data), self.best.num)))[0]
        return {name: board_kl(x) if name == "KL" else sliced_w2(x, real) for name in self.scores}

    def is_best(self, scores: dict[str, float], workdir: Path) -> bool:
        """Tell whether the first score is better than that of the run's checkpoints/best."""
        return self.sign * scores[self.best.metric] < self.sign * self.best_score(workdir)

    def best_score(self, workdir: Path) -> float:
        """Return the score of the run's checkpoints/best; the worst if there is none that was scored in this way."""
        try:
            state = read_state(workdir / "checkpoints" / "best")
        except UserError:
            return self.sign * math.inf
        return state.score if state.score is not None and state.judge == self.facts else self.sign * math.inf
