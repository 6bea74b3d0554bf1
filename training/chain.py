"""Several runs in a row, each from the weights of the one before: all by one command, which also resumes."""

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from flowmaps import FlowMap, UserError
from flowmaps.distributed import processes
from flowmaps.errors import blame
from flowmaps.files import writable_directory, write_file
from training.config import Config
from training.config_rows import Chain
from training.loop import train


def run_chain(chain: Chain, workdir: str | Path, only: str = "") -> list[dict[str, Any]]:
    """Train the stages of ``chain``, or the one named ``only``, in ``workdir``/STAGE; returns a record of each.

    A stage that is done is only looked at, and one that was stopped resumes, by the rules of ``train``. The records
    of a whole chain are also in ``workdir``/chain.json.
    """
    workdir = Path(workdir)
    stages = placed(chain, workdir)
    if only and only not in stages:
        raise UserError(f"--stage={only}: choose one of {', '.join(stages)}")
    for name, config in stages.items():
        try:
            config.validate()
        except UserError as error:
            raise UserError(str(error).replace("--config.", f"--config.{name}.")) from None
    with blame("workdir", workdir):
        writable_directory(workdir)
    records = []
    for name, config in stages.items():
        if name == only or not only:
            AcceleratorState._reset_state()  # stages may differ in precision
            try:
                fm = train(config, workdir / name)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None
            records.append(record(name, config, workdir / name, fm))
    if processes().is_main_process and not only:
        write_file(workdir / "chain.json", json.dumps(records, indent=2).encode())
    return records


def placed(chain: Chain, workdir: Path) -> dict[str, Config]:
    """The stages with the names of earlier stages in ``init_from`` and ``teacher`` replaced by their directories."""
    done: dict[str, Config] = {}
    for name, config in chain.stages().items():
        for field in ("init_from", "teacher"):
            value = getattr(config, field)
            if value in done:
                setattr(config, field, str(workdir / value))
            elif value in chain.stages():
                raise UserError(f"--config.{name}.{field}={value}: that stage does not come before {name}")
        done[name] = config
    return done


def record(name: str, config: Config, directory: Path, fm: FlowMap) -> dict[str, Any]:
    """What became of a stage: what it started from, how long it was, and its last logged loss and scores."""
    processes().wait_for_everyone()  # until the main process has written all
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if key == "loss" or "@" in key}
    origin = json.loads((directory / "config.json").read_text())["origin"]
    return {
        "stage": name,
        "objective": config.objective.name,
        "steps": config.steps,
        "images_seen": fm.info.images_seen,
        "init_from": origin["init_from"],
        "teacher": origin["teacher"],
        "model": fm.fingerprint(),
        **last,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown, fingerprints by their first digits."""
    columns = list(dict.fromkeys(key for row in records for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in records:
        cells = [row.get(key, "") for key in columns]
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        short = ("init_from", "teacher", "model")
        shown = [cell[:12] if key in short else cell for key, cell in zip(columns, shown, strict=True)]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)
