"""Decode image files to uint8 pixels, and crop them to the square that a network sees."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]  # [height, width, 1 or 3]


class BadImage(ValueError):
    """The bytes are not an intact image; the message says why."""


def decode(content: bytes, upright: bool = True) -> Pixels:
    """Decode an image file to uint8 [H, W, C]; C = 1 for grey, else 3.

    ``upright`` applies the EXIF orientation. 16-bit grey is scaled to 8 bits, CMYK and palettes become RGB,
    transparency is put over white.
    """
    if not content:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode == "I" and image.format != "PPM":  # 16-bit PNG and TIFF have other modes
                raise BadImage("pixels of 32 bits")
            return to_pixels(ImageOps.exif_transpose(image) if upright else image)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a hostile file can raise anything: OSError, SyntaxError, struct.error, a bomb, ...
        raise BadImage(str(error) or type(error).__name__) from None


def to_pixels(image: Image.Image) -> Pixels:
    """Convert an open image of any mode to uint8 [H, W, C]."""
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
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        array = np.array(image.convert("L" if grey else "RGB"))
    return np.ascontiguousarray(np.atleast_3d(array))


def area_center_crop(pixels: Pixels, size: int) -> Pixels:
    """Cut the central square and resize it to ``size`` x ``size``; a new pixel is the mean over its area."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(pixels)
    mean = area(side, size)
    rows = np.tensordot(mean, pixels.astype(np.float32), axes=1)  # [size, side, C]
    resized = np.einsum("hwc,kw->hkc", rows, mean, optimize=True)
    rounded: Pixels = np.rint(resized).clip(0, 255).astype(np.uint8)
    return rounded


def adm_center_crop(pixels: Pixels, size: int) -> Pixels:
    """ADM's centre crop to ``size`` x ``size`` (Dhariwal and Nichol 2021), on which published ImageNet FIDs rest.

    Halve by the mean over 2 x 2 pixels while the shorter side has at least 2 ``size`` pixels (Pillow squeezes an odd
    last row or column in), resize by Pillow's bicubic filter until the shorter side is ``size``, then cut.
    """
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.atleast_3d(np.asarray(image))[top : top + size, left : left + size]


@lru_cache(maxsize=64)
def area(source: int, size: int) -> NDArray[np.float32]:
    """Return weights [size, source]; row i averages the pixels in [i, i + 1) * source / size by their overlap."""
    edge = np.arange(size + 1) * (source / size)
    pixel = np.arange(source)
    overlap = np.minimum(edge[1:, None], pixel + 1) - np.maximum(edge[:-1, None], pixel)
    share: NDArray[np.float32] = (overlap.clip(min=0) * (size / source)).astype(np.float32)
    return share


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Repeat grey pixels in three channels if the data set has ``channels`` = 3."""
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if channels > pixels.shape[-1] else pixels
