"""A chain of runs, each from the weights of the one before, by one command that also resumes."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from flowmaps import FlowMap, UserError
from flowmaps.distributed import join, processes
from flowmaps.errors import blame, within
from flowmaps.files import check_new_file, to_json, write_file
from flowmaps.markdown import markdown_table
from training.config import Config, class_name
from training.config_rows import Chain
from training.log import read_log
from training.loop import named, train_section
from training.run_directory import check_run_directory, disk_errors, is_run, read_config
from training.stop import Stop


def run_chain(chain: Chain, workdir: str | Path, only: str = "") -> list[dict[str, Any]]:
    """Train the stages of ``chain``, or the one named ``only``, in ``workdir``/STAGE, and return a record of each.

    By the rules of ``train`` a finished stage is left as it is and a stopped one resumes. The records of the complete
    chain are also written to ``workdir``/chain.json.
    """
    workdir = Path(workdir)
    stages = placed(chain, workdir)
    if only and only not in stages:
        raise UserError(f"choose one of {', '.join(stages)}", field="stage", value=only)
    team = join(next(iter(stages.values())).timeout)
    configs = {"config": {name: config.to_dict() for name, config in stages.items()}}
    team.check_same({"workdir": str(workdir), "stage": only, **named(configs)})
    records, main = [], processes().is_main_process
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if main:
            with blame("workdir", workdir):
                _check_directory(workdir, list(stages))
            stack.enter_context(disk_errors(workdir))
        for number, (name, config) in enumerate(stages.items(), start=1):
            if name == only or not only:
                AcceleratorState._reset_state()  # stages may differ in precision
                stage = f"{number}/{len(stages)} {name}"
                fm = train_section(config, workdir / name, None, f"config.{name}", stop, stage)
                records.append(record(name, config, workdir / name, fm))
        if main and not only:
            write_file(workdir / "chain.json", to_json(records), check=False)
    return records


def _check_directory(workdir: Path, stages: list[str]) -> None:
    """Refuse, before any work, a ``workdir`` where the chain would replace what no chain wrote."""
    for name in stages:
        check_run_directory(workdir / name)
    records = workdir / "chain.json"
    if not any(is_run(workdir / name) for name in stages):  # whose records these are
        check_new_file(records)
    elif records.is_symlink() or (records.exists() and not records.is_file()):
        raise UserError(f"{records} is not a file, and a chain has one there: choose another directory")


def placed(chain: Chain, workdir: Path) -> dict[str, Config]:
    """Return the stages, with names of earlier stages in ``init_from`` and ``teacher`` replaced by directories."""
    done: dict[str, Config] = {}
    for name, config in chain.stages().items():
        with within(f"config.{name}"):
            config.validate()
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
    last: dict[str, Any] = {}
    for row in read_log(directory / "log.jsonl"):
        last |= {key: value for key, value in row.items() if key == "loss" or "@" in key}
    origin = read_config(directory / "config.json")["origin"]
    return {
        "stage": name,
        "objective": class_name(config.objective),
        "steps": config.steps,
        "images_seen": fm.info.images_seen,
        "init_from": origin.get("init_from", ""),
        "teacher": origin.get("teacher", ""),
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
