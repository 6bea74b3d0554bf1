"""Shared by the cases: an empty folder, one line per verdict, and exceptions as values."""

import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")
CLONE = pathlib.Path(os.environ.get("CLONE", "."))
sys.path[:0] = [str(CLONE), str(CLONE / "tests")]
TMP = pathlib.Path(tempfile.mkdtemp())
os.environ["XDG_CACHE_HOME"] = str(TMP / "cache")


def case(name: str, good: bool, shown: str = "") -> None:
    print("HOLDS" if good else "FAILS", name, shown, flush=True)


def raised(f: Callable[[], Any]) -> tuple[Exception | None, Any]:
    """Return (exception or None, value or None)."""
    try:
        return None, f()
    except Exception as error:
        return error, None
