"""scikit-learn's 8x8 scanned digits, class-conditional: the data set of the demo.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
"""

from collections.abc import Callable
from typing import Any

from flowmaps.objectives.mid_training import Target
from training.config import Config, Data, Decay, Optim, Optimizer, Solver, Trajectories, network, objective
from training.config_rows import Chain, method_rows, select, straightening_rows


def base(method: str, **options: Any) -> Config:
    return Config(
        data=Data(name="digits"),
        network=network(
            "UNet",
            image_size=8,
            channels=1,
            width=32,
            channel_mult=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            num_classes=10,
        ),
        objective=objective(method, **options),
        base_std=0.5,
        optim=Optim(name=Optimizer.adamw, lr=2e-3, warmup=50, decay=Decay.cosine),
        steps=1500,
        batch=64,
        ema=(0.99,),
        log_every=50,
        sample_every=500,
        checkpoint_every=500,
    )


def guided(method: str, **options: Any) -> Config:
    """A row with guidance baked in; the network takes its weight if it is drawn."""
    config = base(method, **options)
    config.data.label_dropout = 0.1
    config.network.guidance = "guidance_max" in options
    return config


def smoke(config: Config) -> None:
    """Seconds on two cores: every part runs, nothing is learned."""
    config.network.width = 16
    config.steps, config.batch = 20, 16
    config.log_every = config.sample_every = config.checkpoint_every = 5


def edm2(method: str, **options: Any) -> Config:
    """A row with the magnitude-preserving network of the same size, at the learning rate that it bears."""
    config, net = base(method, **options), base(method).network
    sizes = {name: getattr(net, name) for name in ("image_size", "channels", "width", "channel_mult", "blocks")}
    config.network = network("EDM2UNet", **sizes, attention_resolutions=(4,), num_classes=10)
    config.optim.lr = 1e-1
    return config


def mid(steps: int, **options: Any) -> Config:
    """Mid-training on the trajectories of the drift in runs/digits-flow, from its weights."""
    config = base("mid_training", **options)
    config.init_from = config.teacher = "runs/digits-flow"
    config.trajectories = Trajectories(solver=Solver.heun, steps=8)
    config.steps = steps
    return config


def pipeline(method: str, **options: Any) -> Chain:
    """Flow matching, mid-training on its trajectories, and post-training by ``method``."""
    target = Target.endpoint if method == "consistency" else Target.pairs
    middle, post = mid(750, target=target), base(method, **options)
    middle.init_from = middle.teacher = "pre_training"
    post.init_from, post.steps = "mid_training", 750
    return Chain(base("flow_matching"), middle, post)


def short(method: str) -> Config:
    """A fine-tune."""
    config = base(method)
    config.steps, config.optim.lr = 500, 6e-4
    return config


def started(method: str, teacher: str, **options: Any) -> Config:
    """A row that starts from the weights of flow matching, and with a ``teacher`` follows its drift."""
    config = base(method, **options)
    config.init_from, config.teacher = "runs/digits-flow", teacher
    return config


ROWS: dict[str, Callable[[], Config | Chain]] = {
    **method_rows(base),
    "consistency": lambda: base("consistency", stage_steps=200),
    "lagrangian_distilled": lambda: started("lagrangian", "runs/digits-flow"),
    "lagrangian_started": lambda: started("lagrangian", ""),
    "lagrangian_edm2": lambda: edm2("lagrangian"),
    "mid_training": lambda: mid(1500),
    **straightening_rows(lambda: short("flow_matching"), "runs/digits-flow"),
    "pipeline": lambda: pipeline("lagrangian"),
    "pipeline_mean_flow": lambda: pipeline("mean_flow"),
    "pipeline_consistency": lambda: pipeline("consistency", stage_steps=200),
    "lagrangian_guided": lambda: guided("lagrangian", guidance_max=4.0),
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    return select(choice, ROWS, {"smoke": smoke})
