"""What a run looks at while it trains."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.generate import generate
from flowmaps.images import sample_grid, to_pil
from flowmaps.metrics import board_kl, frechet_distance, sliced_w2
from flowmaps.metrics.extractors import EXTRACTORS, load_extractor
from samplers import uniform_times
from training.config import Best
from training.data import DataSet, Latents, in_order
from training.references import reference_stats
from training.scoring import NotFinite, generated


def samples(fm: FlowMap, steps: int, n: int, seed: int, sampler: str | None = None) -> Tensor:
    """``n`` samples (images, of latents too) with ``steps`` uniform steps: by the map, if ``fm`` is of that kind."""
    made = generate(fm, uniform_times(steps), n, seed, sampler=sampler or fm.info.sampler)
    return torch.cat([fm.decode(x) for x, _ in made])


def grid_image(fm: FlowMap, steps: Sequence[int], seed: int, columns: int = 16) -> Image.Image:
    """A picture of the same noise carried to data in different step counts, one row each."""
    n = columns if len(fm.info.shape) == 3 else 8192  # points are drawn as a density
    n = min(n, 8) if fm.info.latent_scale else n  # large images
    return to_pil(sample_grid([samples(fm, count, n, seed) for count in steps]))


EXTRACTOR_OF = {"FID" if name == "inception" else f"FD-{name}": name for name in EXTRACTORS}
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
    """Scores a model by the metric of ``Best``, lower being better; made once, since it holds the reference."""

    def __init__(self, best: Best, data: DataSet, seed: int, device: torch.device) -> None:
        check_best(best, data.shape)
        self.best, self.seed = best, seed
        self.name = f"{best.metric}@{best.steps}"  # as in the log: metric at a number of sampling steps
        self.facts: dict[str, Any] = {"metric": best.metric, "steps": best.steps, "num": best.num, "seed": seed}
        self.distance = self._features(data, device) if len(data.shape) == 3 else self._points(data)

    def __call__(self, fm: FlowMap) -> float:
        """The score of ``fm``; a model whose samples are not finite scores infinity."""
        try:
            return self.distance(fm)
        except NotFinite:
            return math.inf

    def _batches(self, fm: FlowMap) -> Iterator[tuple[Tensor, Tensor | None]]:
        made = generate(fm, uniform_times(self.best.steps), self.best.num, self.seed, sampler=fm.info.sampler)
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
                reference = extractor.stats(rows for rows, _ in in_order(data))
        except UserError as error:
            message = re.sub(r"--(reference|weights|extractor)\b", r"--config.best.\1", str(error))
            raise UserError(message.replace("best.extractor", "best.metric")) from None
        self.facts |= {"reference": reference.sha256(), "weights": extractor.origin.weights}

        def distance(fm: FlowMap) -> float:
            return frechet_distance(extractor.stats(generated(self._batches(fm))), reference)

        return distance

    def _points(self, data: DataSet) -> Callable[[FlowMap], float]:
        true = data.fetch(torch.arange(min(len(data), self.best.num)))[0]

        def distance(fm: FlowMap) -> float:
            x = torch.cat([x for x, _ in self._batches(fm)]).cpu()
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
