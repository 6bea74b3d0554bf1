"""Your own images, in a folder or a zip file, cropped to squares and resized to 64 x 64.

python scripts/train.py --config=configs/folder.py:lagrangian --config.data.root=my/images --workdir=runs/mine --dry_run
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.root=my/images --workdir=runs/mine
python scripts/train.py --config=configs/folder.py:lagrangian --config.data.name=zip --config.data.root=my.zip ...

Class-conditional with --config.network.num_classes=N (sub-folders or dataset.json; --dry_run lists the classes), grey
images with --config.network.channels=1. Other sizes with --config.network.image_size=N, a multiple of 8, and attention
at resolutions that they have: 128 pixels with --config.network.attention_resolutions=32,16, 48 with 12,6.
The settings are those of Boffi et al. 2025 for CelebA-64 (arXiv 2505.18825, table 3) at a learning rate for this U-Net;
not yet run by us.

from_edm2 is for ImageNet in 1,000 sub-folders: it starts from edm2-img64-s, imported to teachers/edm2 (docs/teachers.md
says how); with ",taught" it also distils its drift.
"""

from functools import partial

from flowmaps.networks import EDM2UNet, UNet
from flowmaps.objectives import Lagrangian, MidTraining, Objective
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


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="folder", workers=4),
        network=network(
            UNet,
            image_size=64,
            channels=3,
            width=128,
            channel_mult=(1, 2, 3, 4),
            blocks=3,
            attention_resolutions=(16, 8),
        ),
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


def mid() -> Config:
    """Mid-training from EDM2-S, on its trajectories; the paper's settings at 64 x 64 are not public."""
    config = from_edm2()
    config.objective = MidTraining(target=Target.endpoint)
    config.teacher = config.init_from
    config.trajectories = Trajectories(Solver.dpm_solver, 16, Grid.log_snr, low=0.0062, start=Start.data)
    return config


ROWS = objective_configs(base) | {"from_edm2": from_edm2, "mid_training": mid}
ROWS |= straightening_configs(from_edm2, "teachers/edm2")


def get_config(choice: str = "lagrangian") -> Config | Chain:
    small = partial(smoke, trajectory_steps=8, width=16, channel_mult=(1, 1, 2), blocks=1, attention_resolutions=(16,))
    return select(choice, ROWS, {"smoke": small, "taught": distil_init})
