"""Digits drawn from an embedding: the 64 numbers in which another network describes a digit, and what lies between two.

python examples/embeddings.py runs/embeddings

About 8 minutes on one core. Prints, for held-out digits and by the number of steps, how often the description of the
sample is nearest to the one that was asked for, among all held-out ones. Draws OUT/between.png: in each row the left
and the right digit are real, and the seven between them are one step from the same noise.
"""

import sys
from pathlib import Path

import torch
from flowmaps.configs.digits import get_config
from torch import Tensor
from torch.utils.data import TensorDataset

from flowmaps.data import open_dataset
from flowmaps.generate import generate
from flowmaps.images import from_uint8, sample_grid, to_pil, to_uint8, write_png
from flowmaps.metrics.extractors import load_extractor
from samplers import uniform_times
from training import Config, train

PAIRS, BETWEEN = ((0, 1), (2, 3), (4, 5), (6, 8)), 7


def main(out: Path, steps: int = 1500) -> None:
    data, network = [open_dataset("digits", split) for split in ("train", "heldout")], load_extractor("digits")
    images, heldout = (part.fetch(torch.arange(len(part)))[0] for part in data)
    std, mean = torch.std_mean(network.embed(images), dim=0)

    def described(x: Tensor) -> Tensor:
        return (network.embed(x) - mean) / std.clamp(min=1e-3)

    config = get_config("lagrangian")
    assert isinstance(config, Config)
    config.network.num_classes, config.network.condition = 0, (64,)
    config.steps, config.sample_every, config.checkpoint_every = steps, steps, steps
    fm = train(config, out / "run", data=TensorDataset(images, described(images)))

    asked = described(heldout)
    for count in (1, 2, 4):
        batches = [x for x, _ in generate(fm, uniform_times(count), len(asked), seed=0, label=asked)]
        nearest = torch.cdist(described(to_uint8(torch.cat(batches))), asked).argmin(dim=1)
        print(f"{count} steps: {(nearest == torch.arange(len(asked))).float().mean():.1%} are nearest to their own")

    rows = []
    for a, b in PAIRS:
        path = torch.lerp(asked[a], asked[b], torch.linspace(0, 1, BETWEEN)[:, None])
        with torch.no_grad():
            x = fm(fm.noise(1, seed=a).expand(BETWEEN, -1, -1, -1), 0.0, 1.0, path)
        rows.append(torch.cat([from_uint8(heldout[a : a + 1]), x, from_uint8(heldout[b : b + 1])]))
    write_png(to_pil(sample_grid(rows, BETWEEN + 2)), out / "between.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
