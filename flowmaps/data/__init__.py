"""Data sets, for training and for scoring: tensors in memory, images in files, and sets prepared on disk."""

from typing import Any

from flowmaps.data.builtin import DATA, ArrayData, download, load_arrays
from flowmaps.data.image_folder import ImageFiles, open_images
from flowmaps.data.loader import DataSet, Loader, Order, in_order
from flowmaps.data.registry import FILES, as_samples, load_data, open_data, prepared
from flowmaps.data.shards import Latents, PreparedImages, TrajectoryFiles


def as_dataset(data: Any) -> DataSet:
    """Return ``data``, a ``DataSet``."""
    made: DataSet = data
    return made


__all__ = [
    "DATA",
    "FILES",
    "ArrayData",
    "DataSet",
    "ImageFiles",
    "Latents",
    "Loader",
    "Order",
    "PreparedImages",
    "TrajectoryFiles",
    "as_dataset",
    "as_samples",
    "download",
    "in_order",
    "load_arrays",
    "load_data",
    "open_data",
    "open_images",
    "prepared",
]
