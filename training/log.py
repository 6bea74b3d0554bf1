"""The run's log: one JSON object a line in log.jsonl, and something to look at on the terminal."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from flowmaps.files import write_file


class Log:
    """Appends to ``workdir/log.jsonl``; shows a progress bar on a terminal, a line per interval otherwise.

    Values of steps are summed where they are and read once an interval, so that no step waits for the device. In a run
    of several processes only the main one writes (``enabled``).
    """

    def __init__(self, workdir: Path, steps: int, start: int, enabled: bool = True) -> None:
        self.enabled, self.steps = enabled, steps
        self.file = None
        if enabled:
            kept = _rows_until(workdir / "log.jsonl", start)
            write_file(workdir / "log.jsonl", kept.encode())
            self.file = (workdir / "log.jsonl").open("a", buffering=1)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (enabled and sys.stderr.isatty()))
        self.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside out of the interval's time: writing is not training."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before

    def clear(self) -> None:
        """Start an interval now."""
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.count, self.clock = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in the values of one step."""
        for name, value in values.items():
            self.sums[name] += value
        self.count += 1
        self.bar.update()

    def interval(self, step: int, batch: int, **facts: float) -> dict[str, float]:
        """End the interval after ``step`` steps: log and return the means over its steps, and ``facts``."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.clock
        values = means | facts | {"images_per_second": self.count * batch / seconds}
        self._write({"step": step, **values})
        shown = " ".join(f"{k}={v:.4g}" for k, v in values.items())
        if self.bar.disable:
            self._say(f"step {step}/{self.steps} {shown}")
        else:
            self.bar.set_postfix_str(shown)
        self.clear()
        return values

    def event(self, name: str, **facts: Any) -> None:
        """Log something that happened, such as a resume."""
        self._write({"event": name, **facts})
        self._say(f"{name}: " + " ".join(f"{k}={v}" for k, v in facts.items()))

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(row) + "\n")

    def _say(self, line: str) -> None:
        if self.enabled:
            tqdm.write(line, file=sys.stderr)


def _rows_until(path: Path, step: int) -> str:
    """The lines of a log that were written up to ``step``: what a killed run logged after its checkpoint goes."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the kill cut the last line
            continue
        if row["step"] <= step and step:
            kept.append(line + "\n")
    return "".join(kept)
