"""The run's log: one JSON object a line in log.jsonl, and something to look at on the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Log:
    """Appends to ``workdir/log.jsonl``; shows a progress bar on a terminal, a line per interval otherwise.

    Only the main process of a run makes one that writes.
    """

    def __init__(self, workdir: Path, steps: int, start: int, enabled: bool = True) -> None:
        self.enabled, self.steps = enabled, steps
        self.file = (workdir / "log.jsonl").open("a", buffering=1) if enabled else None
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (enabled and sys.stderr.isatty()))

    def event(self, name: str, **facts: Any) -> None:
        """Log something that happened, such as a resume."""
        self._write({"event": name, **facts})
        self._say(f"{name}: " + " ".join(f"{k}={v}" for k, v in facts.items()))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the means of an interval that ended after ``step`` steps."""
        self._write({"step": step, **values})
        shown = " ".join(f"{k}={v:.4g}" for k, v in values.items())
        if self.bar.disable:
            self._say(f"step {step}/{self.steps} {shown}")
        else:
            self.bar.set_postfix_str(shown)

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update()

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
