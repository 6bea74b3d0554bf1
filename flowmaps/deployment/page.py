"""One HTML file with a flow map inside, which a browser opens without a server or a network."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import torch

from flowmaps.deployment.graphs import is_image
from flowmaps.deployment.translate import BEYOND, write_program
from flowmaps.errors import UserError
from flowmaps.files import write_file
from flowmaps.flow_map import FlowMap

HERE = Path(__file__).parent
MOST_WEIGHTS = 10_000_000  # a page of 27 MB, and seconds for each picture
PROBED = 64  # numbers of the network's output that the page compares


def check_page(fm: FlowMap) -> None:
    """Refuse a model that a page cannot show: it must be a map of images, and small."""
    if fm.info.kind != "map" or not is_image(fm) or fm.info.shape[0] not in (1, 3) or fm.info.condition:
        raise UserError(f"a page shows a map of images in grey or colour, by class at most: for other models {BEYOND}")
    size = sum(p.numel() for p in fm.network.parameters())
    if size > MOST_WEIGHTS:
        raise UserError(f"the model has {size / 1e6:.1f} million weights, a page at most 10 million: {BEYOND}")


def page(fm: FlowMap, title: str = "") -> str:
    """Return the page of a model in eval mode.

    Args:
        fm: A map of images, of at most MOST_WEIGHTS weights.
        title: Its heading; by default the data set.

    Raises:
        UserError: A page cannot show the model.
    """
    check_page(fm)
    rest = rest_of_label(fm)
    shape = (1, *fm.info.shape)
    pixels = int(torch.tensor(shape).prod())
    x = (fm.base_std * 2**0.5 * (1 + 12.9898 * torch.arange(pixels, dtype=torch.float64)).sin()).float()
    given = {"x": x.reshape(shape), "s": torch.zeros(1), "t": torch.ones(1)}
    if fm.info.num_classes:
        given["label"] = torch.tensor([[1.0, *[0.0] * fm.info.num_classes, *rest]])
    program, weights = write_program(fm.network, given).packed(half=True)
    with torch.no_grad():
        expected = fm.network(**given).flatten()
    every = max(1, pixels // PROBED)
    names = fm.info.class_names or tuple(map(str, range(fm.info.num_classes)))
    model = {
        "shape": fm.info.shape,
        "base_std": fm.base_std,
        "classes": names,
        "rest": rest,
        "weights": fm.fingerprint(),
        "probe": {"every": every, "expected": [round(v, 6) for v in expected[::every].tolist()]},
        "program": program,
    }
    values = {
        "title": html.escape(title or fm.info.data or "Samples"),
        "facts": facts(fm),
        "engine": (HERE / "engine.js").read_text(encoding="utf-8").strip(),
        "model": json.dumps(model, separators=(",", ":")).replace("<", "\\u003c"),
        "weights": base64.b64encode(weights).decode(),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("title", "facts", "engine", "model", "weights"):
        text = text.replace(f"{{{name}}}", values[name])
    return text


def facts(fm: FlowMap) -> str:
    """Return a sentence on the size of the network and of its pictures."""
    size, (channels, height, width) = sum(p.numel() for p in fm.network.parameters()), fm.info.shape
    colour = " in colour" if channels == 3 else ""
    return f"One network of {size / 1e6:.2g} million weights, pictures of {height} × {width} pixels{colour}."  # noqa: RUF001


def write_page(fm: FlowMap, path: Path, title: str = "") -> int:
    """Write ``page`` atomically, in place of one that flowmaps wrote; return its size in bytes."""
    content = page(fm, title).encode()
    write_file(path, content)
    return len(content)


def rest_of_label(fm: FlowMap) -> list[float]:
    """Return what follows the one-hot class in a label row: no augmentation, and the usual guidance."""
    config: Any = getattr(fm.network, "config", {})
    rest = [0.0] * config.get("augment_dim", 0)
    if fm.info.guidance_max is None:
        return rest
    usual = fm.info.usual_guidance()
    low, high = usual.get("guidance_interval", (0.0, 1.0))
    return [*rest, usual.get("guidance", 1.0), *([low, high] if fm.info.guidance_interval else [])]
