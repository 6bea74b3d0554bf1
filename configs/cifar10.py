"""CIFAR-10, 32 x 32 colour, unconditional: the setting of Boffi et al. 2025 (arXiv 2505.18825), table 3.

python scripts/train.py --config=configs/cifar10.py:lagrangian --config.data.root=data --workdir=runs/cifar10
python scripts/train.py --config=configs/cifar10.py:lagrangian --config.data.download --workdir=runs/cifar10

The paper's data (50,000 training images, no augmentation), batch 512, 400,000 steps (204.8 million images), RAdam with
lr / sqrt(max(step / 35,000, 1)), clipping at 1, share of diagonal rows 0.75, dropout 0.13, learned weight and EMA
0.9999. Its network is EDM2's with forced weight normalisation, which bears lr 1e-2; until that is here, the plain U-Net
of the same widths at 5e-4. The paper trains about 24 hours on 4 H100 and reports, best checkpoint for each step count,
FID-50k 8.10 / 4.37 / 3.34 / 3.33 at 1 / 2 / 4 / 8 steps. Not run by the authors of this package, who have no GPU yet.
"""

from training.config import Config, Data, Decay, Optim, Optimizer, Weight, network, objective, select


def base(method: str) -> Config:
    return Config(
        data=Data(name="cifar10"),
        network=network(
            "UNet",
            image_size=32,
            channels=3,
            width=128,
            channel_mult=(2, 2, 2),
            blocks=4,
            attention_resolutions=(16,),
            dropout=0.13,
        ),
        objective=objective(method),
        base_std=0.5,
        weight=Weight(learned=True),
        optim=Optim(name=Optimizer.radam, lr=5e-4, warmup=1000, decay=Decay.inverse_sqrt, decay_start=35_000),
        steps=400_000,
        batch=512,
        ema=(0.9999, 0.999),
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5000,
    )


def smoke(config: Config) -> None:
    """Seconds on two cores: every part runs, nothing is learned."""
    net = config.network
    net.width, net.channel_mult, net.blocks = 16, (1, 2, 2), 1
    config.steps, config.batch = 20, 16
    config.log_every = config.sample_every = config.checkpoint_every = 5


ROWS = {
    "flow_matching": lambda: base("flow_matching"),
    "lagrangian": lambda: base("lagrangian"),
}


def get_config(choice: str = "lagrangian") -> Config:
    return select(choice, ROWS, {"smoke": smoke})
