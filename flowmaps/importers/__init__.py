"""Published checkpoints as flow maps of kind "drift", read without running anything in them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flowmaps.errors import UserError
from flowmaps.files import sha256
from flowmaps.flow_map import FlowMap
from flowmaps.importers.build import Source, build
from flowmaps.importers.convolutional import diffusers_unet, rectified_flow
from flowmaps.importers.edm import edm, edm2
from flowmaps.importers.pickles import refusal
from flowmaps.importers.transformers import dit, sit


class Format(NamedTuple):
    """A kind of checkpoint: how it is read, and what its publisher allows."""

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
    """The checkpoint ``src`` of one of ``FORMATS`` as a flow map of kind "drift", on the CPU in eval mode.

    A file that is damaged, hostile or of another format is refused in one line; ``UserError``.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}: choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if not src.exists():
        raise UserError(f"--src={src}: no such file or directory")
    try:
        source = chosen.read(src)
        fm, weights = build(source), source.file or src
    except Exception as error:  # whatever a foreign file can hold
        raise refusal(src, error) from None
    facts = {"format": format, "sha256": sha256(weights), "license": chosen.license, **fm.info.origin}
    fm.info = replace(fm.info, origin=facts)
    return fm


__all__ = ["FORMATS", "Format", "import_checkpoint"]
