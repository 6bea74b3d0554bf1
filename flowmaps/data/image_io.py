"""Decode image files to uint8 pixels, and crop them to the square that a network sees."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from math import gcd
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]  # [height, width, 1 or 3]
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM")  # of the suffixes; Pillow has others, which start programs
LARGEST_IMAGE, LARGEST_SIDE = 1 << 26, 1 << 13  # pixels of an image, also while it is resized, and of a crop's side
BACKGROUNDS = {"white": 255, "black": 0, "grey": 128}  # what is behind transparent pixels and around padded images
FITS = {"crop": "centre square", "pad": "padded to a square"}  # ways to a square
ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow finds a rotation mark
Result = TypeVar("Result")


class BadImage(ValueError):
    """The bytes are not an intact image; the message says why."""


def decode(content: bytes, upright: bool = True, background: str = "white") -> Pixels:
    """Decode an image file of one of the ``FORMATS`` to uint8 [H, W, C]; C = 1 for grey, else 3.

    ``upright`` applies the EXIF orientation. 16-bit grey is scaled to 8 bits, CMYK and palettes become RGB,
    transparency is put over ``background``, one of ``BACKGROUNDS``.

    Raises:
        BadImage: The file is not an intact image, or has more than ``LARGEST_IMAGE`` pixels.
    """
    return _decode(content, partial(to_pixels, background=background), upright)


def inspect(content: bytes) -> int:
    """Return the channels, 1 or 3, of an image file; what ``decode`` refuses is refused.

    JPEGs are decoded at an eighth of their height and width: all of the file is read, so that damage is found as at
    full size, in half of the time.
    """
    return _decode(content, _channels, upright=True, small=True)


def _decode(content: bytes, use: Callable[[Image.Image], Result], upright: bool, small: bool = False) -> Result:
    if not content:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {LARGEST_IMAGE:,}")
            if small:
                image.draft(None, (1, 1))  # of effect on JPEG alone
            image.load()
            if image.mode == "I" and image.format != "PPM":  # 16-bit PNG and TIFF have other modes
                raise BadImage("pixels of 32 bits")
            if upright and (image.format == "TIFF" or not ORIENTED.isdisjoint(image.info)):
                ImageOps.exif_transpose(image, in_place=True)
            return use(image)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a hostile file can raise anything: OSError, SyntaxError, struct.error, a bomb, ...
        raise BadImage(str(error) or type(error).__name__) from None


def _channels(image: Image.Image) -> int:
    if image.mode in ("L", "RGB") and not image.has_transparency_data:  # nothing to convert that could fail
        return 1 if image.mode == "L" else 3
    return int(to_pixels(image).shape[-1])


def to_pixels(image: Image.Image, background: str = "white") -> Pixels:
    """Convert an open image of any mode to uint8 [H, W, C], transparent pixels over a ``background``."""
    if image.mode.startswith("I"):  # 16 bits
        deep: NDArray[Any] = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadImage("pixels of more than 16 bits")
        array = np.rint(deep / 257).astype(np.uint8)
    elif image.mode == "F":
        raise BadImage("float pixels, whose range is not defined")
    else:
        grey = image.mode in ("1", "L", "LA", "La")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, 3 * (BACKGROUNDS[background],) + (255,))
            image = Image.alpha_composite(behind, image)
        mode = "L" if grey else "RGB"
        array = np.array(image if image.mode == mode else image.convert(mode))
    return np.ascontiguousarray(np.atleast_3d(array))


def area_center_crop(pixels: Pixels, size: int) -> Pixels:
    """Cut the central square and resize it to ``size`` x ``size``; a new pixel is the mean over its area.

    The mean is exact and rounded to the nearest integer, halves to the even one: it is a quotient of integers, whose
    sums the floats below hold without an error, so that the order in which a machine adds does not show.
    """
    height, width, channels = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(pixels)
    whole = side // gcd(side, size)  # sum of the shares in one direction
    sums = np.float32 if 255 * whole**2 <= 2**24 else np.float64
    rows = np.empty((size, side * channels), np.float32)
    for new, old, share in _bands(side, size):
        np.matmul(share, pixels[old].astype(np.float32).reshape(-1, side * channels), out=rows[new])
    planes = rows.reshape(size, side, channels).transpose(2, 0, 1).astype(sums, order="C").reshape(-1, side)
    resized = np.empty((channels * size, size), sums)
    for new, old, share in _bands(side, size):
        np.matmul(planes[:, old], share.T.astype(sums, copy=False), out=resized[:, new])
    mean: Pixels = np.rint(np.divide(resized, whole**2, dtype=np.float64)).astype(np.uint8)
    return mean.reshape(channels, size, size).transpose(1, 2, 0)


def squared(pixels: Pixels, size: int, fit: str = "crop", background: str = "white") -> Pixels:
    """Make an image ``size`` x ``size``: by its central square, or padded with the ``background`` on both sides.

    Raises:
        BadImage: The padded image would have more than ``LARGEST_IMAGE`` pixels.
    """
    height, width, channels = pixels.shape
    if fit == "pad" and height != width:
        side = max(height, width)
        if side**2 > LARGEST_IMAGE:
            raise BadImage(f"{width} x {height} pixels are too many to be padded to a square")
        whole = np.full((side, side, channels), BACKGROUNDS[background], np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        whole[top : top + height, left : left + width] = pixels
        pixels = whole
    return area_center_crop(pixels, size)


def adm_center_crop(pixels: Pixels, size: int) -> Pixels:
    """ADM's centre crop to ``size`` x ``size`` (Dhariwal and Nichol 2021), on which published ImageNet FIDs rest.

    Halve by the mean over 2 x 2 pixels while the shorter side has at least 2 ``size`` pixels (Pillow squeezes an odd
    last row or column in), resize by Pillow's bicubic filter until the shorter side is ``size``, then cut.
    """
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    if image.width * image.height * ratio**2 > LARGEST_IMAGE:
        raise BadImage(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are too narrow to be resized to {size}")
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.atleast_3d(np.asarray(image))[top : top + size, left : left + size]


@lru_cache(maxsize=512)
def _bands(source: int, size: int) -> list[tuple[slice, slice, NDArray[np.float32]]]:
    """Return, four new pixels at a time, which they are, the old pixels under them, and the ``shares`` of those."""
    share, bands = shares(source, size), []
    for start in range(0, size, 4):
        end = min(start + 4, size)
        old = slice(start * source // size, -(-end * source // size))
        bands.append((slice(start, end), old, share[start:end, old].astype(np.float32)))
    return bands


def shares(source: int, size: int) -> NDArray[np.int64]:
    """Return integers [size, source] in proportion to the overlap of new pixel i and old pixel j in one direction.

    New pixel i covers [i, i + 1) * source / size. A row sums to ``source`` / g, a column to ``size`` / g, with g the
    greatest common divisor of both.
    """
    edge = np.arange(size + 1) * source
    pixel = np.arange(source) * size
    overlap = np.minimum(edge[1:, None], pixel + size) - np.maximum(edge[:-1, None], pixel)
    share: NDArray[np.int64] = overlap.clip(min=0) // gcd(source, size)
    return share


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Repeat grey pixels in three channels if the data set has ``channels`` = 3."""
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if channels > pixels.shape[-1] else pixels


def in_threads(work: Callable[[str], Result], names: list[str], threads: int) -> Iterator[Result]:
    """Yield ``work(name)`` of each file in order; decoding and reading leave Python free for other threads.

    A thread takes up to 64 files at once, since to hand one over costs as much as to decode a small one.
    """
    if threads < 2:
        yield from map(work, names)
        return
    piece = max(1, min(64, len(names) // (4 * threads)))
    group = 16 * threads * piece  # what an interrupt has to wait for
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), group):
            part = names[start : start + group]
            pieces = (part[i : i + piece] for i in range(0, len(part), piece))
            for results in pool.map(lambda some: [work(name) for name in some], pieces):
                yield from results
