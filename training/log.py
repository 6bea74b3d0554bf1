"""The log of a run: JSON lines in log.jsonl, progress on the terminal, and TensorBoard files."""

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowmaps.files import finite, write_file
from flowmaps.reading import parse, parse_json, read_bytes

LARGEST = 4 << 30  # bytes of a log; a line has some 300


class Log:
    """Append to ``workdir/log.jsonl``, and show a progress bar on a terminal or a line per interval elsewhere.

    The values of steps stay on their device and are read once per interval, so that no step waits for the device. In
    a run of several processes only the main one writes (``enabled``).
    """

    def __init__(self, workdir: Path, steps: int, start: int, enabled: bool = True) -> None:
        self.enabled, self.steps = enabled, steps
        self.file = None
        if enabled:
            rows = [row for row in read_log(workdir / "log.jsonl") if row["step"] <= start] if start else []
            write_file(workdir / "log.jsonl", b"".join(map(_line, rows)), check=False)
            self.file = (workdir / "log.jsonl").open("a", buffering=1)
        self.board = _tensorboard(workdir, start) if enabled else None
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (enabled and sys.stderr.isatty()))
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
        self.bar.update()

    def interval(self, step: int, batch: int, **facts: float) -> None:
        """End the interval after ``step`` steps and log its means and ``facts``."""
        means = {name: float(sum(values)) / len(values) for name, values in self.values.items()}
        seconds = time.perf_counter() - self.clock
        values = means | facts | {"images_per_second": self.count * batch / seconds}
        self._write({"step": step, **values})
        self._plot(step, values)
        shown = " ".join(f"{k}={v:.4g}" for k, v in values.items())
        if self.bar.disable:
            self.say(f"step {step}/{self.steps} {shown}")
        else:
            self.bar.set_postfix_str(shown)
        self.clear()

    def score(self, step: int, name: str, value: float) -> None:
        """Log a score of the model after ``step`` steps."""
        self._write({"step": step, name: value})
        self._plot(step, {name: value})
        self.say(f"step {step}/{self.steps} {name}={value:.4g}")

    def picture(self, step: int, image: Image.Image) -> None:
        """Show the sample grid in TensorBoard."""
        if self.board:
            self.board.add_image("samples", np.atleast_3d(np.asarray(image)), step, dataformats="HWC")

    def event(self, name: str, **facts: Any) -> None:
        """Log an event, such as a resume."""
        self._write({"event": name, **facts})
        self.say(f"{name}: " + " ".join(f"{k}={v}" for k, v in facts.items()))

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def _plot(self, step: int, values: dict[str, float]) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            self.file.write(_line(row).decode())

    def say(self, line: str) -> None:
        """Show a line to whoever watches the run; it is not kept."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(finite(row), allow_nan=False) + "\n").encode()


def _tensorboard(workdir: Path, start: int) -> Any:
    """Open a writer of event files in workdir/tb if TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(workdir / "tb", purge_step=start + 1)


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
        row = parse(dict[str, bool | int | float | str | None], values, where)
        parse(int, row.get("step"), f"{where}: step")
        rows.append(row)
    return rows
