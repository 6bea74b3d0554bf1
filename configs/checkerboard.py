"""The 4x4 checkerboard on [-1, 1]^2 of Boffi et al. 2025 (arXiv 2505.18825).

python scripts/train.py --config=configs/checkerboard.py:lagrangian --workdir=runs/checkerboard
"""

from typing import Any

from training.config import Config, Data, Decay, Optim, Optimizer, network, objective
from training.config_rows import Chain, method_rows, select, straightening_rows

DATA_STD = 0.577  # of a coordinate that is uniform on [-1, 1]: 1 / sqrt(3)


def base(method: str, **options: Any) -> Config:
    return Config(
        data=Data(name="checkerboard"),
        network=network("MLP", width=256, depth=4, data_std=DATA_STD, fourier_features=64, fourier_scale=2.5),
        objective=objective(method, **options),
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
    config = base("mid_training")
    config.init_from = config.teacher = "runs/checkerboard-flow"
    return config


def short(method: str) -> Config:
    """A fine-tune."""
    config = base(method)
    config.steps, config.optim.lr, config.optim.warmup = 500, 6e-4, 50
    return config


def smoke(config: Config) -> None:
    """Seconds on two cores: every part runs, nothing is learned."""
    config.network.width, config.steps, config.batch = 32, 20, 64
    config.log_every = config.sample_every = config.checkpoint_every = 5


ROWS = method_rows(base) | {
    "consistency": lambda: base("consistency", stage_steps=300, adaptive=0.0),
    "mid_training": mid,
    **straightening_rows(lambda: short("flow_matching"), "runs/checkerboard-flow"),
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    return select(choice, ROWS, {"smoke": smoke})
