"""The documentation site: its hooks, and that a strict build succeeds and shows every public name."""

import ast
import os
import posixpath
import re
import subprocess
import sys

import pytest
import yaml
from documents.fields import comment
from documents.hooks import SOURCE, anchors, command_section, help_of, with_commands, with_equations, with_links
from helpers import ROOT
from mkdocs.exceptions import PluginError

import flowmaps.model_card

DOCS = ROOT / "docs"
PACKAGES = ["flowmaps", "flowmaps.networks", "flowmaps.objectives", "flowmaps.evaluation", "flowmaps.metrics"]
PACKAGES += ["flowmaps.data", "flowmaps.importers", "samplers", "training"]


def public_names(package):
    """Return the names in a package's ``__all__``, without the imports that it would take to ask Python."""
    text = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    return [f"{package}.{name}" for name in ast.literal_eval(re.search(r"__all__ = (\[.*?\])", text, re.DOTALL)[1])]


def marked(tex, tag="span"):
    """Return TeX as arithmatex marks it in HTML."""
    left, right = {"span": r"\(\)", "div": r"\[\]"}[tag][:2], {"span": r"\)", "div": r"\]"}[tag]
    return f'<{tag} class="arithmatex">{left}{tex}{right}</{tag}>'


@pytest.mark.parametrize(
    ("tex", "parts"),
    [
        (r"\partial_t X_{s,t}(x) = b_t(X_{s,t}(x))", ["<msub><mi>∂</mi><mi>t</mi></msub>", "<mi>X</mi>"]),
        (r"\mathrm{sg}\left[\frac{dI_s}{ds}\right]", ["<mfrac>", 'stretchy="true"']),
        (r"\lVert r \rVert^2 \le \sqrt{\sigma}", ["<msup>", "‖", "≤", "<msqrt>"]),
        (r"\begin{aligned} a &amp;= b \\ &amp;= c \end{aligned}", ["<mtable>", "text-align: right", "<mi>c</mi>"]),
        (r"\mathbb{E}\,[x \mid y &lt; 1]", ["\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL E}", "\N{DIVIDES}", "&lt;"]),
    ],
)
@pytest.mark.parametrize("tag", ["span", "div"])
def test_equations_become_mathml(tex, parts, tag):
    made = with_equations(f"before {marked(tex, tag)} between {marked('x', tag)} after", "maths.md")
    assert made.startswith(f'before <{tag} class="equation"><math') and made.endswith(f"</math></{tag}> after")
    assert f'display="{"inline" if tag == "span" else "block"}"' in made and made.count("<math") == 2
    assert all(part in made for part in parts) and "\\" not in made and "annotation" not in made


@pytest.mark.parametrize("tex", [r"\nosuchcommand{x}", r"\frac{1", r"\begin{aligned} a"])
def test_an_equation_that_cannot_be_converted_is_one_line_that_names_the_page(tex):
    with pytest.raises(PluginError) as caught:
        with_equations(marked("x") + marked(tex), "maths.md")
    start = re.escape(f"docs/maths.md: Could not convert TeX math {tex}, ")
    assert re.fullmatch(rf"{start}.* unexpected [\w \\]+", str(caught.value))


@pytest.mark.parametrize(
    ("page", "link", "made"),
    [
        ("data.md", "maths.html#losses", "maths.html#losses"),  # a page of the site, which mkdocs has checked
        ("data.md", "#here", "#here"),
        ("data.md", "https://arxiv.org/abs/2505.18825", "https://arxiv.org/abs/2505.18825"),
        ("data.md", "../configs/digits.py", f"{SOURCE}/blob/main/configs/digits.py"),
        ("data.md", "../configs/", f"{SOURCE}/tree/main/configs"),
        ("data.md", "../CONTRIBUTING.md#style", f"{SOURCE}/blob/main/CONTRIBUTING.md#style"),
        ("data.md", "../assets/edits.png", "repository/assets/edits.png"),
        ("reference/x.md", "../../assets/demo.html", "../repository/assets/demo.html"),
        ("reference/x.md", "../maths.html", "../maths.html"),
    ],
)
def test_links_lead_into_the_repository_or_to_copies(page, link, made):
    copied = set()
    text = with_links(
        f'<p><a class="a" href="{link}">x</a> src="no" <img src="{link}"></p>', page, {"maths.html"}, copied
    )
    assert text == f'<p><a class="a" href="{made}">x</a> src="no" <img src="{made}"></p>'
    assert copied == ({made.removeprefix("../").removeprefix("repository/")} if "repository/" in made else set())


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("../configs/no.py", "no such file"),
        ("../assets/no.png", "no such file"),
        ("no.md", "no such file"),
        ("../../../etc/passwd", "no such file"),
        ("../CONTRIBUTING.md#no", "no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_is_one_line_that_names_page_and_link(link, reason):
    with pytest.raises(PluginError) as caught:
        with_links(f'<a href="{link}">x</a>', "data.md", set(), set())
    assert str(caught.value) == f"docs/data.md: link to {link}: {reason}"


def test_links_name_the_repository_that_model_cards_name():
    assert flowmaps.model_card.SOURCE == SOURCE


def test_a_long_command_continues_on_a_line_but_not_after_the_dashes_of_a_flag():
    text = '<code>--a=1</code> <div class="language-sh highlight"><pre><span></span><code>do --a.b=c\nto\n</code> --e'
    made = '<code class="flag">--a=1</code> <div class="language-sh highlight"><pre><span></span><code>'
    made += '<span class="line">do <span class="flag">--a.b</span>=c</span><span class="line">to</span></code> --e'
    assert with_commands(text) == made


def test_anchors_are_those_of_github(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("# A `b_c`, d & e\n\n```sh\n# not one\n```\n\n## Fréchet's (2nd)\n")
    assert anchors(file) == {"a-b_c-d--e", "fréchets-2nd"}


def test_a_section_on_a_command_has_its_examples_as_code_and_its_flags():
    text = "Do <this>.\n\nflowmaps do --x=1\n\nAs --x does.\n\nFlags:\n"
    text += "  --on  Switch ['false']\n  --x  A|B, * of --on ['1']\n"
    made = command_section("do", text)
    assert made == (
        "## flowmaps do\n\nDo &lt;this&gt;.\n\n    flowmaps do --x=1\n\nAs `--x` does.\n\n"
        "- `--on`: Switch\n- `--x`: A|B, \\* of `--on` [`1`]\n"
    )


def test_the_section_on_a_command_lists_every_flag_of_it():
    text = help_of("sample")
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) > 20 and re.findall(r"^- `(--\w+)`", command_section("sample", text), re.MULTILINE) == flags


def test_the_comment_behind_a_field_is_its_description():
    lines = ["a: int = 1  # one, see", "    # the next", "b: str = '#'", "c: int = 2  # noqa: X", "d: int = 3"]
    assert [comment(lines, i) for i in (1, 3, 4, 5)] == ["one, see the next", "", "", ""]


class Loader(yaml.SafeLoader):
    """YAML in which a tag of Python is nothing."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_the_navigation_lists_every_page_and_no_other():
    listed = re.findall(r"[\w/]+\.md", str(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    assert sorted(listed) == sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))


def test_reference_pages_name_every_public_name_once():
    named = re.findall(
        r"^::: ([\w.]+)$", "\n".join(f.read_text() for f in (DOCS / "reference").glob("*.md")), re.MULTILINE
    )
    assert len(named) == len(set(named))
    for package in PACKAGES:
        missing = set(public_names(package)) - set(named)
        assert not missing, f"docs/reference lacks {sorted(missing)}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*.html")}


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for name, text in site.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*\bhref=\"?([^\s\">]+)", text)
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], name


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    anchors = {name: set(re.findall(r"\b(?:id|name)=\"?([^\s\">]+)", text)) for name, text in site.items()}
    for name, text in site.items():
        for link in re.findall(r"<a\b[^>]*\bhref=\"([^\":]+)\"", text):
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if target.endswith(".html") and name != "404.html" and not name.startswith("repository/"):
                assert target in site, f"{name}: {link}"
                assert not anchor or anchor in anchors[target] | {"__search"}, f"{name}: {link}"


@pytest.mark.slow
def test_the_reference_shows_every_public_name_with_its_fields(site):
    for package in PACKAGES:
        for name in public_names(package):
            assert any(f'id="{name}"' in text for text in site.values()), name
    training, objectives = (
        re.sub("<[^>]*>", "", site[f"reference/{name}.html"]) for name in ("training", "objectives")
    )
    assert "Standard deviation of the noise" in training and "Power p of the adaptive weight" in objectives
    assert "may_change" not in training and "new_option" not in objectives
    assert "--workdir" in site["reference/commands.html"]
