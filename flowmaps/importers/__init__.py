"""Import published checkpoints as flow maps of kind "drift", without running anything in them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flowmaps.errors import UserError
from flowmaps.files import sha256
from flowmaps.flow_map import FlowMap
from flowmaps.importers.build import Source, build
from flowmaps.importers.diffusers_unet import diffusers_unet
from flowmaps.importers.edm import edm, edm2
from flowmaps.importers.pickles import refusal
from flowmaps.importers.rectified_flow import rectified_flow
from flowmaps.importers.transformers import dit, sit


class Format(NamedTuple):
    """A kind of checkpoint: its reader, and the license of the publisher."""

    read: Callable[[Path], Source]
    license: str


FORMATS = {
    "edm": Format(edm, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "edm2": Format(edm2, "NVIDIA's released weights: CC BY-NC-SA 4.0 (no commercial use)"),
    "dit": Format(dit, "facebookresearch's released weights: CC BY-NC 4.0 (no commercial use)"),
    "sit": Format(sit, "see the publisher of the weights"),
    "rectified_flow": Format(rectified_flow, "see the publisher of the weights"),
    "diffusers_unet": Format(diffusers_unet, "see the model card of the weights"),
}


def import_checkpoint(format: str, src: Path) -> FlowMap:
    """Read a published checkpoint. Nothing in the file is executed.

    Args:
        format: A key of ``FORMATS``, such as ``"edm"``.
        src: The published file, or the folder for ``"diffusers_unet"``.

    Returns:
        A flow map of kind "drift" on the CPU in eval mode: sample it with an ODE solver, or train a map from it. Its
        ``info.origin`` has the format, the file's hash and the license.

    Raises:
        UserError: The format is unknown, or the file is missing, damaged, hostile or of another format.

    Example:
        >>> fm = import_checkpoint("edm", Path("edm-cifar10-32x32-cond-vp.pkl"))
        >>> fm.save_pretrained("teachers/edm")
    """
    if format not in FORMATS:
        raise UserError(f"choose one of {', '.join(FORMATS)}", field="format", value=format)
    chosen = FORMATS[format]
    if not src.exists():
        raise UserError("no such file or directory", field="src", value=src)
    try:
        source = chosen.read(src)
        fm, weights = build(source), source.file or src
    except Exception as error:  # a foreign file can raise anything
        raise refusal(src, error) from None
    facts = {"format": format, "sha256": sha256(weights), "license": chosen.license, **fm.info.origin}
    fm.info = replace(fm.info, origin=facts)
    return fm


__all__ = ["FORMATS", "Format", "import_checkpoint"]
