"""A polite stop of training by a signal."""

import signal
from types import FrameType


class Stop:
    """Record SIGTERM or Ctrl-C inside the block in ``asked``, for the loop to stop between two steps.

    A second signal ends the block at once, by KeyboardInterrupt.
    """

    def __enter__(self) -> "Stop":
        self.asked = ""
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
