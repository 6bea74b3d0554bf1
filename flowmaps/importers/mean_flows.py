"""Improved MeanFlow (arXiv 2512.02012) and pixel MeanFlow (arXiv 2601.22158): the weights of ``IMFDiT``, renamed.

Their time T runs from data to noise. They guide where T_min <= T <= T_max, with tokens for each end: T_min is 1 - high
and T_max is 1 - low. ``IMFDiT`` has the sign of their output, minus our velocity or an image, so no weight changes.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from flowmaps.importers.build import Options, Source, side
from flowmaps.importers.inert import shown
from flowmaps.importers.torch_files import Weights, network_weights, read_tensors
from flowmaps.importers.tvm import MOMENTS

GUIDANCE_MAX = 12.0  # weights above the trained 8 are sampled with, up to 10.5
# By width and depth: weight, low and high of the guidance behind the published FID in one step.
IMF_GUIDANCE = {
    (768, 12): (8.0, 0.35, 0.6),
    (768, 24): (10.5, 0.4, 0.6),
    (1024, 32): (10.5, 0.4, 0.6),
    (1024, 48): (8.0, 0.38, 0.58),
}
# By patch, width and depth: standard deviation of the noise, then the same.
PMF = {
    (16, 768, 16): (1.0, (8.5, 0.3, 0.9)),
    (16, 1024, 32): (1.0, (7.0, 0.3, 0.8)),
    (16, 1280, 48): (2.0, (7.0, 0.4, 0.8)),
    (32, 768, 16): (2.0, (6.5, 0.3, 0.9)),
    (32, 1024, 32): (4.0, (7.5, 0.4, 0.8)),
    (32, 1280, 48): (4.0, (5.5, 0.4, 0.9)),
}
UNUSED = ("v_final_layer.", "v_heads.", "rope_freqs")  # the second head, of use in training alone, and a table
NAMES = {  # parts of their names to ours, in this order
    "_flax_linear.": "",
    "_flax_embedding.": "",
    "class_tokens": "prefix.classes.tokens",
    "omega_tokens": "prefix.guidance.tokens",
    "t_min_tokens": "prefix.high.tokens",
    "t_max_tokens": "prefix.low.tokens",
    "time_tokens": "prefix.gap.tokens",
    "y_embedder.embedding_table": "prefix.classes.embed",
    "omega_embedder.mlp": "prefix.guidance.embed",
    "cfg_t_start_embedder.mlp": "prefix.high.embed",
    "cfg_t_end_embedder.mlp": "prefix.low.embed",
    "h_embedder.mlp": "prefix.gap.embed",
    "x_embedder.proj1.": "stem.0.",
    "x_embedder.proj2.": "stem.1.",
    "x_embedder.proj.": "stem.0.",
    "pos_embed": "positions",
    "shared_blocks.": "blocks.",
    "u_heads.": "head_blocks.",
    "attn_scale": "attention_scale",
    "attn.": "attention.",
    "_proj.": ".",
    "u_final_layer.norm": "head.0",
    "u_final_layer.linear": "head.1",
}


def imf(path: Path, options: Options) -> Source:
    """Read ``iMF-B-2.pth`` and the like. Nothing in them tells the size of the latents."""
    weights, left = _read(path, "x_embedder.proj.weight")
    network = _network(weights)
    network["image_size"] = options.settle("image_size", None, 32)
    source = _source(network, weights, left, 1.0, IMF_GUIDANCE.get((network["width"], network["depth"])))
    if network["channels"] == 4:
        mean, deviation = MOMENTS[32]
        source.latents = {"latent_shift": mean, "latent_scale": tuple(1 / std for std in deviation)}
        source.latents["vae"] = "stabilityai/sd-vae-ft-mse"
    return source


def pmf(path: Path, options: Options) -> Source:
    """Read ``pMF-B-16.pt`` and the like, maps of pixels. Nothing in them tells the scale of the noise."""
    weights, left = _read(path, "x_embedder.proj1.weight")
    network = _network(weights)
    before = sum(len(weights[name]) for name in weights if name.endswith(".tokens"))
    network["image_size"] = network["patch"] * side(len(weights["positions"]) - before, "pos_embed")
    network |= {"prediction": "data", "rotation": "grid", "bottleneck": len(weights["stem.0.weight"])}
    known = PMF.get((network["patch"], network["width"], network["depth"]))
    base_std = options.settle("base_std", None, known and known[0])
    return _source(network, weights, left, base_std, known and known[1])


def _read(path: Path, first: str) -> tuple[Weights, tuple[str, ...]]:
    """Return the weights under our names and what is left out, of a file whose patches ``first`` embeds."""
    theirs, _, left = network_weights(read_tensors(path), first)
    unused = [name for name in theirs if name.startswith(UNUSED)]
    parts = {name.partition(".")[0] + ".*" * ("." in name): None for name in unused}
    weights: Weights = {}
    for name, tensor in theirs.items():
        if name in unused:
            continue
        ours = f"{name}.weight" if name.endswith(".w2") else name  # as far as is known it may be bare
        for part, replacement in NAMES.items():
            ours = ours.replace(part, replacement)
        if ours in weights:
            raise UnpicklingError(f"it has {shown(name)} twice")
        stacked = ours == "positions" or ours.endswith(".tokens")
        weights[ours] = tensor[0] if stacked and tensor.ndim == 3 and len(tensor) == 1 else tensor
    return weights, (*left, *parts)


def _network(weights: Weights) -> dict[str, Any]:
    """Return the arguments of ``IMFDiT`` that weights show; the head has its blocks apart from the others."""
    stem, table = weights["stem.0.weight"], weights["prefix.classes.embed.weight"]
    if stem.ndim != 4 or stem.shape[2] != stem.shape[3] or table.ndim != 2 or len(table) < 2:
        raise UnpicklingError("its patches are not square, or its label table is not a table")
    width, (_, channels, patch, _) = table.shape[1], stem.shape
    head, shared = (
        len({name.split(".")[1] for name in weights if name.startswith(f"{part}.")})
        for part in ("head_blocks", "blocks")
    )
    size, hidden = (len(weights[f"head_blocks.0.{name}"]) for name in ("attention.q_norm.weight", "mlp.w1.weight"))
    if not size or width % size:
        raise UnpicklingError(f"its q_norm has {size} channels, which do not divide its width, {width}")
    return {
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": shared + head,
        "head_depth": head,
        "heads": width // size,
        "hidden": 0 if hidden == 8 * width // 3 else hidden,
        "num_classes": len(table) - 1,
        "data_std": 1.0,
        "guidance": True,
        "guidance_interval": True,
        "second_head": False,
    }


def _source(
    network: dict[str, Any],
    weights: Weights,
    left: tuple[str, ...],
    base_std: float,
    recommended: tuple[float, float, float] | None,
) -> Source:
    facts = {"guidance_max": GUIDANCE_MAX, "guidance_interval": True, "recommended_guidance": recommended or ()}
    return Source(
        "IMFDiT", network, weights, label_dropout=0.1, kind="map", facts=facts, left_out=left, base_std=base_std
    )
