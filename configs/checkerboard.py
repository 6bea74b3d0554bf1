"""The 4x4 checkerboard on [-1, 1]^2 of Boffi et al. 2025 (arXiv 2505.18825).

python scripts/train.py --config=configs/checkerboard.py:lagrangian --workdir=runs/checkerboard
"""

from functools import partial

from flowmaps.networks import MLP
from flowmaps.objectives import FACM, AlphaFlow, Consistency, FlowMatching, MidTraining, Objective, SoFlow
from training.config import Config, Data, Decay, Optim, Optimizer, network
from training.config_rows import Chain, objective_configs, select, smoke, straightening_configs

DATA_STD = 0.577  # of a coordinate that is uniform on [-1, 1]: 1 / sqrt(3)


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="checkerboard"),
        network=network(MLP, width=256, depth=4, data_std=DATA_STD, fourier_features=64, fourier_scale=2.5),
        objective=objective,
        base_std=DATA_STD,
        optim=Optim(name=Optimizer.adamw, lr=2e-3, warmup=100, decay=Decay.cosine),
        steps=2500,
        batch=512,
        ema=(0.999,),
        log_every=250,
        sample_every=1250,
        checkpoint_every=1250,
    )


def mid() -> Config:
    """Mid-training on the trajectories of the drift in runs/checkerboard-flow, from its weights."""
    config = base(MidTraining())
    config.init_from = config.teacher = "runs/checkerboard-flow"
    return config


def short() -> Config:
    """A short run from the weights of a drift."""
    config = base(FlowMatching())
    config.steps, config.optim.lr, config.optim.warmup = 500, 6e-4, 50
    return config


ROWS = objective_configs(base) | {  # no adaptive weights: in the plane they regress on another point than the mean
    "soflow": lambda: base(SoFlow(adaptive=0.0)),
    "alpha_flow": lambda: base(AlphaFlow(adaptive=0.0)),
    "facm": lambda: base(FACM(adaptive=0.0)),
    "consistency": lambda: base(Consistency(stage_steps=300, adaptive=0.0)),
    "mid_training": mid,
    **straightening_configs(short, "runs/checkerboard-flow"),
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    return select(choice, ROWS, {"smoke": partial(smoke, batch=64, width=32)})
