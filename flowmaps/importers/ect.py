"""Snapshots of ECT and CMT: consistency models on the networks of EDM and EDM2."""

from pathlib import Path

from flowmaps.importers.build import Options, Source
from flowmaps.importers.edm import edm_source
from flowmaps.importers.edm2 import LATENTS, edm2_source
from flowmaps.importers.inert import Unsupported
from flowmaps.importers.pickles import Record
from flowmaps.importers.snapshots import CONSISTENT, NETS, as_consistency, others, read_ema


def ect(path: Path, options: Options) -> Source:
    """Read ``network-snapshot-*.pkl`` of ECT and CMT: consistency models on the networks of EDM or EDM2."""
    net, content = read_ema(path, tuple(NETS))
    loss = content.get("loss_fn")
    if isinstance(loss, Record) and loss.name not in CONSISTENT:
        raise Unsupported(f"its loss is {loss.name}, not that of a consistency model: choose format edm or edm2")
    edm2 = net.name == "Precond"
    source = edm2_source(net, content, mixed=True) if edm2 else edm_source(net)
    source.left_out = others(content)
    if edm2 and source.options["channels"] == 4 and not source.latents:  # CMT leaves the encoder out
        source.latents = LATENTS
        options.assumed["latents"] = "as EDM2 has them"
    return as_consistency(source, net)
