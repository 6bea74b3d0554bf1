"""Values against annotations: the same rules for flags, config files and Python."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
from absl import flags
from helpers import ROOT, run_script
from helpers.runs import tiny

from flowmaps import UserError
from flowmaps.networks import UNet
from flowmaps.objectives import Straightening
from training.cli.config_file import Tuple, _split
from training.config import Decay, network
from training.config_values import describe, fits


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 1.5], [True, math.nan, math.inf, -math.inf, "1"]),
        (bool, [True], [0, "yes"]),
        (str, ["", "a"], [1, None, b"a"]),
        (tuple[int, ...], [(), (1, 2)], [(1, 2.5), ("a",), [1], 1, "12"]),
        (tuple[float, float], [(0, 0.5)], [(0.5,), (1, 2, 3), ("a", 1)]),
        (tuple[str, ...], [("a",)], [("a", 1), "a"]),
        (int | None, [None, 1], ["1", 1.5]),
        (Literal["a", "b"], ["a"], ["c"]),
        (Decay, [Decay.cosine], ["cosine"]),
        (dict[str, int], [{}], [[]]),
        (Any, [1, None], []),
        (Callable[[int], int], [abs], []),
    ],
)
def test_what_fits_an_annotation(hint, good, bad):
    assert all(fits(hint, value) for value in good)
    assert not [value for value in bad if fits(hint, value)]
    assert describe(hint)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("ema", ("abc",), r"^ema=abc: must be finite numbers, separated by commas"),
        ("ema", 0.9, "^ema=0.9: must be finite numbers"),
        ("sample_steps", (1, 2.5), r"^sample_steps=1,2.5: must be integers"),
        ("optim.betas", (0.9,), "^optim.betas=0.9: must be 2 finite numbers"),
        ("optim.lr", math.nan, "^optim.lr=nan: must be a finite number"),
        ("optim.decay", "cosine", "^optim.decay=cosine: must be one of constant, cosine"),
        ("optim", 3, "^optim=3: must be a Optim"),
        ("data.latent_shift", ("a",), "^data.latent_shift=a: must be finite numbers"),
        ("trajectories.times", ("a", "b"), "^trajectories.times=a,b"),
        ("init_fresh", (3,), "^init_fresh=3: must be texts"),
        ("tf32", "yes", "^tf32=yes: must be True or False"),
        ("steps", 10**20, "^steps=1000.*: must be at most 1,000,000,000"),
        ("batch", 10**20, "^batch=1000.*: must be at most 1,000,000"),
        ("seed", 2**63, "^seed=9223.*: must be at most"),
        ("sample_steps", (10**20,), "^sample_steps=1000.*: must be at most"),
        ("network.width", 10**12, "^network.width=1000.*: must be at most"),
        ("network.width", "wide", "^network.width=wide: must be an integer"),
        ("timeout", 0, "^timeout=0: must be at least 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path, value, said):
    config = tiny()
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
    with pytest.raises(UserError, match=said):
        config.validate()


def test_lists_empty_texts_and_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = tiny(ema=[0.9, 0.99], ema_widths="", init_fresh=[], seed=2**63 - 1)
    config.data.root, config.best.reference, config.optim.betas = "~/data", "~", [0.9, 0.99]
    config.objective = Straightening(steps=(4,))
    config.objective.schedule = "~/s.json"
    config.network = network(UNet, image_size=8, channel_mult=[1, 2])
    with pytest.raises(UserError, match=r"schedule=/home/someone/s\.json"):
        config.validate()  # the file is not there
    assert (config.ema, config.ema_widths, config.init_fresh) == ((0.9, 0.99), (), ())
    assert (config.data.root, config.best.reference) == ("/home/someone/data", "/home/someone")
    assert (config.network.channel_mult, config.optim.betas) == ((1, 2), (0.9, 0.99))


@pytest.mark.parametrize("name", ["init_ema", "init_fresh"])
def test_what_needs_init_from_is_refused_without_it(name):
    with pytest.raises(UserError, match=f"^{name}: has no effect without init_from"):
        tiny(**{name: {"init_ema": "raw", "init_fresh": ("head",)}[name]}).validate()


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (tuple[float, ...], "0.9, 0.99", (0.9, 0.99)),
        (tuple[float, ...], "(0.9,0.99)", (0.9, 0.99)),
        (tuple[float, ...], "[1]", (1,)),
        (tuple[float, ...], "", ()),
        (tuple[float, ...], "()", ()),
        (tuple[str, ...], "head,blocks.0", ("head", "blocks.0")),
        (tuple[str, ...], "0", ("0",)),
        (tuple[int, ...], "1,2.5", None),
        (tuple[int, ...], "abc", None),
        (tuple[int, ...], "(" * 9999, None),
        (tuple[float, float], "1", None),
    ],
)
def test_the_flag_of_a_tuple(hint, text, value):
    if value is None:
        with pytest.raises(ValueError, match=r"must be .*separated by commas"):
            Tuple(hint).parse(text)
    else:
        assert Tuple(hint).parse(text) == value


def test_a_config_file_may_have_a_colon_and_a_tilde_in_its_path(tmp_path, monkeypatch):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "cats.py").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _split(f"{folder}/cats.py:row,x:y") == (folder / "cats.py", ["row,x:y"])
    assert _split("~/a:b/cats.py") == (folder / "cats.py", [])
    with pytest.raises(flags.Error, match=r"^--config=.*cat\.py:row: no such config: did you mean .*cats\.py\?"):
        _split(f"{folder}/cat.py:row")


FILES = {
    "syntax": ("def get_config(:", r"line 1: cannot be used as a config \(SyntaxError"),
    "import": ("import no_such_module", "line 1: .*no_such_module"),
    "none": ("def get_config(row): pass", "returns None, not a Config"),
    "empty": ("", "no function get_config"),
    "field": (
        "from training.config import Data\ndef get_config(row):\n    return Data(nmae=1)",
        r"line 3: .*\(Data has no field nmae: did you mean name\?\)",
    ),
    "attribute": (
        "from flowmaps.configs.digits import get_config as g\ndef get_config(row):\n    return g().optim.lrr",
        r"line 3: .*\(Optim has no field lrr: did you mean lr\?\)",
    ),
    "option": (
        "from flowmaps.configs.digits import get_config as g\ndef get_config(row):\n    g().network.widht = 3",
        r"line 3: network.widht: UNet has no such option: did you mean width\?",
    ),
    "assigned": (
        "from flowmaps.configs.digits import get_config as g\ndef get_config(row):\n    c = g()\n"
        "    c.optim.lrr = 3\n    return c",
        r"--config.optim.lrr: Optim has no such field: did you mean lr\?",
    ),
    "assigned to the objective": (
        "from flowmaps.configs.digits import get_config as g\ndef get_config(row):\n    c = g()\n"
        "    c.objective.diagnal = 3\n    return c",
        r"--config.objective.diagnal: Lagrangian has no such field: did you mean diagonal\?",
    ),
    "raises": ("def get_config(row):\n    return {}[row]", "line 2: .*KeyError: 'x'"),
    "deep": ("def get_config(row):\n    return get_config(row)", "RecursionError"),
}
FLAGS = {
    "--flagfile": "flagfile",
    "--flagfile=nowhere": "Unable to open flagfile: .* 'nowhere'",
    "--config.=5": "--config.: Config has no such field",
    "--config.nework.width=3": "--config.nework.width: .*did you mean --config.network.width?",
    "--config.nework=3": "--config.nework: Config has no such field: did you mean network?",
    "--config.lr=3": "--config.lr: Config has no such field: did you mean --config.optim.lr?",
    "--config.steps.x=3": "--config.steps.x: this is not a section: set --config.steps",
    "--config.qq=3": "--config.qq: Config has no such field: choose one of network, objective",
    "--wrokdir=x": "--wrokdir: unknown flag: did you mean --workdir?",
    "--config.ema[0]=0.5": r"--config.ema\[0\]: Config has no such field",
    "--config.network=build": "--config.network: this is a section",
    "--config.data.rooot=x": "--config.data.rooot: Data has no such field",
    "--config.ema=abc": "--config.ema=abc: must be finite numbers",
    "--config.ema_ramp=2": r"--config.ema_ramp=2.0: a share must lie in \[0, 1\]",
    "--config.ema=": "--config.ema=.*: must be one or more",
    "--config.batch=99999999999999999999": "--config.batch=99999999999999999999: must be at most",
}


@pytest.mark.parametrize("name", [*FILES, *FLAGS])
def test_mistakes_are_one_line(name, tmp_path):
    file, given = f"{ROOT}/configs/checkerboard.py:lagrangian,smoke", [name]
    if name in FILES:
        (tmp_path / "c.py").write_text(FILES[name][0])
        file, given = f"{tmp_path}/c.py:x", []
    done = run_script("scripts/train.py", f"--config={file}", *given, "--dry_run")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and not done.stdout, done.stderr
    assert re.search(FILES[name][1] if name in FILES else FLAGS[name], lines[0]), lines[0]
