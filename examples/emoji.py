"""A folder of pictures to train on: the emoji of Debian's Noto font over white, one folder per group of Unicode.

apt-get install fonts-noto-color-emoji unicode-data; pip install fonttools
python examples/emoji.py my/emoji

The pictures are under the SIL Open Font License 1.1; its text is copied next to them.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LICENCE = Path("/usr/share/doc/fonts-noto-color-emoji/copyright")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE = 136  # pixels of a picture; the font's are 136 x 128
TONES = set(range(0x1F3FB, 0x1F400))


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
    found = ((first, ligature) for some in sets for first, ligatures in some.items() for ligature in ligatures)
    return {(first, *ligature.Component): ligature.LigGlyph for first, ligature in found}


def main(out: Path) -> None:
    font = TTFont(FONT)
    names, joined, [pictures] = font.getBestCmap(), ligatures(font), font["CBDT"].strikeData
    for group, codes in sequences(LIST.read_text(encoding="utf-8")):
        glyphs = tuple(names.get(code, "") for code in codes if code != 0xFE0F)
        glyph = glyphs[0] if len(glyphs) == 1 else joined.get(glyphs, "")
        if glyph in pictures:
            picture = Image.open(io.BytesIO(pictures[glyph].imageData)).convert("RGBA")
            canvas = Image.new("RGBA", (SIDE, SIDE), "white")
            canvas.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
            (out / group).mkdir(parents=True, exist_ok=True)
            canvas.convert("RGB").save(out / group / f"{'-'.join(f'{code:x}' for code in codes)}.png")
    (out / "LICENCE.txt").write_bytes(LICENCE.read_bytes())
    print(f"{out}: {len(list(out.glob('*/*.png')))} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
