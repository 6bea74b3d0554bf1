"""ImageNet at 256 x 256 as latents of 32 x 32, DiT-XL/2 (675 million parameters), 1,000 classes.

python scripts/prepare_data.py latents --src=ILSVRC/train --vae=stabilityai/sd-vae-ft-mse --flip --out=data/imagenet256
python scripts/train.py --config=configs/imagenet256.py:mean_flow --workdir=runs/mean-flow --dry_run
torchrun --nproc_per_node=8 scripts/train.py --config=configs/imagenet256.py:mean_flow --workdir=runs/mean-flow
python scripts/fid.py --checkpoint=runs/mean-flow --reference=VIRTUAL_imagenet256_labeled.npz --num=50000 --steps=1,2

Adam (0.9, 0.95) at a constant 1e-4, batch 256, 240 epochs = 1.2 million steps, EMA 0.9999, a tenth of the rows without
their label: MeanFlow's (Geng et al. 2025, arXiv 2505.13447). Clipping at 1 and bf16 (derivatives in float32) are ours.
FID-50k below is with guidance, in 1 / 2 steps; protocol: 50,000 samples, labels uniform, ADM's reference (moments of
the training images, ADM's crop), decoded by the same VAE; which papers balance classes or pick checkpoints is not
known. Nothing here was run by the authors of this package.

mean_flow            3.43 / 2.93 (second-hand). A quarter of the rows has s < t, times logit-normal (-0.4, 1) on the
                     paper's axis, adaptive weight p = 1; guidance baked in: effective weight 2.5 while its t is in
                     [0.3, 0.8] (second-hand, as is the cost of 1,520 GPU hours). The paper mixes 0.2 of the data's
                     velocity with 0.92 of the model's own to get 2.5; here the weight is 2.5 itself.
improved_mean_flow   1.72 / 1.54 (second-hand; arXiv 2512.02012). Half of the rows have s < t, p = 1; batch 1024, 640
                     epochs, warm-up 10 epochs, as in the authors' file for their B/2; the network is conditioned on a
                     guidance weight drawn uniformly from [1, 8] (the paper's density falls, and it conditions on the
                     range of times too). Their XL/2 takes conditions as tokens and has 610 million parameters.
terminal_velocity    3.29 / 2.80 at weight 2, in 4 steps 1.99 at 1.75 (TVM, ICLR 2026). Gap times (-0.8, 1) and ends
                     (-0.4, 1) on the paper's axis, both terms with equal weight, teacher EMA 0.99, normalised queries
                     and keys; its RMSNorm of the modulation is not here. Batch and rate: MeanFlow's, a guess.
lagrangian           Not published at this size: the objective as in Boffi et al. 2025, all else as MeanFlow, without
                     guidance.
cmt                  3.34 in one step for 760 GPU hours in all (second-hand; Hu et al. 2025, arXiv 2509.24526): a
                     chain of a small guided drift (DiT-B/4, 131 million; 38 GPU hours), mid-training of XL/2 on its
                     trajectories (135; rate, betas and EMA from the authors' later code) and MeanFlow from there
                     (587). Steps are those shares of MeanFlow's 1.2 million; solver and grid are a guess.
"""

from collections.abc import Callable
from functools import partial

from flowmaps.objectives import (
    FlowMatching,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    MidTraining,
    Objective,
    TerminalVelocity,
)
from flowmaps.objectives.mid_training import Target
from flowmaps.objectives.time_sampling import Times
from training.config import (
    Config,
    Data,
    Decay,
    Optim,
    Optimizer,
    Precision,
    Solver,
    Trajectories,
    Weight,
    preset,
)
from training.config_rows import Chain, select, smoke


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="prepared", root="data/imagenet256", workers=4, label_dropout=0.1),
        network=preset("dit-xl2-imagenet256"),
        objective=objective,
        base_std=1.0,
        optim=Optim(name=Optimizer.adamw, lr=1e-4, betas=(0.9, 0.95), warmup=0),
        steps=1_200_000,
        batch=256,
        precision=Precision.bf16,
        ema=(0.9999,),
        log_every=100,
        sample_every=25_000,
        checkpoint_every=5000,
    )


def mean_flow() -> Config:
    return base(
        MeanFlow(diagonal=0.75, adaptive=1.0, times=Times.logit_normal, guidance=2.5, guidance_times=(0.2, 0.7))
    )


def improved() -> Config:
    config = base(ImprovedMeanFlow(diagonal=0.5, adaptive=1.0, times=Times.logit_normal, guidance_max=8.0))
    config.network.guidance = True
    config.batch, config.steps, config.optim.warmup = 1024, 800_000, 12_500
    return config


def terminal() -> Config:
    config = base(TerminalVelocity(times=Times.gap, time_mean=(0.4, -0.8), diagonal=0.5, guidance=2.0))
    config.network.qk_norm = True
    return config


def lagrangian() -> Config:
    config = base(Lagrangian())
    config.weight = Weight(learned=True)
    return config


def cmt() -> Chain:
    pre = base(FlowMatching(guidance=2.5, times=Times.logit_normal))
    pre.network, pre.steps = preset("dit-b4-imagenet256"), 400_000
    middle = base(MidTraining(target=Target.pairs))
    middle.teacher = "pre_training"
    middle.trajectories = Trajectories(solver=Solver.heun, steps=16)
    middle.steps, middle.ema = 107_000, (0.999,)
    middle.optim.decay = Decay.linear
    post = mean_flow()
    post.init_from, post.steps = "mid_training", 463_000
    return Chain(pre, middle, post)


ROWS: dict[str, Callable[[], Config | Chain]] = {
    "lagrangian": lagrangian,
    "mean_flow": mean_flow,
    "improved_mean_flow": improved,
    "terminal_velocity": terminal,
    "cmt": cmt,
}


def get_config(choice: str = "mean_flow") -> Config | Chain:
    small = partial(smoke, trajectory_steps=8, patch=8, width=32, depth=2, heads=2)
    return select(choice, ROWS, {"smoke": small})
