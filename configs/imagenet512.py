"""ImageNet at 512 x 512 as latents of 64 x 64, EDM2-XXL (1.52 billion parameters), 1,000 classes.

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
The latents have the scaling of EDM2's own training, whose VAE takes and gives pixels in [0, 1] (--vae_range=0,1; a set
that was made with another range is refused). Not run by the authors of this package.
"""

from functools import partial

from flowmaps.objectives import Consistency, MidTraining, Objective
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
from training.config_rows import Chain, select, smoke

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


ROWS = {"cmt": cmt}


def get_config(choice: str = "cmt") -> Config | Chain:
    small = partial(smoke, trajectory_steps=8, width=16, channel_mult=(1, 1, 2), blocks=1, attention_resolutions=(16,))
    return select(choice, ROWS, {"smoke": small})
