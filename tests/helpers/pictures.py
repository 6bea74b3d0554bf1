"""Pictures to measure, and rewards that ``--reward=helpers.pictures:NAME`` names."""

import torch
from PIL import Image

from flowmaps.data import open_dataset
from flowmaps.images import to_pil
from samplers import Score


def digit(number, index=0):
    """A held-out digit: uint8 [1, 8, 8]."""
    images, label = open_dataset("digits", "heldout").fetch(torch.arange(200))
    return images[label == number][index]


def save(folder, number=3):
    """Write digit.png, small.png (means of 2 x 2), mask.png (right half white) and pictures of wrong sizes."""
    image = digit(number)
    to_pil(image).save(folder / "digit.png")
    small = torch.nn.functional.avg_pool2d(image.float(), 2).round().to(torch.uint8)
    to_pil(small).save(folder / "small.png")
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[..., 4:] = 255
    to_pil(mask).save(folder / "mask.png")
    Image.new("L", (8, 8), 255).save(folder / "white.png")
    Image.new("L", (8, 8), 0).save(folder / "black.png")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "colour.png")
    (folder / "broken.png").write_bytes((folder / "digit.png").read_bytes()[:60])
    return folder


def bright(x):
    return x.mean(dim=(1, 2, 3))


def counted(x):
    """The number of bright pixels, which has no gradient."""
    return (x > 0).float().sum(dim=(1, 2, 3))


def wrong_shape(x):
    return x.mean(dim=(2, 3))


def fails(x):
    raise KeyError("no such thing")


def not_a_number(x):
    return bright(x) * float("nan")


weighed = Score(counted, 0.1, ascents=0)
constant = 3
