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

mean_flow            3.43 / 2.93 (second-hand): the authors' file for XL/2 and 240 epochs. A quarter of the rows has
                     s < t, times logit-normal (-0.4, 1) on the paper's axis (a diagonal row takes the smaller of
                     two), adaptive weight p = 1 with c = 0.01; guidance of weight 2.5 baked in where our s >= 0.25,
                     the target mixed of 0.2 of the data's velocity and 0.92 of the network's own guided drift. (Their
                     XL/2+ of 1,000 epochs has weight 2, 0.2 <= s <= 0.7 and a mix of 0.5.) 1,520 GPU hours,
                     second-hand.
improved_mean_flow   1.72 / 1.54 (second-hand; arXiv 2512.02012). Half of the rows have s < t, p = 1, c = 0.01; batch
                     1024, 640 epochs, warm-up 10 epochs, as in the authors' file for their B/2; the network is
                     conditioned on a guidance weight with density 1 / w on [1, 8], mixed 1 - 1 / w, and on the
                     interval that is guided; labels are left out on diagonal rows alone; no clipping. Here with
                     DiT-XL/2.
imf                  The same with its own network, whose conditions are tokens, and the second head: XL/2, 610 million
                     parameters (711 in training). imf_l2 1.86, imf_m2 2.27, imf_b2 3.39 in one step; all but their size
                     as imf_b2, the only one whose file is published. Latents of sd-vae-ft-mse scaled by channel, drawn
                     anew each step, float32, no clipping. Sample with --guidance=8 --guidance_interval=0.38,0.58 (XL/2
                     and, with 0.35,0.6, B/2), in two steps 4 and 0.36,0.64; L/2 and M/2 with 10.5, beyond what is
                     trained, and 0.4,0.6.
pmf                  3.12 in one step, straight in pixels, by pmf,perceptual, whose feature networks need weight files
                     (docs/maths.md#perceptual-terms); without them 9.56 for 3.53 after 160 epochs (pixel MeanFlow,
                     arXiv 2601.22158). B/16, the authors' file: batch 1024, 320 epochs, Muon; averages with half-lives
                     of 2, 1 and 0.5 million images, at most a twentieth of those seen. Sample with --guidance=8.5
                     --guidance_interval=0.3,0.9. pmf_l16 (2.52; 7 and 0.3,0.8) draws weights with density 1 / w^2 and
                     samples the average of 1 million. pmf_h16 (2.22; 7 and 0.4,0.8): noise of deviation 2, times with
                     logits (0, 0.8) or for a tenth of the rows uniform, 360 epochs, averages of 1, 2 and 0.5 million
                     images.
                     prepare_data.py imagenet --src=ILSVRC/train --size=256 --out=data/imagenet256-images
terminal_velocity    3.29 / 2.80 at weight 2, in 4 steps 1.99 at 1.75 (TVM, arXiv 2511.19797): the authors' file. Gaps
                     (-0.8, 1), then ends (-0.4, 1) on the paper's axis; 2,048 images per step, each with a row of the
                     map and a diagonal row: 4,096 rows here, whose images differ; losses over the squared weight;
                     teacher and the drift without a label from an EMA of 0.99; heads of 64, normalised queries and
                     keys, RMSNorm of tokens and modulation, the output for rows with a label times the weight,
                     latents (of sd-vae-ft-ema) scaled by channel, 300,000 steps without clipping.
dmf                  2.16 / 1.64, in 4 steps 1.51 (DMF, arXiv 2510.24474): MeanFlow from the drift of SiT-XL/2 with
                     REPA, imported to teachers/repa (docs/teachers.md). The first 20 blocks know s alone, the last 8
                     and the head t alone. 256 images per step, each with a diagonal row and one with s < t: 512 rows
                     here, whose images differ. Guidance of weight 2.5 baked in where our s >= 0.3, mixed of 0.6; a
                     row's loss is ln(exp(-w) r^2 + 0.01) + w with a learned w(s, t), |w| < 20.
soflow               2.96 / 2.66 (SoFlow, arXiv 2512.15657), two steps with fresh noise between (--sampler=stochastic).
                     The defaults of the objective are the authors': a quarter of the rows has s < t, start logits
                     (-0.2, 0.8), ends (1, 0.8), diagonal (0.2, 1), p = 1 with c = 0.01, a from 0.1 to 0.002; betas
                     (0.9, 0.99). Guidance of weight 3 where our s >= 0.2, the target mixed with a share of 0.75; theirs
                     fades in below 0.2 and is mixed there too.
alpha_flow           2.58 / 2.15 (second-hand, with longer training; alpha-Flow, arXiv 2510.20771): half of the rows has
                     s < t, a falls between 1/2 and 5/6 of the run; guidance as mean_flow's. Its times are not known:
                     MeanFlow's.
facm                 1.76 / 1.32 (FACM, arXiv 2507.03738), two steps with --sampler=stochastic, by distillation of
                     LightningDiT-XL/1 on the latents of another VAE, from its weights, in 250 epochs: batch 1024, power
                     averages 0.05 and 0.2. Here nothing is distilled: guidance of weight 1.75 where s >= 0.125 is that
                     of the network's own drift. To distil: --config.objective.guidance=1
                     --config.objective.guidance_times=0,1 --config.teacher=DIR, a drift with guidance baked in.
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
    FACM,
    AlphaFlow,
    FlowMatching,
    ImprovedMeanFlow,
    Lagrangian,
    MeanFlow,
    MidTraining,
    Objective,
    SoFlow,
    TerminalVelocity,
)
from flowmaps.objectives.mid_training import Target
from flowmaps.objectives.time_sampling import Times
from training.config import (
    Config,
    Data,
    Decay,
    DropoutRows,
    Optim,
    Optimizer,
    Precision,
    Solver,
    Trajectories,
    Weight,
    preset,
)
from training.config_rows import Chain, decouple, improve, perceptual, pixels, select, smoke

MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)  # of the latents, per channel
SCALE = tuple(1 / std for std in (4.85503674, 5.31922414, 3.93725398, 3.9870003))


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
    objective = MeanFlow(diagonal=0.75, adaptive=1.0, adaptive_floor=0.01)
    objective.guidance, objective.guidance_mix, objective.guidance_times = 2.5, 0.92, (0.25, 1.0)
    config = base(objective)
    config.data.dropout_rows = DropoutRows.diagonal
    return config


def improved(network: str = "dit-xl2-imagenet256") -> Config:
    config = base(ImprovedMeanFlow())
    config.network = preset(network)
    improve(config)
    config.batch, config.steps, config.optim.warmup = 1024, 800_000, 12_500
    return config


def imf(size: str) -> Config:
    config = improved(f"imf-{size}-imagenet256")
    config.data.latent_shift, config.data.latent_scale = MEAN, SCALE
    config.precision = Precision.fp32
    return config


def pmf(size: str, power: float = 1.0, **law: float) -> Config:
    config = base(ImprovedMeanFlow())
    config.data.root, config.network = "data/imagenet256-images", preset(f"pmf-{size}-imagenet256")
    pixels(config, power=power, **law)
    config.batch, config.steps, config.precision = 1024, 400_000, Precision.fp32
    config.ema, config.ema_ramp = (0.999645, 0.99929, 0.99858), 0.05  # half-lives of 2, 1, 0.5 million images
    return config


def pmf_l16() -> Config:
    config = pmf("l16", 2.0)
    config.ema = (0.99929, 0.999645, 0.99858)
    return config


def pmf_h16() -> Config:
    config = pmf("h16", time_mean=0.0, uniform=0.1, after=0.4)
    config.base_std, config.steps, config.ema = 2.0, 450_000, (0.99929, 0.999645, 0.99858)
    return config


def terminal() -> Config:
    weight = 2.0
    config = base(TerminalVelocity(guidance=weight))
    config.network = preset("dit-xl2-heads64-imagenet256", qk_norm=True, norm="rms", label_scale=weight)
    config.data.latent_shift, config.data.latent_scale = MEAN, SCALE
    config.batch, config.steps, config.optim.clip = 4096, 300_000, 0.0
    return config


def dmf() -> Config:
    config = base(MeanFlow())
    config.network = preset("dit-xl2-imagenet256", convention="velocity", base_std=1.0)
    decouple(config, blocks=20)
    config.init_from = "teachers/repa"
    config.batch, config.steps = 512, 400_000
    return config


def soflow() -> Config:
    config = base(SoFlow(guidance=3.0, guidance_mix=0.75, guidance_times=(0.2, 1.0)))
    config.optim.betas = (0.9, 0.99)
    return config


def alpha_flow() -> Config:
    objective = AlphaFlow(diagonal=0.5, ramp=(1 / 2, 5 / 6))
    objective.guidance, objective.guidance_mix, objective.guidance_times = 2.5, 0.92, (0.25, 1.0)
    return base(objective)


def facm() -> Config:
    config = base(FACM(guidance=1.75, guidance_times=(0.125, 1.0)))
    config.optim.betas, config.ema_widths = (0.9, 0.999), (0.05, 0.2)
    config.batch, config.steps, config.snapshot_every = 1024, 313_000, 20_000
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
    "imf": partial(imf, "xl2"),
    "imf_l2": partial(imf, "l2"),
    "imf_m2": partial(imf, "m2"),
    "imf_b2": partial(imf, "b2"),
    "pmf": partial(pmf, "b16"),
    "pmf_l16": pmf_l16,
    "pmf_h16": pmf_h16,
    "terminal_velocity": terminal,
    "dmf": dmf,
    "soflow": soflow,
    "alpha_flow": alpha_flow,
    "facm": facm,
    "cmt": cmt,
}


def get_config(choice: str = "mean_flow") -> Config | Chain:
    small = partial(smoke, trajectory_steps=8, patch=8, width=32, depth=2, heads=2)
    return select(choice, ROWS, {"smoke": small, "perceptual": perceptual})
