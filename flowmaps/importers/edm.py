"""NVIDIA's pickles: EDM (DDPM++ and ADM; Karras et al. 2022) and EDM2 (Karras et al. 2024)."""

import itertools
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flowmaps.importers.build import Options, Source, check_empty, layer
from flowmaps.importers.inert import Unsupported, shown
from flowmaps.importers.pickles import Record, read_objects
from flowmaps.importers.torch_files import Weights
from flowmaps.networks.edm2unet import BALANCE, LABEL_BALANCE, LIMIT
from flowmaps.parametrisations import PARAMETRISATIONS


def _ema(path: Path, name: str) -> tuple[Record, dict[str, Any]]:
    content = read_objects(path)
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, Record) or net.name != name:
        kind = net.name if isinstance(net, Record) else "nothing of that kind"
        raise UnpicklingError(f"its ema is {kind}, expected {name}")
    low, high = PARAMETRISATIONS["edm"].noise
    if not net.number("sigma_min", 0) <= low or not high <= float(net.get("sigma_max", math.inf)):
        raise Unsupported(f"its sigma_min and sigma_max leave out noise levels between {low} and {high}")
    return net, content


def _layout(enc: list[str], dec: list[str], size: int, ends: list[str]) -> tuple[dict[str, str], int]:
    """Return our place for each of their blocks, by name, and the number of blocks per level.

    Names tell resolution and kind: any others than for images of ``size`` are refused. ``ends`` are the decoder's last.
    """
    levels = 1 + sum(name.endswith("_down") for name in enc)
    each = sum("_block" in name for name in enc) // levels
    sides = [f"{size >> level}x{size >> level}" for level in range(levels)]
    down = [f"{sides[0]}_conv"]
    up: list[str] = []
    for level, now in enumerate(sides):
        down += [f"{now}_down"] * (level > 0) + [f"{now}_block{i}" for i in range(each)]
        first = [f"{now}_in0", f"{now}_in1"] if level == levels - 1 else [f"{now}_up"]
        up = [*first, *(f"{now}_block{i}" for i in range(each + 1)), *up]
    up += [f"{sides[0]}{end}" for end in ends]
    for theirs, ours in ((enc, down), (dec, up)):
        if wrong := next((pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1]), None):
            raise UnpicklingError(f"its layers differ: {shown(wrong[0])} is where {shown(wrong[1])} is expected")
    places = {f"enc.{name}": f"down.{n}" for n, name in enumerate(down[1:])}
    blocks = [name for name in up if "_aux_" not in name]
    places |= {f"dec.{name}": f"middle.{n}" for n, name in enumerate(blocks[:2])}
    places |= {f"dec.{name}": f"up.{n}" for n, name in enumerate(blocks[2:])}
    return places, each


def _shape(
    enc: dict[str, Record], width: int, conv: str, out: str, qkv: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the width of each level in units of ``width`` and the resolutions with attention, from an encoder."""
    mult = [block.child(out, conv).tensors()["weight"].shape[0] / width for k, block in enc.items() if "_block0" in k]
    attention = {int(k.partition("x")[0]) for k, block in enc.items() if "_block" in k and block.children.get(qkv)}
    if any(m != int(m) for m in mult):
        raise UnpicklingError(f"its levels are {mult} times its first one")
    return tuple(int(m) for m in mult), tuple(sorted(attention, reverse=True))


def _dropout(blocks: list[Record]) -> float:
    shares = {block.number("dropout", 0) for block in blocks}
    if len(shares) > 1:
        raise Unsupported(f"its blocks differ in dropout: {shown(sorted(shares))}")
    return float(shares.pop())


def edm(path: Path, options: Options) -> Source:
    """Read ``network-snapshot-*.pkl`` and released ``edm-*-vp.pkl`` files of EDM."""
    net, _ = _ema(path, "EDMPrecond")
    model = net.children.get("model", Record())
    adm = model.name == "DhariwalUNet"
    level = model.children.get("map_noise", Record())
    if model.name not in ("SongUNet", "DhariwalUNet") or level.name != "PositionalEmbedding":
        raise Unsupported("it is an NCSN++ (a -ve file), which has no network here: take the -vp one")
    size, classes = net.count("img_resolution"), net.count("label_dim")
    enc, dec = (model.child(name, "module").children for name in ("enc", "dec"))
    ends = [] if adm else ["_aux_norm", "_aux_conv"]
    places, each = _layout(list(enc), list(dec), size, ends)
    w, (first, *_) = model.tensors(), enc
    width = len(w[f"enc.{first}.weight"])
    level.check("map_noise", num_channels=width, max_positions=10000, endpoint=not adm)
    if classes:
        model.child("map_label", "Linear").check("map_label", in_features=classes)
    blocks = [_edm_block(name, {"enc": enc, "dec": dec}[name[:3]], adm) for name in places]
    mult, attention = _shape(enc, width, "Conv2d", "conv0", "qkv")
    norm, conv = ("out_norm", "out_conv") if adm else (f"dec.{size}x{size}{end}" for end in ends)
    last = model.child(norm, "GroupNorm") if adm else dec[f"{size}x{size}_aux_norm"]
    _check_norm(norm, last, len(w[f"{norm}.weight"]), adm)
    for name, outer in ((first, enc[first]), (conv, model.child(conv, "Conv2d") if adm else dec[conv[4:]])):
        outer.check(name, up=False, down=False)
    augment = w["map_augment.weight"].shape[1] if "map_augment.weight" in w else 0

    def swapped(w: Tensor) -> Tensor:  # DDPM++ has sines first
        return w if adm else torch.roll(w, width // 2, dims=-1)

    ours: Weights = {
        "embedding.start.0.weight": swapped(w.pop("map_layer0.weight")),
        "embedding.start.0.bias": w.pop("map_layer0.bias"),
        **layer("embedding.start.2", w, "map_layer1."),
        **layer("stem", w, f"enc.{first}."),
        **layer("head.0", w, f"{norm}."),
        **layer("head.2", w, f"{conv}."),
    }
    if classes:
        one_hot = w.pop("map_label.weight").T.float() * (1 if adm else math.sqrt(classes))
        rows = torch.cat([one_hot, torch.zeros_like(one_hot[:1])]) + w.pop("map_label.bias", torch.zeros(1))
        ours["embedding.label.weight"] = swapped(rows)
    if augment:
        ours["embedding.augmentation.weight"] = swapped(w.pop("map_augment.weight").T).T
    for name, place in places.items():
        ours |= {f"{place}.{key}": tensor for key, tensor in _edm_weights(w, f"{name}.", adm).items()}
    check_empty(name for name in w if not name.endswith("resample_filter"))
    arguments = {
        "image_size": size,
        "channels": net.count("img_channels"),
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "dropout": _dropout(blocks),
        "num_classes": classes,
        "data_std": float(net.number("sigma_data")),
        "augment_dim": augment,
        "variant": "adm" if adm else "ddpm++",
        "convention": "edm",
        "base_std": float(net.number("sigma_data")),
    }
    return Source("UNet", arguments, ours, label_dropout=float(model.number("label_dropout", 0)))


def _edm_block(name: str, blocks: dict[str, Record], adm: bool) -> Record:
    """Return a UNetBlock by its name; one that computes something else than ours is refused."""
    block = blocks[name[4:]]
    if block.name != "UNetBlock":
        raise UnpicklingError(f"its {name} is a {block.name}, expected UNetBlock")
    layers, up, down = block.children, name.endswith("_up"), name.endswith("_down")
    outputs, inputs = block.child("conv0", "Conv2d").tensors()["weight"].shape[:2]
    heads = (outputs // 64 if adm else 1) if "qkv" in layers else 0
    block.check(name, num_heads=heads, skip_scale=1.0 if adm else math.sqrt(0.5), adaptive_scale=adm)
    for key, channels in (("norm0", inputs), ("norm1", outputs), *([("norm2", outputs)] if heads else [])):
        _check_norm(f"{name}.{key}", block.child(key, "GroupNorm"), channels, adm)
    for key in ("conv0", "conv1", *[key for key in ("skip", "qkv", "proj") if key in layers]):
        conv, changes = block.child(key, "Conv2d"), key in ("conv0", "skip")
        conv.check(f"{name}.{key}", up=up and changes, down=down and changes, fused_resample=False)
        box = conv["_buffers"].get("resample_filter")
        if box is not None and (box.numel() != 4 or not torch.allclose(box.float(), torch.tensor(0.25))):
            raise Unsupported(f"its {name}.{key}.resample_filter is not that of means over 2 x 2 pixels")
    block.child("affine", "Linear")
    return block


def _check_norm(name: str, norm: Record, channels: int, adm: bool) -> None:
    norm.check(name, num_groups=min(32, channels // 4), eps=1e-5 if adm else 1e-6)


def _edm_weights(w: Weights, name: str, adm: bool) -> Weights:
    """Take the weights of a UNetBlock; return them under our names."""
    names = {"norm1": "norm0", "conv1": "conv0", "conv2": "conv1", "attention.norm": "norm2", "attention.out": "proj"}
    names |= {"skip": "skip", "attention.qkv": "qkv"} | ({} if adm else {"norm2": "norm1", "modulation": "affine"})
    ours = {
        f"{mine}.{part}": w.pop(f"{name}{theirs}.{part}")
        for mine, theirs in names.items()
        for part in ("weight", "bias")
        if f"{name}{theirs}.{part}" in w
    }
    if adm:  # norm's affine part, then scale + 1 and shift: one scale and one shift
        scale, shift = w.pop(f"{name}affine.weight").float().chunk(2)
        scale_bias, shift_bias = w.pop(f"{name}affine.bias").float().chunk(2)
        gain, bias = (w.pop(f"{name}norm1.{part}").float() for part in ("weight", "bias"))
        ours["modulation.weight"] = torch.cat([gain[:, None] * scale, shift + bias[:, None] * scale])
        ours["modulation.bias"] = torch.cat([gain * (scale_bias + 1), shift_bias + bias * (scale_bias + 1)])
    for part in ("weight", "bias"):
        if f"attention.qkv.{part}" in ours:  # q, k and v alternate within a head
            qkv = ours[f"attention.qkv.{part}"]
            heads = max(1, len(qkv) // 3 // 64) if adm else 1
            ours[f"attention.qkv.{part}"] = rearrange(qkv, "(heads c n) ... -> (n heads c) ...", heads=heads, n=3)
    return ours


def edm2(path: Path, options: Options) -> Source:
    """Read ``edm2-*.pkl`` snapshots of EDM2, one EMA length each."""
    net, content = _ema(path, "Precond")
    unet = net.child("unet", "UNet")
    size, classes = net.count("img_resolution"), net.count("label_dim")
    enc, dec = (unet.child(name, "module").children for name in ("enc", "dec"))
    places, each = _layout(list(enc), list(dec), size, [])
    unet.check("unet", concat_balance=0.5, **({"label_balance": LABEL_BALANCE} if classes else {}))
    unet.child("emb_fourier", "MPFourier")
    blocks = [_edm2_block(name, {"enc": enc, "dec": dec}[name[:3]]) for name in places]
    w, (first, *_) = unet.tensors(), enc
    width = len(w[f"enc.{first}.weight"])
    mult, attention = _shape(enc, width, "MPConv", "conv_res0", "attn_qkv")
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
        "dropout": _dropout(blocks),
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
