"""scikit-learn's 8x8 scanned digits, class-conditional: the data set of the demo.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
"""

from collections.abc import Callable
from functools import partial

from flowmaps.networks import DiT, EDM2UNet, IMFDiT, UNet
from flowmaps.objectives import Consistency, FlowMatching, Lagrangian, MeanFlow, MidTraining, Objective
from flowmaps.objectives.mid_training import Target
from training.config import Config, Data, Decay, Optim, Optimizer, Solver, Trajectories, network
from training.config_rows import (
    Chain,
    decouple,
    improve,
    objective_configs,
    pixels,
    select,
    smoke,
    straightening_configs,
)


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="digits"),
        network=network(
            UNet,
            image_size=8,
            channels=1,
            width=32,
            channel_mult=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            num_classes=10,
        ),
        objective=objective,
        base_std=0.5,
        optim=Optim(name=Optimizer.adamw, lr=2e-3, warmup=50, decay=Decay.cosine),
        steps=1500,
        batch=64,
        ema=(0.99,),
        log_every=50,
        sample_every=500,
        checkpoint_every=500,
    )


def guided(objective: Objective) -> Config:
    """A row with guidance baked in; the network takes its weight if it is drawn."""
    config = base(objective)
    config.data.label_dropout = 0.1
    config.network.guidance = objective.guidance_max > 1
    return config


def edm2(objective: Objective) -> Config:
    """A row with the magnitude-preserving network of the same size, at the higher learning rate that it tolerates."""
    config = base(objective)
    config.network = network(
        EDM2UNet,
        image_size=8,
        channels=1,
        width=32,
        channel_mult=(1, 2),
        blocks=1,
        attention_resolutions=(4,),
        num_classes=10,
    )
    config.optim.lr = 1e-1
    return config


def dmf() -> Config:
    """Decoupled MeanFlow with a small DiT, from random weights; DMF itself starts from a drift."""
    config = base(MeanFlow())
    config.network = network(DiT, image_size=8, channels=1, patch=2, width=96, depth=6, heads=4, num_classes=10)
    decouple(config, blocks=4)
    return config


def imf() -> Config:
    """Improved MeanFlow with its network, small, without clipping; size, rate, noise and steps are ours.

    A fresh network returns 0 and learns slowly at the rate of the U-Net. After 500 steps FD-digits in one step was 12.9
    at 2e-3, 5.7 at 1e-2, and 10.4 with Muon at 1e-2 (seed 0, 1,000 samples).
    """
    config = base(MeanFlow())
    config.network = network(
        IMFDiT, image_size=8, channels=1, patch=2, width=64, depth=4, head_depth=2, heads=2, num_classes=10
    )
    improve(config)
    config.optim.lr = 1e-2
    return config


def pmf() -> Config:
    """Pixel MeanFlow with the same network; patches of 2 x 2 need no bottleneck. The rest is ours, as for imf.

    The rate is the best of docs/training.md for Muon and a small DiT.
    """
    config = imf()
    pixels(config)
    config.optim = Optim(name=Optimizer.muon, lr=1e-2, betas=(0.9, 0.95), warmup=50, decay=Decay.cosine, clip=0.0)
    return config


def mid(steps: int, target: Target = Target.pairs) -> Config:
    """Mid-training on the trajectories of the drift in runs/digits-flow, from its weights."""
    config = base(MidTraining(target=target))
    config.init_from = config.teacher = "runs/digits-flow"
    config.trajectories = Trajectories(solver=Solver.heun, steps=8)
    config.steps = steps
    return config


def pipeline(objective: Objective) -> Chain:
    """Flow matching, mid-training on its trajectories, and post-training by ``objective``."""
    target = Target.endpoint if isinstance(objective, Consistency) else Target.pairs
    middle, post = mid(750, target), base(objective)
    middle.init_from = middle.teacher = "pre_training"
    post.init_from, post.steps = "mid_training", 750
    return Chain(base(FlowMatching()), middle, post)


def short() -> Config:
    """A short run from the weights of a drift."""
    config = base(FlowMatching())
    config.steps, config.optim.lr = 500, 6e-4
    return config


def started(teacher: str = "") -> Config:
    """A row that starts from the weights of flow matching, and with a ``teacher`` distils its drift."""
    config = base(Lagrangian())
    config.init_from, config.teacher = "runs/digits-flow", teacher
    return config


ROWS: dict[str, Callable[[], Config | Chain]] = {
    **objective_configs(base),
    "consistency": lambda: base(Consistency(stage_steps=200)),
    "lagrangian_distilled": lambda: started(teacher="runs/digits-flow"),
    "lagrangian_started": started,
    "lagrangian_edm2": lambda: edm2(Lagrangian()),
    "mid_training": lambda: mid(1500),
    **straightening_configs(short, "runs/digits-flow"),
    "pipeline": lambda: pipeline(Lagrangian()),
    "pipeline_mean_flow": lambda: pipeline(MeanFlow()),
    "pipeline_consistency": lambda: pipeline(Consistency(stage_steps=200)),
    "lagrangian_guided": lambda: guided(Lagrangian(guidance_max=4.0)),
    "dmf": dmf,
    "imf": imf,
    "pmf": pmf,
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    return select(choice, ROWS, {"smoke": partial(smoke, width=16)})
