"""CIFAR-10, 32 x 32 colour, unconditional: the setting of Boffi et al. 2025 (arXiv 2505.18825), table 3.

python scripts/train.py --config=configs/cifar10.py:lagrangian --config.data.root=data --workdir=runs/cifar10
python scripts/train.py --config=configs/cifar10.py:lagrangian --config.data.download --workdir=runs/cifar10
python scripts/fid.py --checkpoint=runs/cifar10 --reference=cifar10-train --num=50000 --steps=1,2,4,8 --repeats=3

The paper's data (50,000 training images, no augmentation), network (EDM2's with forced weight normalisation, 54.67
million parameters), batch 512, 400,000 steps (204.8 million images), RAdam with 1e-2 / sqrt(max(step / 35,000, 1)),
clipping at 1, share of diagonal rows 0.75, dropout 0.13, learned weight and EMA 0.9999; about 24 hours on 4 H100.
Append ",ddpmpp" for EDM's U-Net of 55.7 million parameters, at lr 5e-4 (a guess).

Published FID of 50,000 samples to the training images, at 1 / 2 / 4 / 8 steps, and its protocol. Extractors and
selection differ, which is worth a few tenths. [2]: as reported by others. No number was found for rows not listed.

lagrangian            8.10 / 4.37 / 3.34 / 3.33. Own port of Inception, resized bilinearly, statistics of the training
                      images, seed 42, the best checkpoint for each step count; one checkpoint (27) has 8.82 / 4.49 /
                      3.34 / 3.65
progressive           12.81 / 8.43 / 5.96 / 5.07, with midpoints; the same protocol and budget
progressive_uniform   13.61 / 7.95 / 6.03 / 5.32; same protocol and budget
eulerian              none: it diverged in the paper. None for eulerian_slim either
flow_matching         2.07 with Heun in 50 evaluations (facebookresearch/flow_matching; users report 2.2 to 3.1)
soflow                2.86 / 2.28, two steps with fresh noise between (arXiv 2512.15657): 819 million images
mean_flow             2.92 / - [2] (arXiv 2505.13447): 819 million images, some 370 H200 hours, EDM's augmentation;
                      torchmetrics, i.e. torch-fidelity's Inception
shortcut              27.28 / 16.04 / 9.63 / 7.10 [2], not by its authors
consistency           3.60 / 2.11 [2] (arXiv 2406.14548) after 51.2 million images from EDM's weights; NVIDIA's
                      Inception. From random weights, as here, none was found
mid_training, post_training   2.74 / 1.97 [2] (arXiv 2509.24526) after 51.2 million images in both; NVIDIA's Inception
straightening         4.80 in 6 Euler steps, and reflow 4.33 [2] (arXiv 2312.16414); clean-fid
from_edm              none as a map; the teacher's own 1.79 in 35 evaluations, conditional (arXiv 2206.00364)
from_rectified_flow, from_ddpm   none as a map; the teachers' own: arXiv 2209.03003, 2006.11239

Rows that start from published weights (docs/teachers.md), and also distil their drift with ",taught": from_edm
(edm-cifar10-32x32-cond-vp), from_rectified_flow (DDPM++), from_ddpm (google/ddpm-cifar10-32), each imported to
teachers/NAME first. Consistency mid-training: the row mid_training with --workdir=runs/cifar10-mid, then post_training,
from edm-cifar10-32x32-uncond-vp imported to teachers/edm-uncond; optimiser, rates, steps, dropout 0.2, EMAs, LPIPS and
q = 4096 are those of the authors' scripts [2]. Only ours: the last of 16 steps goes from noise level 0.002 to none.

mean_flow is the second version of the authors' PyTorch file (start logits (0.6, 1.6), ends (4, 1.6), 3/4 of the rows
diagonal, lr 6e-4, three averages); dropout 0.2, warm-up and augmentation are second-hand. soflow is the authors'
setting: noise of deviation 1, start logits (0.9, 1.6), ends (4, 1.6), no diagonal rows, a from 1 to 1/3200, dropout in
both jumps, augmentation; clipping is ours. imf and pmf are improved and pixel MeanFlow with their own network (33
million parameters, 47 in training), class-conditional and guided, whose papers have ImageNet alone: objective, betas
and, for pmf, Muon and its rate are theirs; size, batch, steps, noise of deviation 0.5 and averages are ours; pmf has no
perceptual losses. improved_mean_flow (arXiv 2512.02012), alpha_flow, facm and consistency have the shares, times and
weights of their papers in the first row's setting. All rows cost what the first one does, times the step's cost
relative to lagrangian's (docs/maths.md), or less where they have fewer steps. Nothing here was run by
the authors of this package.
"""

from functools import partial
from typing import Any

from flowmaps.networks import IMFDiT
from flowmaps.objectives import (
    FACM,
    AlphaFlow,
    Consistency,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    MidTraining,
    Objective,
    SoFlow,
)
from flowmaps.objectives.mid_training import Distance, Target
from flowmaps.objectives.time_sampling import DiagonalDraw
from training.config import (
    Config,
    Data,
    Decay,
    Grid,
    Optim,
    Optimizer,
    Solver,
    Start,
    Trajectories,
    Weight,
    network,
    preset,
)
from training.config_rows import (
    Chain,
    distil_init,
    improve,
    objective_configs,
    pixels,
    select,
    smoke,
    straightening_configs,
)


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="cifar10"),
        network=preset("edm2-cifar10"),
        objective=objective,
        base_std=0.5,
        weight=Weight(learned=True),
        optim=Optim(name=Optimizer.radam, lr=1e-2, warmup=0, decay=Decay.inverse_sqrt, decay_start=35_000),
        steps=400_000,
        batch=512,
        ema=(0.9999, 0.999),
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5000,
    )


def ddpmpp(config: Config) -> None:
    """The network that EDM trained: an ordinary one, at an ordinary learning rate."""
    config.network = preset("ddpm++-cifar10")
    config.optim.lr, config.optim.warmup = 5e-4, 1000


def started(name: str, base_std: float, **options: Any) -> Config:
    """A row whose network has the shape and the weights of the import in teachers/``name``."""
    config = base(Lagrangian())
    config.network = preset("ddpm++-cifar10", base_std=base_std, **options)
    config.init_from, config.base_std = f"teachers/{name}", base_std
    config.optim = Optim(name=Optimizer.radam, lr=1e-4, warmup=1000)
    config.weight.learned, config.steps = False, 100_000
    return config


def from_edm() -> Config:
    """EDM's class-conditional network, conditioned on its augmentation as in its own training."""
    config = started("edm", 0.5, convention="edm", num_classes=10, augment_dim=9)
    config.data.augment = 0.12
    return config


def cmt(stage: Config) -> Config:
    """Set the common part of both stages of consistency mid-training: EDM's unconditional VP network, RAdam."""
    stage.network = preset("ddpm++-cifar10", base_std=0.5, convention="edm", augment_dim=9)
    stage.network.dropout = 0.2
    stage.optim = Optim(name=Optimizer.radam, lr=2e-4, warmup=0, decay=Decay.linear)
    stage.weight.learned, stage.batch, stage.steps, stage.ema = False, 128, 300_000, (0.999,)
    return stage


def mid_training() -> Config:
    """8 trajectories of 16 steps per batch, from noised data, each state to the end by LPIPS."""
    config = cmt(base(MidTraining(target=Target.endpoint, distance=Distance.lpips)))
    config.trajectories = Trajectories(Solver.dpm_solver, 16, Grid.log_snr, low=0.0062, start=Start.data)
    config.init_from = config.teacher = "teachers/edm-uncond"
    return config


def post_training() -> Config:
    """Consistency tuning at the final gap from the first step on, from mid-training's average."""
    config = cmt(base(Consistency(q=4096.0, stage_steps=0)))
    config.init_from, config.steps, config.ema, config.optim.lr = "runs/cifar10-mid", 100_000, (0.9999,), 1e-4
    return config


def unweighted(objective: Objective) -> Config:
    """A row without a learned weight: the objective has its own."""
    config = base(objective)
    config.weight.learned = False
    return config


def rectified() -> Config:
    """The published rectified flow."""
    return started("rectified_flow", 1.0, convention="rectified_flow", **DDPM)


def short() -> Config:
    """The fine-tuning of Nguyen et al. 2024 (arXiv 2312.16414), in batches of 60 for their 15: 15 paths of 4 steps."""
    config = rectified()
    config.optim = Optim(name=Optimizer.adamw, lr=2e-4, warmup=5000)
    config.batch, config.steps, config.ema = 60, 12_000, (0.9999,)
    return config


def mean_flow() -> Config:
    """The second version of the authors' PyTorch file."""
    objective = MeanFlow(diagonal=0.75, adaptive=0.75, time_mean=(0.6, 4.0), time_std=(1.6, 1.6))
    objective.diagonal_draw = DiagonalDraw.single
    config = unweighted(objective)
    config.network = preset("ddpm++-cifar10", augment_dim=9)
    config.network.dropout, config.data.augment = 0.2, 0.12
    config.optim = Optim(name=Optimizer.adamw, lr=6e-4, warmup=10_000)
    config.batch, config.steps, config.ema = 1024, 800_000, (0.9999, 0.99995, 0.9996)
    return config


def soflow() -> Config:
    """The authors' file: no diagonal rows, and dropout in both jumps."""
    objective = SoFlow(diagonal=0.0, adaptive=0.75, adaptive_floor=1e-3, alpha_start=1.0, alpha_end=1 / 3200)
    objective.diagonal_draw, objective.time_mean, objective.time_std = DiagonalDraw.single, (0.9, 4.0), (1.6, 1.6)
    config = unweighted(objective)
    config.network = preset("ddpm++-cifar10", augment_dim=9)
    config.network.dropout, config.data.augment = 0.3, 0.12
    config.optim = Optim(name=Optimizer.radam, lr=1e-4, warmup=0)
    config.batch, config.steps, config.base_std = 1024, 800_000, 1.0
    return config


def imf() -> Config:
    """Improved MeanFlow with its network, conditional."""
    config = unweighted(ImprovedMeanFlow())
    config.network = network(IMFDiT, image_size=32, channels=3, patch=2, width=384, depth=18, heads=6, num_classes=10)
    improve(config)
    config.optim = Optim(name=Optimizer.adamw, lr=1e-4, betas=(0.9, 0.95), warmup=1000, clip=0.0)
    return config


def pmf() -> Config:
    """Pixel MeanFlow; patches of 4 x 4 through a bottleneck."""
    config = imf()
    config.network.patch, config.network.bottleneck = 4, 32
    pixels(config)
    return config


DDPM = {"channel_mult": (1, 2, 2, 2)}
ROWS = objective_configs(base) | {
    "mean_flow": mean_flow,
    **straightening_configs(short, "teachers/rectified_flow"),
    "improved_mean_flow": lambda: unweighted(ImprovedMeanFlow(diagonal=0.5, adaptive=1.0)),
    "imf": imf,
    "pmf": pmf,
    "soflow": soflow,
    "alpha_flow": lambda: unweighted(AlphaFlow()),
    "consistency": lambda: unweighted(Consistency()),
    "facm": lambda: unweighted(FACM()),
    "mid_training": mid_training,
    "post_training": post_training,
    "from_edm": from_edm,
    "from_rectified_flow": rectified,
    "from_ddpm": lambda: started("ddpm", 1.0, convention="ddpm", variant="ddpm", blocks=2, data_std=1.0, **DDPM),
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    small = partial(smoke, trajectory_steps=8, width=16, channel_mult=(1, 2, 2), blocks=1, depth=2, heads=2)
    return select(choice, ROWS, {"ddpmpp": ddpmpp, "taught": distil_init, "smoke": small})
