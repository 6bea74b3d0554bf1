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
from pathlib import Path

import pypandoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from flowmaps.cli.commands import COMMANDS

SOURCE = "https://github.com/flowmaps/flowmaps"
ROOT = Path(__file__).resolve().parents[2]
COPIED = {".png", ".jpg", ".svg", ".gif", ".webp", ".html"}  # shown on the site; links to other files leave it
COPIES = "repository"  # their folder on the site

copied: set[str] = set()  # paths in the repository of what the pages show


def on_pre_build(config: MkDocsConfig) -> None:
    """Forget the pictures of an earlier build."""
    copied.clear()


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Add the flags to the page of the commands."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    return "\n\n".join([markdown, *(command_section(name, help_of(name)) for name in COMMANDS)])


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert the equations of a page and lead its links to files that exist."""
    name = page.file.src_uri
    pages = {file.dest_uri for file in files}
    return with_links(with_equations(with_commands(text), name), name, pages, copied)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the pictures of the repository that pages show."""
    for path in sorted(copied):
        target = Path(config.site_dir) / COPIES / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)


def with_commands(text: str) -> str:
    """Return HTML in which long commands continue on a further line, but none breaks after the dashes of a flag."""
    text = re.sub(r"<code>(?=-[^<]{,24}</code>)", '<code class="flag">', text)
    block = re.compile(r'(<div class="language-sh highlight"><pre>(?:<span></span>)?<code>)(.*?)(?=</code>)', re.DOTALL)

    def lines(match: re.Match[str]) -> str:
        code = re.sub(r"(?<=[\s>])--[\w.]+", r'<span class="flag">\g<0></span>', match[2].rstrip("\n"))
        return match[1] + "".join(f'<span class="line">{line}</span>' for line in code.split("\n"))

    return block.sub(lines, text)


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
        said = re.sub(r"\s+", " ", str(error)).partition("[WARNING] ")[2] or str(error)
        raise PluginError(f"docs/{name}: {re.split(' expecting | Failing because', said)[0]}") from None
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
        before, target, anchor = match[1], html.unescape(match[2]), match[3] or ""
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
            return f'{before}"{posixpath.relpath(posixpath.join(COPIES, path), folder or ".")}{anchor}"'
        return f'{before}"{SOURCE}/{"tree" if file.is_dir() else "blob"}/main/{path}{anchor}"'

    return re.sub(r'(<(?:a|img|source)\b[^>]*\s(?:href|src)=)"([^":#?]+)(#[^"]*)?"', lead, text)


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    slug = slugify(case="lower")
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(re.sub(r"[`*]", "", heading), "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def command_section(name: str, text: str) -> str:
    """Return a section of Markdown on a command from the text that its ``--help`` prints."""
    description, _, flags = text.partition("\nFlags:\n")
    return f"## flowmaps {name}\n\n{_description(description)}\n\n{_flags(flags)}\n"


def help_of(name: str) -> str:
    """Return the text that ``flowmaps NAME --help`` prints."""
    command = [sys.executable, "-m", "flowmaps", name, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _description(text: str) -> str:
    """Return a docstring in Markdown, its example lines as code."""
    return "\n".join(f"    {line}" if line.startswith("flowmaps ") else _escaped(line) for line in text.splitlines())


def _flags(text: str) -> str:
    """Return lines ``--name  help ['default']`` as a list in Markdown."""
    rows = []
    for flag, meaning, default in re.findall(r"^  (--\w+)  (.*?)(?: \['(.*)'\])?$", text, re.MULTILINE):
        rows.append(f"- `{flag}`: {_escaped(meaning)}" + (f" [`{default}`]" if default not in ("", "false") else ""))
    return "\n".join(rows)


def _escaped(text: str) -> str:
    """Return plain text as Markdown, with flags as code."""
    return re.sub(r"--\w+(?:=[\w,]+)?", r"`\g<0>`", html.escape(text, quote=False).replace("*", r"\*"))
