"""Pictures to train on: the emoji of Debian's Noto font, one folder per group of Unicode.

apt-get install fonts-noto-color-emoji unicode-data; pip install fonttools
python examples/emoji.py my/emoji

my/emoji gets nine tenths of them, my/emoji-heldout the rest; those that differ in skin tone or sex only are together.
They are under the SIL Open Font License 1.1; its text is copied next to them.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageOps

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
TONES = set(range(0x1F3FB, 0x1F400))
PEOPLE = {0x1F468, 0x1F469, 0x1F9D1, 0x2640, 0x2642, 0xFE0F}  # man, woman and person, the signs of sex, and of variants


def sequences(text: str) -> Iterator[tuple[str, list[int]]]:
    """Yield group and code points of each emoji of emoji-test.txt; of mixed skin tones none, there are hundreds."""
    for part in text.split("# group: ")[1:]:
        name, *lines = part.splitlines()
        for line in lines:
            codes = [int(code, 16) for code in line.split(";")[0].split()] if "; fully-qualified" in line else []
            if codes and len(TONES.intersection(codes)) < 2:
                yield name.replace(" & ", "-").lower(), codes


def ligatures(font: TTFont) -> dict[tuple[str, ...], str]:
    """Return the glyph of each sequence of glyphs that the font joins into one."""
    tables = (table for lookup in font["GSUB"].table.LookupList.Lookup for table in lookup.SubTable)
    sets = (getattr(getattr(table, "ExtSubTable", table), "ligatures", {}) for table in tables)
    return {(first, *one.Component): one.LigGlyph for some in sets for first, found in some.items() for one in found}


def main(out: Path) -> None:
    font = TTFont(FONT)
    names, joined, [pictures] = font.getBestCmap(), ligatures(font), font["CBDT"].strikeData
    heldout, alike = out.with_name(f"{out.name}-heldout"), dict[frozenset[int], int]()
    for group, codes in sequences(LIST.read_text(encoding="utf-8")):
        first, *others = (names.get(code, "") for code in codes if code != 0xFE0F)
        glyph = joined.get((first, *others), "") if others else first
        if glyph in pictures:
            picture = Image.open(io.BytesIO(pictures[glyph].imageData)).convert("RGBA")
            number = alike.setdefault(frozenset(codes) - TONES - PEOPLE, len(alike))
            folder = (out if number % 10 else heldout) / group
            folder.mkdir(parents=True, exist_ok=True)
            ImageOps.pad(picture, (136, 136)).save(folder / f"{'-'.join(f'{code:x}' for code in codes)}.png")
    (out / "LICENCE.txt").write_bytes(Path("/usr/share/doc/fonts-noto-color-emoji/copyright").read_bytes())
    print(*(f"{len(list(part.glob('*/*.png')))} pictures in {part}" for part in (out, heldout)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
