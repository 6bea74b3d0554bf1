"""Equations in the documents are of the form that GitHub and the site's converter both read."""

import re

import pytest
from helpers import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def prose(text: str) -> str:
    """Return Markdown without displayed equations and code: fenced blocks, indented commands, words in backticks."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_equations_in_a_line_survive_markdown(page):
    """No space inside the dollars, no letter after them, no escape that Markdown itself takes, no code inside."""
    for paragraph in prose(page.read_text()).split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
        for before, tex, after in re.findall(r"(^|.)\$([^$]+)\$(.|$)", paragraph, re.MULTILINE):
            assert not re.search(r"^\s|\s$|\n|\\[^A-Za-z]|`|\|", tex), tex
            assert not re.match(r"\w", after) and (not before or before in " (|"), before + tex + after


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_equations_on_their_own_line_are_balanced(page):
    for tex in re.findall(r"```math\n(.*?)```", page.read_text(), re.DOTALL):
        assert tex.count("{") == tex.count("}") and tex.count("\\left") == tex.count("\\right"), tex
        assert re.findall(r"\\begin\{(\w+)\}", tex) == re.findall(r"\\end\{(\w+)\}", tex), tex
        assert "$" not in tex and not re.search(r"\\(new|def)", tex), tex
