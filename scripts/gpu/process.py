"""The process of a part, and the reading of its events."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.order import Order

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "gpu.report", "-p", "no:cacheprovider", "-W", "default"]
COMMANDS = {"a": PYTEST, **{part: ["-m", "gpu.worker"] for part in "bcd"}}
START_LIMIT = 120.0  # seconds until a process has listed its items
GRACE = 20.0  # seconds to write a checkpoint after SIGTERM


class PartProcess:
    """Do the items of a part in a separate process; ``add(name, result)`` receives each result.

    An item that takes longer than its limit, or ends the process, has failed. At ``deadline`` the item in work is
    stopped without a result.
    """

    def __init__(
        self,
        part: str,
        skip: list[str],
        deadline: float,
        smoke: bool,
        out: Path,
        data: Path,
        run: str,
        add: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.part, self.deadline, self.add = part, deadline, add
        self.names: list[str] = []
        self.current, self.limit = "start", START_LIMIT  # the item in work, and its seconds
        self.began = time.time()
        self.pipe, events = os.pipe()
        order = Order(part, skip, deadline, smoke, str(out), str(data), run, events)
        paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        self.log = tempfile.TemporaryFile()  # closed in run
        self.process = subprocess.Popen(
            [sys.executable, *COMMANDS[part]],
            cwd=ROOT,
            env={**os.environ, **order.environment(), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            pass_fds=[events],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(events)

    def run(self) -> list[str]:
        """Collect events until the process ends or is stopped; return the names of all items of the part."""
        received = b""
        try:
            while True:
                given_up = self.began + self.limit
                wait = min(given_up, self.deadline) - time.time()
                if not select.select([self.pipe], [], [], max(0.0, wait))[0]:
                    if given_up < self.deadline:
                        self._fail(f"no result within {self.limit:g} s")
                    break
                chunk = os.read(self.pipe, 65536)
                if not chunk:
                    if self.process.wait():
                        self._fail(f"the process ended with exit code {self.process.returncode}")
                    break
                *lines, received = (received + chunk).split(b"\n")
                for line in lines:
                    self._event(json.loads(line))
        finally:
            self._stop()
            os.close(self.pipe)
            self.log.close()
        return self.names

    def _event(self, event: dict[str, Any]) -> None:
        if "names" in event:
            self.names, self.current, self.limit = event["names"], "", START_LIMIT
        elif "start" in event:
            self.current, self.limit = event["start"], event["limit"]
        else:
            self.add(event.pop("name"), event)
            self.current, self.limit = "", START_LIMIT
        self.began = time.time()

    def _fail(self, error: str) -> None:
        """Record a failure of the item in work, with the end of the process's output."""
        if self.current:
            self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 8000))
            output = self.log.read().decode(errors="replace")
            self.add(self.current, {"status": "failed", "error": error, "traceback": output})

    def _stop(self) -> None:
        """End the process and those that it started: politely, then by force."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(GRACE)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
