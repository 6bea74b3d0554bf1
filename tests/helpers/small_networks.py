"""Every network at a size for tests."""

import torch

from flowmaps import FlowMap, FlowMapInfo
from flowmaps.networks import MLP, DiT, EDM2UNet, IMFDiT, UNet

LABELS = {"num_classes": 4, "guidance": True}
INTERVAL = {**LABELS, "guidance_interval": True}
UNET = {"image_size": 8, "channels": 1, "width": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
DIT = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 2, "heads": 2, **LABELS}
IMF = {**DIT, **INTERVAL, "depth": 3, "head_depth": 2, "second_head": False}
SMALL = {
    "MLP": (MLP, {"width": 16, "depth": 2, "fourier_features": 3}),
    "UNet": (UNet, {**UNET, **LABELS}),
    "UNet patch": (UNet, {**UNET, "image_size": 16, "patch": 2}),
    "UNet adm": (UNet, {**UNET, **INTERVAL, "variant": "adm"}),
    "UNet ddpm": (UNet, {**UNET, **LABELS, "variant": "ddpm", "convention": "ddpm"}),
    "UNet diffusers": (UNet, {**UNET, **LABELS, "variant": "diffusers", "convention": "rectified_flow"}),
    "UNet edm": (UNet, {**UNET, **LABELS, "variant": "ddpm++", "convention": "edm"}),
    "UNet ddpm++": (UNet, {**UNET, **LABELS, "variant": "ddpm++"}),
    "UNet ncsn++": (UNet, {**UNET, **LABELS, "variant": "ncsn++"}),
    "UNet groups": (UNet, {**UNET, "variant": "diffusers", "norm_groups": 8, "head_channels": 2}),
    "EDM2UNet": (EDM2UNet, {**UNET, **LABELS}),
    "DiT": (DiT, DIT),
    "EDM2UNet edm": (EDM2UNet, {**UNET, **INTERVAL, "convention": "edm"}),
    "DiT velocity": (DiT, {**DIT, "convention": "velocity"}),
    "DiT diffusers": (DiT, {**DIT, "variant": "diffusers", "convention": "ddpm:velocity:squaredcos_cap_v2:1000"}),
    "DiT qk_norm": (DiT, {**DIT, "qk_norm": True, "mlp_ratio": 2.0}),
    "DiT decoupled": (DiT, {**DIT, "depth": 5, "decoupled": 2}),
    "DiT wide": (DiT, {**DIT, "gap_embedding": "wide", "convention": "noise_at_one"}),
    "DiT none": (DiT, {**DIT, "decoupled": 1, "gap_embedding": "none", "convention": "noise_at_one"}),
    "DiT rms": (DiT, {**DIT, "norm": "rms", "qk_norm": True, "label_scale": 2.0}),
    "IMFDiT": (IMFDiT, IMF),
    "UNet vector": (UNet, {**UNET, "condition": (3,), "guidance": True}),
    "UNet image": (UNet, {**UNET, "image_size": 16, "patch": 2, "condition": (2, 16, 16)}),
    "EDM2UNet vector": (EDM2UNet, {**UNET, "condition": (3,)}),
    "EDM2UNet image": (EDM2UNet, {**UNET, "condition": (2, 8, 8)}),
    "DiT tokens": (DiT, {**DIT, "num_classes": 0, "condition": (5, 3)}),
    "DiT image": (DiT, {**DIT, "num_classes": 0, "condition": (2, 8, 8)}),
    "IMFDiT vector": (IMFDiT, {**IMF, "num_classes": 0, "condition": (3,)}),
    "IMFDiT tokens": (IMFDiT, {**IMF, "num_classes": 0, "condition": (5, 3), "rotation": "grid"}),
    "IMFDiT image": (IMFDiT, {**IMF, "num_classes": 0, "condition": (2, 8, 8)}),
}
IMAGES = [name for name in SMALL if name != "MLP"]
LABELLED = [name for name, (_, options) in SMALL.items() if options.get("num_classes")]
CONDITIONED = [name for name, (_, options) in SMALL.items() if "condition" in options]


def small(name: str, std: float = 0.2, **options: object) -> FlowMap:
    """A flow map with every weight random, so that no branch that starts at zero hides an error; in train mode."""
    torch.manual_seed(0)
    cls, usual = SMALL[name]
    network = cls(**{**usual, **options})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std if p.ndim < 2 else min(std, p[0].numel() ** -0.5))
    c = network.config
    shape = (c.dim,) if name == "MLP" else (c.channels, c.image_size, c.image_size)
    info = FlowMapInfo(shape=shape, num_classes=c.get("num_classes", 0), condition=tuple(c.get("condition", ())))
    return FlowMap(network.train(), base_std=0.5, info=info)


def inputs(fm: FlowMap, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, s < t, and labels (one of them "no label") or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *fm.info.shape, generator=generator, dtype=dtype)
    s, t = torch.rand(2, n, generator=generator, dtype=dtype).sort(dim=0).values
    if fm.info.condition:
        return x, s, t, torch.randn(n, *fm.info.condition, generator=generator, dtype=dtype)
    classes = fm.info.num_classes
    return x, s, t, (torch.arange(n) % (classes + 1) if classes else None)


def randomised(network: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Draw every weight from a normal distribution; in eval mode."""
    torch.manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network.eval()
