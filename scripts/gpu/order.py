"""The order that the process of a part receives, and the events that it reports, one JSON object per line of a pipe.

{"names": [...]}                  all items of the part, before the first
{"start": name, "limit": seconds} an item begins, which is given up after so long
{"name": name, "status": "ok" | "failed" | "skipped", "seconds": ..., ...}  an item ended, with its results
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

VARIABLE = "FLOWMAPS_GPU_ORDER"  # environment variable that holds the order


class Unavailable(Exception):
    """An item cannot be done here, for a reason outside the package."""


class Item(NamedTuple):
    """A check or a measurement: the seconds that it may take, and the work, which returns its results."""

    limit: float
    work: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Order:
    """The items of a part except those in ``skip``, to be done until ``deadline`` (of ``time.time``)."""

    part: str
    skip: list[str]
    deadline: float
    smoke: bool
    out: str
    data: str
    run: str  # identifies the file of results, for files elsewhere that belong to it
    pipe: int  # descriptor for the events

    @classmethod
    def received(cls) -> "Order | None":
        """Return the order of this process, None if it is not a process of a part."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def emit(self, **event: Any) -> None:
        """Report an event."""
        os.write(self.pipe, json.dumps(event).encode() + b"\n")
