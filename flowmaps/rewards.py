"""Rewards and measurements for steering, made of what a user has: pictures, classes, functions by name."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flowmaps.data.image_io import BadImage, decode, to_pixels
from flowmaps.errors import UserError, blame, shorten
from flowmaps.flow_map import FlowMap
from flowmaps.images import from_uint8
from flowmaps.info import FlowMapInfo
from flowmaps.labels import class_number
from flowmaps.metrics.classifier import CLASSIFIERS
from flowmaps.metrics.extractors import extractor_file, read_classifier
from flowmaps.reading import read_bytes
from samplers.measurement import Measurement, downsample, inpaint
from samplers.steer import Reward, Score

MEASUREMENT_STD = 0.05  # of the noise of measured pixels, which lie in [-1, 1]


def pictures(info: FlowMapInfo, given: Any, field: str, channels: int | None = None) -> Tensor:
    """Return pictures as float32 [n, C, h, w] in [-1, 1], in the model's number of channels.

    Args:
        info: Facts about a model of images.
        given: One picture or a list: the name of a file, a PIL image, or a tensor [C, h, w] of numbers in 0 .. 1; or a
            tensor [n, C, h, w].
        field: What errors call it.
        channels: Another number of channels, for a mask.

    Raises:
        UserError: The model does not make images, or a picture is missing, damaged, or has more channels.
    """
    if len(info.shape) != 3 or info.latent_scale:
        made = "latents, whose pixels cannot be measured or inverted" if info.latent_scale else "points, not images"
        raise UserError(f"this model makes {made}: leave it out", field=field)
    channels = channels or info.shape[0]
    several = (
        list(given) if isinstance(given, (list, tuple)) or (isinstance(given, Tensor) and given.ndim == 4) else [given]
    )
    rows = [_picture(one, field, channels) for one in several]
    if not rows or len({row.shape for row in rows}) > 1:
        raise UserError("give at least one picture, all of one size", field=field)
    return torch.stack(rows)


def _picture(given: Any, field: str, channels: int) -> Tensor:
    name = given if isinstance(given, (str, Path)) else None
    if isinstance(given, Tensor):
        if given.ndim != 3 or not given.is_floating_point() or not bool(((given >= 0) & (given <= 1)).all()):
            raise UserError("a tensor must be [C, h, w] of numbers in 0 .. 1", field=field, value=list(given.shape))
        x = given.float().cpu() * 2 - 1
    else:
        try:
            if name is not None:
                x = from_uint8(torch.from_numpy(decode(read_bytes(name, "give a picture")))).movedim(-1, 0)
            elif isinstance(given, Image.Image):
                x = from_uint8(torch.from_numpy(to_pixels(given))).movedim(-1, 0)
            else:
                raise UserError("must be a PIL image, a file or a tensor", field=field, value=type(given).__name__)
        except BadImage as error:
            raise UserError(f"is not an intact picture ({error}): give another", field=field, value=name) from None
        except UserError as error:
            raise UserError(error.message, field=field, value=name) from None
    if x.shape[0] == 1 or (channels == 1 and bool((x == x[:1]).all())):  # grey, maybe in three equal channels
        return x[:1].expand(channels, -1, -1)
    if x.shape[0] != channels:
        raise UserError(f"has {x.shape[0]} channels, not {channels}: convert it", field=field, value=name)
    return x


def measured(
    info: FlowMapInfo,
    image: Any,
    mask: Any = None,
    factor: int | None = None,
    std: float = MEASUREMENT_STD,
    device: torch.device | None = None,
) -> Measurement:
    """Return the measurement that ``image`` is: some pixels of a sample with a ``mask``, else means of its pixels.

    Args:
        info: Facts about a model of images.
        image: One picture, or one for each sample, as ``pictures`` takes them. With a mask of the model's size;
            without, ``factor`` times smaller in both directions, or of the model's size and then made smaller.
        mask: White (1) where pixels are to be filled in, black (0) where they are given, as in diffusers.
        factor: Pixels of a mean in one direction; None: what the size of ``image`` says.
        std: The standard deviation of the noise of measured values, in units of a range of 2.
        device: The model's device.

    Raises:
        UserError: A size does not fit, or nothing is measured; the field is "measurement", "mask", "downsample" or
            "measurement_std".
    """
    if not 0 < std < math.inf:
        raise UserError("must be a positive number", field="measurement_std", value=std)
    y = pictures(info, image, "measurement").to(device)
    whole, size = tuple(info.shape[1:]), tuple(y.shape[2:])
    if mask is not None:
        if factor is not None:
            raise UserError("is for a measurement without a mask: leave one of them out", "downsample", factor)
        check_size(size, whole, "measurement")
        hidden = (pictures(info, mask, "mask", 1) > 0).float().to(device)
        check_size(tuple(hidden.shape[2:]), whole, "mask")
        if len(hidden) not in (1, len(y)):
            raise UserError(f"there are {len(hidden)} for {len(y)} measurements: pass one for all or each", "mask")
        if bool((hidden == hidden.flatten()[0]).all()):
            all_of_it = "white: nothing is given" if hidden.flatten()[0] else "black: nothing is to be filled in"
            raise UserError(f"is all {all_of_it}; paint white what is to be filled in, and the rest black", "mask")
        return inpaint(y, hidden, std)
    if factor is None:
        factor = whole[0] // size[0]
        if factor < 2:
            raise UserError("give a mask, or a smaller picture to enlarge", field="measurement")
    if factor < 2 or any(side % factor for side in whole):
        raise UserError(f"must be at least 2 and divide {_sides(whole)}", field="downsample", value=factor)
    if size == whole:
        return downsample(F.avg_pool2d(y, factor), factor, std)
    check_size(size, tuple(side // factor for side in whole), "measurement")
    return downsample(y, factor, std)


def check_size(size: Sequence[int], wanted: Sequence[int], field: str) -> None:
    """Refuse a picture of another height and width than ``wanted``."""
    if tuple(size) != tuple(wanted):
        raise UserError(f"is {_sides(size)} pixels, and has to be {_sides(wanted)}: crop or resize it", field=field)


def _sides(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def named_reward(fm: FlowMap, name: str, scale: float = 1.0) -> Reward:
    """Return the reward that ``name`` means: "class:3" (or a class by name), or "module:function".

    The first is the log-probability of the class by the classifier that ships for the model's data set. The other is a
    function of images [n, C, H, W] in about [-1, 1] (decoded ones, of latents) that returns [n], or a ``Score`` or
    other reward of ``samplers``; modules are also looked for in the current directory.

    Raises:
        UserError: There is no such class, classifier, module or function; the field is "reward".
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise UserError("must be class:NUMBER_OR_NAME or module:function", field="reward", value=name)
    if kind == "class":
        return class_reward(fm, rest, scale)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(kind), rest)
    except Exception as error:  # of the user's module: anything
        raise UserError(f"cannot be imported ({shorten(error, 120)})", field="reward", value=name) from None
    return as_reward(fm, found, scale, name)


def as_reward(fm: FlowMap, given: Any, scale: float = 1.0, name: str = "") -> Reward:
    """Return a reward from its name, a function of images, or a reward, whose own scale is multiplied by ``scale``."""
    if not 0 <= scale < math.inf:
        raise UserError("must be a number from 0", field="reward_scale", value=scale)
    if isinstance(given, str):
        return named_reward(fm, given, scale)
    if isinstance(given, Score):
        return Score(_guarded(fm, given.function, name), given.scale * scale, given.ascents)
    if hasattr(given, "potential") and hasattr(given, "propose"):
        if scale != 1:
            raise UserError("is for functions: this reward has its own scale, leave it out", "reward_scale", scale)
        found: Reward = given
        return found
    if not callable(given):
        raise UserError("must be a function of images", field="reward", value=name or type(given).__name__)
    return Score(_guarded(fm, given, name), scale)


def class_reward(fm: FlowMap, label: int | str, scale: float = 1.0) -> Score:
    """Return the log-probability of a class, by the classifier of the model's data set that ships with flowmaps."""
    info = fm.info
    if info.data not in CLASSIFIERS:
        names = ", ".join(CLASSIFIERS)
        raise UserError(
            f"there is a classifier for models of {names}, and this model's data are {info.data or 'unknown'}: give "
            "module:function",
            field="reward",
            value=f"class:{label}",
        )
    options = CLASSIFIERS[info.data]
    if info.shape != (options.channels, options.size, options.size):
        raise UserError(f"its classifier takes images of {options.size} x {options.size} pixels", field="reward")
    with blame("reward", f"class:{label}"):
        number = class_number(info, label)
        if number >= options.classes:
            raise UserError(f"must be a class from 0 to {options.classes - 1}")
    network = read_classifier(info.data, options, extractor_file(info.data)).to(next(fm.parameters()).device)

    def log_probability(x: Tensor) -> Tensor:
        found: Tensor = network(x.float()).log_softmax(dim=1)[:, number]
        return found

    return Score(log_probability, scale)


def _guarded(fm: FlowMap, function: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Return ``function`` of decoded samples; what it raises becomes one line that names it."""

    def call(x: Tensor) -> Tensor:
        images = fm.decode(x)
        try:
            return function(images)
        except Exception as error:  # of the user's function: anything
            reason = f"{type(error).__name__}: {shorten(error, 160)}"
            raise UserError(f"failed on samples {list(images.shape)} ({reason})", "reward", name or None) from None

    return call
