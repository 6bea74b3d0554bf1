"""Published maps on DiT's network, in the files of their authors: SoFlow, MeanFlow SiT and DMF.

All count time from data to noise and predict minus our velocity, with one guidance weight trained in.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from flowmaps.errors import UserError
from flowmaps.importers.build import Options, Source
from flowmaps.importers.inert import Unsupported, shown
from flowmaps.importers.torch_files import Weights, family
from flowmaps.importers.transformers import known, read_network, transformer
from samplers import Schedule

MEANFLOW_SCALE = 0.18125  # as its code has it, instead of Stable Diffusion's 0.18215: its latents were made so
MEANFLOW_GUIDANCE = {768: 2.0, 1024: 2.5, 1152: 2.5}  # of B, L and XL, by width
DMF_BLOCKS = {28: 20, 24: 18}  # that know the start alone, of XL and L, by depth
DMF_GRIDS = {n: [k / n / (1.5 - 0.5 * k / n) for k in range(n + 1)] for n in range(2, 9)}  # its sampler at 512


def soflow(path: Path, options: Options) -> Source:
    """Read SoFlow's ``.pt`` files (arXiv 2512.15657), the average: its two steps have fresh noise between them."""
    weights, args, left = _read(path, "soflow")
    source = transformer(weights, args, "noise_at_one", options, gap_embedding="wide")
    _is_map(source, options, left, 3.0, "stochastic")
    return _vae(source, "mse")


def meanflow_sit(path: Path, options: Options) -> Source:
    """Read the ``.pt`` files of MeanFlow on SiT (zhuyu-cs), released averages or training checkpoints."""
    weights, args, left = _read(path, "meanflow_sit")
    if known(args, "path_type", {"linear": "linear", "Linear": "linear", "cosine": "cosine"}) == "cosine":
        raise Unsupported("its path_type is cosine, and maps are read on the linear path alone")
    source = transformer(weights, args, "noise_at_one", options, gap_embedding="wide")
    usual = MEANFLOW_GUIDANCE.get(source.options["width"])
    _is_map(source, options, left, usual, said=_mixed(args))
    if source.latents:
        source.latents["latent_scale"] = 4 * (MEANFLOW_SCALE,)
    return source


def dmf(path: Path, options: Options) -> Source:
    """Read DMF's ``.pt`` files (arXiv 2510.24474): a SiT whose first blocks know the start, and the others the end."""
    weights, args, left = _read(path, "dmf")
    loss = [name for name in weights if name.startswith("logvar_linear.")]  # of use in training alone
    for name in loss:
        del weights[name]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    blocks = options.settle("decoupled", None, DMF_BLOCKS.get(depth))
    if not 1 <= blocks <= depth:
        raise UserError(f"must be from 1 to {depth}, the number of blocks", field="decoupled", value=blocks)
    network = {"gap_embedding": "none", "decoupled": blocks}
    source = transformer(weights, args, "noise_at_one", options, **network)
    _is_map(source, options, (*left, *loss), 2.5)
    if source.options["image_size"] == 64:  # of latents, of images of 512
        source.facts["schedules"] = {"map": Schedule(DMF_GRIDS, sampler="map")}
    if source.latents:
        source.origin["latents encoded by"] = "stabilityai/sd-vae-ft-mse"
    return _vae(source, "ema")


def _read(path: Path, form: str) -> tuple[Weights, dict[str, Any], tuple[str, ...]]:
    """Return the weights, which must be of format ``form``, the training's arguments, and what is left out.

    Where the arguments do not say so, the last row of the label table is "no label", as in all these files.
    """
    weights, args, left = read_network(path)
    if (found := family(weights)) != form:
        raise UnpicklingError(f"its weights are those of {found}")
    table = weights["y_embedder.embedding_table.weight"]
    return weights, {"num_classes": len(table) - 1} | args, left


def _mixed(args: dict[str, Any]) -> float | None:
    """Return the weight omega / (1 - kappa) of the guidance in a training's arguments, None if they do not have it."""
    omega, kappa = args.get("cfg_omega"), args.get("cfg_kappa")
    if omega is None or kappa is None:
        return None
    if not all(isinstance(value, (int, float)) for value in (omega, kappa)) or not (omega >= 0 and 0 <= kappa < 1):
        raise Unsupported(f"its cfg_omega and cfg_kappa are {shown(omega)} and {shown(kappa)}")
    return float(max(1.0, omega / (1 - kappa)))  # 0 and 0 stand for none


def _is_map(
    source: Source,
    options: Options,
    left: tuple[str, ...],
    guidance: float | None,
    recommended: str = "",
    said: float | None = None,
) -> None:
    """Record that a source is a map, with the weight of guidance that it was trained with and its sampler."""
    source.kind, source.left_out = "map", left
    if source.options["num_classes"]:
        weight = options.settle("guidance", said, guidance)
        source.facts["guidance"] = weight if weight > 1 else None
    source.facts["recommended_sampler"] = recommended


def _vae(source: Source, kind: str) -> Source:
    """Name the VAE that decodes the latents, if there are latents."""
    if source.latents:
        source.latents["vae"] = f"stabilityai/sd-vae-ft-{kind}"
    return source
