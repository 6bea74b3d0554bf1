"""Conditions of Windows: no fcntl, and directories that os.open cannot open."""

import os
import sys
from pathlib import Path

from common import CLONE, TMP, case, raised

sys.modules["fcntl"] = None
real = os.open


def no_directories(path, flags, *a, **k):
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, flags, *a, **k)


os.open = no_directories
from flowmaps import FlowMap  # noqa: E402  after os.open has been replaced

fm = FlowMap.from_pretrained(CLONE / "assets/digits")
case("from_pretrained", True)
e, _ = raised(lambda: fm.save_pretrained(TMP / "m"))
case("save_pretrained", e is None, repr(e)[:100])
for name in ("flowmaps.cli.sample", "training.loop"):
    e, _ = raised(lambda: __import__(name))
    case(f"import {name} (sample.py, train.py)", e is None, repr(e)[:100])
