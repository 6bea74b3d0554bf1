"""Steering and inversion: laws in the plane, inpainting and super-resolution, classes, edits (docs/steering.md)."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.plane_laws import Scores, chain, plane_rows
from flowmaps import FlowMap, UserError
from flowmaps.data import open_dataset
from flowmaps.images import from_uint8, grid, to_pil, to_uint8
from flowmaps.metrics import FeatureStats, frechet_distance
from flowmaps.metrics.classifier import CLASSIFIERS, Classifier
from flowmaps.metrics.extractors import extractor_file, load_extractor, read_classifier
from flowmaps.rng import generator
from samplers import Score, downsample, inpaint, invert, invert_drift, rollout, uniform_times
from samplers.callables import Map
from samplers.measurement import Measurement

ROWS = ["plane", "digits", "fashion_mnist", "classes", "inversion"]
PICTURES = ("fashion_mnist", "digits", "inversion")  # rows that --plot draws
NOISE, FACTOR = 0.05, {"digits": 2, "fashion_mnist": 4}  # of a measurement; pixels of a mean in one direction
DATA_STDS = {"digits": 0.52, "fashion_mnist": 0.48}
Records = Iterator[dict[str, Any]]


def chosen(rows: Sequence[str]) -> list[str]:
    """Return the rows named by --rows."""
    if unknown := [row for row in rows if row not in ROWS]:
        raise UserError(f"--rows={','.join(unknown)}: of --suite=steering they are {', '.join(ROWS)}")
    return list(rows)


def records(row: str, seed: int, num: int | None, done: Collection[tuple[str, int]]) -> Records:
    """Yield the records of a row and seed that are not ``done``."""
    made: dict[str, Callable[[], Scores]] = {
        "plane": plane_rows,
        "classes": _class_rows,
        "inversion": _inversion_rows,
    }.get(row, partial(_image_rows, row))(seed, num)
    for name, scores in made.items():
        if (f"{row}, {name}", seed) not in done:
            yield {"row": f"{row}, {name}", "seed": seed, "scores": scores()}


# Images: held-out ones, half of their pixels seen or means of them.


@lru_cache(maxsize=2)
def _opened(name: str) -> tuple[FlowMap, Tensor, Tensor]:
    """Return the shipped map, and the held-out images in [-1, 1] with their labels."""
    data = open_dataset(name, "heldout")
    images, label = data.fetch(torch.arange(len(data)))
    assert label is not None
    return FlowMap.from_pretrained(f"assets/{name}").requires_grad_(False), from_uint8(images), label


@lru_cache(maxsize=2)
def _classifier(name: str) -> Classifier:
    return read_classifier(name, CLASSIFIERS[name], extractor_file(name))


def _distance(name: str, x: Tensor) -> float:
    stats = load_extractor(name).stats([to_uint8(x)])
    return frechet_distance(stats, FeatureStats.load(f"assets/references/{name}.npz"))


def _denoiser(fm: FlowMap) -> Map:
    """Return E[x_1 given x_s] = x + (1 - s) b_s(x), in the place of the map to data."""
    return lambda x, s, t, label: x + (1 - s).view(-1, 1, 1, 1) * fm.drift(x, s, label)


def measurements(name: str, x: Tensor, seed: int, particles: int = 1) -> dict[str, Measurement]:
    """Return the measurements of images x [n, C, H, W], with noise: the left half, and means of pixels."""
    g = generator(seed, "measurement", 0)
    mask = torch.zeros_like(x)
    mask[..., x.shape[-1] // 2 :] = 1
    made = {"half": inpaint(x, mask, NOISE), "means": downsample(x, FACTOR[name], NOISE)}
    found = {}
    for task, clean in made.items():
        y = clean.forward(x)
        y = (y + NOISE * torch.randn(y.shape, generator=g)).repeat_interleave(particles, dim=0)
        wide = mask.repeat_interleave(particles, dim=0)
        found[task] = inpaint(y, wide, NOISE) if task == "half" else downsample(y, FACTOR[name], NOISE)
    return found


def _image_rows(name: str, seed: int, num: int | None) -> dict[str, Callable[[], Scores]]:
    fm, images, labels = _opened(name)
    n = min(num or 64, len(images))
    x, label = images[:n], labels[:n]

    def score_of(task: str, look: str, particles: int) -> Scores:
        found: Scores = {}
        model = fm if look == "map" else _denoiser(fm)
        reward = measurements(name, x, seed, particles)[task]
        facts = {"base_std": fm.base_std, "data_std": DATA_STDS[name], "label": label.repeat_interleave(particles)}
        for steps in (4, 8, 16):
            start = x.repeat_interleave(particles, dim=0)
            made = chain(model, reward, start, steps, particles, seed, **facts)
            seen = measurements(name, x, seed)[task].error(made).square().mean().sqrt()
            if task == "half":
                unseen = (made - x)[..., x.shape[-1] // 2 :].square().mean().sqrt()
            else:
                unseen = (made - x).square().mean().sqrt()
            found |= {f"seen@{steps}": seen.item(), f"unseen@{steps}": unseen.item()}
            found[f"FD@{steps}"] = _distance(name, made)
        return found

    def unsteered() -> Scores:
        noise = fm.noise(n, seed)
        return {"FD@1": _distance(name, rollout(fm, noise, uniform_times(1), label))}

    rows: dict[str, Callable[[], Scores]] = {
        "real images": lambda: {"FD@1": _distance(name, x)},
        "unsteered": unsteered,
    }
    for task in ("half", "means"):
        for particles in (1, 4):
            for look in ("map", "denoiser"):
                title = f"{task}, {particles} particle{'s' * (particles > 1)}, {look}"
                rows[title] = partial(score_of, task, look, particles)
    return rows


# Classes: the reward is a classifier's log-probability; a logistic regression judges.


@lru_cache(maxsize=1)
def _judge() -> Any:
    """Return a logistic regression on pixels of the training digits, which knows nothing of the classifier."""
    from sklearn.linear_model import LogisticRegression

    data = open_dataset("digits")
    images, label = data.fetch(torch.arange(len(data)))
    assert label is not None
    return LogisticRegression(max_iter=2000, C=0.1).fit(from_uint8(images).flatten(1).numpy(), label.numpy())


def _agrees(x: Tensor, wanted: Tensor) -> Scores:
    seen = from_uint8(to_uint8(x))
    judged = torch.as_tensor(_judge().predict(seen.flatten(1).numpy()))
    by_net = _classifier("digits")(seen).argmax(dim=1)
    shares = {"rewarding net, %": by_net == wanted, "judge, %": judged == wanted}
    return {name: 100 * hit.double().mean().item() for name, hit in shares.items()} | {"FD": _distance("digits", x)}


def _class_rows(seed: int, num: int | None) -> dict[str, Callable[[], Scores]]:
    """Labels in turn, as ``generate`` gives particles without a label, or labels that are all wrong."""
    n = num or 200
    fm, images, labels = _opened("digits")
    wanted = torch.randint(0, 10, (n,), generator=generator(seed, "wanted", 0))

    def score_of(steps: int, particles: int, scale: float, other: bool) -> Scores:
        goal = wanted.repeat_interleave(particles)
        number = torch.arange(n * particles)
        label = (goal + 1 + number // particles % 9) % 10 if other else number % 10
        net = _classifier("digits")

        def log_p(x: Tensor) -> Tensor:
            found: Tensor = net(x).log_softmax(dim=1).gather(1, goal[:, None])[:, 0]
            return found

        start = images[:1].expand(n * particles, -1, -1, -1)
        facts = {"base_std": fm.base_std, "data_std": DATA_STDS["digits"], "label": label}
        return _agrees(chain(fm, Score(log_p, scale), start, steps, particles, seed, **facts), wanted)

    rows: dict[str, Callable[[], Scores]] = {"held-out digits": lambda: _agrees(images[:n], labels[:n])}
    ways = {
        "unsteered, 1 evaluation": (1, 1, 0.0),
        "one step, best of 4, scale 10, 4": (1, 4, 10.0),
        "one step, best of 16, scale 10, 16": (1, 16, 10.0),
        "chain of 4 steps, 4 particles, scale 10, 16": (4, 4, 10.0),
        "chain of 8 steps, 4 particles, scale 10, 32": (8, 4, 10.0),
        "chain of 4 steps, 10 particles, scale 10, 40": (4, 10, 10.0),
    }
    for kind in ("labels in turn", "wrong labels"):
        for title, (steps, particles, scale) in ways.items():
            rows[f"{kind}, {title}"] = partial(score_of, steps, particles, scale, kind == "wrong labels")
    return rows


# Inversion: the error of held-out images that are rebuilt, and edits.


def _inversion_rows(seed: int, num: int | None) -> dict[str, Callable[[], Scores]]:
    n = num or 48
    rows: dict[str, Callable[[], Scores]] = {}
    for name in ("digits", "fashion_mnist"):

        def case(name: str = name) -> tuple[FlowMap, Tensor, Tensor]:
            fm, images, labels = _opened(name)
            part = torch.arange(seed * n, (seed + 1) * n) % len(images)
            return fm, images[part], labels[part]

        def by_map(steps: int, iterations: int, case: Callable[..., Any] = case) -> Scores:
            fm, x, label = case()
            found = invert(fm, x, uniform_times(steps), label, iterations=iterations)
            return {"rms": found.error.square().mean().sqrt().item()}

        def by_drift(steps: int, case: Callable[..., Any] = case) -> Scores:
            fm, x, label = case()
            noise = invert_drift(fm.drift, x, uniform_times(steps), label)
            with torch.no_grad():
                rebuilt = rollout(fm, noise, uniform_times(8), label)
            return {"rms": (rebuilt - x).square().mean().sqrt().item()}

        def edited(name: str = name, case: Callable[..., Any] = case) -> Scores:
            fm, x, label = case()
            other = (label + 1 + torch.arange(n) % 9) % 10
            made, rms = edit(fm, x, label, other)
            agrees = _classifier(name)(from_uint8(to_uint8(made))).argmax(dim=1) == other
            return {"rms": rms, "other class, %": 100 * agrees.double().mean().item(), "FD": _distance(name, made)}

        for steps, iterations in ((1, 16), (4, 4), (4, 8), (8, 4)):
            title = f"{name}, {steps} x {iterations}, {steps * iterations} evaluations"
            rows[title] = partial(by_map, steps, iterations)
        rows[f"{name}, drift backwards, 16 steps of Heun, 32 evaluations"] = partial(by_drift, 16)
        rows[f"{name}, edited: 4 x 8, then another class in 4 steps"] = edited
    return rows


def edit(fm: FlowMap, x: Tensor, label: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """Return images x rebuilt from their noise with ``other`` labels, and the rms of the rebuilt x."""
    found = invert(fm, x, uniform_times(4), label)
    with torch.no_grad():
        return rollout(fm, found.noise, uniform_times(4), other), found.error.square().mean().sqrt().item()


def picture(row: str) -> Image.Image:
    """Draw what a row of ``PICTURES`` does to some held-out images."""
    if row not in PICTURES:
        raise UserError(f"of --suite=steering only {', '.join(PICTURES)} draw one: leave it out", field="plot")
    return to_pil(_edits() if row == "inversion" else _steered(row))


def _index(labels: Tensor, c: int, number: int) -> int:
    """Return the index of an image of class c, of small data sets any."""
    found = (labels == c).nonzero()[:, 0].tolist()
    return int(found[number % len(found)])


def _steered(name: str, seed: int = 0) -> Tensor:
    """Truth, what is seen, samples in 4, 8 and 16 steps, and one more in 8; first a half, then means."""
    fm, images, labels = _opened(name)
    pick = [_index(labels, c, 1) for c in range(10)]
    x, label, rows = images[pick], labels[pick], list[Tensor]()
    for task, reward in measurements(name, x, seed).items():
        shown = reward.y if task == "half" else reward.adjoint(reward.y) / reward.gain
        rows += [x, shown if task == "means" else torch.where(torch.arange(x.shape[-1]) < x.shape[-1] // 2, shown, 0.0)]
        facts = {"base_std": fm.base_std, "data_std": DATA_STDS[name], "label": label}
        rows += [chain(fm, reward, x, steps, 1, s, **facts) for steps, s in ((4, 0), (8, 0), (16, 0), (8, 1))]
    return grid([to_uint8(row) for row in rows], scale=2 if x.shape[-1] == 32 else 6)


def _edits() -> Tensor:
    """Held-out garments in the first column, then each rebuilt with the labels of all ten classes."""
    fm, images, labels = _opened("fashion_mnist")
    rows = []
    for c, index in ((6, 1), (2, 1), (3, 3), (9, 3), (8, 1)):
        x = images[_index(labels, c, index)][None]
        label, every = torch.full((10,), c), torch.arange(10)
        made, _ = edit(fm, x.expand(10, -1, -1, -1), label, every)
        rows.append(torch.cat([x, made]))
    return grid([to_uint8(row) for row in rows], scale=2)
