"""Folders and zip files with what editors leave in them."""

import json
import zipfile

import numpy as np
from common import TMP, case, raised
from PIL import Image

from flowmaps.data import open_images

rng = np.random.default_rng(0)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)


for hidden in (".ipynb_checkpoints", ".thumbnails", "@eaDir"):
    d = TMP / hidden.strip(".")
    for c in "ab":
        image(d / c / "0.png")
    image(d / hidden / "0-checkpoint.png")
    data = open_images(d, 16)
    case(f"{hidden}/ is not a class", data.classes == ("a", "b"), f"classes {data.classes}, {len(data)} images")
d = TMP / "inside"
[image(d / c / "0.png") for c in "ab"]
image(d / "a/.ipynb_checkpoints/0-checkpoint.png")
case("a hidden copy inside a class is not an image", len(open_images(d, 16)) == 2, f"{len(open_images(d, 16))} images")
z = TMP / "x.zip"
with zipfile.ZipFile(z, "w") as file:
    for name in ("top/a/0.png", "top/b/0.png", "top/.ipynb_checkpoints/0.png"):
        file.write(d / "a/0.png", name)
case("the same in a zip file", open_images(z, 16).classes == ("a", "b"), str(open_images(z, 16).classes))
d = TMP / "one"
[image(d / f"{i}.png") for i in range(4)]
(d / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", 1 + i % 2] for i in range(4)]}))
error, data = raised(lambda: open_images(d, 16))
case("dataset.json counted from 1: refused", "class 0 has no image" in str(error), f"{error or data}"[-110:])
