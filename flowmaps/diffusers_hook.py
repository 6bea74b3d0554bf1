"""Lets diffusers' generic ``DiffusionPipeline.from_pretrained`` find ``FlowMapPipeline``, without importing either.

diffusers looks the class of a pipeline up in its own module. That module gets it from here when it is asked for it.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder:
    """Finds ``diffusers`` as the other finders do, and prepares the module once it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _prepare(sys.modules[name])  # diffusers puts another module in place of the one it is loaded into

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _prepare(diffusers: ModuleType) -> None:
    """Let the module find ``FlowMapPipeline``; other names are looked up as before."""
    before = vars(diffusers).get("__getattr__")

    def find(name: str) -> Any:
        if name == "FlowMapPipeline":
            from flowmaps.pipeline import FlowMapPipeline

            return FlowMapPipeline
        if before is not None:
            return before(name)
        raise AttributeError(f"module {diffusers.__name__!r} has no attribute {name!r}")

    vars(diffusers)["__getattr__"] = find


def install() -> None:
    """Prepare ``diffusers``: at once if it is imported already, else when it is."""
    if "diffusers" in sys.modules:
        _prepare(sys.modules["diffusers"])
    else:
        sys.meta_path.insert(0, _Finder())
