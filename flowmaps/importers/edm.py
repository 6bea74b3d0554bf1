"""NVIDIA's pickles: EDM (DDPM++ and ADM; Karras et al. 2022) and EDM2 (Karras et al. 2024)."""

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flowmaps.importers.build import Source, Weights
from flowmaps.importers.pickles import Record, read_objects


def _ema(path: Path, name: str) -> tuple[Record, dict[str, Any]]:
    content = read_objects(path)
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, Record) or net.name != name:
        kind = net.name if isinstance(net, Record) else "nothing of that kind"
        raise UnpicklingError(f"its ema is {kind}, expected {name}")
    return net, content


def _layout(enc: list[str], dec: list[str]) -> tuple[dict[str, str], int]:
    """Return our place for each of their blocks, by name, and the number of blocks per level."""
    places = {f"enc.{name}": f"down.{n}" for n, name in enumerate(enc[1:])}
    blocks = [name for name in dec if "_aux_" not in name]
    places |= {f"dec.{name}": f"middle.{n}" for n, name in enumerate(blocks[:2])}
    places |= {f"dec.{name}": f"up.{n}" for n, name in enumerate(blocks[2:])}
    levels = 1 + sum(name.endswith("_down") for name in enc)
    return places, sum("_block" in name for name in enc) // levels


def _shape(enc: dict[str, Any], width: int, out: str, qkv: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the width of each level in units of ``width`` and the resolutions with attention, from an encoder."""
    mult = [block["_modules"][out].tensors()["weight"].shape[0] / width for k, block in enc.items() if "_block0" in k]
    attention = {int(k.partition("x")[0]) for k, block in enc.items() if "_block" in k and block["_modules"].get(qkv)}
    if any(m != int(m) for m in mult):
        raise UnpicklingError(f"its levels are {mult} times its first one")
    return tuple(int(m) for m in mult), tuple(sorted(attention, reverse=True))


def edm(path: Path) -> Source:
    """Read ``network-snapshot-*.pkl`` and released ``edm-*-vp.pkl`` files of EDM."""
    net, _ = _ema(path, "EDMPrecond")
    model = net.children["model"]
    children = model.children
    adm = model.name == "DhariwalUNet"
    if not adm and (model.name != "SongUNet" or children["map_noise"].name != "PositionalEmbedding"):
        raise UnpicklingError("it is an NCSN++ (a -ve file), which has no network here: take the -vp one")
    enc, dec = children["enc"].children, children["dec"].children
    blocks = [block for block in (*enc.values(), *dec.values()) if block.name == "UNetBlock"]
    for block in blocks:
        filters = [w for name, w in block.tensors().items() if name.endswith("resample_filter")]
        scale = block.get("skip_scale")
        heads = block["out_channels"] // 64 if adm else 1
        same = all(w.numel() == 4 for w in filters) and block["num_heads"] in (0, heads)
        if not same or not math.isclose(scale, 1 if adm else math.sqrt(0.5)):
            raise UnpicklingError("its blocks filter, scale or attend differently from DDPM++ and ADM")
    places, each = _layout(list(enc), list(dec))
    first, *_ = enc
    theirs = model.tensors()
    width = theirs[f"enc.{first}.weight"].shape[0]
    mult, attention = _shape(enc, width, "conv0", "qkv")
    classes = int(net["label_dim"])
    augment = theirs["map_augment.weight"].shape[1] if "map_augment.weight" in theirs else 0

    def swapped(w: Tensor) -> Tensor:  # DDPM++ has sines first
        return w if adm else torch.roll(w, width // 2, dims=-1)

    ours: Weights = {
        "embedding.start.0.weight": swapped(theirs["map_layer0.weight"]),
        "embedding.start.0.bias": theirs["map_layer0.bias"],
        "embedding.start.2.weight": theirs["map_layer1.weight"],
        "embedding.start.2.bias": theirs["map_layer1.bias"],
        "stem.weight": theirs[f"enc.{first}.weight"],
        "stem.bias": theirs[f"enc.{first}.bias"],
    }
    if classes:
        one_hot = theirs["map_label.weight"].T.float() * (1 if adm else math.sqrt(classes))
        rows = torch.cat([one_hot, torch.zeros_like(one_hot[:1])]) + theirs.get("map_label.bias", 0)
        ours["embedding.label.weight"] = swapped(rows)
    if augment:
        ours["embedding.augmentation.weight"] = swapped(theirs["map_augment.weight"].T).T
    norm, conv = ("out_norm", "out_conv") if adm else (f"dec.{list(dec)[-2]}", f"dec.{list(dec)[-1]}")
    for name, theirs_name in (("head.0", norm), ("head.2", conv)):
        ours |= {f"{name}.{part}": theirs[f"{theirs_name}.{part}"] for part in ("weight", "bias")}
    for name, place in places.items():
        ours |= {f"{place}.{key}": w for key, w in _edm_block(theirs, f"{name}.", adm).items()}
    options = {
        "image_size": int(net["img_resolution"]),
        "channels": int(net["img_channels"]),
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "dropout": float(blocks[0].get("dropout", 0.0)),
        "num_classes": classes,
        "data_std": float(net["sigma_data"]),
        "augment_dim": augment,
        "variant": "adm" if adm else "ddpm++",
        "convention": "edm",
        "base_std": float(net["sigma_data"]),
    }
    return Source("UNet", options, ours, label_dropout=float(model.get("label_dropout") or 0))


def _edm_block(w: Weights, name: str, adm: bool) -> Weights:
    """Return a UNetBlock's weights under our names."""
    names = {"norm1": "norm0", "conv1": "conv0", "conv2": "conv1", "attention.norm": "norm2", "attention.out": "proj"}
    names |= {"skip": "skip", "attention.qkv": "qkv"} | ({} if adm else {"norm2": "norm1", "modulation": "affine"})
    ours = {
        f"{mine}.{part}": w[f"{name}{theirs}.{part}"]
        for mine, theirs in names.items()
        for part in ("weight", "bias")
        if f"{name}{theirs}.{part}" in w
    }
    if adm:  # norm's affine part, then scale + 1 and shift: one scale and one shift
        scale, shift = w[f"{name}affine.weight"].float().chunk(2)
        scale_bias, shift_bias = w[f"{name}affine.bias"].float().chunk(2)
        gain, bias = w[f"{name}norm1.weight"].float(), w[f"{name}norm1.bias"].float()
        ours["modulation.weight"] = torch.cat([gain[:, None] * scale, shift + bias[:, None] * scale])
        ours["modulation.bias"] = torch.cat([gain * (scale_bias + 1), shift_bias + bias * (scale_bias + 1)])
    for part in ("weight", "bias"):
        if f"attention.qkv.{part}" in ours:  # q, k and v alternate within a head
            qkv = ours[f"attention.qkv.{part}"]
            heads = max(1, len(qkv) // 3 // 64) if adm else 1
            ours[f"attention.qkv.{part}"] = rearrange(qkv, "(heads c n) ... -> (n heads c) ...", heads=heads, n=3)
    return ours


def edm2(path: Path) -> Source:
    """Read ``edm2-*.pkl`` snapshots of EDM2, one EMA length each."""
    net, content = _ema(path, "Precond")
    unet = net.children["unet"]
    enc, dec = unet.children["enc"].children, unet.children["dec"].children
    places, each = _layout(list(enc), list(dec))
    theirs, (first, *_) = unet.tensors(), enc
    width = theirs[f"enc.{first}.weight"].shape[0]
    mult, attention = _shape(enc, width, "conv_res0", "attn_qkv")
    classes = int(net["label_dim"])
    ours: Weights = {
        "embedding.start.weight": theirs["emb_noise.weight"],
        "embedding.frequencies": theirs["emb_fourier.freqs"],
        "embedding.phases": theirs["emb_fourier.phases"],
        "stem.weight": theirs[f"enc.{first}.weight"],
        "head.weight": theirs["out_conv.weight"],
        "gain": theirs["out_gain"].reshape(1),
    }
    if classes:
        ours["embedding.label.weight"] = theirs["emb_label.weight"]
    names = {"skip": "conv_skip", "conv1": "conv_res0", "modulation": "emb_linear", "conv2": "conv_res1"}
    names |= {"qkv": "attn_qkv", "out": "attn_proj"}
    for name, place in places.items():
        ours[f"{place}.gain"] = theirs[f"{name}.emb_gain"].reshape(1)
        found = {mine: theirs.get(f"{name}.{old}.weight") for mine, old in names.items()}
        ours |= {f"{place}.{mine}.weight": w for mine, w in found.items() if w is not None}
    options = {
        "image_size": int(net["img_resolution"]),
        "channels": int(net["img_channels"]),
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "dropout": float(list(enc.values())[-1].get("dropout", 0.0)),
        "num_classes": classes,
        "data_std": float(net["sigma_data"]),
        "convention": "edm",
        "base_std": float(net["sigma_data"]),
    }
    return Source("EDM2UNet", options, ours, latents=_latents(content.get("encoder")))


def _latents(encoder: Any) -> dict[str, Any]:
    """Return the facts about latents, if the network works on those: theirs are scale * (the VAE's output) + bias.

    The VAE encodes pixels in [0, 1] and its output is read so, though it was trained on [-1, 1].
    """
    if not isinstance(encoder, Record) or encoder.name != "StabilityVAEEncoder":
        return {}
    scale, bias = (encoder[name].value.flatten().astype(float) for name in ("scale", "bias"))
    shift = tuple((-bias / scale).tolist())
    scaling = {"latent_shift": shift, "latent_scale": tuple(scale.tolist())}
    return {"vae": str(encoder.get("vae_name", "")), "vae_range": (0.0, 1.0), **scaling}
