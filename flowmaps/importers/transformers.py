"""facebookresearch's DiT and SiT: state dicts of one transformer, with two ways to train it."""

import argparse
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.importers.build import Options, Source, side
from flowmaps.importers.inert import Unsupported, same, shown
from flowmaps.importers.torch_files import Weights, network_weights, read_tensors
from flowmaps.networks.dit import positions

# Both were trained on latents of Stable Diffusion's VAE, from the sample (no mean or standard deviation taken out).
SD_LATENTS: dict[str, Any] = {"latent_shift": 4 * (0.0,), "latent_scale": 4 * (0.18215,)}
# Heads by width and depth, of XL, L, M, B and S.
PUBLISHED = {(1152, 28): 16, (1024, 24): 16, (1024, 16): 16, (768, 12): 12, (384, 12): 6}
# What a training run's arguments may say about DiT; another value has no reading here.
NOISING = {"noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False, "path_type": None}
NOISING["prediction"] = None  # with path_type, an argument of SiT
# Names in SiT's and in REPA's arguments. REPA's time runs from data to noise.
PATHS = {"Linear": "linear", "GVP": "trigonometric", "VP": "vp", "linear": "linear", "cosine": "trigonometric"}
PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "noise", "score": "score"}
PATHS_HERE = ("linear", "trigonometric")
OF_REPA = ("linear", "cosine", "v")


def dit(path: Path, options: Options) -> Source:
    """Read DiT's ``.pt`` files, released weights or a training checkpoint (its EMA): noise prediction, DDPM's times."""
    weights, args, left = read_network(path)
    for key, value in NOISING.items():
        if not same(found := args.get(key, value), value):
            raise Unsupported(f"its args.{key} is {shown(found)}, which is not how DiT was trained")
    return replace(transformer(weights, args, "ddpm", options), left_out=left)


def sit(path: Path, options: Options) -> Source:
    """Read SiT's ``.pt`` files, in the same two forms: velocity prediction, noise at time 0.

    Files of REPA, which have projectors in addition to the same network, are turned to this direction of time.
    """
    weights, args, left = read_network(path)
    projectors = [name for name in weights if name.startswith("projectors.")]
    for name in projectors:  # of use in training alone
        del weights[name]
    said = [args.get(key) for key in ("path_type", "prediction")]
    turned = any(name in OF_REPA for name in said if isinstance(name, str)) or (bool(projectors) and said[0] is None)
    form, predicted = (known(args, key, names) for key, names in (("path_type", PATHS), ("prediction", PREDICTIONS)))
    form = options.settle("path", form, "linear")
    predicted = options.settle("prediction", predicted, "velocity")
    for name, value, read in (("path", form, PATHS_HERE), ("prediction", predicted, ("velocity",))):
        if value not in read:
            raise Unsupported(f"its {name} is {value}, and this package reads only {' and '.join(read)}")
    source = transformer(weights, args, "velocity", options)
    source.interpolant, source.left_out = form, (*left, *projectors)
    if turned:
        _turn(source.weights)
        if said[0] is None:
            options.assumed["time"] = "as REPA has it"
    return source


def read_network(path: Path) -> tuple[Weights, dict[str, Any], tuple[str, ...]]:
    """Return the weights, a training checkpoint's "ema" or all of the content, its arguments, and what is left out."""
    if path.is_dir():
        raise UserError("is a folder: choose format diffusers_dit for a folder of diffusers")
    content = read_tensors(path)
    weights, training, left = network_weights(content, "x_embedder.proj.weight")
    args = content.get("args", {}) if training else {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise UnpicklingError("its args are not a namespace")
    return weights, args, left


def known(args: dict[str, Any], key: str, names: dict[str, str]) -> str | None:
    """Return the meaning in ``names`` of a training's argument ``key``, None if it is not given; refuse another."""
    found = args.get(key)
    if found is not None and (not isinstance(found, str) or found not in names):
        raise Unsupported(f"its args.{key} is {shown(found)}, and only {', '.join(names)} are known")
    return None if found is None else names[found]


def _turn(ours: Weights) -> None:
    """Let time run the other way: -F(x, 1 - t), from cos and sin of (1 - t) f in terms of those of t f."""
    first = ours["embedding.start.0.weight"].double()
    cos, sin = first.chunk(2, dim=1)
    f = 10000.0 ** (-torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    turned = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], dim=1)
    ours["embedding.start.0.weight"] = turned
    ours |= {name: -ours[name] for name in ("head.weight", "head.bias")}


def _labels(table: Tensor, args: dict[str, Any], options: Options) -> tuple[int, bool]:
    """Return the number of classes, and whether the table has a row more, which means "no label"."""
    rows, classes = len(table), args.get("num_classes")
    if rows == 1:
        if classes not in (None, 0, 1):
            raise Unsupported(f"its label table has one row, and its args.num_classes is {shown(classes)}")
        return 0, False
    if classes is None:
        options.assumed["classes"] = f"{rows - 1} and a row for no label"
        return rows - 1, True
    if not isinstance(classes, int) or rows - classes not in (0, 1):
        raise Unsupported(f"its label table has {rows} rows, and its args.num_classes is {shown(classes)}")
    return classes, rows > classes


def _label_dropout(args: dict[str, Any]) -> float:
    share = args.get("class_dropout_prob", args.get("cfg_prob", 0.1))
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise Unsupported(f"its args.class_dropout_prob is {shown(share)}, which is not a probability")
    return float(share)


def _heads(args: dict[str, Any], width: int, depth: int, options: Options, head_width: int) -> int:
    found = args.get("num_heads", width // head_width if head_width else PUBLISHED.get((width, depth)))
    usual = width // 64 if width % 64 == 0 else None
    heads = options.settle("heads", None if options.heads else found, usual)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"must divide the width, {width}", field="heads", value=shown(heads))
    return heads


def transformer(w: Weights, args: dict[str, Any], convention: str, options: Options, **network: Any) -> Source:
    """Return the source of a transformer from its weights under facebookresearch's names.

    ``network`` has further arguments of our DiT. Queries and keys of a published map may be normalised.
    """
    stem, table = w.pop("x_embedder.proj.weight"), w.pop("y_embedder.embedding_table.weight")
    if stem.ndim != 4 or table.ndim != 2 or stem.shape[2] != stem.shape[3]:
        raise UnpicklingError("its patches are not square, or its label table is not a table")
    width, channels, patch, _ = stem.shape
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    place = w.pop("pos_embed")[0]
    size = side(len(place), "pos_embed")
    rounding = max(1e-3, torch.finfo(place.dtype).eps)
    if place.shape[1] != width or (place.float() - positions(size, width)).abs().max() > rounding:
        raise Unsupported("its pos_embed is not DiT's table of sines and cosines")
    head, bias = w.pop("final_layer.linear.weight"), w.pop("final_layer.linear.bias")
    if len(head) not in (patch**2 * channels, 2 * patch**2 * channels):
        raise UnpicklingError(f"final_layer.linear.weight has {len(head)} rows, which is not one or two images")

    def pixels(rows: Tensor) -> Tensor:
        """Reorder rows (p, q, c), c over prediction and variance, to (c, p, q) of the prediction alone."""
        both = rearrange(rows, "(p q c) ... -> p q c ...", p=patch, q=patch)
        return rearrange(both[:, :, :channels], "p q c ... -> (c p q) ...")

    names = {
        "x_embedder.proj": "stem",
        "t_embedder.mlp": "embedding.start",
        "s_embedder.mlp": "embedding.gap",
        "r_embedder.mlp": "embedding.gap",
        "final_layer.adaLN_modulation.1": "modulation",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "adaLN_modulation.1": "modulation",
    }
    scales = _scales(w, depth)
    ours = {"stem.weight": stem.flatten(1), "head.weight": pixels(head), "head.bias": pixels(bias)}
    for name, tensor in w.items():
        theirs = next((key for key in names if f"{key}." in name), None)
        ours[name if theirs is None else name.replace(theirs, names[theirs])] = tensor
    ours |= {f"blocks.{i}.attention.scales": pair for i, pair in enumerate(scales)}
    classes, null = _labels(table, args, options)
    if not classes:  # one row, which every image has
        ours["embedding.start.2.bias"] = ours["embedding.start.2.bias"] + table[0]
    else:
        ours["embedding.label.weight"] = table if null else torch.cat([table, torch.zeros_like(table[:1])])
    arguments = {
        "image_size": size * patch,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": _heads(args, width, depth, options, scales[0].shape[1] if scales else 0),
        "mlp_ratio": len(w["blocks.0.mlp.fc1.bias"]) / width,
        "num_classes": classes,
        "data_std": 1.0,
        "convention": convention,
        "base_std": 1.0,
        **({"qk_norm": True} if scales else {}),
        **network,
    }
    latents = SD_LATENTS | {"vae": f"stabilityai/sd-vae-ft-{_vae(args)}"} if channels == 4 else {}
    return Source("DiT", arguments, ours, label_dropout=_label_dropout(args) if null else 0.0, latents=latents)


def _scales(w: Weights, depth: int) -> list[Tensor]:
    """Take the weights of the norms of queries and keys [2, d] of every block; none if the first one has none."""
    for key in ("scale", "weight"):
        if f"blocks.0.attn.q_norm.{key}" in w:
            pairs = [[w.pop(f"blocks.{i}.attn.{part}_norm.{key}") for part in "qk"] for i in range(depth)]
            if any(q.ndim != 1 or q.shape != k.shape or not len(q) for q, k in pairs):
                raise UnpicklingError("its q_norm and k_norm are not one number for each channel of a head")
            return [torch.stack(pair) for pair in pairs]
    return []


def _vae(args: dict[str, Any]) -> str:
    """Return which of Stable Diffusion's two fine-tuned VAEs the training used."""
    if (found := args.get("vae", "ema")) not in ("ema", "mse"):
        raise Unsupported(f"its args.vae is {shown(found)}, and only ema and mse are known")
    return str(found)
