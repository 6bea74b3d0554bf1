"""NVIDIA's pickles of EDM2 (Karras et al. 2024)."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from flowmaps.importers.build import Options, Source, check_empty
from flowmaps.importers.inert import Unsupported, shown
from flowmaps.importers.pickles import Record
from flowmaps.importers.snapshots import (
    as_consistency,
    common_dropout,
    is_consistency,
    layout,
    level_shapes,
    others,
    read_ema,
)
from flowmaps.importers.torch_files import Weights
from flowmaps.networks.edm2unet import BALANCE, LABEL_BALANCE, LIMIT

LATENTS: dict[str, Any] = {  # of Stable Diffusion's VAE, as EDM2's encoder has them: deviations of 1/2
    "vae": "stabilityai/sd-vae-ft-mse",
    "vae_range": (0.0, 1.0),
    "latent_shift": (5.81, 3.25, 0.12, -2.15),
    "latent_scale": (0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28),
}


def edm2(path: Path, options: Options) -> Source:
    """Read ``edm2-*.pkl`` snapshots of EDM2, one EMA length each; one of ECT is a consistency model."""
    net, content = read_ema(path, ("Precond",))
    consistent = is_consistency(net, content)
    source = edm2_source(net, content, mixed=consistent)
    source.left_out = others(content)
    return as_consistency(source, net) if consistent else source


def edm2_source(net: Record, content: dict[str, Any], mixed: bool = False) -> Source:
    """Return the source of a denoiser; ``mixed``: some blocks may have no dropout, as in ECT."""
    unet = net.child("unet", "UNet")
    size, classes = net.count("img_resolution"), net.count("label_dim")
    enc, dec = (unet.child(name, "module").children for name in ("enc", "dec"))
    places, each = layout(list(enc), list(dec), size, [])
    unet.check("unet", concat_balance=0.5, **({"label_balance": LABEL_BALANCE} if classes else {}))
    unet.child("emb_fourier", "MPFourier")
    blocks = [_edm2_block(name, {"enc": enc, "dec": dec}[name[:3]]) for name in places]
    w, (first, *_) = unet.tensors(), enc
    width = len(w[f"enc.{first}.weight"])
    mult, attention = level_shapes(enc, width, "MPConv", "conv_res0", "attn_qkv")
    ours: Weights = {
        "embedding.start.weight": w.pop("emb_noise.weight"),
        "embedding.frequencies": w.pop("emb_fourier.freqs"),
        "embedding.phases": w.pop("emb_fourier.phases"),
        "stem.weight": w.pop(f"enc.{first}.weight"),
        "head.weight": w.pop("out_conv.weight"),
        "gain": w.pop("out_gain").reshape(1),
    }
    if classes:
        ours["embedding.label.weight"] = w.pop("emb_label.weight")
    names = {"skip": "conv_skip", "conv1": "conv_res0", "modulation": "emb_linear", "conv2": "conv_res1"}
    names |= {"qkv": "attn_qkv", "out": "attn_proj"}
    for name, place in places.items():
        ours[f"{place}.gain"] = w.pop(f"{name}.emb_gain").reshape(1)
        found = {mine: w.pop(f"{name}.{old}.weight", None) for mine, old in names.items()}
        ours |= {f"{place}.{mine}.weight": tensor for mine, tensor in found.items() if tensor is not None}
    check_empty(w)
    arguments = {
        "image_size": size,
        "channels": net.count("img_channels"),
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "dropout": common_dropout(blocks, mixed),
        "num_classes": classes,
        "data_std": float(net.number("sigma_data")),
        "convention": "edm",
        "base_std": float(net.number("sigma_data")),
    }
    return Source("EDM2UNet", arguments, ours, latents=_latents(content.get("encoder")))


def _edm2_block(name: str, blocks: dict[str, Record]) -> Record:
    """Return a Block by its name; one that computes something else than ours is refused."""
    block = blocks[name[4:]]
    if block.name != "Block":
        raise UnpicklingError(f"its {name} is a {block.name}, expected Block")
    outputs = len(block.child("conv_res0", "MPConv").tensors()["weight"])
    mode = next((mode for mode in ("up", "down") if name.endswith(f"_{mode}")), "keep")
    heads = outputs // 64 if "attn_qkv" in block.children else 0
    block.check(name, flavor=name[:3], resample_mode=mode, resample_filter=[1, 1], num_heads=heads)
    block.check(name, res_balance=BALANCE, attn_balance=BALANCE, clip_act=LIMIT)
    return block


def _latents(encoder: Any) -> dict[str, Any]:
    """Return the facts about latents, if the network works on those: theirs are scale * (the VAE's output) + bias.

    The VAE encodes pixels in [0, 1] and its output is read so, though it was trained on [-1, 1].
    """
    if encoder is None or (isinstance(encoder, Record) and encoder.name == "StandardRGBEncoder"):
        return {}
    if not isinstance(encoder, Record) or encoder.name != "StabilityVAEEncoder":
        raise Unsupported("its encoder is not one of EDM2's")
    scale, bias = (encoder[name].value.flatten().astype(float) for name in ("scale", "bias"))
    if not (np.isfinite(scale).all() and np.isfinite(bias).all() and scale.all()):
        raise UnpicklingError("its encoder's scale or bias is 0 or not finite")
    vae, shift = encoder.get("vae_name", ""), tuple((-bias / scale).tolist())
    if not isinstance(vae, str):
        raise UnpicklingError(f"its encoder's vae_name is {shown(vae)}")
    scaling = {"latent_shift": shift, "latent_scale": tuple(scale.tolist())}
    return {"vae": vae, "vae_range": (0.0, 1.0), **scaling}
