"""The shape of the package: who may import whom, and the public names that must not drift."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, run_script

import flowmaps
import flowmaps.networks
import flowmaps.objectives
import samplers
import training
from flowmaps.metrics.extractors import CLASSIFIERS
from flowmaps.objectives import OBJECTIVES

MAY_IMPORT = {
    "samplers": {"samplers"},
    "flowmaps": {"samplers", "flowmaps"},
    "training": {"samplers", "flowmaps", "training"},
    "configs": {"training", "flowmaps"},
    "scripts": {"samplers", "flowmaps", "training"},
}
OURS = {"samplers", "flowmaps", "training", "configs", "scripts", "tests"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_go_one_way(layer):
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        wrong = {name.split(".")[0] for name in imported(path)} & OURS - MAY_IMPORT[layer]
        assert not wrong, f"{path} imports {wrong}"


def test_samplers_need_torch_alone():
    tops = {name.split(".")[0] for path in (ROOT / "samplers").rglob("*.py") for name in imported(path)}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "samplers"}


def test_wheel_holds_the_packages_types_and_extractors(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"flowmaps/py.typed", "samplers/py.typed", "training/py.typed"} <= names
    assert {f"flowmaps/assets/extractors/{name}.safetensors" for name in CLASSIFIERS} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flowmaps", "samplers", "training"}


@pytest.mark.parametrize("package", ["flowmaps", "samplers"])
def test_import_is_light(package):
    code = (
        f"import sys, {package}; print([m for m in ('diffusers', 'torch_fidelity', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


FROZEN = {
    flowmaps: {"FlowMap", "FlowMapInfo", "UserError", "__version__"},
    flowmaps.networks: {"MLP", "NETWORKS", "PRESETS", "UNet", "EDM2UNet", "DiT"},
    flowmaps.objectives: {cls.__name__ for cls in OBJECTIVES.values()}
    | {"OBJECTIVES", "Draws", "LogVariance", "Loss", "Objective", "PathObjective"},
    samplers: {"check_times", "dpm_solver", "euler", "heun", "log_snr_times", "rollout", "stochastic"}
    | {"Schedule", "Trajectory", "trajectory", "uniform_times"},
    training: {"Config", "build_network", "train"},
}

SAMPLING = {"checkpoint", "steps", "num", "seed", "sampler", "label", "guidance", "gamma", "batch", "schedule"}
SAMPLING |= {"vae", "vae_dtype", "vae_batch", "vae_tiling", "ema"}
SCORING = {"extractor", "weights", "root"}
FLAGS = {
    "train.py": {"config", "workdir", "dry_run", "stage"},
    "sample.py": SAMPLING | {"out", "beside"},
    "stats.py": SCORING | {"data", "out", "download", "size", "skip_corrupt", "features"},
    "fid.py": SAMPLING
    | SCORING
    | {"samples", "reference", "max_fid", "json", "memorisation", "metrics", "kid_subset"}
    | {"repeats", "max_regression", "tolerance", "junit"},
    "schedule.py": {"checkpoint", "steps", "out", "store", "plot", "sampler", "cost", "noises", "seed", "fine"}
    | {"guidance", "batch"},
    "train_extractor.py": {"data", "root", "out", "epochs", "seed"},
    "benchmark.py": {"suite", "rows", "rates", "seeds", "train_steps", "cpu_minutes", "num", "threads", "json", "plot"},
    "demo.py": {"workdir", "steps", "num"},
    "export.py": {"checkpoint", "ema", "out", "name", "license", "results", "how", "push_to_hub"},
    "import_checkpoint.py": {"format", "src", "out"},
    "prepare_data.py": {"teacher", "out", "num", "solver", "steps", "substeps", "grid", "low", "high", "times", "start"}
    | {"data", "root", "seed", "batch", "shard", "src", "size", "vae", "flip", "skip_corrupt", "workers"},
}


@pytest.mark.parametrize("module", FROZEN, ids=lambda m: m.__name__)
def test_public_names(module):
    assert set(module.__all__) == FROZEN[module]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "scripts").glob("*.py")])
def test_flags(script):
    """What ``--help`` lists is the contract; it shows the docstring's commands too."""
    shown = run_script(f"scripts/{script}", "--help", check=True).stdout
    assert f"python scripts/{script} " in shown
    assert set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)) == FLAGS[script]


def test_module_paths_written_into_checkpoints_stay():
    paths = {name: cls.__module__ for name, cls in flowmaps.networks.NETWORKS.items()}
    assert paths == {name: f"flowmaps.networks.{name.lower()}" for name in ("MLP", "UNet", "EDM2UNet", "DiT")}


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path
