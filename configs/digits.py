"""scikit-learn's 8x8 scanned digits, class-conditional: the data set of the demo.

python scripts/train.py --config=configs/digits.py:lagrangian --workdir=runs/digits
"""

from typing import Any

from flowmaps.objectives.eulerian import Stop
from flowmaps.objectives.progressive import Middle
from training.config import Config, Data, Decay, Optim, Optimizer, network, objective, select


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


ROWS = {
    "flow_matching": lambda: base("flow_matching"),
    "lagrangian": lambda: base("lagrangian"),
    "lagrangian_slim": lambda: base("lagrangian", slim=True),
    "eulerian": lambda: base("eulerian"),
    "eulerian_slim": lambda: base("eulerian", stop=Stop.slim),
    "progressive": lambda: base("progressive"),
    "progressive_uniform": lambda: base("progressive", middle=Middle.uniform),
    "shortcut": lambda: base("shortcut"),
    "terminal_velocity": lambda: base("terminal_velocity"),
    "mean_flow": lambda: base("mean_flow"),
    "improved_mean_flow": lambda: base("improved_mean_flow"),
    "consistency": lambda: base("consistency", stage_steps=200),
    "lagrangian_guided": lambda: guided("lagrangian", guidance_max=4.0),
}


def get_config(choice: str = "lagrangian") -> Config:
    return select(choice, ROWS, {"smoke": smoke})
