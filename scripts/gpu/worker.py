"""The process of part b, c or d: ``python -m gpu.worker``."""

import importlib
import time
import traceback
from pathlib import Path
from typing import Any

from flowmaps.errors import Stopped
from gpu.order import Order, Unavailable

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"b": "gpu.rows", "c": "gpu.speed", "d": "gpu.training"}


def work(order: Order) -> None:
    """Do the items one after the other, up to the first that fails: an error on a GPU can spoil all that follow."""
    items = importlib.import_module(MODULES[order.part]).items(order)
    order.emit(names=list(items))
    for name in [name for name in items if name not in order.skip]:
        order.emit(start=name, limit=items[name].limit)
        start = time.perf_counter()
        try:
            result = {"status": "ok", **items[name].work()}
        except Stopped:
            return
        except Exception as error:
            result = explained(error)
        order.emit(name=name, seconds=round(time.perf_counter() - start, 2), **result)
        if result["status"] == "failed":
            return


def explained(error: Exception) -> dict[str, Any]:
    """Return the result of an item that raised ``error``: skipped without a package that is not ours, else failed."""
    if isinstance(error, Unavailable):
        return {"status": "skipped", "reason": str(error)}
    if isinstance(error, ModuleNotFoundError) and not (ROOT / str(error.name).partition(".")[0]).exists():
        return {"status": "skipped", "reason": f"needs {error.name}"}
    line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return {"status": "failed", "error": line, "traceback": traceback.format_exc()[-8000:]}


if __name__ == "__main__":
    if received := Order.received():
        work(received)
