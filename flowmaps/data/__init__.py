"""Data sets, for training and for scoring.

What belongs here: opening a data set by name or path (``open_dataset``) or from the user's own Python object
(``as_dataset``), reading its files, writing prepared ones, loading batches in a reproducible order, and augmentation.
What is made of the items, losses or statistics, belongs to ``training`` and ``flowmaps.evaluation``.
"""

from flowmaps.data.builtin import ArrayData, download
from flowmaps.data.dataset import DataSet, iterate
from flowmaps.data.image_folder import ImageFiles, open_images
from flowmaps.data.loader import Loader, ShuffledOrder
from flowmaps.data.map_style import as_dataset
from flowmaps.data.registry import DATASETS, as_samples, open_dataset
from flowmaps.data.shards import Latents, PreparedImages, TrajectoryFiles

__all__ = [
    "DATASETS",
    "ArrayData",
    "DataSet",
    "ImageFiles",
    "Latents",
    "Loader",
    "PreparedImages",
    "ShuffledOrder",
    "TrajectoryFiles",
    "as_dataset",
    "as_samples",
    "download",
    "iterate",
    "open_dataset",
    "open_images",
]
