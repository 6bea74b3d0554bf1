"""Pickles of Terminal Velocity Matching (arXiv 2511.19797): modules with their source, which is never looked at."""

import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from flowmaps.importers.build import Options, Source
from flowmaps.importers.inert import shown
from flowmaps.importers.pickles import Record, read_objects
from flowmaps.importers.torch_files import Weights, network_weights
from flowmaps.importers.transformers import transformer

# Mean and deviation of the channels of Stable Diffusion's latents, by the size of the latents.
MOMENTS = {
    32: ((0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)),
    64: ((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
}
UNSCALED = (64, 2.5)  # size and weight of the published network whose output is not multiplied by the weight


def tvm(path: Path, options: Options) -> Source:
    """Read ``im256_w2.pkl`` and the like; the embedding of the weight of guidance joins those of classes."""
    content = read_objects(path)
    net = content.get("net") if isinstance(content, dict) else None
    if not isinstance(net, Record):
        raise UnpicklingError("it has no net")
    weights = network_weights(net.tensors(), "x_embedder.proj.weight").weights
    model = _model(net)
    table, size = weights["y_embedder.embedding_table.weight"], _size(weights)
    w = options.settle("guidance", None, _published_weight(path.name))
    if (scaled := _said(net, model)) is None:
        scaled = (size, w) != UNSCALED
        options.assumed["output times its weight"] = "yes" if scaled else "no"
    told = _embedding(weights, torch.tensor([1 / w, 1.0], dtype=torch.float64)).to(table.dtype)
    weights["y_embedder.embedding_table.weight"] = torch.cat([table[:-1] + told[0], table[-1:] + told[1]])
    network: dict[str, Any] = {"gap_embedding": "wide", "norm": "rms", "label_scale": w if scaled else 1.0}
    source = transformer(weights, {"num_classes": len(table) - 1}, "noise_at_one", options, **network)
    _check_layers(model, source.options["heads"])
    source.kind, source.facts["guidance"] = "map", w if w > 1 else None
    source.left_out = tuple(str(name) for name in content if name != "net")
    if source.latents:
        if size not in MOMENTS:
            options.assumed["latents"] = "scaled as for images of 256"
        mean, deviation = MOMENTS.get(size, MOMENTS[32])
        source.latents |= {"latent_shift": mean, "latent_scale": tuple(1 / std for std in deviation)}
        source.latents["vae"] = "stabilityai/sd-vae-ft-ema"
    return source


def _size(weights: Weights) -> int:
    """Return the side of the latents, from positions and patches."""
    return math.isqrt(weights["pos_embed"].shape[1]) * int(weights["x_embedder.proj.weight"].shape[-1])


def _model(net: Record) -> Record:
    """Return the transformer inside wrappers, which have one module each."""
    for _ in range(4):
        children = net.children
        if "blocks" in children:
            return net
        net = next((children[name] for name in ("model", "_orig_mod") if name in children), net)
    raise UnpicklingError("its net has no blocks")


def _said(*places: Record) -> bool | None:
    """Return whether the output is multiplied by the weight, if an attribute or an argument of a class says so."""
    for place in places:
        for found in (place.state, place.get("_init_kwargs")):
            if isinstance(found, dict) and "do_scale_param" in found:
                if not isinstance(value := found["do_scale_param"], bool):
                    raise UnpicklingError(f"its do_scale_param is {shown(value)}")
                return value
    return None


def _published_weight(name: str) -> float | None:
    """Return the weight of guidance in the name of a published file, such as 1.75 of im256_w1p75.pkl."""
    found = re.search(r"_w(\d)(?:p(\d{1,4}))?\.", name)
    return float(f"{found[1]}.{found[2] or 0}") if found else None


def _embedding(weights: Weights, value: Tensor) -> Tensor:
    """Take the embedding of the weight; return its output [n, width] at values 1 / w [n]."""
    part = {
        key: weights.pop(f"guidance_embedder.mlp.{key}").double()
        for key in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    half = part["0.weight"].shape[1] // 2
    phase = value[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    features = torch.cat([phase.cos(), phase.sin()], dim=1)
    hidden = torch.nn.functional.silu(features @ part["0.weight"].T + part["0.bias"])
    return hidden @ part["2.weight"].T + part["2.bias"]


def _check_layers(model: Record, heads: int) -> None:
    """Refuse layers that compute something else than ours: another activation, other heads, another constant."""
    for name, block in model.children["blocks"].children.items():
        attention, mlp = block.children["attn"], block.children["mlp"]
        attention.check(f"blocks.{name}.attn", num_heads=heads)
        for norm in ("q_norm", "k_norm"):
            if attention.children[norm].get("eps") is not None:
                attention.children[norm].check(f"blocks.{name}.attn.{norm}", eps=1e-6)
        if "act" in mlp.children:
            mlp.children["act"].check(f"blocks.{name}.mlp.act", approximate="tanh")
