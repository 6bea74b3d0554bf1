"""Data sets: tensors in memory or images in files, and the order in which a run visits them."""

from training.data.arrays import DATA, ArrayData, download, load_arrays
from training.data.files import ImageFiles, open_images
from training.data.load import FILES, as_samples, load_data, open_data, prepared
from training.data.loader import DataSet, Loader, Order, in_order
from training.data.shards import Latents, PreparedImages, TrajectoryFiles

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
    "as_samples",
    "download",
    "in_order",
    "load_arrays",
    "load_data",
    "open_data",
    "open_images",
    "prepared",
]
