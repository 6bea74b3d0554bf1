"""WebDataset shards: tar files in which the members of one name are a sample, read in any order by an index."""

import hashlib
import json
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flowmaps.data.dataset import numbered
from flowmaps.data.file_source import SUFFIXES, check_size, is_hidden
from flowmaps.errors import UserError, shorten
from flowmaps.files import cache_directory, new_file, write_file
from flowmaps.reading import parse_json, read_bytes, regular_file

URL = re.compile(r"https?://", re.IGNORECASE)
LABEL = "cls"  # the extension of labels, if none is named
SHORT = 64  # bytes of a member whose content is kept in the index: a label
MOST_SHARDS = 100_000
LARGEST_INDEX = 1 << 30  # bytes
TIMEOUT = 60  # seconds that a server may take to answer


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int
    text: str  # its content if that is short text


@dataclass(frozen=True)
class Tars:
    """The samples of WebDataset shards; made by ``open_tars``. A sample's name is SHARD.tar/MEMBER."""

    root: Path
    shards: tuple[Path, ...]
    number: dict[str, int]  # of each sample by name, in the order of shards and members
    place: NDArray[np.int64]  # [n, 3]: shard, offset, size
    texts: tuple[str | None, ...]  # the label of each sample as it is written
    left_out: tuple[str, ...]

    def listing(self) -> tuple[dict[str, str], list[str]]:
        """Return the images with their sizes, and the shards' own sizes and times."""
        seen = [shard.stat() for shard in self.shards]
        states = [f"{one.st_size} {one.st_mtime_ns}" for one in seen]
        place = self.place.tolist()
        found = {name: f"{place[i][2]} {place[i][1]} {states[place[i][0]]}" for name, i in self.number.items()}
        return found, list(self.left_out)

    def read(self, name: str) -> bytes:
        shard, offset, size = self.place[self.number[name]].tolist()
        check_size(size)
        file = os.open(self.shards[shard], os.O_RDONLY)
        try:
            content = os.pread(file, size, offset)
            while len(content) < size and (more := os.pread(file, size - len(content), offset + len(content))):
                content += more
        finally:
            os.close(file)
        if len(content) < size:
            raise EOFError(f"{self.shards[shard]} has become shorter")
        return content

    def labels(self, names: list[str]) -> tuple[Tensor | None, tuple[str, ...]]:
        """Return labels int64 [n] of the samples ``names`` and the names of the classes; (None, ()) without labels."""
        return numbered([self.texts[self.number[name]] for name in names], names, str(self.root))


def open_tars(text: str) -> Tars:
    """Open WebDataset shards without reading an image.

    Args:
        text: A folder of .tar files, a tar file, or a pattern of them: ``data/train-{000..099}.tar``, ``data/*.tar``;
            or such a pattern of URLs, whose files are downloaded once into the cache directory. ``#jpg,cls`` at its end
            names the extensions of images and labels; by default an image is what has a suffix of images, and a label
            is text in ``.cls``, a number or a class's name.

    Raises:
        UserError: A shard is missing or damaged, two have one name, or a sample has several images.
    """
    pattern, _, extensions = text.partition("#") if not Path(text).exists() else (text, "", "")
    image, _, label = extensions.partition(",")
    shards = [_fetched(one) if URL.match(one) else regular_file(one) for one in shards_of(pattern)]
    names = [shard.name for shard in shards]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise UserError(f"two shards are called {min(twice)}: give each its own name", field="root", value=pattern)
    number: dict[str, int] = {}
    place: list[tuple[int, int, int]] = []
    texts: list[str | None] = []
    left_out: list[str] = []
    with tqdm(shards, desc="reading shards", unit="shard", disable=None, leave=False) as bar:
        for i, shard in enumerate(bar):
            for key, parts in _samples(_index(shard)).items():
                picture = _image(parts, image, f"{shard}: {key}")
                if picture is None:
                    left_out.append(f"{shard.name}/{key} (no image)")
                    continue
                number[f"{shard.name}/{picture.name}"] = len(place)
                place.append((i, picture.offset, picture.size))
                texts.append(parts[label or LABEL].text.strip() or None if (label or LABEL) in parts else None)
    if label and not any(texts):
        raise UserError(f"no sample has a label .{label}: a number or a name in a text file", "root", text)
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    return Tars(folder, tuple(shards), number, np.array(place, np.int64), tuple(texts), tuple(left_out))


def shards_of(pattern: str) -> list[str]:
    """Return the paths or URLs that a pattern stands for, in order: {000..099}, {a,b}, * and ?, a folder, or one file.

    Raises:
        UserError: It stands for no file.
    """
    parts, found = re.split(r"\{([^{}]*)\}", pattern), [""]
    for i, part in enumerate(parts):
        if i % 2 == 0:
            found = [one + part for one in found]
            continue
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = map(int, numbers.groups())
            if last - first >= MOST_SHARDS:
                raise UserError(f"more than {MOST_SHARDS:,} shards", field="root", value=pattern)
            choices = [str(n).zfill(len(numbers[1])) for n in range(first, last + 1)]
        else:
            choices = part.split(",")
        if len(found) * len(choices) > MOST_SHARDS:
            raise UserError(f"more than {MOST_SHARDS:,} shards", field="root", value=pattern)
        found = [one + choice for one in found for choice in choices]
    if not URL.match(pattern):
        found = [path for one in found for path in _local(one)]
    if not found:
        raise UserError("no tar file there: give a folder of .tar files, or a pattern of them", "root", pattern)
    return found


def _local(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.tar") if not is_hidden(file.name))
    if path.exists() or not re.search(r"[*?]", path.name):
        return [pattern]
    return sorted(str(file) for file in path.parent.glob(path.name))


def _fetched(url: str) -> Path:
    """Return the copy of the shard at ``url`` in the cache directory, which is downloaded if it is not there yet.

    A tar on a web server can only be read from its start: the order of a run, a function of the seed, needs it here.
    """
    parts = urlsplit(url)
    folder = hashlib.sha256(url.rpartition("/")[0].encode()).hexdigest()[:16]
    above, _, name = parts.path.rpartition("/")
    target = cache_directory() / "wds" / folder / (Path(above).name or parts.netloc) / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, new_file(target, check=False) as beside:
            with beside.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            size, length = beside.stat().st_size, answer.headers.get("Content-Length")
            if length is not None and size != int(length):
                raise OSError(f"{size:,} of {length} bytes came")
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UserError(f"{shorten(url)} cannot be downloaded ({shorten(error, 120)}): try again") from None
    return target


def _index(shard: Path) -> list[Member]:
    """Return the files in a tar, from the cache directory if the tar has not changed since."""
    seen = shard.stat()
    key = hashlib.sha256(f"1 {shard.resolve()} {seen.st_size} {seen.st_mtime_ns}".encode()).hexdigest()
    cache = cache_directory() / "tars" / f"{key}.json"
    try:
        return [Member(*row) for row in parse_json(read_bytes(cache, "", LARGEST_INDEX), "", "")]
    except (UserError, TypeError):  # none yet, or damaged
        pass
    members = _walk(shard)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_file(cache, json.dumps(members).encode(), check=False)
    except OSError:  # only a cache: without it the next start reads the tar again
        pass
    return members


def _walk(shard: Path) -> list[Member]:
    members = []
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which would keep all of them
                if entry.isfile() and not entry.issparse():
                    short = 0 < entry.size <= SHORT
                    content = os.pread(file.fileno(), entry.size, entry.offset_data) if short else b""
                    text = "" if b"\0" in content else content.decode(errors="ignore")
                    members.append(Member(entry.name, entry.offset_data, entry.size, text))
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
            if end.strip(b"\0"):  # tarfile ends in silence at a header that is none
                raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"{shard} is not an intact tar file without compression ({shorten(error, 120)}): create it again"
        ) from None
    return members


def _samples(members: list[Member]) -> dict[str, dict[str, Member]]:
    """Return the members of each sample by extension: what follows the first dot of a name, as in WebDataset."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        above, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if stem and not any(is_hidden(part) for part in above.split("/") if part != "."):
            samples.setdefault(f"{above}{slash}{stem}", {})[extension.lower()] = member
    return samples


def _image(parts: dict[str, Member], wanted: str, where: str) -> Member | None:
    if wanted:
        return parts.get(wanted.lower())
    images = [extension for extension in parts if f".{extension}".endswith(SUFFIXES)]
    if len(images) > 1:
        raise UserError(f"{where} has several images ({', '.join(images)}): choose one of them, as in #{images[0]}")
    return parts[images[0]] if images else None
