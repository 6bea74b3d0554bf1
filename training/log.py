"""The log of a run: JSON lines in log.jsonl, progress on the terminal, and trackers such as TensorBoard."""

import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowmaps.distributed import team
from flowmaps.errors import shorten
from flowmaps.files import finite, write_file
from flowmaps.reading import parse, parse_json, read_bytes
from training.loss_module import GAPS, largest

LARGEST = 4 << 30  # bytes of a log; a line has some 300
COLUMNS = 80  # that what is shown fits in
LEAST_BAR = 6  # columns of a bar that is worth its place
PAUSE = 5.0  # seconds between two lines, off a terminal


class Progress:
    """The progress of a run for whoever watches it: a bar on a terminal; elsewhere lines, some seconds apart.

    Both have the stage of a chain or "step", the step, the means of the latest interval, and the time: that since this
    command began, and that left at the same average speed.
    """

    def __init__(self, steps: int, start: int, stage: str = "", enabled: bool = True) -> None:
        self.steps, self.start, self.enabled = steps, start, enabled
        self.name = stage or "step"
        self.begun, self.shown = time.perf_counter(), -math.inf
        self.bar = tqdm(
            total=steps,
            initial=start,
            dynamic_ncols=True,
            smoothing=0,  # the average speed
            bar_format=self._bar(),
            disable=not (enabled and sys.stderr.isatty()),
        )

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the means of an interval that ended after ``step`` steps."""
        facts = f"loss {values['loss']:.4g} {_number(values['images_per_second'])} images/s"
        skipped = sum(int(values.get(name, 0)) for name in ("skipped", "spikes"))
        facts += f" skipped {skipped}" if skipped else ""
        rate = f" lr {values['lr']:.3g}"
        if not self.bar.disable:
            room = COLUMNS - len(f"{self.name} {step}/{self.steps} || {facts} 00:00:00<00:00:00")
            facts += rate if room >= LEAST_BAR + len(rate) else ""
            self.bar.bar_format = self._bar(facts, "|{bar}|" if room >= LEAST_BAR else "")
            self.bar.refresh()
            return
        now = time.perf_counter()
        if step == self.steps or now - self.shown >= PAUSE:
            self.shown, gone = now, now - self.begun
            left = gone / (step - self.start) * (self.steps - step)
            line = f"{self.name} {step}/{self.steps} {facts} {clock(gone)}<{clock(left)}"
            self.say(line + rate if len(line + rate) <= COLUMNS else line)

    def say(self, line: str) -> None:
        """Show a line."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)

    def _bar(self, facts: str = "", bar: str = "|{bar}|") -> str:
        parts = (f"{self.name} {{n_fmt}}/{{total_fmt}}", bar, facts, "{elapsed}<{remaining}")
        return " ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """Return "02:30", or "1:02:30"."""
    return str(tqdm.format_interval(seconds))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Trackers:
    """The trackers of accelerate that are called ``names``, for a run in ``workdir`` that begins after step ``start``.

    None stops a run: one that fails is left out from then on, and a line ``say``s so.
    """

    def __init__(
        self, names: Iterable[str], workdir: Path, start: int, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.say, self.open = say, dict[str, Any]()
        plain = {name: x if isinstance(x, (bool, int, float, str)) else str(x) for name, x in config.items()}
        for name in names:
            self._try(name, self._start, name, workdir, start, plain)

    def _start(self, name: str, *facts: Any) -> None:
        self.open[name] = _tracker(name, *facts)

    def log(self, values: dict[str, float], step: int) -> None:
        """Record numbers after ``step`` steps."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.log, values, step=step)

    def picture(self, pixels: NDArray[np.uint8], step: int) -> None:
        """Record a sample grid [H, W, C], with trackers that take pictures."""
        for name, tracker in list(self.open.items()):
            form = {"dataformats": "NHWC"} if name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                self._try(name, tracker.log_images, {"samples": pixels[None]}, step=step, **form)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            work(*arguments, **options)
        except Exception as error:  # whatever it is: of the network, the disk, an account, a missing package
            self.open.pop(name, None)
            reason = shorten(f"{type(error).__name__}: {error}")
            self.say(f"warning: {name} fails and is left out from here on: {reason}")


def _tracker(name: str, workdir: Path, start: int, config: dict[str, Any]) -> Any:
    """Start a tracker of accelerate and give it the config."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # its files are in workdir/tb
        tracker = kind("tb", logging_dir=workdir, purge_step=start + 1)
    elif name == "wandb":
        project, before = os.environ.get("WANDB_PROJECT", "flowmaps"), sorted((workdir / "wandb").glob("*run-*-*"))
        same = {"id": before[-1].name.rpartition("-")[2], "resume": "allow"} if start and before else {}
        tracker = kind(project, dir=workdir, name=workdir.name, **same)
    else:
        tracker = kind("flowmaps", **({"logging_dir": workdir} if kind.requires_logging_directory else {}))
    tracker.start()
    if not start or name != "tensorboard":  # which would list a resumed run twice
        tracker.store_init_configuration(config)
    return tracker


class Log:
    """Append to ``workdir/log.jsonl``, tell the trackers, and show the progress.

    The values of steps stay on their device and are read once per interval, so that no step waits for the device. In
    a run of several processes only the main one writes (``enabled``). ``trackers`` are names, and they receive
    ``config``; TensorBoard is one of them if it is installed.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        start: int,
        enabled: bool = True,
        stage: str = "",
        trackers: Sequence[str] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.steps, self.file = steps, None
        if enabled:
            rows = [row for row in read_log(workdir / "log.jsonl") if row["step"] <= start] if start else []
            write_file(workdir / "log.jsonl", b"".join(map(_line, rows)), check=False)
            self.file = (workdir / "log.jsonl").open("a", buffering=1)
        self.progress = Progress(steps, start, stage, enabled)
        names = dict.fromkeys([*["tensorboard"] * (find_spec("tensorboard") is not None), *trackers])
        self.trackers = Trackers(names if enabled else (), workdir, start, config or {}, self.progress.say)
        self.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the interval's time: writing is not training."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before

    def clear(self) -> None:
        """Start a new interval."""
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.count, self.clock = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one step to the interval."""
        for name, value in values.items():
            self.values[name].append(value)
        self.count += 1
        self.progress.bar.update()

    def interval(self, step: int, batch: int, **facts: float) -> None:
        """End the interval after ``step`` steps and log ``facts`` and its means over steps and processes; collective.

        The residuals by time are one field: a list of BINS numbers for each of GAPS, and "largest": [residual, s, t].
        """
        means = self._means()
        seconds = time.perf_counter() - self.clock
        cells, row = means.pop("residuals", None), means.pop("largest", None)
        residuals = {**dict(zip(GAPS, cells, strict=True)), "largest": row} if cells else {}
        values = means | facts | {"images_per_second": self.count * batch / seconds}
        self._write({"step": step, **values, "residuals": residuals})
        plots = {f"residuals/{name}/{i}": x for name, numbers in residuals.items() for i, x in enumerate(numbers)}
        self.trackers.log(values | plots, step)
        self.progress.show(step, values)
        self.clear()

    def _means(self) -> dict[str, Any]:
        """Return the interval's means over steps and processes as numbers, by one call to the other processes."""
        found = {}
        for name, values in self.values.items():
            found[name] = largest(torch.stack(values)) if name == "largest" else torch.stack(values).mean(dim=0)
        parts = team().all_gather(torch.cat([value.flatten().float() for value in found.values()])[None])
        sizes = [value.numel() for value in found.values()]
        for (name, value), part in zip(found.items(), torch.split(parts, sizes, dim=1), strict=True):
            found[name] = largest(part) if name == "largest" else part.mean(dim=0).view(value.shape)
        return {name: value.tolist() for name, value in found.items()}

    def skipped(self, step: int, values: dict[str, Tensor]) -> None:
        """Show where the largest residual of ``step`` was, which has been skipped; collective."""
        residual, s, t = largest(team().all_gather(values["largest"][None])).tolist()
        self.progress.say(
            f"{self.progress.name} {step}/{self.steps} skipped: gradient norm {float(values['grad_norm']):.3g}, "
            f"largest residual {residual:.3g} at s={s:.3f} t={t:.3f}"
        )

    def score(self, step: int, name: str, value: float) -> None:
        """Log a score of the model after ``step`` steps."""
        self._write({"step": step, name: value})
        self.trackers.log({name: value}, step)
        self.progress.say(f"{self.progress.name} {step}/{self.steps} {name} {value:.4g}")

    def picture(self, step: int, image: Image.Image) -> None:
        """Show the sample grid in the trackers."""
        self.trackers.picture(np.atleast_3d(np.asarray(image)), step)

    def event(self, name: str, **facts: Any) -> None:
        """Log an event, such as a resume; it is not shown."""
        self._write({"event": name, **facts})

    def close(self) -> None:
        self.progress.bar.close()
        if self.file:
            self.file.close()
        self.trackers.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            self.file.write(_line(row).decode())


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(finite(row), allow_nan=False) + "\n").encode()


NO_JSON = re.compile(r"-?\bInfinity\b|\bNaN\b")  # numbers of a log that an earlier version wrote


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log.jsonl, each with its "step"; a last line that a kill cut is left out.

    Raises:
        UserError: The file, or one of its lines, is not what a run writes; the message names the line.
    """
    remedy = "remove the line, or use a new workdir"
    *lines, _ = read_bytes(path, "use a new workdir", LARGEST).decode(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        values = parse_json(NO_JSON.sub("null", line), where, remedy)
        row = parse(dict[str, bool | int | float | str | dict[str, list[float | None]] | None], values, where)
        parse(int, row.get("step"), f"{where}: step")
        rows.append(row)
    return rows
