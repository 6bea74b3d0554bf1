"""ImageNet at 512 x 512, 1,000 classes: EDM2-XXL (1.52 billion parameters) on latents of 64 x 64, and pixel MeanFlow.

python scripts/prepare_data.py latents --src=ILSVRC/train --size=512 --vae=stabilityai/sd-vae-ft-mse \\
    --vae_range=0,1 --out=data/imagenet512
python scripts/import_checkpoint.py --format=edm2 --src=edm2-img512-xxl-0939524-0.070.pkl --out=teachers/edm2-xxl
torchrun --nproc_per_node=8 scripts/train.py --config=configs/imagenet512.py:cmt --workdir=runs/imagenet512
python scripts/fid.py --checkpoint=runs/imagenet512/post_training --reference=img512.pkl --num=50000 --steps=1,2

Consistency mid-training of Hu et al. 2025 (arXiv 2509.24526), a chain from an import, read in the authors' scripts:

mid_training   12.8 million rows (100,000 steps of 8 trajectories of 16 steps, from noise alone, DPM-Solver++), Adam
               2e-4 falling to 0, EMA 0.999, teacher EDM2-XXL without guidance. Its loss is E-LatentLPIPS, whose weights
               are not here: pseudo-Huber instead, a guess.
post_training  16 million rows (125,000 steps of 128), consistency distillation by one Heun step of the teacher,
               q = 1024 from the first step on, log noise level normal (-0.8, 1.6), Adam (0.9, 0.99) at 1e-6, EMA
               0.9999. Theirs guides the teacher by a smaller EDM2 (weight 2.05) and has a Huber loss with another
               weight over time.

FID-50k after 28.8 million images, second-hand: 3.38 / 1.84 in 1 / 2 steps; the teacher's 1.81 takes 63 x 2 evaluations.
Protocol as in EDM2: 50,000 samples, labels uniform, NVIDIA's Inception, its statistics of the training images in ADM's
crop (img512.pkl, read as it is). No cost in GPU hours was found.
imf            improved MeanFlow (arXiv 2512.02012) as configs/imagenet256.py:imf has it. Published at 256 alone:
               patches of 4 x 4 latents, for as many tokens, and the latents of this file are ours.
pmf            3.70 in one step (pixel MeanFlow, arXiv 2601.22158), B/32, straight in pixels, noise of deviation 2, as
               configs/imagenet256.py:pmf; sample with --guidance=6.5 --guidance_interval=0.3,0.9. pmf_l32 (2.75; 7.5
               and 0.4,0.8): noise of 4, both times with logits (0, 0.8). The figures need the variant perceptual.
               pmf_h32 (2.48; 5.5 and 0.4,0.9): noise of 4, those times or for a tenth of the rows uniform ones, 360
               epochs, averages of 0.5, 1 and 2 million images.
               prepare_data.py imagenet --src=ILSVRC/train --size=512 --out=data/imagenet512-images

The latents have the scaling of EDM2's own training, whose VAE takes and gives pixels in [0, 1] (--vae_range=0,1; a set
that was made with another range is refused). Not run by the authors of this package.
"""

from collections.abc import Callable
from functools import partial

from flowmaps.objectives import Consistency, ImprovedMeanFlow, MidTraining, Objective
from flowmaps.objectives.mid_training import Distance, Target
from training.config import (
    Config,
    Data,
    Decay,
    Grid,
    Optim,
    Optimizer,
    Precision,
    Solver,
    Trajectories,
    preset,
)
from training.config_rows import Chain, improve, perceptual, pixels, select, smoke

MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the latents, per channel
TEACHER = "teachers/edm2-xxl"


def base(objective: Objective) -> Config:
    return Config(
        data=Data(
            name="prepared",
            root="data/imagenet512",
            workers=4,
            latent_shift=MEAN,
            latent_scale=tuple(0.5 / std for std in STD),
        ),
        network=preset("edm2-xxl-imagenet512", convention="edm"),
        objective=objective,
        base_std=0.5,
        optim=Optim(name=Optimizer.adamw, lr=2e-4, warmup=0, decay=Decay.linear),
        steps=100_000,
        batch=128,
        precision=Precision.bf16,
        ema=(0.999,),
        log_every=100,
        sample_every=5000,
        checkpoint_every=2500,
    )


def cmt() -> Chain:
    middle = base(MidTraining(target=Target.endpoint, distance=Distance.huber))
    middle.init_from = middle.teacher = TEACHER
    middle.trajectories = Trajectories(solver=Solver.dpm_solver, steps=16, grid=Grid.log_snr, low=0.0062)
    post = base(Consistency(q=1024.0, stage_steps=0, sigma_mean=-0.8, sigma_std=1.6))
    post.init_from, post.teacher = "mid_training", TEACHER
    post.optim = Optim(name=Optimizer.adamw, lr=1e-6, betas=(0.9, 0.99), warmup=0)
    post.steps, post.ema = 125_000, (0.9999,)
    return Chain(None, middle, post)


def imf() -> Config:
    config = base(ImprovedMeanFlow())
    config.network = preset("imf-xl2-imagenet256", image_size=64, patch=4, data_std=0.5)
    improve(config)
    config.optim = Optim(name=Optimizer.adamw, lr=1e-4, betas=(0.9, 0.95), warmup=12_500, clip=0.0)
    config.batch, config.steps, config.precision, config.ema = 1024, 800_000, Precision.fp32, (0.9999,)
    return config


def pmf(size: str, noise: float, time_mean: float, **law: float) -> Config:
    config = base(ImprovedMeanFlow())
    config.data = Data(name="prepared", root="data/imagenet512-images", workers=4)
    config.network, config.base_std = preset(f"pmf-{size}-imagenet512"), noise
    pixels(config, time_mean, **law)
    config.batch, config.steps, config.precision = 1024, 400_000, Precision.fp32
    config.ema, config.ema_ramp = (0.999645, 0.99929, 0.99858), 0.05  # half-lives of 2, 1, 0.5 million images
    return config


def pmf_h32() -> Config:
    config = pmf("h32", 4.0, 0.0, uniform=0.1, after=0.4)
    config.steps, config.ema = 450_000, (0.99858, 0.99929, 0.999645)
    return config


ROWS: dict[str, Callable[[], Config | Chain]] = {
    "cmt": cmt,
    "imf": imf,
    "pmf": partial(pmf, "b32", 2.0, -0.8),
    "pmf_l32": partial(pmf, "l32", 4.0, 0.0, after=0.4),
    "pmf_h32": pmf_h32,
}


def get_config(choice: str = "cmt") -> Config | Chain:
    small = partial(
        smoke,
        trajectory_steps=8,
        width=16,
        channel_mult=(1, 1, 2),
        blocks=1,
        attention_resolutions=(16,),
        depth=2,
        heads=2,
    )
    return select(choice, ROWS, {"smoke": small, "perceptual": perceptual})
