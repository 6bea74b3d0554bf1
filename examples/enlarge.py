"""Garments of 32 x 32 pixels from their 8 x 8 versions, in one step.

python examples/enlarge.py runs/enlarge data

About 13 minutes on one core; the last argument is the folder of Fashion-MNIST's files. Prints the peak signal-to-noise
ratio to the true picture and the distance FD-fashion_mnist of 2,000 held-out pictures, and draws OUT/enlarged.png: the
small picture, bicubic, the map in one step and in four, Euler's method in eight, the true picture.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from flowmaps.configs.fashion_mnist import get_config
from torch import Tensor
from torch.utils.data import TensorDataset

from flowmaps.data import open_dataset
from flowmaps.evaluation import evaluate
from flowmaps.generate import generate
from flowmaps.images import from_uint8, sample_grid, to_pil, to_uint8, write_png
from samplers import uniform_times
from training import Config, train

REFERENCE = "assets/references/fashion_mnist.npz"


def small(images: Tensor) -> Tensor:
    """Return means of 4 x 4 pixels of uint8 images [..., C, H, W], in [-1, 1], repeated to the size of the images."""
    means = F.avg_pool2d(from_uint8(images), 4)
    return means.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)


def main(out: Path, root: str, steps: int = 1200, num: int = 2000) -> None:
    config = get_config("lagrangian,cpu")
    assert isinstance(config, Config)
    config.network.num_classes, config.network.condition = 0, (1, 32, 32)
    config.steps, config.sample_every, config.checkpoint_every = steps, steps, steps
    data, heldout = (open_dataset("fashion_mnist", split, root=root) for split in ("train", "heldout"))
    images, true = data.fetch(torch.arange(len(data)))[0], heldout.fetch(torch.arange(num))[0]
    fm = train(config, out / "run", data=TensorDataset(images, small(images)))

    asked = small(true)
    made = {"bicubic": F.interpolate(asked[..., ::4, ::4], scale_factor=4, mode="bicubic")}
    for sampler, count in (("map", 1), ("map", 4), ("euler", 8)):
        batches = generate(fm, uniform_times(count), len(true), seed=0, sampler=sampler, label=asked)
        made[f"{sampler}, {count} steps"] = torch.cat([x for x, _ in batches])
    for name, x in made.items():
        psnr = -10 * (to_uint8(x).float() / 255 - true.float() / 255).square().mean(dim=(1, 2, 3)).log10().mean()
        row = evaluate(to_uint8(x), REFERENCE)["results"][0]
        print(f"{name}: {psnr:.2f} dB, FD-fashion_mnist {row['FD-fashion_mnist']:.2f}")
    columns = [asked, *made.values(), from_uint8(true)]
    rows = [torch.stack(row) for row in zip(*(column[:10] for column in columns), strict=True)]
    write_png(to_pil(sample_grid(rows, len(columns))), out / "enlarged.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
