"""NVIDIA's pickles of EDM: DDPM++, NCSN++ and ADM (Karras et al. 2022)."""

import math
from pathlib import Path
from pickle import UnpicklingError

import torch
from einops import rearrange
from torch import Tensor

from flowmaps.importers.build import Options, Source, check_empty, layer
from flowmaps.importers.inert import Unsupported
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


def edm(path: Path, options: Options) -> Source:
    """Read ``network-snapshot-*.pkl`` and released ``edm-*.pkl`` files of EDM; one of ECT is a consistency model."""
    net, content = read_ema(path, ("EDMPrecond", "ECMPrecond"))
    source = edm_source(net)
    source.left_out = others(content)
    return as_consistency(source, net) if is_consistency(net, content) else source


def edm_source(net: Record) -> Source:
    """Return the source of a denoiser on one of EDM's networks."""
    model = net.children.get("model", Record())
    adm = model.name == "DhariwalUNet"
    level = model.children.get("map_noise", Record())
    ncsn = not adm and level.name == "FourierEmbedding"
    if model.name not in ("SongUNet", "DhariwalUNet") or not (ncsn or level.name == "PositionalEmbedding"):
        raise Unsupported(f"its network is a {model.name} with {level.name}, which has no network here")
    size, classes = net.count("img_resolution"), net.count("label_dim")
    enc, dec = (model.child(name, "module").children for name in ("enc", "dec"))
    ends = [] if adm else ["_aux_norm", "_aux_conv"]
    places, each = layout(list(enc), list(dec), size, ends, ncsn)
    w, (first, *_) = model.tensors(), enc
    width = len(w[f"enc.{first}.weight"])
    if not ncsn:
        level.check("map_noise", num_channels=width, max_positions=10000, endpoint=not adm)
    if classes:
        model.child("map_label", "Linear").check("map_label", in_features=classes)
    blocks = [_edm_block(name, {"enc": enc, "dec": dec}[name[:3]], adm, ncsn) for name in places]
    again = [name for name in enc if name.endswith("_aux_residual")]
    for name in again:
        _check_conv(name, enc[name], ncsn, down=True, up=False, fused_resample=True)
    mult, attention = level_shapes(enc, width, "Conv2d", "conv0", "qkv")
    norm, conv = ("out_norm", "out_conv") if adm else (f"dec.{size}x{size}{end}" for end in ends)
    last = model.child(norm, "GroupNorm") if adm else dec[f"{size}x{size}_aux_norm"]
    _check_norm(norm, last, len(w[f"{norm}.weight"]), adm)
    for name, outer in ((first, enc[first]), (conv, model.child(conv, "Conv2d") if adm else dec[conv[4:]])):
        outer.check(name, up=False, down=False)
    augment = w["map_augment.weight"].shape[1] if "map_augment.weight" in w else 0

    def swapped(w: Tensor) -> Tensor:  # DDPM++ and NCSN++ have sines first
        return w if adm else torch.roll(w, w.shape[-1] // 2, dims=-1)

    ours: Weights = {
        "embedding.start.0.weight": swapped(w.pop("map_layer0.weight")),
        "embedding.start.0.bias": w.pop("map_layer0.bias"),
        **layer("embedding.start.2", w, "map_layer1."),
        **layer("stem", w, f"enc.{first}."),
        **layer("head.0", w, f"{norm}."),
        **layer("head.2", w, f"{conv}."),
    }
    if ncsn:
        ours["embedding.frequencies"] = 2 * math.pi * w.pop("map_noise.freqs").double()
    for n, name in enumerate(again):
        ours |= layer(f"residuals.{n}", w, f"enc.{name}.")
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
        "dropout": common_dropout(blocks),
        "num_classes": classes,
        "data_std": float(net.number("sigma_data")),
        "augment_dim": augment,
        "variant": "adm" if adm else "ncsn++" if ncsn else "ddpm++",
        "convention": "edm",
        "base_std": float(net.number("sigma_data")),
    }
    return Source("UNet", arguments, ours, label_dropout=float(model.number("label_dropout", 0)))


def _edm_block(name: str, blocks: dict[str, Record], adm: bool, ncsn: bool) -> Record:
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
        _check_conv(f"{name}.{key}", conv, ncsn, up=up and changes, down=down and changes, fused_resample=False)
    block.child("affine", "Linear")
    return block


def _check_conv(name: str, conv: Record, ncsn: bool, **expected: bool) -> None:
    conv.check(name, **expected)
    found = conv["_buffers"].get("resample_filter")
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8 if ncsn else torch.tensor([0.5, 0.5])
    wanted = line.outer(line)
    if found is not None and (
        found.numel() != wanted.numel() or not torch.allclose(found.float().view_as(wanted), wanted)
    ):
        kind = "that of (1, 3, 3, 1)" if ncsn else "that of means over 2 x 2 pixels"
        raise Unsupported(f"its {name}.resample_filter is not {kind}")


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
