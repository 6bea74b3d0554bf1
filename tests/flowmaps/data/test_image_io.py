"""Bytes to pixels, and pixels to squares."""

import io
import random
import time

import numpy as np
import pytest
from helpers.makers import encoded, photograph, zoo
from PIL import Image, ImageOps

from flowmaps.data.image_io import BadImage, area_center_crop, decode, in_threads, inspect, shares, with_channels


def test_pixels_of_each_mode():
    """Constant pictures whose right value is known."""

    def first(image, suffix="png", **options):
        return decode(encoded(image, suffix, **options))[0, 0].tolist()

    for level in (0, 1, 100, 254, 255):
        assert first(Image.fromarray(np.full((3, 3), 257 * level, np.uint16))) == [level]
        assert first(Image.fromarray(np.full((3, 3), 257 * level, np.uint16)), "tif") == [level]
        assert first(Image.new("L", (3, 3), level)) == [level]
    assert first(Image.new("RGBA", (3, 3), (255, 0, 0, 51))) == [255, 204, 204]  # a fifth of red over white
    assert first(Image.new("RGBA", (3, 3), (1, 2, 3, 0))) == [255, 255, 255]  # hidden colours stay hidden
    assert first(Image.new("LA", (3, 3), (0, 51))) == [204]
    assert first(Image.new("CMYK", (3, 3), (0, 0, 0, 0)), "tif") == [255, 255, 255]
    assert first(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "tif") == [255, 0, 0]
    assert first(Image.new("1", (3, 3), 1)) == [255]
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("L", (20, 10))
    assert decode(encoded(wide, "jpg", exif=exif)).shape == (20, 10, 1)
    for content, reason in ((b"", "empty"), (b"GIF but not really", "not an image")):
        with pytest.raises(BadImage, match=reason):
            decode(content)


def test_32_bit_pixels_are_refused():
    with pytest.raises(BadImage, match="32 bits"):
        decode(encoded(Image.fromarray(np.full((3, 3), 200, np.int32)), "tif"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_turned_images_are_pillows_upright_copies(suffix, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    for mode in ("RGB", "L") if suffix != "webp" else ("RGB",):
        content = encoded(photograph(1, 21, 34).convert(mode), suffix, exif=exif)
        with Image.open(io.BytesIO(content)) as image:
            upright = np.atleast_3d(np.array(ImageOps.exif_transpose(image)))
        assert np.array_equal(decode(content), upright) and decode(content).flags.writeable


def damaged(content, r):
    """Cut ``content`` anywhere, overwrite some of it, or take a piece out."""
    yield from (content[:cut] for cut in (*r.sample(range(len(content)), 12), len(content) - 1, len(content) - 2))
    for _ in range(25):
        changed, at = bytearray(content), r.randrange(len(content))
        if r.random() < 0.7:
            for i in r.sample(range(len(content)), r.choice((1, 3, 20))):
                changed[i] = r.randrange(256)
        else:
            changed[at : at + r.randrange(1, 200)] = b""
        yield bytes(changed)


def verdict(content, look):
    try:
        return look(content)
    except BadImage:
        return None


@pytest.mark.filterwarnings("ignore")
def test_a_look_at_a_file_shows_the_damage_that_decoding_it_shows(monkeypatch):
    """The check of a folder decodes JPEGs at an eighth: the same files are intact, with the same channels."""

    def whole(content):
        return decode(content).shape[-1]

    kinds = ({}, {"progressive": True}, {"subsampling": 0, "optimize": True}, {"restart_marker_blocks": 2})
    r, seen = random.Random(0), {None: 0, 1: 0, 3: 0}
    for height, width in ((40, 53), (9, 130)):
        for mode in ("RGB", "L", "CMYK"):
            for kind in kinds:
                content = encoded(photograph(0, height, width).convert(mode), "jpg", **kind)
                for changed in (content, *damaged(content, r)):
                    expected = verdict(changed, whole)
                    assert verdict(changed, inspect) == expected
                    seen[expected] += 1
    assert min(seen.values()) > 50
    good, bad = zoo()
    for content in (good | bad).values():
        assert verdict(content, inspect) == verdict(content, whole)
    sizes = []
    monkeypatch.setattr(
        "flowmaps.data.image_io.to_pixels", lambda image: sizes.append(image.size) or np.zeros((1, 1, 3))
    )
    assert inspect(encoded(photograph(0, 80, 60).convert("CMYK"), "jpg")) == 3 and sizes == [(8, 10)]


def exact_mean(pixels, size):
    """The central square's area means by their definition, in integers, halves to even."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(np.int64)
    fine = square.repeat(size, axis=0).repeat(size, axis=1)  # a pixel in size x size parts, new ones in side x side
    total = fine.reshape(size, side, size, side, -1).sum(axis=(1, 3))
    low, rest = np.divmod(total, side**2)
    return low + ((2 * rest > side**2) | ((2 * rest == side**2) & (low % 2 == 1)))


SIZES = [(12, 4), (24, 4), (13, 5), (37, 8), (24, 7), (8, 12), (5, 8), (1, 3), (7, 1), (9, 9), (40, 16), (257, 2)]


@pytest.mark.parametrize(("side", "size"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_the_exact_mean(side, size, channels):
    r = np.random.default_rng(side)
    for height, width in ((side, side), (side, side + 7), (side + 4, side)):
        for top in (2, 256):  # many halves, and all levels
            pixels = r.integers(0, top, (height, width, channels), dtype=np.uint8)
            made = area_center_crop(pixels, size)
            assert made.shape == (size, size, channels) and made.dtype == np.uint8
            assert np.array_equal(made, exact_mean(pixels, size))
            colour = with_channels(pixels, 3)  # of strides 0 if it was grey
            assert np.array_equal(area_center_crop(colour, size), with_channels(made, 3))


@pytest.mark.parametrize(("side", "size"), [(256, 64), (257, 64), (300, 64), (384, 64), (600, 7), (521, 32)])
def test_crop_equals_float32_sums_but_for_ties(side, size):
    """The crop as it was before, all weights in float32: equal if those are powers of two, and away from halves."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    square = pixels[:, 1 : side + 1].astype(np.float32)
    mean = (shares(side, size) / shares(side, size)[0].sum()).astype(np.float32)
    resized = np.einsum("hwc,kw->hkc", np.tensordot(mean, square, axes=1), mean, optimize=True)
    sure = np.abs(resized - np.floor(resized) - 0.5) > 1e-4
    sure |= side == 256
    made = area_center_crop(pixels, size)
    assert np.array_equal(made[sure], np.rint(resized)[sure].astype(np.uint8)) and sure.mean() > 0.97
    assert np.abs(made - resized).max() <= 0.5 + 1e-4


def test_shares_are_overlaps():
    assert shares(3, 2).tolist() == [[2, 1, 0], [0, 1, 2]]
    assert shares(8, 4).tolist() == np.eye(4, dtype=int).repeat(2, axis=1).tolist()
    for source, size in ((7, 3), (64, 37), (5, 8), (500, 64)):
        unit = np.gcd(source, size)
        assert (shares(source, size).sum(axis=1) == source // unit).all()
        assert (shares(source, size).sum(axis=0) == size // unit).all()


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_results_of_threads_are_in_order(threads, count):
    names = [str(i) for i in range(count)]

    def work(name):
        time.sleep(0.001 if name.endswith("3") else 0)
        return 2 * int(name)

    assert list(in_threads(work, names, threads)) == [2 * i for i in range(count)]
