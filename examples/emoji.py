"""A folder of pictures to train on: the emoji of Debian's Noto font over white, one folder per group of Unicode.

apt-get install fonts-noto-color-emoji unicode-data; pip install fonttools
python examples/emoji.py my/emoji

The pictures are under the SIL Open Font License 1.1; its text is copied next to them.
"""

import io
import sys
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LICENCE = Path("/usr/share/doc/fonts-noto-color-emoji/copyright")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE = 136  # pixels of a picture; the font's are 136 x 128
TONES = range(0x1F3FB, 0x1F400)


def sequences(text: str) -> list[tuple[str, list[int]]]:
    """Return group and code points of each emoji of emoji-test.txt; of mixed skin tones none, there are hundreds."""
    found, group = [], ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").replace(" & ", "-").lower()
        elif "; fully-qualified" in line:
            codes = [int(code, 16) for code in line.split(";")[0].split()]
            if len({code for code in codes if code in TONES}) < 2:
                found.append((group, codes))
    return found


def ligatures(font: TTFont) -> dict[tuple[str, ...], str]:
    """Return the glyph of each sequence of glyphs that the font joins into one."""
    return {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for table in lookup.SubTable
        for first, joined in getattr(getattr(table, "ExtSubTable", table), "ligatures", {}).items()
        for ligature in joined
    }


def main(out: Path) -> None:
    font = TTFont(FONT)
    names, joined, [pictures] = font.getBestCmap(), ligatures(font), font["CBDT"].strikeData
    count = 0
    for group, codes in sequences(LIST.read_text(encoding="utf-8")):
        glyphs = tuple(names.get(code, "") for code in codes if code != 0xFE0F)
        glyph = glyphs[0] if len(glyphs) == 1 else joined.get(glyphs, "")
        if glyph not in pictures:
            continue
        picture = Image.open(io.BytesIO(pictures[glyph].imageData)).convert("RGBA")
        canvas = Image.new("RGBA", (SIDE, SIDE), "white")
        canvas.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
        file = out / group / f"{'-'.join(f'{code:x}' for code in codes)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.convert("RGB").save(file)
        count += 1
    (out / "LICENCE.txt").write_bytes(LICENCE.read_bytes())
    print(f"{out}: {count} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
