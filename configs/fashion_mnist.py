"""Fashion-MNIST, 28 x 28 grey padded to 32 x 32, class-conditional: 60,000 photographs of garments.

python scripts/train.py --config=configs/fashion_mnist.py:lagrangian --config.data.root=data --workdir=runs/fashion
python scripts/train.py --config=configs/fashion_mnist.py:lagrangian,cpu --config.data.root=data --workdir=runs/fashion
python scripts/train.py --config=configs/fashion_mnist.py:pipeline,cpu --workdir=runs/fashion-chain

assets/fashion_mnist was made by flow_matching,cpu, lagrangian,cpu and soflow,cpu, each from the weights of the one
before; its card has the commands. FD-fashion_mnist of 5,000 samples to the held-out images at 1 / 2 / 4 / 8 steps is
2.6 / 1.4 / 1.2 / 0.9 (Euler on its drift: 138 / 39 / 8.1 / 2.6, and 0.8 at 64).
"""

from collections.abc import Callable
from dataclasses import replace

from flowmaps.networks import IMFDiT, UNet
from flowmaps.objectives import Consistency, FlowMatching, ImprovedMeanFlow, Lagrangian, MidTraining, Objective
from training.config import Config, Data, Decay, Optim, Optimizer, Precision, Solver, Trajectories, network
from training.config_rows import Chain, improve, objective_configs, select, smoke, straightening_configs


def base(objective: Objective) -> Config:
    """For one GPU: 874 images/s of `lagrangian` on an H100, eager (docs/performance.md)."""
    return Config(
        data=Data(name="fashion_mnist"),
        network=network(
            UNet,
            image_size=32,
            channels=1,
            width=64,
            channel_mult=(1, 2, 2),
            blocks=2,
            attention_resolutions=(16,),
            dropout=0.1,
            num_classes=10,
        ),
        objective=objective,
        base_std=0.5,
        optim=Optim(name=Optimizer.adamw, lr=1e-3, warmup=500, decay=Decay.cosine),
        steps=50_000,
        batch=256,
        precision=Precision.bf16,
        ema=(0.9995,),
        log_every=100,
        sample_every=5000,
        checkpoint_every=5000,
    )


def imf() -> Config:
    """Improved MeanFlow with its network, small, without clipping; all else but the objective is ours."""
    config = base(ImprovedMeanFlow())
    config.network = network(
        IMFDiT, image_size=32, channels=1, patch=4, width=256, depth=12, head_depth=6, heads=4, num_classes=10
    )
    improve(config)
    return config


def cpu(config: Config) -> None:
    """Under two hours on one CPU core: a narrow network, a fifth of the steps, batches of 64, Muon."""
    net = config.network
    if net.network_class is IMFDiT:  # 64 patches
        net.width, net.depth, net.head_depth, net.heads = 96, 4, 2, 3
    else:
        net.width, net.channel_mult, net.blocks, net.attention_resolutions, net.dropout = 16, (1, 2, 4, 4), 1, (8,), 0.0
    config.steps, config.batch, config.precision, config.ema = config.steps // 5, 64, Precision.fp32, (0.999,)
    config.optim = replace(config.optim, name=Optimizer.muon, muon_kernels=True, lr=10 * config.optim.lr, warmup=200)
    if isinstance(config.objective, Consistency):
        config.objective.stage_steps //= 5
    config.sample_every = config.checkpoint_every = 1000


def cpu_smoke(config: Config) -> None:
    cpu(config)
    smoke(config, trajectory_steps=8, width=16, depth=2, heads=2)


def mid(to_end: float = 0.0) -> Config:
    """Mid-training on the trajectories of the drift in runs/fashion-mnist-flow, from its weights."""
    config = base(MidTraining(to_end=to_end))
    config.init_from = config.teacher = "runs/fashion-mnist-flow"
    return config


def pipeline() -> Chain:
    """Flow matching, mid-training on its trajectories of 8 Heun steps, and Lagrangian self-distillation."""
    pre, middle, post = base(FlowMatching()), mid(to_end=0.5), base(Lagrangian())
    middle.init_from = middle.teacher = "pre_training"
    middle.trajectories = Trajectories(solver=Solver.heun, steps=8)
    post.init_from, post.optim.lr = "mid_training", 5e-4
    pre.steps, middle.steps, post.steps = 40_000, 5_000, 25_000
    return Chain(pre, middle, post)


def short() -> Config:
    """A short run from the weights of a drift."""
    config = base(FlowMatching())
    config.steps, config.optim.lr = 10_000, 3e-4
    return config


ROWS: dict[str, Callable[[], Config | Chain]] = {
    **objective_configs(base),
    "consistency": lambda: base(Consistency(stage_steps=6250)),
    "imf": imf,
    "mid_training": mid,
    "pipeline": pipeline,
    **straightening_configs(short, "runs/fashion-mnist-flow"),
}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    return select(choice, ROWS, {"cpu": cpu, "smoke": cpu_smoke})
