"""facebookresearch's DiT and SiT: state dicts of one transformer, with two ways to train it."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from einops import rearrange
from torch import Tensor

from flowmaps.importers.build import Source, side
from flowmaps.importers.pickles import check_not_expanded, read_tensors
from flowmaps.networks.dit import positions

# Both were trained on latents of Stable Diffusion's VAE, from the sample (no mean or standard deviation taken out).
SD_LATENTS = {"vae": "stabilityai/sd-vae-ft-ema", "latent_shift": 4 * (0.0,), "latent_scale": 4 * (0.18215,)}


def dit(path: Path) -> Source:
    """Read DiT's ``.pt`` files, released weights or a training checkpoint (its EMA): noise prediction, DDPM's times."""
    return _transformer(path, "ddpm")


def sit(path: Path) -> Source:
    """Read SiT's ``.pt`` files, in the same two forms: velocity prediction on the linear path, noise at time 0."""
    return _transformer(path, "velocity")


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Return the weights in a training checkpoint's "ema", or all of the content if that is weights."""
    weights = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UnpicklingError("it has no weights, and neither has its ema")
    return {name: check_not_expanded(tensor) for name, tensor in weights.items()}


def _transformer(path: Path, convention: str) -> Source:
    w = _state_dict(read_tensors(path))
    stem, table = w.pop("x_embedder.proj.weight"), w.pop("y_embedder.embedding_table.weight")
    width, channels, patch, _ = stem.shape
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    if width % 64:
        raise UnpicklingError(f"its width is {width}, which is not a multiple of 64, the size of a head")
    place = w.pop("pos_embed")[0]
    size = side(len(place), "pos_embed")
    if place.shape[1] != width or (place.float() - positions(size, width)).abs().max() > 1e-3:
        raise UnpicklingError("its pos_embed is not DiT's table of sines and cosines")
    head, bias = w.pop("final_layer.linear.weight"), w.pop("final_layer.linear.bias")

    def pixels(rows: Tensor) -> Tensor:
        """Reorder rows (p, q, c), c over prediction and variance, to (c, p, q) of the prediction alone."""
        both = rearrange(rows, "(p q c) ... -> p q c ...", p=patch, q=patch)
        return rearrange(both[:, :, :channels], "p q c ... -> (c p q) ...")

    names = {
        "x_embedder.proj": "stem",
        "t_embedder.mlp": "embedding.start",
        "final_layer.adaLN_modulation.1": "modulation",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "adaLN_modulation.1": "modulation",
    }
    ours = {"stem.weight": stem.flatten(1), "embedding.label.weight": table}
    ours |= {"head.weight": pixels(head), "head.bias": pixels(bias)}
    for name, tensor in w.items():
        theirs = next((key for key in names if f"{key}." in name), None)
        ours[name if theirs is None else name.replace(theirs, names[theirs])] = tensor
    options = {
        "image_size": size * patch,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": 16 if width == 1152 else width // 64,  # cannot be read off the weights: XL, and S, B, L
        "mlp_ratio": len(w["blocks.0.mlp.fc1.bias"]) / width,
        "num_classes": len(table) - 1,
        "data_std": 1.0,
        "convention": convention,
        "base_std": 1.0,
    }
    return Source("DiT", options, ours, label_dropout=0.1, latents=SD_LATENTS if options["channels"] == 4 else {})
