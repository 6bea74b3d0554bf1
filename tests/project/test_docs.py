"""Documents agree with the code: examples, tables, links, flags and the names of files."""

import re

import torch
from documents.hooks import anchors
from helpers import CASES, ROOT, gaussian_data, gaussian_map, run_script

from flowmaps import __version__
from flowmaps.cli.commands import COMMANDS
from flowmaps.cli.run import COMMAND_OF
from flowmaps.objectives import OBJECTIVES
from training.config import class_name

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_objective_of_extending_md_vanishes_only_at_the_exact_map():
    """The file that the page describes runs, and its residual is zero at the exact map and not at a wrong one."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[1]
    scope = {"__name__": "thirds"}
    exec(compile(code, "thirds.py", "exec"), scope)
    for case in CASES:
        values = []
        for wrong in (0.0, 0.1):
            fm = gaussian_map(*case, wrong=wrong)
            x1, label = gaussian_data(fm, 64)
            objective = scope["Thirds"](diagonal=0.0)
            values.append(objective(fm, x1, label, generator=torch.Generator().manual_seed(0)).value.item())
        assert values[0] < 1e-16 and values[1] > 1e-6


def test_the_version_is_the_same_everywhere():
    """It lives in the package; the citation, the newest changes and the names in the documents follow."""
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__
    for file in DOCUMENTS:
        assert set(re.findall(r"flowmaps-(\d[\d.]*\d)|/action@v([\d.]+)", file.read_text())) <= {
            (__version__, ""),
            ("", __version__),
        }, file


def test_every_objective_has_a_row_in_the_documents_and_each_config():
    import importlib

    for file in ("docs/objectives.md", "docs/maths.md"):
        text = (ROOT / file).read_text()
        assert all(f"\n| `{name}`" in text for name in OBJECTIVES), file
    for config in (ROOT / "configs").glob("*.py"):
        module = importlib.import_module(f"configs.{config.stem}")
        if config.stem.startswith("imagenet"):  # only published runs
            continue
        configs = [module.get_config(row) for row in module.ROWS if "pipeline" not in row]
        assert {class_name(config.objective) for config in configs} == set(OBJECTIVES)


def test_the_config_of_extending_md_trains_its_own_objective(tmp_path):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[-1]
    (tmp_path / "mine.py").write_text(block)
    flags = ["--config.objective.damping=0.2", "--config.batch=8", "--dry_run"]
    done = run_script("scripts/train.py", *flags, f"--config={tmp_path}/mine.py:damped")
    assert done.returncode == 0 and "loss of two steps" in done.stdout, done.stderr


def test_architecture_md_names_every_module_and_no_other():
    """The tree has a line per package (its ``__init__.py``) and per file in it."""
    [tree] = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    folder, named = "", set()
    for name in re.findall(r"^( *[\w/]+(?:\.py|/))(?: |$)", tree, re.MULTILINE):
        folder = folder if name.startswith(" ") else name
        named.add(f"{folder}{name.strip()}" if name.startswith(" ") else f"{name}__init__.py")
    for package in ("samplers", "flowmaps", "training"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        here = {name for name in named if name.startswith(f"{package}/")}
        assert not files - here, f"docs/architecture.md lacks {sorted(files - here)}"
        assert not here - files, f"docs/architecture.md names {sorted(here - files)}, which do not exist"


def test_documents_name_files_that_exist():
    """Paths of source files and tests in the prose of the documents."""
    for file in DOCUMENTS:
        prose = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        for path in re.findall(r"`((?:samplers|flowmaps|training|tests|scripts|configs)/[\w/.]+)`", prose):
            if path != "flowmaps/objectives/thirds.py":  # the example of extending.md
                assert (ROOT / path).exists(), f"{file.name}: {path}"


def test_links_between_documents_lead_somewhere():
    for file in DOCUMENTS:
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", file.read_text()):
            to = file.parent / link if link else file
            assert to.exists(), f"{file.name}: {link}"
            if anchor and to.suffix == ".md":
                assert anchor in anchors(to), f"{file.name}: {link}#{anchor}"


def test_commands_in_the_documents_name_real_flags():
    """Each flag of a script or of `flowmaps` in README and docs exists in the command or its config row."""
    import importlib

    scripts = {command: script for script, command in COMMAND_OF.items()}
    for file in DOCUMENTS:
        text = file.read_text().replace("\\\n", " ")
        found = re.findall(r"^    python scripts/(\w+)\.py(.*)$", text, re.MULTILINE)
        found += re.findall(r"^    flowmaps (\w+)(.*)$", text, re.MULTILINE)
        for script, arguments in found:
            script = scripts.get(script, script)
            shim = (ROOT / f"scripts/{script}.py").read_text()
            module = COMMANDS[COMMAND_OF.get(script, script)].replace(".", "/") if "run_command" in shim else ""
            shared = [f"flowmaps/cli/{name}_flags.py" for name in ("sampling", "steering")]
            files = [*shared, f"{module}.py"] if module else []
            source = shim + "".join((ROOT / file).read_text() for file in files)
            for flag in re.findall(r"--([\w.]+)", arguments):
                if not flag.startswith("config."):
                    assert f'"{flag}"' in source or f'"--{flag}"' in source, f"{file.name}: {script}.py --{flag}"
            if row := re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?:(\S+)", arguments):
                if row[2] == "thirds":
                    continue
                config = importlib.import_module(f"configs.{row[1]}").get_config(row[2])
                for path in re.findall(r"--config\.([\w.]+)", arguments):
                    value = config
                    for part in path.split("."):
                        assert hasattr(value, part), f"{file.name}: --config.{path}"
                        value = getattr(value, part)
