"""Snapshots of EDM, EDM2, ECT and CMT: the parts that they have in common."""

import itertools
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from flowmaps.importers.build import Source
from flowmaps.importers.inert import Unsupported, shown
from flowmaps.importers.pickles import Record, read_objects
from flowmaps.parametrisations import PARAMETRISATIONS

NETS = {"EDMPrecond": "edm", "Precond": "edm2", "ECMPrecond": "ect"}  # the format of each class of network
CONSISTENT = ("ECMLoss", "DPMSolverLoss")  # the losses of ECT and of CMT


def read_ema(path: Path, names: tuple[str, ...]) -> tuple[Record, dict[str, Any]]:
    """Return the average of a snapshot, which must be of one of the classes ``names``, and all of its content."""
    content = read_objects(path)
    net = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(net, Record) or net.name not in names:
        kind = net.name if isinstance(net, Record) else "nothing of that kind"
        hint = f", which is read by format {NETS[kind]}" if kind in NETS else ""
        raise UnpicklingError(f"its ema is {kind}{hint}, expected {' or '.join(names)}")
    low, high = PARAMETRISATIONS["edm"].noise
    low = 1.0 if net.name == "ECMPrecond" else low  # where its map is the identity
    if not net.number("sigma_min", 0) <= low or not high <= float(net.get("sigma_max", math.inf)):
        raise Unsupported(f"its sigma_min and sigma_max leave out noise levels between {low} and {high}")
    return net, content


def others(content: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of what a snapshot has besides the average and the scaling of latents."""
    return tuple(str(name) for name in content if name not in ("ema", "encoder"))


def as_consistency(source: Source, net: Record) -> Source:
    """Turn the source of a denoiser into that of a consistency model."""
    least = net.number("sigma_min") if net.name == "ECMPrecond" else 0
    source.options["convention"] = f"consistency:{least!r}" if least else "consistency"
    source.kind = "consistency"
    return source


def is_consistency(net: Record, content: dict[str, Any]) -> bool:
    """Return whether a snapshot says that it is of ECT or CMT, by its class or its loss."""
    loss = content.get("loss_fn")
    return net.name == "ECMPrecond" or (isinstance(loss, Record) and loss.name in CONSISTENT)


def layout(
    enc: list[str], dec: list[str], size: int, ends: list[str], residual: bool = False
) -> tuple[dict[str, str], int]:
    """Return our place for each of their blocks, by name, and the number of blocks per level.

    Names tell resolution and kind: any others than for images of ``size`` are refused. ``ends`` are the decoder's last;
    with ``residual``, the input comes again at every level.
    """
    levels = 1 + sum(name.endswith("_down") for name in enc)
    each = sum("_block" in name for name in enc) // levels
    sides = [f"{size >> level}x{size >> level}" for level in range(levels)]
    down = [f"{sides[0]}_conv"]
    up: list[str] = []
    for level, now in enumerate(sides):
        again = [f"{now}_aux_residual"] if residual else []
        down += [f"{now}_down", *again] * (level > 0) + [f"{now}_block{i}" for i in range(each)]
        first = [f"{now}_in0", f"{now}_in1"] if level == levels - 1 else [f"{now}_up"]
        up = [*first, *(f"{now}_block{i}" for i in range(each + 1)), *up]
    up += [f"{sides[0]}{end}" for end in ends]
    for theirs, ours in ((enc, down), (dec, up)):
        if wrong := next((pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1]), None):
            raise UnpicklingError(f"its layers differ: {shown(wrong[0])} is where {shown(wrong[1])} is expected")
    places = {f"enc.{name}": f"down.{n}" for n, name in enumerate(name for name in down[1:] if "_aux_" not in name)}
    blocks = [name for name in up if "_aux_" not in name]
    places |= {f"dec.{name}": f"middle.{n}" for n, name in enumerate(blocks[:2])}
    places |= {f"dec.{name}": f"up.{n}" for n, name in enumerate(blocks[2:])}
    return places, each


def level_shapes(
    enc: dict[str, Record], width: int, conv: str, out: str, qkv: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the width of each level in units of ``width`` and the resolutions with attention, from an encoder."""
    mult = [block.child(out, conv).tensors()["weight"].shape[0] / width for k, block in enc.items() if "_block0" in k]
    attention = {int(k.partition("x")[0]) for k, block in enc.items() if "_block" in k and block.children.get(qkv)}
    if any(m != int(m) for m in mult):
        raise UnpicklingError(f"its levels are {mult} times its first one")
    return tuple(int(m) for m in mult), tuple(sorted(attention, reverse=True))


def common_dropout(blocks: list[Record], mixed: bool = False) -> float:
    """Return the dropout of all blocks; ``mixed``: the largest, where some have none."""
    shares = {block.number("dropout", 0) for block in blocks}
    if len(shares) > 1 and not (mixed and len(shares - {0}) == 1):
        raise Unsupported(f"its blocks differ in dropout: {shown(sorted(shares))}")
    return float(max(shares))
