"""Import published checkpoints as flow maps, without running anything in them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flowmaps.errors import UserError
from flowmaps.files import sha256
from flowmaps.flow_map import FlowMap
from flowmaps.importers.build import Options, Source, build
from flowmaps.importers.diffusers_dit import diffusers_dit
from flowmaps.importers.diffusers_unet import diffusers_unet
from flowmaps.importers.ect import ect
from flowmaps.importers.edm import edm
from flowmaps.importers.edm2 import edm2
from flowmaps.importers.guess import guess_format
from flowmaps.importers.inert import refusal
from flowmaps.importers.maps import dmf, meanflow_sit, soflow
from flowmaps.importers.mean_flows import imf, pmf
from flowmaps.importers.rectified_flow import rectified_flow
from flowmaps.importers.transformers import dit, sit
from flowmaps.importers.tvm import tvm


class Format(NamedTuple):
    """A kind of checkpoint: its reader, the license of the publisher, and the options that its reader uses."""

    read: Callable[[Path, Options], Source]
    license: str
    options: tuple[str, ...] = ()


LARGEST_SIZE = 1 << 14  # of an image
LEAST = {"base_std": 1e-3}  # of an option, 1 for the others
SHOWN = 12  # names of what is left out
FORMATS = {
    "edm": Format(edm, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "edm2": Format(edm2, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "ect": Format(ect, "see the publisher of the weights, which start from NVIDIA's: CC BY-NC-SA 4.0"),
    "dit": Format(dit, "facebookresearch's released weights: CC BY-NC 4.0 (no commercial use)", ("heads",)),
    "sit": Format(sit, "see the publisher of the weights", ("heads", "prediction", "path")),
    "rectified_flow": Format(rectified_flow, "see the publisher of the weights", ("image_size",)),
    "diffusers_unet": Format(diffusers_unet, "see the model card of the weights", ("image_size", "prediction")),
    "diffusers_dit": Format(diffusers_dit, "see the model card of the weights", ("prediction",)),
    "soflow": Format(soflow, "code MIT; of the weights see zlab-princeton's model card", ("heads", "guidance")),
    "meanflow_sit": Format(meanflow_sit, "code MIT; of the weights see zhuyu-cs's page", ("heads", "guidance")),
    "dmf": Format(
        dmf, "none is given for weights or code: all rights are kyungmnlee's", ("heads", "guidance", "decoupled")
    ),
    "imf": Format(imf, "code MIT; of the weights see Lyy0725's model card", ("image_size",)),
    "pmf": Format(pmf, "code MIT; of the weights see Lyy0725's model card", ("base_std",)),
    "tvm": Format(tvm, "lumalabs' released weights: CC BY-NC-SA 4.0 (no commercial use)", ("guidance",)),
}
NOT_READ = {
    "facm": "its maps are of latents of VA-VAE, which has no reader here: it is another kind than AutoencoderKL"
}
PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "noise", "epsilon": "noise", "score": "score"}
PREDICTIONS |= {"v_prediction": "velocity", "data": "data", "sample": "data"}
PATHS = {"linear": "linear", "trigonometric": "trigonometric", "gvp": "trigonometric", "vp": "vp"}


def import_checkpoint(
    format: str,
    src: str | Path,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    prediction: str | None = None,
    path: str | None = None,
    guidance: float | None = None,
    decoupled: int | None = None,
    base_std: float | None = None,
) -> FlowMap:
    """Read a published checkpoint. Nothing in the file is executed.

    Args:
        format: A key of ``FORMATS``, such as ``"edm"``; ``guess_format(src)`` finds it.
        src: The published file, or the folder for ``"diffusers_unet"`` and ``"diffusers_dit"``.
        image_size: Height and width, where weights do not show them: "rectified_flow", "diffusers_unet" without a
            ``sample_size``, and "imf" (of its latents).
        heads: The number of attention heads of a transformer, if it is not the published one of its size.
        prediction: What a "sit", "diffusers_unet" or "diffusers_dit" predicts, if its file does not say: "velocity",
            "noise", "data" or "score".
        path: The path of a "sit", if its file does not say: "linear", "trigonometric" (SiT's GVP) or "vp".
        guidance: The weight of the guidance that a published map was trained with, if it is not that of its authors.
        decoupled: The number of blocks of a "dmf" that know the start alone, if it is not the published one.
        base_std: The standard deviation of the noise of a "pmf", if it is not the published one of its size.

    Returns:
        A flow map on the CPU in eval mode. Its kind is "drift": sample it with an ODE solver, or train a map from it;
        or "consistency" for ECT and CMT; or "map" for published maps. Its ``info.origin`` has the format, the
        file's hash, the license, under "assumed" what nobody said, and under "left out" what else the file has.

    Raises:
        UserError: The format is unknown, an option is out of range, missing, or not one of the format, or the file is
            missing, damaged, hostile, of another format, or of a network that this package does not have.

    Example:
        >>> fm = import_checkpoint("edm", Path("edm-cifar10-32x32-cond-vp.pkl"))
        >>> fm.save_pretrained("teachers/edm")
    """
    given: dict[str, float | str | None] = {"image_size": image_size, "heads": heads, "prediction": prediction}
    given |= {"path": path, "guidance": guidance, "decoupled": decoupled, "base_std": base_std}
    options = check_options(format, given)
    src, chosen = Path(src), FORMATS[format]
    if not src.exists():
        raise UserError("no such file or directory", field="src", value=src)
    try:
        source = chosen.read(src, options)
        fm, files = build(source), source.files or (src,)
    except Exception as error:  # a foreign file can raise anything
        raise refusal(src, error) from None
    facts = {"format": format, "sha256": ", ".join(map(sha256, files)), "license": chosen.license, **source.origin}
    if options.assumed:
        facts["assumed"] = ", ".join(f"{name} {value}" for name, value in options.assumed.items())
    if source.left_out:
        facts["left out"] = listed(source.left_out)
    fm.info = replace(fm.info, origin=facts)
    return fm


def listed(names: Sequence[str]) -> str:
    """Return names of a file for a line of text: "ema, opt and 12 more", without characters that mean anything."""
    plain = [re.sub(r"[^\w.*/ -]", "?", name)[:40] for name in names[:SHOWN]]
    return ", ".join(plain) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_options(format: str, given: dict[str, float | str | None]) -> Options:
    """Check a format and the options given with it, before any file is opened.

    Raises:
        UserError: The format is unknown, or an option is out of range or not one of the format.
    """
    if format in NOT_READ:
        raise UserError(f"is not supported: {NOT_READ[format]}", field="format", value=format)
    if format not in FORMATS:
        raise UserError(f"choose one of {', '.join(FORMATS)}", field="format", value=format)
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if name not in FORMATS[format].options:
            usable = ", ".join(FORMATS[format].options) or "none"
            raise UserError(f"has no use in format {format}, whose options are: {usable}", field=name, value=value)
        if isinstance(value, str):
            known = PREDICTIONS if name == "prediction" else PATHS
            if value.lower() not in known:
                raise UserError(f"choose one of {', '.join(dict.fromkeys(known.values()))}", field=name, value=value)
            found[name] = known[value.lower()]
        elif not (least := LEAST.get(name, 1)) <= value <= LARGEST_SIZE:
            raise UserError(f"must be from {least:g} to {LARGEST_SIZE}", field=name, value=value)
    return Options(**found)  # type: ignore[arg-type]


__all__ = ["FORMATS", "Format", "Options", "check_options", "guess_format", "import_checkpoint"]
