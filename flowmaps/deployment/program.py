"""A program for engine.js: nodes in order, each writing one contiguous array of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

SMALL = 1024  # numbers: constants with fewer stay float32, such as frequencies


class Live(NamedTuple):
    """A value that depends on the inputs: its number in the program, and one value of it, from the traced inputs."""

    id: int
    value: Tensor


@dataclass
class Program:
    """Nodes in order, each writing one value; values are contiguous float32 arrays of ``sizes`` numbers."""

    inputs: dict[str, int] = field(default_factory=dict)
    output: int = -1
    sizes: list[int] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)

    def add(self, value: Tensor) -> Live:
        """Number a new value."""
        self.sizes.append(value.numel())
        return Live(len(self.sizes) - 1, value)

    def node(self, op: str, value: Tensor, inputs: Sequence[int], **options: Any) -> Live:
        """Append a node whose result is ``value``."""
        live = self.add(value)
        self.nodes.append({"op": op, "out": live.id, "inputs": list(inputs), **options})
        return live

    def packed(self, half: bool) -> tuple[dict[str, Any], bytes]:
        """Return the program as JSON values, and its constants as bytes, with ``half`` the large ones as float16."""
        self._drop_unused()
        listed, parts = [], []
        for id, tensor in self.constants.items():
            numbers = tensor.detach().float().contiguous().numpy().ravel()
            short = half and numbers.size >= SMALL and float(np.abs(numbers).max()) < 65504
            listed.append([id, int(short)])
            parts.append(numbers.astype("<f2" if short else "<f4").tobytes())
        values = {"inputs": self.inputs, "output": self.output, "sizes": self.sizes, "nodes": self.nodes}
        return {**values, "constants": listed}, b"".join(parts)

    def _drop_unused(self) -> None:
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if node["out"] in needed:
                needed.update(node["inputs"])
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {id: tensor for id, tensor in self.constants.items() if id in needed}


def contiguous(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous array."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the same walk over memory with as few dimensions as possible."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return [size for size, _ in found], [stride for _, stride in found]
