"""diffusers' DiTTransformer2DModel, as in a DiTPipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.importers.build import Options, Source
from flowmaps.importers.diffusers_folder import check_defaults, find_folder, read_config, read_convention, read_weights
from flowmaps.importers.inert import REMEDY, Unsupported, shown
from flowmaps.importers.torch_files import Weights
from flowmaps.importers.transformers import SD_LATENTS, transformer
from flowmaps.networks.dit import positions
from flowmaps.reading import read_json

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: its name up to diffusers 0.28


@dataclass(frozen=True)
class DiTConfig:
    """The arguments of a DiTTransformer2DModel, with the class's defaults, and those of its former class."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    cross_attention_dim: int | None = None
    num_vector_embeds: int | None = None
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    double_self_attention: bool = False
    attention_type: str = "default"
    caption_channels: int | None = None
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None


ALWAYS = (  # arguments of which only the default has a network here
    *("attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine", "norm_eps", "cross_attention_dim"),
    *("num_vector_embeds", "only_cross_attention", "double_self_attention", "attention_type", "caption_channels"),
)
NAMES = {  # of facebookresearch's code, for diffusers' own
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
PARTS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDER = {  # every block has a copy of it
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def diffusers_dit(path: Path, options: Options) -> Source:
    """Read the folder of a ``DiTTransformer2DModel``, or of its pipeline, with the schedule of its scheduler."""
    folder = find_folder(path, "transformer")
    config = read_config(folder / "config.json", CLASSES, DiTConfig)
    check_defaults(config, ALWAYS)
    width, sides = config.num_attention_heads * config.attention_head_dim, (config.sample_size, config.patch_size)
    if (
        min(*sides, width) < 1
        or config.sample_size % config.patch_size
        or config.sample_size // config.patch_size > 1024
    ):
        raise Unsupported(f"its sample_size is {sides[0]} and its patch_size {sides[1]}, which do not fit")
    convention = read_convention(path, folder, options)
    theirs, files = read_weights(folder, "pos_embed.proj.weight")
    weights = _renamed(theirs, config.num_layers)
    weights["pos_embed"] = positions(config.sample_size // config.patch_size, width)[None]
    facts: dict[str, Any] = {"num_heads": config.num_attention_heads, "num_classes": config.num_embeds_ada_norm}
    source = transformer(weights, facts, convention, options)
    source.options |= {"variant": "diffusers", "dropout": config.dropout}
    if source.options["channels"] != config.in_channels:
        raise Unsupported(f"its in_channels is {config.in_channels}, and its weights have {source.options['channels']}")
    if source.latents:
        source.latents = _latents(path, folder, options)
    source.files = files
    return source


def _renamed(theirs: Weights, depth: int) -> Weights:
    """Return the weights under the names of facebookresearch's code; queries, keys and values are put together."""
    if not 0 < depth <= len(theirs):
        raise Unsupported(f"its num_layers is {depth}")
    weights, copies = Weights(), "transformer_blocks.{}.norm1.emb.{}"
    for name in list(theirs):
        stem, _, kind = name.rpartition(".")
        if stem in NAMES:
            weights[f"{NAMES[stem]}.{kind}"] = theirs.pop(name)
    for name, mine in EMBEDDER.items():
        for kind in ("weight",) if name.startswith("class") else ("weight", "bias"):
            first, *others = (theirs.pop(f"{copies.format(n, name)}.{kind}") for n in range(depth))
            if not all(_equal(first, other) for other in others):
                raise Unsupported("its blocks embed time and class each in its own way, as after training in diffusers")
            weights[f"{mine}.{kind}"] = first
    for n in range(depth):
        place = f"transformer_blocks.{n}."
        for kind in ("weight", "bias"):
            weights |= {
                f"blocks.{n}.{mine}.{kind}": theirs.pop(f"{place}{name}.{kind}") for name, mine in PARTS.items()
            }
            qkv = [theirs.pop(f"{place}attn1.to_{letter}.{kind}") for letter in "qkv"]
            weights[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(qkv)
    theirs.pop("pos_embed.pos_embed", None)  # a table of sines, which the config makes
    return weights | theirs


def _equal(first: Tensor, other: Tensor) -> bool:
    return first.shape == other.shape and torch.equal(first, other)


def _latents(path: Path, folder: Path, options: Options) -> dict[str, Any]:
    """Return the facts about latents: of the pipeline's VAE, or else of the one that DiT was trained with."""
    for place in (path, folder.parent):
        if (file := place / "vae" / "config.json").exists():
            values = read_json(file, REMEDY)
            scale = values.get("scaling_factor", 0.18215) if isinstance(values, dict) else None
            if not isinstance(scale, float) or (isinstance(values, dict) and values.get("shift_factor")):
                raise UserError(f"{file}: its scaling_factor is {shown(scale)}, or it has a shift: {REMEDY}")
            return SD_LATENTS | {"latent_scale": 4 * (scale,), "vae": str(file.parent.resolve())}
    options.assumed["vae"] = "stabilityai/sd-vae-ft-ema"
    return SD_LATENTS | {"vae": options.assumed["vae"]}
