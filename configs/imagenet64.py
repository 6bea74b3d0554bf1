"""ImageNet at 64 x 64, 1,000 classes: set prepared by ``prepare_data.py imagenet --size=64 --out=data/imagenet64``.

python scripts/train.py --config=configs/imagenet64.py:lagrangian --workdir=runs/imagenet64 --dry_run
torchrun --nproc_per_node=8 scripts/train.py --config=configs/imagenet64.py:lagrangian --workdir=runs/imagenet64
python scripts/fid.py --checkpoint=runs/imagenet64 --reference=imagenet-64x64.npz --num=50000 --steps=1,2,4 --repeats=3

Nobody has published Lagrangian self-distillation on this set. The settings are those of Boffi et al. 2025 for 64 x 64
(arXiv 2505.18825, table 3: batch 256, 800,000 steps = 204.8 million images, RAdam with 1e-2 / sqrt(max(step / 35,000,
1)), clipping at 1, share of diagonal rows 0.75, learned weight, EMA 0.9999, bf16), the network is EDM2-S for this size
(arXiv 2312.02696: 280 million parameters), class-conditional. The paper trains its 124 million parameters about
48 hours on 4 H100; by parameters this is some 110 hours, a guess. To compare with, second-hand: FID-50k of the largest
EDM2 1.33 in 63 evaluations; in 1 / 2 steps sCT 2.04 / 1.48, CMT 1.78 / 1.32, ECT 2.49 / 1.67. Their protocol: 50,000
samples, labels uniform, NVIDIA's Inception, EDM's statistics of the 1.28 million training images in ADM's crop
(imagenet-64x64.npz, read as it is). Not run by the authors of this package.
"""

from functools import partial

from flowmaps.objectives import Lagrangian, Objective
from training.config import Config, Data, Decay, Optim, Optimizer, Precision, Weight, preset
from training.config_rows import Chain, select, smoke


def base(objective: Objective) -> Config:
    return Config(
        data=Data(name="prepared", root="data/imagenet64", workers=4),
        network=preset("edm2-s-imagenet64"),
        objective=objective,
        base_std=0.5,
        weight=Weight(learned=True),
        optim=Optim(name=Optimizer.radam, lr=1e-2, warmup=0, decay=Decay.inverse_sqrt, decay_start=35_000),
        steps=800_000,
        batch=256,
        precision=Precision.bf16,
        ema=(0.9999, 0.999),
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5000,
    )


ROWS = {"lagrangian": lambda: base(Lagrangian())}


def get_config(choice: str = "lagrangian") -> Config | Chain:
    small = partial(smoke, width=16, channel_mult=(1, 1, 2), blocks=1, attention_resolutions=(16,))
    return select(choice, ROWS, {"smoke": small})
