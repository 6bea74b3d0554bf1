"""Provenance of features, and the files of their statistics: ours, EDM's, EDM2's and ADM's."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flowmaps.errors import UserError
from flowmaps.reading import npz_shapes, read_npz, regular_file

INCEPTION_DIM = 2048
REMEDY, AGAIN = "make reference statistics with stats.py", "make it again with stats.py"
PUBLISHED_DIMS = {"inception": INCEPTION_DIM, "inception-spatial": 2023, "dinov2": 1024}
# The mean and covariance in published files by extractor: .npz of EDM and ADM, pickles of EDM2.
PUBLISHED = {"inception": ("mu", "sigma"), "inception-spatial": ("mu_s", "sigma_s")}
PICKLED = {name: (f"{kind} mu", f"{kind} sigma") for name, kind in (("inception", "fid"), ("dinov2", "fd_dinov2"))}


@dataclass(frozen=True)
class Origin:
    """Provenance of features; a fact is empty where it is not known.

    Two sets are comparable only if extractor, weights, resize and size agree, as far as both are known.
    """

    extractor: str = ""
    weights: str = ""  # SHA-256 of the extractor's weight file
    resize: str = ""  # what the extractor does to an image first
    size: str = ""  # of the images, height x width
    crop: str = ""  # how the images got that size
    data: str = ""
    split: str = ""
    content: str = ""  # SHA-256 of the images: the same on every machine, where moments differ by rounding


def pixels(height: int, width: int) -> str:
    """Format an image size as ``Origin.size`` has it."""
    return f"{height}x{width}"


FACTS = tuple(field.name for field in fields(Origin))


@dataclass(frozen=True)
class Stored:
    """A file of statistics: the shapes of its arrays, and for each extractor the names of what it has.

    ``moments`` are the arrays of a pickle, which are read at once.
    """

    path: Path
    own: bool  # written by ``save``
    all_shapes: dict[str, tuple[int, ...]]
    names: dict[str, dict[str, str]]  # extractor -> array -> its name in the file
    moments: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> "Stored":
        if path.suffix == ".pkl":
            moments = _moments_in_pickle(path)
            return cls._published(path, {key: value.shape for key, value in moments.items()}, PICKLED, moments)
        shapes = npz_shapes(path, REMEDY)
        if "extractor" not in shapes:
            return cls._published(path, shapes, PUBLISHED)
        first = {key: key for key in shapes if "/" not in key}
        names = {str(read_npz(path, REMEDY, {"extractor"})["extractor"]): first}
        for key in shapes:
            extractor, _, array = key.rpartition("/")
            if extractor:
                names.setdefault(extractor, {})[array] = key
        return cls(path, True, shapes, names)

    @classmethod
    def _published(
        cls,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        known: dict[str, tuple[str, str]],
        moments: dict[str, Any] | None = None,
    ) -> "Stored":
        names = {
            extractor: {key: stored for key, stored in zip(("mu", "sigma"), pair, strict=True) if stored in shapes}
            for extractor, pair in known.items()
        }
        names = {extractor: arrays for extractor, arrays in names.items() if arrays or extractor == "inception"}
        return cls(path, False, shapes, names, moments)

    @property
    def first(self) -> str:
        return next(iter(self.names))

    def _arrays(self, extractor: str | None) -> dict[str, str]:
        if (extractor or self.first) not in self.names:
            reason = f"{self.path} was made with {', '.join(self.names)}"
            raise UserError(reason, field="extractor", value=extractor)
        return self.names[extractor or self.first]

    def shapes(self, extractor: str | None) -> dict[str, tuple[int, ...]]:
        return {key: self.all_shapes[stored] for key, stored in self._arrays(extractor).items()}

    def values(self, extractor: str | None) -> dict[str, Any]:
        arrays = self._arrays(extractor)
        wanted = {arrays[key] for key in ("mu", "sigma", "n", "features", *FACTS) if key in arrays}
        read = read_npz(self.path, REMEDY, wanted) if self.moments is None else self.moments
        return {key: read[stored] for key, stored in arrays.items() if stored in wanted}

    def origin(self, extractor: str) -> Origin:
        """Return what is known of published moments."""
        images = self.all_shapes.get("arr_0", ())  # [n, height, width, channels]
        size = pixels(*images[1:3]) if len(images) == 4 else ""
        return Origin(extractor=extractor, size=size, data=self.path.name)


def _moments_in_pickle(path: Path) -> dict[str, Any]:
    from flowmaps.importers.pickles import read_objects

    regular_file(path, REMEDY)
    try:
        found = read_objects(path)
        return {
            f"{kind} {key}": np.asarray(found[kind][key].value)
            for kind in ("fid", "fd_dinov2")
            if kind in found or kind == "fid"
            for key in ("mu", "sigma")
        }
    except (UserError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing, damaged or not a file of EDM2's reference statistics: {REMEDY}") from None
