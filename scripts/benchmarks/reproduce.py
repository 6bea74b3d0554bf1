"""Reproduce the FID of a published map: fetch its file, import it, sample it as its authors do, score the samples.

python scripts/benchmarks/reproduce.py --map=soflow-b4 --workdir=runs/soflow-b4
python scripts/benchmarks/reproduce.py --map=meanflow-sit-b4 --file=MeanFlow-B-4.pt --workdir=runs/meanflow --num=5000
python scripts/benchmarks/reproduce.py --map=dmf-xl2 --hub=MIRROR --workdir=runs/dmf

Prints the published FID, ours, and how far counting alone allows the two to be apart. The same command resumes a
stopped run. MIRROR is a folder in place of the hub, with OWNER/NAME/FILE for each file, and ADM's statistics by name.
Nobody has run this on the real files yet: please report what it prints, whether it agrees or not.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli.run import required, run
from flowmaps.errors import UserError, blame

if TYPE_CHECKING:
    from benchmarks.published import Published
    from flowmaps import FlowMap
    from flowmaps.evaluation.references import Reference
    from flowmaps.metrics import FeatureStats

MAP = flags.DEFINE_string("map", None, "The published map, such as soflow-b4")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the import, the moments of its samples, and the record")
FILE = flags.DEFINE_string("file", None, "The published file [fetched from the hub]")
HUB = flags.DEFINE_string("hub", None, "A folder in place of the hub")
REFERENCE = flags.DEFINE_string("reference", None, "Reference statistics [ADM's, fetched]")
VAE = flags.DEFINE_string("vae", None, "The VAE that decodes: folder or hub id [that of the authors]")
WEIGHTS = flags.DEFINE_string("weights", None, "Weight file of Inception [torch-fidelity's]")
STEPS = flags.DEFINE_list("steps", None, "Step counts [those with a published figure]")
NUM = flags.DEFINE_integer("num", 50_000, "Samples for each step count, the same number of each class", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "Sample i depends only on (seed, i)", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 100, "Samples at a time", 1, 100_000)
PART = 2500  # samples between two moments that are written
READS, WRITES = (FILE, HUB, REFERENCE, VAE, WEIGHTS), (WORKDIR,)


def main() -> None:
    folder = Path(required(WORKDIR, "runs/soflow-b4"))
    from benchmarks.published import MAPS, find_file, find_reference
    from flowmaps.distributed import pick_device
    from flowmaps.evaluation import open_reference
    from flowmaps.files import writable_directory, write_json

    if MAP.value not in MAPS:
        raise UserError(f"choose one of {', '.join(MAPS)}", field="map", value=MAP.value or "")
    chosen = MAPS[MAP.value]
    given = STEPS.value or []
    try:
        steps = sorted({int(count) for count in given}) or list(chosen.fid)
    except ValueError:
        raise UserError("give whole numbers, such as 1,2", field="steps", value=",".join(given)) from None
    writable_directory(folder)
    with blame("map", MAP.value):
        file = Path(FILE.value) if FILE.value else find_file(chosen, HUB.value)
        reference_file = REFERENCE.value or find_reference(chosen.size, HUB.value, folder)
    fm = imported(chosen, file, folder / "model")
    facts = {
        "map": MAP.value,
        "model": fm.fingerprint(),
        "vae": fm.decoder.source if fm.decoder else "",
        "seed": SEED.value,
    }
    check_same(folder / "reproduce.json", facts)
    reference = open_reference(reference_file, weights=WEIGHTS.value, device=pick_device())
    fm.to(pick_device())
    rows = []
    for count in steps:
        guided = chosen.guided.get(count, fm.info.usual_guidance())
        stats = moments(fm, reference, count, folder / f"moments-{count}.npz", guided)
        rows.append(compared(count, stats, reference, chosen.fid.get(count)) | {"sampler": fm.info.sampler, **guided})
    record = {**facts, "num": NUM.value, "origin": fm.info.origin, "results": rows}
    write_json(folder / "reproduce.json", record)
    print(report(rows, fm))
    print(f"wrote    {folder}/reproduce.json: please report it, whether the figures agree or not")


def imported(chosen: "Published", file: Path, directory: Path) -> "FlowMap":
    """Import ``file`` to ``directory``, unless an earlier call did, and return the map with its decoder open."""
    from flowmaps import FlowMap
    from flowmaps.importers import import_checkpoint
    from flowmaps.vae import Decoder

    if not (directory / "model_index.json").is_file():
        with blame("file", file):
            fm = import_checkpoint(chosen.form, file, **chosen.options)
        fm.save_pretrained(directory)
    fm = FlowMap.from_pretrained(directory)
    if fm.info.latent_scale:
        near = Path(HUB.value) / fm.info.vae if HUB.value else None
        source = VAE.value or (str(near) if near and near.is_dir() else fm.info.vae)
        fm.decoder = Decoder(source, fm.info)
        fm.open_decoder()
    return fm


def check_same(file: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder with the moments of another map, or of other noise; note what this one's are of."""
    from flowmaps.files import write_json
    from flowmaps.reading import parse, read_json

    if file.exists():
        found = parse(dict[str, Any], read_json(file, "remove it"), str(file))
        if wrong := [name for name, value in facts.items() if found.get(name) != value]:
            reason = f"has samples of {wrong[0]} {found.get(wrong[0])}, not {facts[wrong[0]]}: choose another folder"
            raise UserError(reason, field="workdir", value=file.parent)
    else:
        write_json(file, facts)


def moments(fm: "FlowMap", reference: "Reference", steps: int, file: Path, guided: dict[str, Any]) -> "FeatureStats":
    """Return the moments of ``--num`` samples, going on from those in ``file`` and writing them every ``PART``.

    ``guided``: the guidance of a map that takes one, as options of ``generate``.
    """
    import torch

    from flowmaps.evaluation.samples import sample_batches
    from flowmaps.evaluation.settings import sampling_settings
    from flowmaps.images import to_uint8
    from flowmaps.markdown import counted
    from flowmaps.metrics import FeatureStats

    (way,) = sampling_settings(fm, [steps], [fm.info.sampler], **guided)
    done = FeatureStats.load(file) if file.is_file() else None
    start = 0 if done is None else int(done.n or 0)
    if start > NUM.value:
        raise UserError(f"{file} has {start:,} samples already: give at least as many", field="num", value=NUM.value)
    while done is None or start < NUM.value:
        share = range(start, min(start + PART, NUM.value))
        options = {"sampler": way.sampler, "batch": BATCH.value, **guided}
        made = sample_batches(fm, way.times, share, SEED.value, progress=True, **options)
        new = reference.extractor.stats(to_uint8(x) for x, _ in made if bool(torch.isfinite(x).all()))
        if new.n != len(share):
            raise UserError("its samples hold NaN or infinity: nothing to score", field="map", value=MAP.value)
        done = new if done is None else done.merge(new)
        start = share.stop
        done.save(file)
        print(f"{counted(steps, 'step')}: {start:,} of {NUM.value:,} samples", flush=True)
    return done


def compared(steps: int, stats: "FeatureStats", reference: "Reference", published: float | None) -> dict[str, Any]:
    """Return our distance, the published one, what the latter would be at our number of samples, and the tolerance.

    The tolerance is two standard deviations of the difference of the two, of which each is of other noise.
    """
    from benchmarks.counting import bias, variance
    from benchmarks.published import COUNT
    from flowmaps.metrics import frechet_distance

    num = int(stats.n or 0)
    row: dict[str, Any] = {"steps": steps, "num": num, "fid": frechet_distance(stats, reference.stats)}
    if published is not None:
        row |= {"published": published, "expected": published + bias(stats) * (1 / num - 1 / COUNT)}
        row["tolerance"] = 2 * math.sqrt(variance(stats, reference.stats) * (1 / num + 1 / COUNT))
        row["agrees"] = abs(row["fid"] - row["expected"]) <= row["tolerance"]
    return row


def report(rows: list[dict[str, Any]], fm: "FlowMap") -> str:
    """Return a table of the rows, and what it was made from."""
    from flowmaps.markdown import markdown_table

    title = ["steps", "sampler", "guidance", "published FID", f"expected at {NUM.value:,}", "ours"]
    title += ["counting allows", "agrees"]
    cells = []
    for row in rows:
        known = "published" in row
        figures = [f"{row['published']:g}", f"{row['expected']:.2f}"] if known else ["", ""]
        verdict = [f"± {row['tolerance']:.2f}", "yes" if row["agrees"] else "no"] if known else ["", ""]
        low, high = row.get("guidance_interval", (0, 1))
        guidance = f"{row['guidance']:g} from {low:g} to {high:g}" if "guidance" in row else ""
        cells.append([str(row["steps"]), row["sampler"], guidance, *figures, f"{row['fid']:.2f}", *verdict])
    origin = "\n".join(f"{name}: {value}" for name, value in fm.info.origin.items())
    return f"{markdown_table(title, cells)}\n\n{origin}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package that this file is in
    run(sys.modules[__name__])
