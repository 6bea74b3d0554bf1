"""Structure of the repository: who may import whom, and the public names and flags that must not change by accident."""

import ast
import functools
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
from flowmaps.cli.commands import COMMANDS
from flowmaps.cli.run import COMMAND_OF
from flowmaps.cli.sampling_flags import DTYPE_NAMES, SAMPLER_NAMES
from flowmaps.deployment.onnx_files import STORAGE
from flowmaps.metrics.classifier import CLASSIFIERS
from flowmaps.metrics.scores import KID_SUBSET
from flowmaps.objectives import OBJECTIVES
from flowmaps.vae import DTYPES

FLOORS = ["samplers", "flowmaps", "flowmaps.cli", "training", "training.cli"]  # each may import those before it
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for layer in ("samplers", "flowmaps", "training")
    for path in (ROOT / layer).rglob("*.py")
}
OUTSIDE = {"configs", "scripts", "benchmarks", "drawing", "tests", "helpers"}  # no package imports these


def floor(module):
    module = module.replace("flowmaps.__main__", "flowmaps.cli.__main__")  # has to lie there
    return max((f for f in FLOORS if f"{module}.".startswith(f"{f}.")), key=len)


def imported(path, type_checking=True):
    """Yield the modules that a file imports, also in functions; ``type_checking`` includes imports for annotations."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if not type_checking and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES)


@functools.cache
def arrows():
    """Return pairs (module, imported module) inside the packages; a name imported from a package counts as that."""
    found = set()
    for module, path in MODULES.items():
        names = list(imported(path, type_checking=False))
        found |= {(module, name) for name in names if name in MODULES and name != module}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module):
    above = FLOORS[FLOORS.index(floor(module)) + 1 :]
    for name in imported(MODULES[module]):
        assert name.split(".")[0] not in OUTSIDE, f"{module} imports {name}"
        assert name not in MODULES or floor(name) not in above, f"{module} imports {name}"


def test_only_the_table_of_commands_names_modules_above():
    """A module looked up by its name at run time is an import too: `flowmaps` does this for its commands alone."""
    for module, path in MODULES.items():
        above = FLOORS[FLOORS.index(floor(module)) + 1 :]
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        named = {text for text in texts & MODULES.keys() if "." in text and floor(text) in above}
        own = {f"training.cli.{name}" for name in ("train", "prepare", "extractor", "compare")}
        assert named == (own if module == "flowmaps.cli.commands" else set())
    assert set(COMMANDS.values()) <= MODULES.keys()


def test_no_circle_among_modules():
    """Remove modules without imports until none is left; also prints the number of modules and imports per package."""
    left = {module: {b for a, b in arrows() if a == module} for module in MODULES}
    for layer in ("samplers", "flowmaps", "training"):
        inside = [m for m in MODULES if m.split(".")[0] == layer]
        print(layer, len(inside), "modules,", sum(a in inside and b in inside for a, b in arrows()), "imports")
    while free := {module for module, names in left.items() if not names}:
        left = {module: names - free for module, names in left.items() if module not in free}
    assert not left, f"circles among {sorted(left)}"


def test_training_stays_small():
    """Its commands and its forecast, which no run needs, are packages below it."""
    assert sum(floor(module) == "training" and ".forecast" not in module for module in MODULES) <= 24


@pytest.mark.parametrize("package", sorted(m for m, path in MODULES.items() if path.name == "__init__.py"))
def test_each_package_has_a_docstring(package):
    assert len(ast.get_docstring(ast.parse(MODULES[package].read_text())) or "") > 20


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0].startswith("test_")], path


def test_samplers_import_only_torch():
    tops = {name.split(".")[0] for path in (ROOT / "samplers").rglob("*.py") for name in imported(path)}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "samplers"}


def test_wheel_holds_packages_types_configs_commands_and_small_assets(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    file = next(tmp_path.glob("*.whl"))
    assert file.stat().st_size < 8e6
    with zipfile.ZipFile(file) as wheel:
        names = set(wheel.namelist())
        (points,) = [wheel.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "[console_scripts]\nflowmaps = flowmaps.cli.commands:main" in points
    assert {f"flowmaps/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= names
    assert "flowmaps/assets/digits/network/diffusion_pytorch_model.safetensors" in names
    assert {f"flowmaps/deployment/{name}" for name in ("engine.js", "page.html")} <= names
    assert {"flowmaps/py.typed", "samplers/py.typed", "training/py.typed"} <= names
    assert {f"flowmaps/assets/extractors/{name}.safetensors" for name in CLASSIFIERS} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flowmaps", "samplers", "training"}


@pytest.mark.parametrize("torch", ["cpu", "cu126", ""])
def test_make_installs_torch_from_the_index_that_it_is_given(torch):
    """TORCH=cpu leaves out 5 GB of CUDA, of which `make demo` warns before it installs them."""
    command = ["make", "-nB", "demo", *([f"TORCH={torch}"] if torch else [])]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pip = f"pip install --quiet torch torchvision --index-url https://download.pytorch.org/whl/{torch}\n"
    assert (pip in shown) == bool(torch) and ("TORCH=cpu leaves them out" in shown) == (not torch)
    assert shown.index("torch torchvision" if torch else "echo") < shown.index("--editable '.[dev]'")


HEAVY = ("torch", "diffusers", "torch_fidelity", "accelerate", "numpy", "PIL")
LIGHT = {  # what starts a command, and what it may have loaded when it answers
    "import samplers": {"torch", "numpy"},
    "import flowmaps": set(),
    "import training": set(),
    "from flowmaps import FlowMap": {"torch", "numpy"},
    **{f"import {module}": {"numpy"} for module in MODULES if ".cli." in module},
    **{f"import scripts.{path.stem}": {"numpy"} for path in (ROOT / "scripts").glob("*.py")},
}


@pytest.mark.parametrize("code", LIGHT)
def test_imports_load_what_they_need(code):
    """Help and mistakes in flags are answered before torch is imported, which takes seconds."""
    loaded = f"{code}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(ast.literal_eval(done.stdout)) <= LIGHT[code]


def test_flags_name_every_sampler_and_precision():
    """Literals in the flags, which are defined without torch, agree with the tables and the defaults."""
    assert SAMPLER_NAMES == list(samplers.SAMPLERS)
    assert DTYPE_NAMES == list(DTYPES)
    (names,) = re.findall(r"^STORAGE_NAMES = (\[.*\])", (ROOT / "flowmaps/cli/export.py").read_text(), re.MULTILINE)
    assert ast.literal_eval(names) == list(STORAGE)
    shown = run_script("scripts/fid.py", "--help", check=True).stdout
    assert f"Images in each of KID's subsets ['{KID_SUBSET}']" in shown


FROZEN = {
    flowmaps: {"FlowMap", "FlowMapInfo", "UserError", "__version__"},
    flowmaps.networks: {"MLP", "NETWORKS", "PRESETS", "UNet", "EDM2UNet", "DiT", "IMFDiT", "Network", "registered"},
    flowmaps.objectives: {cls.__name__ for cls in OBJECTIVES.values()}
    | {"OBJECTIVES", "Draws", "LogVariance", "Loss", "Objective", "SelfDistillation", "TrajectoryObjective"},
    samplers: {"check_times", "dpm_solver", "euler", "heun", "log_snr_times", "rollout", "stochastic"}
    | {"SAMPLERS", "Sampler", "midpoint", "Schedule", "Trajectory", "trajectory", "uniform_times"}
    | {"Measurement", "Score", "Steered", "downsample", "inpaint", "invert", "invert_drift", "steer"},
    training: {"Config", "build_network", "train"},
}

SAMPLING = {"checkpoint", "steps", "num", "seed", "sampler", "label", "guidance", "gamma", "batch", "schedule"}
SAMPLING |= {"condition", "guidance_interval", "vae", "vae_dtype", "vae_batch", "vae_tiling", "ema"}
SCORING = {"extractor", "extractors", "weights", "root"}
FLAGS = {
    "train.py": {"config", "workdir", "seeds", "dry_run", "stage", "forecast", "gpus", "mfu", "json"},
    "sample.py": SAMPLING
    | {"out", "beside", "reward", "reward_scale", "measurement", "mask", "downsample", "measurement_std", "particles"}
    | {"invert", "edit_label"},
    "stats.py": SCORING | {"data", "out", "download", "size", "skip_corrupt", "features", "fit", "background"},
    "fid.py": SAMPLING
    | SCORING
    | {"pairs", "lpips_weights", "samples", "reference", "max_fid", "json", "memorisation", "metrics", "kid_subset"}
    | {"repeats", "max_regression", "tolerance", "confidence", "update_baseline", "junit"}
    | {"from_record", "label_policy", "floor", "markdown"},
    "figures.py": {"only", "out"},
    "schedule.py": {"checkpoint", "steps", "out", "store", "plot", "sampler", "cost", "noises", "seed", "fine"}
    | {"guidance", "batch", "reference", "num"},
    "compare.py": {"out"},
    "train_extractor.py": {"data", "root", "size", "out", "epochs", "seed"},
    "benchmark.py": {"suite", "rows", "rates", "seeds", "train_steps", "cpu_minutes", "num", "threads", "json", "plot"},
    "demo.py": {"workdir", "steps", "num"},
    "results.py": set(),
    "gpu_check.py": {"parts", "out", "minutes", "data", "device", "smoke"},
    "export.py": {"checkpoint", "ema", "out", "name", "license", "results", "how", "push_to_hub", "picture"}
    | {"onnx", "storage", "torch_export", "web", "space"},
    "app.py": {"checkpoint", "reference", "root", "vae", "port"},
    "import_checkpoint.py": {
        *("format", "src", "out", "image_size", "heads", "prediction", "path", "guidance", "decoupled"),
        "base_std",
    },
    "prepare_data.py": {"teacher", "out", "num", "solver", "steps", "substeps", "grid", "low", "high", "times", "start"}
    | {"data", "root", "seed", "batch", "shard", "src", "size", "vae", "vae_range", "flip", "skip_corrupt", "workers"},
}


@pytest.mark.parametrize("module", FROZEN, ids=lambda m: m.__name__)
def test_public_names_are_the_frozen_ones(module):
    assert set(module.__all__) == FROZEN[module]
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "scripts").glob("*.py")])
def test_help_lists_the_frozen_flags_and_an_example(script):
    """The flags that ``--help`` lists are the contract."""
    shown = run_script(f"scripts/{script}", "--help", check=True).stdout
    assert f"python scripts/{script} " in shown
    assert set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)) == FLAGS[script]


def test_module_paths_in_checkpoints_do_not_change():
    paths = {name: cls.__module__ for name, cls in flowmaps.networks.NETWORKS.items()}
    assert paths == {name: f"flowmaps.networks.{name.lower()}" for name in flowmaps.networks.NETWORKS}


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        shim = "run_command" in path.read_text()
        assert len(path.read_text().splitlines()) < (10 if shim else 100), path
    shims = [path.stem for path in (ROOT / "scripts").glob("*.py") if "run_command" in path.read_text()]
    assert sorted(COMMAND_OF.get(shim, shim) for shim in shims) == sorted(COMMANDS)
