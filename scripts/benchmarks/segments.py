"""Bench of segments: from which part of its path on a checkpoint leaves errors, and which way to data leaves fewest.

Real images are mixed with noise to I_t = (1 - t) x0 + t x1, and the checkpoint takes them on to data. I_t has the law
of the exact path at time t. So an exact flow gives back the law of the images, whatever t is, and the distance of what
comes out is that of the errors made after t. A single Euler step gives the mean of the images instead, given I_t.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.images import from_uint8, to_uint8
from samplers import euler, rollout

REFERENCES = {"digits": "digits:heldout", "fashion_mnist": "assets/references/fashion_mnist.npz"}
STARTS = (0.0, 0.25, 0.5, 0.75, 0.875)
FINE = 64  # steps from noise to data
SEED, BATCH = 5, 250


def scores(checkpoint: str, num: int | None) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the scores of each start t: Fréchet distances of ``num`` training images."""
    if not (Path(checkpoint) / "model_index.json").is_file():
        raise UserError(f"--rows={checkpoint}: of --suite=segments they are checkpoints, such as assets/digits")
    fm = FlowMap.from_pretrained(checkpoint)
    if fm.info.data not in REFERENCES:
        raise UserError(f"--rows={checkpoint}: was not trained on {' or '.join(REFERENCES)}")
    data = open_dataset(fm.info.data, "train")
    x1, label = data.fetch(torch.arange(min(num or 2000, len(data))))
    x1, x0 = from_uint8(x1), fm.noise(len(x1), SEED)
    reference = open_reference(REFERENCES[fm.info.data], device=torch.device("cpu"))

    def distance(images: Tensor) -> float:
        record = evaluate(to_uint8(images), reference, num=len(images))
        return float(record["results"][0][record["metric"]])

    floor = distance(x1)
    for start in STARTS:
        steps = round((1 - start) * FINE)
        ways: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
            f"Euler, steps of 1/{FINE}": (euler, fm.drift, steps),
            "Euler, one step": (euler, fm.drift, 1),
        }
        if fm.info.kind == "map":
            ways["map, one jump"] = (rollout, fm, 1)
        found = {"the images": floor}
        for name, (sampler, model, count) in ways.items():
            times = torch.linspace(start, 1, count + 1)
            with torch.no_grad():
                made = [
                    sampler(model, (1 - start) * x0[i] + start * x1[i], times, None if label is None else label[i])
                    for i in torch.split(torch.arange(len(x1)), BATCH)
                ]
            found[name] = distance(torch.cat(made))
        yield f"{checkpoint}, from t = {start:g}", found
