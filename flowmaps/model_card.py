"""The model card: description, usage, measured results and origin of a checkpoint."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from flowmaps.data.registry import DATASETS, FORMATS
from flowmaps.labels import BALANCED
from flowmaps.markdown import counted, markdown_table

if TYPE_CHECKING:
    from flowmaps.flow_map import FlowMap

TASK = "unconditional-image-generation"
Record = dict[str, Any]  # of fid.py --json

SOURCE = "https://github.com/flowmaps/flowmaps"  # flowmaps is on no package index yet
NAMES = 20  # classes that a card names
PICTURE = "samples.png"  # next to the card
USE = """    pip install git+{source}

or, in a checkout of [the source]({source}), `pip install .`. Then

```python
from flowmaps.pipeline import FlowMapPipeline

pipeline = FlowMapPipeline.from_pretrained("{name}")
samples = pipeline(16, num_inference_steps={steps}{guidance}, output_type="pt").images
```

or

    flowmaps sample --checkpoint={name}{sampler} --steps={steps} --num=16 --out=samples
"""


def card(
    fm: "FlowMap",
    name: str = "",
    license: str = "",
    records: Sequence[Record] = (),
    training_details: str = "",
    picture: Sequence[int] = (),
) -> str:
    """Return Markdown with YAML front matter.

    Args:
        fm: The model.
        name: What its user gives to ``from_pretrained``: a hub id or a directory.
        license: Of the weights, by its name on the hub; imported ones keep that of their source.
        records: Those of fid.py.
        training_details: Markdown.
        picture: Step counts of the rows of samples.png, which ``FlowMap.save_pretrained`` writes next to the card.
    """
    info, (low, high) = fm.info, fm.info.t_range
    size = sum(p.numel() for p in fm.network.parameters())
    data_name = "" if info.data in FORMATS else info.data  # which say how the images were stored, not what they are
    license = license or ("other" if info.origin else "")
    data = ModelCardData(
        library_name="flowmaps",
        tags=["flow-map", "few-step"],
        license=license or None,
        pipeline_tag=TASK if len(info.shape) == 3 else None,
        datasets=[data_name] if data_name else None,
        model_name=name or data_name or "flow map",
        eval_results=[result for record in records for result in _evaluations(record)] or None,
    )
    facts = {
        "network": f"{type(fm.network).__name__}, {size / 1e6:.2f} million parameters",
        "kind": info.kind,
        **({"trained on": data_name} if data_name else {}),
        "samples": " x ".join(map(str, info.shape)),
        "classes": f"{info.num_classes:,}{_names(info.class_names)}" if info.num_classes else "none",
        "t_range": f"{low:.5g} .. {high:.5g} (noise at 0, data at 1; outside, the drift is that of the nearest end)",
        "interpolant": fm.interpolant_name,
        "base_std": f"{fm.base_std:g}",
        "average of the weights": info.ema or "none",
        "images seen": f"{info.images_seen:,}",
        "stored step sizes": "; ".join(f"{k} in {_steps(v)}" for k, v in info.schedules.items() if v) or "none",
        "weights": fm.fingerprint(),
        **info.origin,
    }
    sampler = "" if info.sampler == "map" else f" --sampler={info.sampler}"
    steps, usual = 64 if info.kind == "drift" else 1, info.usual_guidance()
    guidance = ", guidance_scale={guidance:g}, guidance_interval={guidance_interval}".format(**usual) if usual else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}",
        {
            "map": "A flow map: it jumps from noise to data in any number of network evaluations, from one on.",
            "drift": "A drift, to be integrated by an ODE solver.",
            "consistency": "A consistency model: it jumps to data.",
        }[info.kind]
        + f" Made with [flowmaps]({SOURCE}).",
        *([f"![samples]({PICTURE})\n\n{_caption(info.sampler, picture)}"] if picture else []),
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        "## Use\n\n"
        + USE.format(source=SOURCE, name=name or "DIRECTORY", steps=steps, sampler=sampler, guidance=guidance).rstrip(),
    ]
    if records:
        parts.append("## Results\n\n" + "\n\n".join(result_tables(records, name or "DIRECTORY")))
    if training_details:
        parts.append("## How it was made\n\n" + training_details.strip())
    if info.origin:
        parts.append(
            "Weights imported by flowmaps, or trained from imported ones or by an imported teacher. The license of the "
            "source applies to them."
        )
    return "\n\n".join(parts) + "\n"


def _names(names: Sequence[str]) -> str:
    """Return ": boot, coat and 8 more", in letters that mean nothing in a table of Markdown."""
    plain = [re.sub(r"[^\w .,/()-]", " ", name) for name in names[:NAMES]]
    more = [f"and {len(names) - NAMES:,} more"] if len(names) > NAMES else []
    return f": {', '.join([*plain, *more])}" if names else ""


def _steps(counts: Iterable[int]) -> str:
    *others, last = counts
    return f"{', '.join(map(str, others))} and {last} steps" if others else counted(last, "step")


def _caption(sampler: str, counts: Sequence[int]) -> str:
    rows = f"one row each for {_steps(counts)}" if len(counts) > 1 else _steps(counts)
    return f"The same noise in every row, sampled by `{sampler}`: {rows}, from above."


def _label(record: Record, row: Record) -> str:
    return f"{record['metric']}, {row['sampler']}, {row['grid']} grid, {counted(row['steps'], 'step')}"


def _evaluations(record: Record) -> list[EvalResult]:
    reference = record["reference"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=reference["data"],
            dataset_name=reference["data"],
            dataset_split=reference["split"],
            metric_type=record["metric"],
            metric_name=_label(record, row),
            metric_value=round(row[record["metric"]], 4),
        )
        for row in record["results"]
    ]


def _command(record: Record, name: str) -> str:
    """Return a command that measures the rows of ``record`` on the model called ``name``."""
    reference, rows = record["reference"], sorted(record["results"], key=lambda row: int(row["steps"]))
    data = f"{reference['data']}:{reference['split']}" if reference["data"] in DATASETS else reference["data"]
    given = {"checkpoint": name, "reference": data or "REFERENCE", "num": record["num"], "seed": record["seeds"][0]}
    given |= {"repeats": len(record["seeds"])} if len(record["seeds"]) > 1 else {}
    for flag, key in (("sampler", "sampler"), ("schedule", "grid"), ("steps", "steps")):
        given[flag] = ",".join(map(str, dict.fromkeys(row[key] for row in rows)))
    given |= {k: record[k] for k in ("label", "guidance") if record[k] is not None}
    if interval := record.get("guidance_interval"):
        given["guidance_interval"] = ",".join(f"{time:g}" for time in interval)
    given |= {"gamma": record["gamma"]} if record["gamma"] not in (None, 1) else {}
    if (policy := record.get("label_policy")) not in (None, BALANCED):
        given["label_policy"] = "LABELS.json" if policy.startswith("sha256:") else policy  # the record has no file name
    return shlex.join(["flowmaps", "fid", *(f"--{flag}={value}" for flag, value in given.items())])


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    """Return the distance in a row of a record, with its standard error if that is known."""
    if row is None:
        return ""
    return f"{row[metric]:.3g}" + (f" ± {row['se'][metric]:.2g}" if "se" in row else "")


def result_tables(records: Sequence[Record], name: str) -> Iterator[str]:
    """Yield one table per set of comparable records: a row per sampler and grid, a column per step count.

    A caption above it and the commands that measure the rows on the model called ``name``.
    """
    together: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        together.setdefault((record["metric"], record["num"], record["reference"]["sha256"]), []).append(record)
    for (metric, num, _), mine in together.items():
        found = {(row["sampler"], row["grid"], row["steps"]): row for r in mine for row in r["results"]}
        counts = sorted({steps for *_, steps in found})
        rows = []
        for sampler, grid in dict.fromkeys(key[:2] for key in found):
            cells = [_cell(found.get((sampler, grid, k)), metric) for k in counts]
            rows.append([f"{sampler}, {grid} steps", *cells])
        reference = mine[0]["reference"]
        spread = " ± its standard error" if any("se" in row for row in found.values()) else ""
        split = f"{reference['split']}, " if reference["split"] else ""
        to = f"{reference['data']} ({split}{reference['n']:,} samples)"
        caption = f"{metric}{spread} of {num:,} samples to {to}, by"
        commands = "".join(f"\n    {_command(record, name)}" for record in mine)
        yield f"{caption}\n{commands}\n\n" + markdown_table(["steps", *map(str, counts)], rows)
