"""Your own images, cropped to squares and resized to 64 x 64, with "small" to 32 x 32.

They are in a folder, a zip file, a Hugging Face dataset or WebDataset shards (docs/data.md).

python scripts/train.py --config=configs/folder.py:lagrangian,small --config.data.root=my/images --workdir=runs/mine
python scripts/train.py --config=configs/folder.py:pipeline,small --config.data.root=my/images --workdir=runs/chain
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.root=my/images --workdir=runs/mine
python scripts/train.py --config=configs/folder.py:mid_training --config.data.root=my/images --workdir=runs/mid \\
    --config.init_from=runs/flow --config.teacher=runs/flow
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.name=zip --config.data.root=my.zip ...
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.name=hf --config.data.root=USER/DATASET ...
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.name=wds --config.data.root=my/shards ...

docs/tutorials/own_images.md leads from a folder to a score. ",small" is for one CPU core: 1.2 million parameters, half
an hour.

Channels and classes are those of the images (sub-folders or dataset.json; --dry_run lists the classes):
--config.network.num_classes=0 trains without classes. Other sizes with --config.network.image_size=N, a multiple of 8;
attention is at the two lowest resolutions.
The settings are those of Boffi et al. 2025 for CelebA-64 (arXiv 2505.18825, table 3) at a learning rate for this U-Net;
not yet run by us.

mid_training, straightening and reflow start from a flow_matching run of yours, runs/flow unless init_from and teacher
say otherwise. from_edm2, edm2_mid_training, edm2_straightening and edm2_reflow are for ImageNet in 1,000 sub-folders:
they start from edm2-img64-s, imported to teachers/edm2 (docs/teachers.md says how); from_edm2,taught also distils it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flowmaps.networks import EDM2UNet, UNet
from flowmaps.objectives import Consistency, FlowMatching, Lagrangian, MidTraining, Objective
from flowmaps.objectives.mid_training import Target
from training.config import (
    Config,
    Data,
    Decay,
    Grid,
    Optim,
    Optimizer,
    Precision,
    Solver,
    Start,
    Trajectories,
    network,
)
from training.config_rows import Chain, distil_init, objective_configs, select, smoke, straightening_configs

RUN = "runs/flow"  # of flow_matching on the same images


def base(objective: Objective) -> Config:
    config = Config(
        data=Data(name="folder", workers=4),
        network=network(UNet, image_size=64, width=128, channel_mult=(1, 2, 3, 4), blocks=3),
        objective=objective,
        base_std=0.5,
        optim=Optim(name=Optimizer.radam, lr=3e-4, warmup=1000, decay=Decay.inverse_sqrt, decay_start=35_000),
        steps=400_000,
        batch=256,
        precision=Precision.bf16,
        ema=(0.9999,),
        log_every=100,
        sample_every=5000,
        checkpoint_every=5000,
    )
    net = config.network
    net.channels = net.num_classes = net.attention_resolutions = None  # from the images
    return config


def small(config: Config) -> None:
    """For half an hour on one CPU core: 32 x 32 pixels, 2 x 2 pixel patches, a narrow network, batches of 64."""
    config.network = network(UNet, image_size=32, width=32, channel_mult=(1, 2, 2), blocks=1, patch=2)
    net = config.network
    net.channels = net.num_classes = net.attention_resolutions = None
    config.data.workers = 0
    config.optim = Optim(name=Optimizer.adamw, lr=min(1e-3, 3 * config.optim.lr), warmup=200, decay=Decay.cosine)
    config.steps, config.batch, config.precision, config.ema = config.steps // 160, 64, Precision.fp32, (0.999,)
    if isinstance(config.objective, Consistency):
        config.objective.stage_steps //= 80
    config.log_every, config.sample_every, config.checkpoint_every = 50, 500, 500


def mid(to_end: float = 0.0) -> Config:
    """Mid-training on the trajectories of the drift in RUN, from its weights."""
    config = base(MidTraining(to_end=to_end))
    config.init_from = config.teacher = RUN
    config.trajectories = Trajectories(solver=Solver.heun, steps=8)
    config.steps = 40_000
    return config


def pipeline() -> Chain:
    """Flow matching, mid-training on its trajectories of 8 Heun steps, and Lagrangian self-distillation."""
    pre, middle, post = base(FlowMatching()), mid(to_end=0.5), base(Lagrangian())
    middle.init_from = middle.teacher = "pre_training"
    post.init_from, post.optim.lr = "mid_training", 1.5e-4
    pre.steps, post.steps = 320_000, 200_000
    return Chain(pre, middle, post)


def short() -> Config:
    """A short run from the weights of a drift."""
    config = base(FlowMatching())
    config.steps, config.optim.lr = 80_000, 1e-4
    return config


def from_edm2() -> Config:
    """The shape and weights of EDM2-S at 64 x 64."""
    config = base(Lagrangian())
    config.network = network(
        EDM2UNet,
        image_size=64,
        width=192,
        channel_mult=(1, 2, 3, 4),
        blocks=3,
        attention_resolutions=(16, 8),
        num_classes=1000,
        convention="edm",
    )
    config.init_from = "teachers/edm2"
    config.optim = Optim(name=Optimizer.radam, lr=1e-3, warmup=1000)
    return config


def edm2_mid() -> Config:
    """Mid-training from EDM2-S, on its trajectories; the paper's settings at 64 x 64 are not public."""
    config = from_edm2()
    config.objective = MidTraining(target=Target.endpoint)
    config.teacher = config.init_from
    config.trajectories = Trajectories(Solver.dpm_solver, 16, Grid.log_snr, low=0.0062, start=Start.data)
    return config


ROWS: dict[str, Callable[[], Config | Chain]] = {
    **objective_configs(base),
    "mid_training": mid,
    **straightening_configs(short, RUN),
    "pipeline": pipeline,
    "from_edm2": from_edm2,
    "edm2_mid_training": edm2_mid,
    **{f"edm2_{name}": row for name, row in straightening_configs(from_edm2, "teachers/edm2").items()},
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    sizes: dict[str, Any] = {
        "image_size": 32,
        "width": 16,
        "channel_mult": (1, 1, 2),
        "blocks": 1,
        "attention_resolutions": None,
    }
    tiny = partial(smoke, trajectory_steps=8, **sizes)
    return select(choice, ROWS, {"small": small, "smoke": tiny, "taught": distil_init})
