"""Data sets of the user's own, from Python: any map-style dataset."""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmaps.data.dataset import Batch, DataSet, named
from flowmaps.data.image_io import to_pixels
from flowmaps.errors import UserError
from flowmaps.info import MOST_CLASSES


@dataclass(frozen=True)
class MapStyleData(DataSet):
    """The items of a map-style dataset, each read when it is visited. Made by ``as_dataset``."""

    items: Sequence[Any]
    fingerprint: str
    shape: tuple[int, ...] = ()
    num_classes: int = 0
    condition: tuple[int, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        names = getattr(self.items, "classes", ())
        texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        return named(names) if texts and len(names) == self.num_classes else ()

    @property
    def name(self) -> str:
        return type(self.items).__name__

    def __len__(self) -> int:
        return len(self.items)

    def digest(self) -> str:
        return self.fingerprint

    def fetch(self, index: Tensor) -> Batch:
        rows = [_read(self.items, i) for i in index.tolist()]
        labels = [torch.as_tensor(label) for _, label in rows if label is not None]
        return torch.stack([x for x, _ in rows]), torch.stack(labels) if labels else None


def as_dataset(data: Any, num_classes: int | None = None) -> DataSet:
    """Adapt a map-style dataset, such as torchvision's, for training and scoring.

    Args:
        data: An object with ``__len__`` and ``__getitem__``; an item is x or (x, label). x is an image, PIL or uint8
            [C, H, W], all of one shape, or a point, float32 [dim]. label is an integer from 0 on, or a condition:
            floats of one shape, a vector [dim], tokens [n, dim] or an image [C, H, W]. A ``DataSet`` is returned as it
            is. Items must be the same at every visit: random augmentation belongs in the config
            (``data.flip``, ``data.augment``).
        num_classes: Number of classes; by default the largest label + 1, or 0 without labels. Needed if no item has
            the label 0.

    Returns:
        A ``DataSet``. Its class names are those of the attribute ``classes`` of ``data``, if that is a list of one text
        per class, as in torchvision. All items are read once here, for their check and for the digest (SHA-256 over
        items and labels) by which a resumed run recognises its data; during training each is read again when visited.

    Raises:
        UserError: An item is none of these, or the items differ in shape.

    Example:
        >>> images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> data = as_dataset(torch.utils.data.TensorDataset(images, torch.arange(32) % 10))
        >>> data.shape, data.num_classes
        ((1, 8, 8), 10)
    """
    if hasattr(data, "fetch") and hasattr(data, "digest"):
        return cast(DataSet, data)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise UserError(
            f"data must be a map-style dataset with at least one item (__len__, __getitem__), got {type(data).__name__}"
        )
    (first, first_label), digest, classes = _read(data, 0), hashlib.sha256(), 0
    smallest = first_label
    for i in range(len(data)):
        x, label = _read(data, i)
        if x.shape != first.shape or x.dtype != first.dtype:
            raise UserError(f"item {i} is {_described(x)}, item 0 {_described(first)}: give all items one shape")
        if (label is None) != (first_label is None):
            raise UserError(f"item {i} has {'no' if label is None else 'a'} label, unlike item 0: label all or none")
        if isinstance(label, Tensor) or isinstance(first_label, Tensor):
            if not isinstance(label, Tensor) or _condition(first_label) != label.shape:
                raise UserError(f"the condition of item {i} is not of the shape of item 0's, {_condition(first_label)}")
            digest.update(label.numpy().tobytes())
        elif label is not None and isinstance(smallest, int):
            classes, smallest = max(classes, label + 1), min(smallest, label)
        told = "condition" if isinstance(label, Tensor) else label
        digest.update(f"{tuple(x.shape)} {told} ".encode() + x.contiguous().numpy().tobytes())
    if num_classes is not None and num_classes < classes:
        raise UserError(f"the largest label is {classes - 1}", field="num_classes", value=num_classes)
    if num_classes is None and isinstance(smallest, int) and smallest:
        raise UserError(f"the labels begin at {smallest}, so class 0 has no item: count from 0, or pass num_classes")
    found, shape = classes if num_classes is None else num_classes, _condition(first_label)
    return MapStyleData(data, digest.hexdigest(), tuple(first.shape), found, shape)


def _condition(label: int | Tensor | None) -> tuple[int, ...]:
    return tuple(label.shape) if isinstance(label, Tensor) else ()


def _read(items: Any, i: int) -> tuple[Tensor, int | Tensor | None]:
    item = items[i]
    x, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if isinstance(x, (tuple, list)) and len(x) == 1:  # an item of a TensorDataset without labels
        x = x[0]
    if isinstance(x, Image.Image):
        x = torch.from_numpy(to_pixels(x)).permute(2, 0, 1)
    is_image = isinstance(x, Tensor) and x.ndim == 3 and x.dtype == torch.uint8
    is_point = isinstance(x, Tensor) and x.ndim == 1 and x.dtype == torch.float32
    if not is_image and not is_point:
        raise UserError(
            f"item {i} is {_described(x)}: give an image (PIL or uint8 [C, H, W], without ToTensor or Normalize) or a "
            "point (float32 [dim]), alone or with its label"
        )
    if label is None:
        return x, None
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim and torch.as_tensor(label).is_floating_point():
        condition = torch.as_tensor(label).float()
        if not bool(torch.isfinite(condition).all()):
            raise UserError(f"the condition of item {i} is not finite")
        return x, condition.contiguous()
    try:
        number = operator.index(label)
    except TypeError:
        raise UserError(f"the label of item {i} is {label!r}: give an integer from 0 on") from None
    if not 0 <= number < MOST_CLASSES:
        raise UserError(f"the label of item {i} is {number}: give an integer from 0 on, below {MOST_CLASSES:,}")
    return x, number


def _described(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
