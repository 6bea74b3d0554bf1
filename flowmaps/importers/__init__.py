"""Import published checkpoints as flow maps, without running anything in them."""

from collections.abc import Callable
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
from flowmaps.importers.inert import refusal
from flowmaps.importers.rectified_flow import rectified_flow
from flowmaps.importers.transformers import dit, sit


class Format(NamedTuple):
    """A kind of checkpoint: its reader, the license of the publisher, and the options that its reader uses."""

    read: Callable[[Path, Options], Source]
    license: str
    options: tuple[str, ...] = ()


LARGEST_SIZE = 1 << 14  # of an image
FORMATS = {
    "edm": Format(edm, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "edm2": Format(edm2, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "ect": Format(ect, "see the publisher of the weights, which start from NVIDIA's: CC BY-NC-SA 4.0"),
    "dit": Format(dit, "facebookresearch's released weights: CC BY-NC 4.0 (no commercial use)", ("heads",)),
    "sit": Format(sit, "see the publisher of the weights", ("heads", "prediction", "path")),
    "rectified_flow": Format(rectified_flow, "see the publisher of the weights", ("image_size",)),
    "diffusers_unet": Format(diffusers_unet, "see the model card of the weights", ("image_size", "prediction")),
    "diffusers_dit": Format(diffusers_dit, "see the model card of the weights", ("prediction",)),
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
) -> FlowMap:
    """Read a published checkpoint. Nothing in the file is executed.

    Args:
        format: A key of ``FORMATS``, such as ``"edm"``.
        src: The published file, or the folder for ``"diffusers_unet"`` and ``"diffusers_dit"``.
        image_size: Height and width, where weights do not show them: "rectified_flow", and "diffusers_unet" without a
            ``sample_size``.
        heads: The number of attention heads of "dit" and "sit", if it is not the published one of their size.
        prediction: What a "sit", "diffusers_unet" or "diffusers_dit" predicts, if its file does not say: "velocity",
            "noise", "data" or "score".
        path: The path of a "sit", if its file does not say: "linear", "trigonometric" (SiT's GVP) or "vp".

    Returns:
        A flow map on the CPU in eval mode. Its kind is "drift": sample it with an ODE solver, or train a map from it;
        or "consistency" for ECT and CMT. Its
        ``info.origin`` has the format, the file's hash, the license, and under "assumed" what nobody said.

    Raises:
        UserError: The format is unknown, an option is out of range, missing, or not one of the format, or the file is
            missing, damaged, hostile, of another format, or of a network that this package does not have.

    Example:
        >>> fm = import_checkpoint("edm", Path("edm-cifar10-32x32-cond-vp.pkl"))
        >>> fm.save_pretrained("teachers/edm")
    """
    given = {"image_size": image_size, "heads": heads, "prediction": prediction, "path": path}
    options = check_options(format, given)
    src, chosen = Path(src), FORMATS[format]
    if not src.exists():
        raise UserError("no such file or directory", field="src", value=src)
    try:
        source = chosen.read(src, options)
        fm, files = build(source), source.files or (src,)
    except Exception as error:  # a foreign file can raise anything
        raise refusal(src, error) from None
    facts = {"format": format, "sha256": ", ".join(map(sha256, files)), "license": chosen.license}
    if options.assumed:
        facts["assumed"] = ", ".join(f"{name} {value}" for name, value in options.assumed.items())
    fm.info = replace(fm.info, origin=facts)
    return fm


def check_options(format: str, given: dict[str, int | str | None]) -> Options:
    """Check a format and the options given with it, before any file is opened.

    Raises:
        UserError: The format is unknown, or an option is out of range or not one of the format.
    """
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
        elif not 1 <= value <= LARGEST_SIZE:
            raise UserError(f"must be from 1 to {LARGEST_SIZE}", field=name, value=value)
    return Options(**found)  # type: ignore[arg-type]


__all__ = ["FORMATS", "Format", "Options", "check_options", "import_checkpoint"]
