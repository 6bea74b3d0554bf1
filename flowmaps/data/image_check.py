"""One check of all images in a folder or zip file, cached until the files change."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass

import PIL
from tqdm import tqdm

from flowmaps.data.file_source import READ_ERRORS, FileSource
from flowmaps.data.image_io import BadImage, in_threads, inspect
from flowmaps.errors import UserError, shorten
from flowmaps.files import cache_directory, write_file
from flowmaps.reading import parse, read_json

SMALL = 16_000  # bytes of a file on average: below, threads wait for each other's Python longer than they decode


@dataclass(frozen=True)
class Check:
    """Result of the check of all images of a source."""

    bad: dict[str, str]  # files that are not intact images, with the reasons
    channels: int  # of the others: 1 if all are grey, else 3
    sha256: str  # over the contents of the others, in order


def some(bad: dict[str, str], most: int = 20) -> str:
    """List the first ``most`` of the files in ``bad`` with their reasons."""
    shown = ", ".join(f"{shorten(name)} ({reason})" for name, reason in list(bad.items())[:most])
    return shown + (f" and {len(bad) - most} more" if len(bad) > most else "")


def check_images(source: FileSource, found: dict[str, str]) -> Check:
    """Decode the files in ``found``, which maps names to sizes and times, and cache the result for unchanged files.

    The cache is a small file in the cache directory, keyed by names, sizes and times.
    """
    key = hashlib.sha256(json.dumps([3, PIL.__version__, str(source.root.resolve()), found]).encode()).hexdigest()
    cache = cache_directory() / f"{key}.json"
    try:
        return parse(Check, read_json(cache, ""), "")
    except UserError:  # none yet, or damaged
        pass
    bad, channels, contents, names = {}, 1, hashlib.sha256(), list(found)
    unsure: list[str] = []  # the error may be temporary: do not cache it

    def check(name: str) -> tuple[int, bytes] | str:
        try:
            content = source.read(name)
            return inspect(content), hashlib.sha256(content).digest()
        except (BadImage, *READ_ERRORS) as error:
            if isinstance(error, OSError):
                unsure.append(name)
            return shorten(error)

    small = sum(int(state.partition(" ")[0]) for state in found.values()) < SMALL * len(found)
    threads = 1 if small else os.cpu_count() or 1
    with tqdm(total=len(names), desc="checking images", unit="image", disable=None, leave=False) as bar:
        for name, result in zip(names, in_threads(check, names, threads), strict=True):
            if isinstance(result, str):
                bad[name] = result
            else:
                channels = max(channels, result[0])
                contents.update(result[1])
            bar.update()
    checked = Check(bad, channels, contents.hexdigest())
    try:
        if unsure:
            return checked
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_file(cache, json.dumps(asdict(checked)).encode(), check=False)
    except OSError:  # only a cache: without it the next start checks again
        pass
    return checked
