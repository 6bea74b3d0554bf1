"""Config rows, sections, and validation."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ConfigMixin, ModelMixin
from helpers import ROOT
from helpers.makers import write_lpips
from helpers.runs import assert_same, tiny, weights

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.data import ArrayData
from flowmaps.networks import UNet, registered
from flowmaps.objectives import Lagrangian, MeanFlow, SoFlow
from flowmaps.objectives.eulerian import Velocity
from flowmaps.objectives.mid_training import Distance
from flowmaps.run_weights import list_checkpoints
from training import build_network
from training.config import build_objective, class_name, network
from training.config_rows import Chain
from training.dry_run import dry_run, dry_run_chain
from training.loop import train
from training.network_section import fitted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("ema", (1.0,)),
        ("ema", ()),
        ("base_std", 0.0),
        ("sample_steps", (0,)),
        ("interpolant", "x"),
    ],
)
def test_config_mistakes_name_the_field(field, value):
    with pytest.raises(UserError, match=f"^{field}="):
        tiny(**{field: value}).validate()


HEAVY = ("cifar10", "folder")  # networks of 50 million parameters: no whole row is quick
HUGE = ("imagenet64", "imagenet256", "imagenet512")  # 280 to 1,524 million: the whole row is for a larger machine
MILLIONS = {  # of each row's network, as published
    "imagenet64:lagrangian": 280.0,
    **{f"imagenet256:{row}": 675.1 for row in ("lagrangian", "mean_flow", "improved_mean_flow", "terminal_velocity")},
    **{f"imagenet256:{row}": 675.1 for row in ("dmf", "soflow", "alpha_flow", "facm")},
    "imagenet256:cmt,pre_training": 131.0,
    "imagenet256:cmt,mid_training": 675.1,
    "imagenet256:cmt,post_training": 675.1,
    "imagenet256:imf": 711.11,
    "imagenet256:imf_l2": 509.75,
    "imagenet256:imf_m2": 230.57,
    "imagenet256:imf_b2": 145.60,
    "imagenet256:pmf": 175.5,
    "imagenet256:pmf_l16": 511.8,
    "imagenet512:imf": 711.11,
    "imagenet256:pmf_h16": 1113.9,
    "imagenet512:pmf_h32": 1120.4,
    "imagenet512:pmf": 179.3,
    "imagenet512:pmf_l32": 516.8,
    "imagenet512:cmt,mid_training": 1523.0,
    "imagenet512:cmt,post_training": 1523.0,
}


def config_rows():
    for file in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        if file.stem in HUGE:
            for row in module.ROWS:
                slow = [pytest.mark.slow] if (file.stem, row) == ("imagenet512", "cmt") else []
                yield pytest.param(module, f"{row},smoke", id=f"{file.stem}:{row},smoke", marks=slow)
            continue
        for row in (row for row in module.ROWS if "pipeline" not in row):  # chains: tests/training/test_chain.py
            slow = [] if row == "lagrangian" and file.stem not in HEAVY else [pytest.mark.slow]
            yield pytest.param(module, row, id=f"{file.stem}:{row}", marks=slow)
            yield pytest.param(module, f"{row},smoke", id=f"{file.stem}:{row},smoke")
            if row.startswith("from_"):
                yield pytest.param(module, f"{row},taught,smoke", id=f"{file.stem}:{row},taught,smoke")
            for variant in ("cpu", "ddpmpp"):
                if hasattr(module, variant):
                    yield pytest.param(module, f"{row},{variant}", id=f"{file.stem}:{row},{variant}", marks=slow)
                    if row == "lagrangian":
                        yield pytest.param(module, f"{row},{variant},smoke", id=f"{file.stem}:{row},{variant},smoke")


def write_start(config, folder):
    """Write the checkpoint of init_from and teacher: a drift of the same network, as an import makes it."""
    config = replace(config, network=fitted(config.network, (3,), 2))  # what the folder of small data decides
    net = config.network
    shape = (net.dim,) if hasattr(net, "dim") else (net.channels, net.image_size, net.image_size)
    latents = {}
    if config.data.name == "prepared" and net.channels == 4:
        shift = tuple(config.data.latent_shift or 4 * (0.0,))
        latents = {"latent_shift": shift, "latent_scale": tuple(config.data.latent_scale or 4 * (0.18215,))}
    dropout = config.data.label_dropout
    info = FlowMapInfo(shape, getattr(net, "num_classes", 0), kind="drift", label_dropout=dropout, **latents)
    FlowMap(build_network(config), config.interpolant, config.base_std, info).save_pretrained(folder)


@pytest.mark.parametrize(("module", "row"), list(config_rows()))
def test_every_config_row_passes_a_dry_run(module, row, request, tmp_path):
    AcceleratorState._reset_state()  # rows differ in precision
    made = module.get_config(row)
    if isinstance(made, Chain):
        for config in made.stages().values():
            on_small_data(config, request, tmp_path)
        found = [(facts, picture) for _, facts, picture in dry_run_chain(made, batch=2)]
    else:
        on_small_data(made, request, tmp_path)
        found = [dry_run(made, batch=2)]
    AcceleratorState._reset_state()
    for facts, picture in found:
        assert facts["parameters"] > 0 and picture.width > 50


def on_small_data(config, request, tmp_path):
    """Set up data of the true format, and a substitute for the checkpoint that the row starts from."""
    classes = {"folder": 2, "prepared": 32}.get(config.data.name, 10)
    if config.data.name == "prepared":
        config.data.root = str(request.getfixturevalue("imagenet_root") / Path(config.data.root).name)
    else:
        data_root = request.getfixturevalue("data_root")
        config.data.root = str(data_root / "folder" if config.data.name == "folder" else data_root)
    config.data.workers = min(config.data.workers, 1)  # torch warns of more workers than cores
    started = [source for source in (config.init_from, config.teacher) if source and not source.endswith("_training")]
    if hasattr(config.network, "num_classes") and (started or config.data.name == "prepared"):
        config.network.num_classes = min(config.network.num_classes or classes, classes)
    if started:
        write_start(config, tmp_path)
    for field in ("init_from", "teacher"):
        if getattr(config, field) and not getattr(config, field).endswith("_training"):  # i.e. not a stage
            setattr(config, field, str(tmp_path))
    if getattr(config.objective, "distance", None) is Distance.lpips:
        config.objective.lpips_weights = str(write_lpips(tmp_path))


@pytest.mark.parametrize("file", [path.stem for path in sorted((ROOT / "configs").glob("*.py"))])
def test_every_row_at_its_size_is_valid_and_has_a_network(file):
    module = importlib.import_module(f"configs.{file}")
    for row in module.ROWS:
        made = module.get_config(row)
        for config in made.stages().values() if isinstance(made, Chain) else [made]:
            config.validate()
            with torch.device("meta"):
                config = replace(config, network=fitted(config.network, (3,), 2))
                assert sum(p.numel() for p in build_network(config).parameters()) > 1000


@pytest.mark.parametrize("name", list(MILLIONS))
def test_rows_have_the_published_number_of_parameters(name):
    file, choice = name.split(":")
    row, _, stage = choice.partition(",")
    config = importlib.import_module(f"configs.{file}").get_config(row)
    config = config.stages()[stage] if stage else config
    config.validate()
    with torch.device("meta"):
        millions = sum(p.numel() for p in build_network(config).parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=4e-3)


def test_every_row_of_the_large_files_has_a_published_number():
    for file in HUGE:
        rows = importlib.import_module(f"configs.{file}").ROWS
        assert set(rows) == {name.partition(":")[2].partition(",")[0] for name in MILLIONS if name.startswith(file)}


def test_dry_run_refuses_what_training_would():
    config = tiny(accumulate=3, batch=16)
    with pytest.raises(UserError, match=r"^config\.batch=16: not divisible"):
        dry_run(config)
    config = tiny()
    config.best.metric = "FID"
    with pytest.raises(UserError, match=r"config\.best\.metric"):
        dry_run(config)


def test_options_of_any_name_can_be_set():
    """MeanFlow and mid-training each have an option ``target``; a copy is built, so the config may change later."""
    section = MeanFlow(target=Velocity.model)
    assert (class_name(section), section.target) == ("mean_flow", Velocity.model)
    built = build_objective(tiny(objective=section))
    assert built.uses_teacher and built == section and built is not section


def test_the_row_of_dmf_has_its_times_and_its_weight():
    objective = (config := importlib.import_module("configs.digits").get_config("dmf")).objective
    n = 400_000
    _, s, t, *_ = objective.draw(FlowMap(torch.nn.Identity()), torch.zeros(2 * n, 1), torch.Generator().manual_seed(0))
    gap, logit = (t - s)[n:].double(), torch.logit(s[:n].double())
    assert torch.equal(s[:n], t[:n]) and abs(logit.mean()) < 0.01 and abs(logit.std() - 1) < 0.01
    assert gap.mean() == pytest.approx(0.352, rel=0.01)
    assert (gap > 0.8).double().mean() == pytest.approx(0.0142, abs=3 * (0.0142 / n) ** 0.5 + 5e-5)
    config.weight.learned = False
    with pytest.raises(UserError, match=r"^weight\.log_floor=0\.01: needs weight\.learned"):
        config.validate()
    config.weight.log_floor = -1.0
    with pytest.raises(UserError, match=r"^weight\.log_floor=-1\.0: must be at least 0"):
        config.validate()


def test_a_schedule_of_the_objective_covers_the_run():
    config = tiny(steps=77, objective=SoFlow())
    assert build_objective(config).alpha_steps == 77 and config.objective.alpha_steps == 0


def test_accidental_options_are_refused():
    with pytest.raises(UserError, match=r"network.heads: UNet has no such option"):
        network(UNet, heads=3)
    with pytest.raises(UserError, match=r"network\.widht: UNet has no such option"):
        network(UNet).widht = 3
    with pytest.raises(TypeError, match="colour"):
        Lagrangian(colour=1)


class Line(ModelMixin, ConfigMixin):
    """A network that is not in NETWORKS."""

    @registered
    def __init__(self, dim: int, width: int = 8) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(dim + 2, width), torch.nn.Linear(width, dim))

    def forward(self, x, s, t, label=None):
        return self.layers(torch.cat([x, s[:, None], t[:, None]], dim=1))


def test_a_network_class_of_ones_own_is_configured_trained_and_resumed_without_our_tables(tmp_path):
    def config(width=5):
        made = tiny(network=network(Line, 2))
        made.network.width = width
        return made

    assert config().to_dict()["network"] == {"name": f"{__name__}.Line", "dim": 2, "width": 5}
    assert build_network(config()).layers[0].out_features == 5
    with pytest.raises(UserError, match="dim"):
        network(Line)
    train(config(), tmp_path)
    before = weights(tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(config(), tmp_path)
    assert_same(before, weights(tmp_path))
    with pytest.raises(UserError, match=r"^config\.network\.width: differs"):
        train(config(width=6), tmp_path)


def test_a_run_trains_on_data_from_memory_and_knows_it_again(tmp_path):
    x = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    fm = train(tiny(), tmp_path, data=ArrayData(x, None, 0))
    assert fm.info.images_seen == 6 * 64
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(tiny(), tmp_path, data=ArrayData(x, None, 0))
    with pytest.raises(UserError, match=r"^config\.data\.root: has changed"):
        train(tiny(), tmp_path, data=ArrayData(x + 1, None, 0))
    with pytest.raises(UserError, match=r"^config\.network: made for samples of shape \(2,\)"):
        train(tiny(), tmp_path, data=ArrayData(torch.rand(10, 3), None, 0))


SNIPPET = """
from flowmaps.data import ArrayData
from flowmaps.networks import UNet, registered
from flowmaps.objectives import Lagrangian
from training.config import Config, network

config = Config(network(UNet, image_size=8, {network}), Lagrangian({objective}))
config.{field} = 3
"""


@pytest.mark.slow
def test_mypy_finds_a_misspelt_option(tmp_path):
    """Types of networks, objectives and fields reach a config file."""
    right = {"network": "width=32", "objective": "diagonal=0.5", "field": "steps"}
    wrong = [right, {**right, "network": "widht=32"}, {**right, "objective": "diagnal=1"}, {**right, "field": "stepz"}]
    for number, parts in enumerate([*wrong, {**right, "network": "width='32'"}]):
        (tmp_path / f"row{number}.py").write_text(SNIPPET.format(**parts))
    command = [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", *map(str, tmp_path.glob("*.py"))]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "row0" not in said, said
    for number, word in enumerate(("widht", "diagnal", "stepz", '"width"'), start=1):
        assert any(f"row{number}.py" in line and word in line for line in said.splitlines()), said
