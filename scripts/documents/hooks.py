"""Hooks of mkdocs: equations as MathML, links from pages into the repository, and the page of the commands.

The pages are written for GitHub, whose links lead from docs/ to other folders and whose equations are TeX. The site
has the equations as MathML, which browsers show without a script, copies of the pictures, and links to the repository
for the other files. A link to what does not exist fails the build.
"""

import html
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pypandoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from flowmaps.cli.commands import COMMANDS
from flowmaps.model_card import SOURCE

ROOT = Path(__file__).resolve().parents[2]
COPIED = {".png", ".jpg", ".svg", ".gif", ".webp", ".html"}  # shown on the site; links to other files leave it
COPIES = "repository"  # their folder on the site

copied: set[str] = set()  # paths in the repository of what the pages show


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the commands, whose flags come from the commands themselves."""
    copied.clear()
    text = commands_page(_help)
    files.append(File.generated(config, "reference/commands.md", content=text))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert the equations of a page and lead its links to files that exist."""
    name = page.file.src_uri
    pages = {file.dest_uri for file in files}
    return with_links(with_equations(html, name), name, pages, copied)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the pictures of the repository that pages show."""
    for path in sorted(copied):
        target = Path(config.site_dir) / COPIES / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)


def with_equations(text: str, name: str) -> str:
    """Return the HTML of page ``name`` with the TeX that ``pymdownx.arithmatex`` has marked as MathML.

    Raises:
        PluginError: pandoc, which has its binary in pypandoc's wheel, does not know a command.
    """
    marked = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
    found = [(tag, re.sub(r"\n\s*\n", "\n", html.unescape(tex)).strip()) for tag, tex in marked.findall(text)]
    if not found:
        return text
    fences = {"span": "$", "div": "$$"}
    source = "\n\n".join(f"{fences[tag]}{tex}{fences[tag]}" for tag, tex in found)
    try:
        made = pypandoc.convert_text(source, "html", "markdown", ["--mathml", "--fail-if-warnings"])
    except RuntimeError as error:
        said = re.sub(r"\s+", " ", str(error).split("[WARNING]")[-1])
        raise PluginError(f"docs/{name}: {said[:300]}") from None
    equations = re.findall(r"<math.*?</math>", made, re.DOTALL)
    if len(equations) != len(found):
        raise PluginError(f"docs/{name}: {len(found)} equations became {len(equations)}: is one empty?")
    plain = iter(re.sub(r"<annotation.*?</annotation>", "", equation, flags=re.DOTALL) for equation in equations)
    return marked.sub(lambda match: f'<{match[1]} class="equation">{next(plain)}</{match[1]}>', text)


def with_links(text: str, name: str, pages: set[str], copied: set[str]) -> str:
    """Return the HTML of page ``name`` with links to other folders of the repository as they have to be on the site.

    Args:
        text: The HTML, whose links between pages mkdocs has already written.
        name: The page's file, relative to docs/.
        pages: The files of the site.
        copied: Gets the paths of pictures that the site needs.

    Raises:
        PluginError: A link leads nowhere.
    """
    folder = posixpath.dirname(name)

    def lead(match: re.Match[str]) -> str:
        attribute, target, anchor = match[1], html.unescape(match[2]), match[3] or ""
        here = posixpath.normpath(posixpath.join(folder, target))
        if here in pages:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", here))
        file = ROOT / path
        if path.startswith("..") or not file.exists():
            raise PluginError(f"docs/{name}: link to {target}: no such file")
        if anchor and file.suffix == ".md" and anchor[1:] not in anchors(file):
            raise PluginError(f"docs/{name}: link to {target}{anchor}: no such heading")
        if file.suffix in COPIED:
            copied.add(path)
            return f'{attribute}="{posixpath.relpath(posixpath.join(COPIES, path), folder or ".")}{anchor}"'
        return f'{attribute}="{SOURCE}/{"tree" if file.is_dir() else "blob"}/main/{path}{anchor}"'

    return re.sub(r'(?<=\s)(href|src)="([^":#?]+)(#[^"]*)?"', lead, text)


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    slug = slugify(case="lower")
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(re.sub(r"[`*]", "", heading), "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def commands_page(help_of: Callable[[str], str]) -> str:
    """Return the reference page of all commands in Markdown, from the text that ``--help`` prints."""
    parts = [
        "# Commands\n\nIn a checkout, `python scripts/train.py` is `flowmaps train`, and so on; configs are then files such"
        " as `configs/digits.py`. Numbers in brackets are defaults. Every flag is written `--name=value`."
    ]
    for name in COMMANDS:
        description, _, flags = help_of(name).partition("\nFlags:\n")
        parts.append(f"## flowmaps {name}\n\n{_description(description)}\n\n{_flags(flags)}")
    return "\n\n".join(parts) + "\n"


def _description(text: str) -> str:
    """Return a docstring in Markdown, its example lines as code."""
    lines = [f"    {line}" if line.startswith("flowmaps ") else html.escape(line, quote=False) for line in text.splitlines()]
    return "\n".join(lines).strip()


def _flags(text: str) -> str:
    """Return lines ``--name  help ['default']`` as a list in Markdown."""
    rows = []
    for flag, meaning, default in re.findall(r"^  (--\w+)  (.*?)(?: \['(.*)'\])?$", text, re.MULTILINE):
        meaning = re.sub(r"--\w+(?:=\w+)?", r"`\g<0>`", html.escape(meaning, quote=False).replace("*", r"\*"))
        rows.append(f"- `{flag}`: {meaning}" + (f" [`{default}`]" if default not in ("", "false") else ""))
    return "\n".join(rows)


def _help(name: str) -> str:
    command = [sys.executable, "-m", "flowmaps", name, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
