"""Bench of operators: the time of loss and gradient by kind of operator."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.objectives import COSTS, loss_and_gradient

GROUPS = {  # the first pattern that is found in an operator's name; what matches none is dispatch and other
    "matrix products, convolutions": r"conv|::mm|addmm|bmm",
    "norms": r"group_norm|layer_norm",
    "activations, softmax": r"silu|gelu|sigmoid|softmax|tanh",
    "element by element": r"::(add|mul|div|sub|rsub|neg|sum|mean|pow|square|rsqrt|sqrt|addcmul|cos|sin|exp|where|lerp)",
    "copies": r"copy_|::cat|fill_|zero_|clone|contiguous",
}
OTHER = "dispatch and other"
METHODS = ("flow_matching", "lagrangian")


def times(work: Callable[[], Any], rounds: int) -> Counter[str]:
    """Seconds of one ``work`` by group: of the device's own time on a GPU, else of the CPU's."""
    work()
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(rounds):
            work()
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), OTHER)
        seconds[group] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / rounds
    return seconds


def profiles(name: str, rounds: int = 5) -> dict[str, float]:
    """Time of each group in a flow-matching and a Lagrangian step of the network ``name``, in flow-matching steps."""
    _, step = loss_and_gradient(name)
    found = {key: times(partial(step, COSTS[key], COSTS[key].loss, 0), rounds) for key in METHODS}
    whole = found["flow_matching"].total()
    return {f"{key}@{group}": seconds[group] / whole for group in (*GROUPS, OTHER) for key, seconds in found.items()}
