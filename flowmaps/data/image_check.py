"""One check of all images in a folder or zip file, cached until the files change."""

import hashlib
import json
import os

import PIL
from tqdm import tqdm

from flowmaps.data.file_source import READ_ERRORS, FileSource
from flowmaps.data.image_io import BadImage, decode, in_threads
from flowmaps.files import cache_directory, write_file


def some(bad: dict[str, str], most: int = 20) -> str:
    """List the first ``most`` of the files in ``bad`` with their reasons."""
    shown = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:most])
    return shown + (f" and {len(bad) - most} more" if len(bad) > most else "")


def check_images(source: FileSource, found: dict[str, str]) -> tuple[dict[str, str], int]:
    """Decode the files in ``found``, which maps names to sizes and times, and cache the result for unchanged files.

    Returns the files that are not intact images, with the reasons, and the channels of the others: 1 if all are grey,
    else 3. The cache is a small file in the cache directory, keyed by names, sizes and times.
    """
    key = hashlib.sha256(json.dumps([2, PIL.__version__, str(source.root.resolve()), found]).encode()).hexdigest()
    cache = cache_directory() / f"{key}.json"
    try:
        known = json.loads(cache.read_text())
        return dict(known["bad"]), int(known["channels"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    bad, channels, names = {}, 1, list(found)
    unsure: list[str] = []  # the error may be temporary: do not cache it

    def check(name: str) -> int | str:
        try:
            return int(decode(source.read(name), thumbnail=True).shape[-1])
        except (BadImage, *READ_ERRORS) as error:
            if isinstance(error, OSError):
                unsure.append(name)
            return str(error)

    with tqdm(total=len(names), desc="checking images", unit="image", disable=None, leave=False) as bar:
        for name, result in zip(names, in_threads(check, names, os.cpu_count() or 1), strict=True):
            if isinstance(result, str):
                bad[name] = result
            else:
                channels = max(channels, result)
            bar.update()
    try:
        if unsure:
            return bad, channels
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_file(cache, json.dumps({"bad": bad, "channels": channels}).encode(), check=False)
    except OSError:  # only a cache: without it the next start checks again
        pass
    return bad, channels
