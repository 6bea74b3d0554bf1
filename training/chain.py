"""A chain of runs, each from the weights of the one before, by one command that also resumes."""

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from flowmaps import FlowMap, UserError
from flowmaps.distributed import processes
from flowmaps.errors import blame, within
from flowmaps.files import writable_directory, write_file
from flowmaps.markdown import markdown_table
from training.config import Config, class_name
from training.config_rows import Chain
from training.loop import train_section


def run_chain(chain: Chain, workdir: str | Path, only: str = "") -> list[dict[str, Any]]:
    """Train the stages of ``chain``, or the one named ``only``, in ``workdir``/STAGE, and return a record of each.

    By the rules of ``train`` a finished stage is left as it is and a stopped one resumes. The records of the complete
    chain are also written to ``workdir``/chain.json.
    """
    workdir = Path(workdir)
    stages = placed(chain, workdir)
    if only and only not in stages:
        raise UserError(f"choose one of {', '.join(stages)}", field="stage", value=only)
    for name, config in stages.items():
        with within(f"config.{name}"):
            config.validate()
    with blame("workdir", workdir):
        writable_directory(workdir)
    records = []
    for name, config in stages.items():
        if name == only or not only:
            AcceleratorState._reset_state()  # stages may differ in precision
            fm = train_section(config, workdir / name, None, f"config.{name}")
            records.append(record(name, config, workdir / name, fm))
    if processes().is_main_process and not only:
        write_file(workdir / "chain.json", json.dumps(records, indent=2).encode(), check=False)
    return records


def placed(chain: Chain, workdir: Path) -> dict[str, Config]:
    """Return the stages, with names of earlier stages in ``init_from`` and ``teacher`` replaced by directories."""
    done: dict[str, Config] = {}
    for name, config in chain.stages().items():
        for field in ("init_from", "teacher"):
            value = getattr(config, field)
            if value in done:
                setattr(config, field, str(workdir / value))
            elif value in chain.stages():
                raise UserError(f"that stage does not come before {name}", f"config.{name}.{field}", value)
        done[name] = config
    return done


def record(name: str, config: Config, directory: Path, fm: FlowMap) -> dict[str, Any]:
    """Summarise a finished stage: its start, its length, and its last logged loss and scores."""
    processes().wait_for_everyone()  # until the main process has written everything
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if key == "loss" or "@" in key}
    origin = json.loads((directory / "config.json").read_text())["origin"]
    return {
        "stage": name,
        "objective": class_name(config.objective),
        "steps": config.steps,
        "images_seen": fm.info.images_seen,
        "init_from": origin["init_from"],
        "teacher": origin["teacher"],
        "model": fm.fingerprint(),
        **last,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Format the records as a Markdown table, with shortened fingerprints."""
    columns = list(dict.fromkeys(key for row in records for key in row))
    rows = []
    for record in records:
        cells = {key: record.get(key, "") for key in columns}
        shown = {key: f"{cell:.4g}" if isinstance(cell, float) else str(cell) for key, cell in cells.items()}
        rows.append([text[:12] if key in ("init_from", "teacher", "model") else text for key, text in shown.items()])
    return markdown_table(columns, rows)
