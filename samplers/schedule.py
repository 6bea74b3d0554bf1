"""Step sizes fitted to a model: time grids by number of steps, and how they were found."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from samplers.grids import MOST_STEPS, check_times, uniform_times

BY_STEPS = {"grids", "errors", "uniform_errors"}  # fields that are mappings from step counts


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # neither NaN


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a value must be; in BY_STEPS each step's
    **dict.fromkeys(("sampler", "cost", "checkpoint"), ("text", lambda value: isinstance(value, str))),
    **dict.fromkeys(("noises", "seed", "fine"), ("a whole number", _count)),
    "guidance": ("a number or null", lambda value: value is None or _number(value)),
    **dict.fromkeys(("errors", "uniform_errors"), ("a number", _number)),
}


@dataclass(frozen=True, eq=False)
class Schedule(Mapping[int, Tensor]):
    """Time grids by number of steps: ``schedule[4]`` is a float64 tensor of 5 times from 0 (noise) to 1 (data).

    The other fields record what the grids are for and how they were found; an empty field means unknown.

    Args:
        grids: {steps: times}, each with ``steps + 1`` increasing times from 0 to 1.

    Raises:
        ValueError: A grid has the wrong length or ends, or does not increase, or a field has the wrong type.

    Example:
        >>> schedule = Schedule({2: (0, 0.7, 1)}, sampler="euler")
        >>> euler(fm.drift, fm.noise(16, seed=0), schedule[2])
        >>> Schedule.from_json(schedule.to_json()) == schedule
        True
    """

    grids: Mapping[int, Sequence[float] | Tensor]
    sampler: str = ""  # the sampler whose error was minimised: map, euler or heun
    cost: str = ""  # the error that was minimised, a key of ``flowmaps.step_sizes.COSTS``
    checkpoint: str = ""  # FlowMap.fingerprint of the model
    noises: int = 0  # number of fine paths that the grids were fitted to
    seed: int = 0  # seed of their noise
    fine: int = 0  # steps of the fine grid, from which all times are taken
    guidance: float | None = None  # guidance weight of the paths
    errors: Mapping[int, float] = field(default_factory=dict)  # by steps: error of the grid on other noise
    uniform_errors: Mapping[int, float] = field(default_factory=dict)  # by steps: error of equal steps on that noise

    def __post_init__(self) -> None:
        grids = {}
        for steps, times in self.grids.items():
            values = times.tolist() if isinstance(times, Tensor) else times
            if not isinstance(values, (list, tuple)) or not all(map(_number, values)):
                raise ValueError(f"times of {steps} steps must be a list of numbers, got {str(values)[:80]}")
            grid = check_times(torch.tensor(values, dtype=torch.float64))
            if len(grid) != steps + 1 or grid[0] != 0 or grid[-1] != 1:
                raise ValueError(f"times of {steps} steps must be {steps + 1}, from 0 to 1, got {grid.tolist()}")
            grids[steps] = tuple(grid.tolist())
        object.__setattr__(self, "grids", dict(sorted(grids.items())))
        for name, (kind, fits) in FIELDS.items():
            values = getattr(self, name)
            for value in values.values() if name in BY_STEPS else [values]:
                if not fits(value):
                    raise ValueError(f"a schedule's {name} is {str(value)[:80]!r}, of the wrong type: expected {kind}")

    def __getitem__(self, steps: int) -> Tensor:
        return torch.tensor(self.grids[steps], dtype=torch.float64)

    def __iter__(self) -> Iterator[int]:
        return iter(self.grids)

    def __len__(self) -> int:
        return len(self.grids)

    def __eq__(self, other: object) -> bool:
        return asdict(self) == asdict(other) if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_json())

    def only(self, *steps: int) -> Self:
        """Return the same schedule with only the grids for these numbers of steps; ValueError if one is missing."""
        if missing := sorted(set(steps) - set(self.grids)):
            raise ValueError(f"a schedule for {_listed(self.grids)} steps has no grid of {_listed(missing)}")
        kept = {name: {n: v for n, v in getattr(self, name).items() if n in steps} for name in BY_STEPS}
        return replace(self, **kept)  # type: ignore[arg-type]

    def better(self) -> Self:
        """Return the same schedule with only the grids that are known to beat equal steps."""
        return self.only(*(n for n in self if self.errors.get(n, 0.0) < self.uniform_errors.get(n, 0.0)))

    def sigmas(self, steps: int) -> list[float]:
        """Return the ``sigmas`` that diffusers' ``set_timesteps`` takes: decreasing from 1 (noise), 0 implied."""
        return (1 - self[steps][:-1]).tolist()

    @classmethod
    def uniform(cls, *steps: int) -> Self:
        """Return equal steps for each of these numbers of steps."""
        return cls({count: uniform_times(count) for count in steps})

    def to_json(self) -> str:
        """Return text for ``from_json``."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Rebuild from ``to_json``; ValueError if it is not a schedule."""
        try:
            return cls.from_dict(json.loads(text))
        except RecursionError:
            raise ValueError("not a schedule: too deeply nested") from None

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Rebuild from plain values, whose keys may be text as in JSON.

        Raises:
            ValueError: A field is unknown, missing, or of the wrong type.
        """
        if not isinstance(values, dict) or "grids" not in values:
            raise ValueError("not a schedule: it has no grids")
        taken = {name: value for name, value in values.items() if name != "written_by"}  # of a file
        if unknown := sorted(str(name)[:40] for name in taken.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"a schedule has no field {unknown[0]}")
        for name in BY_STEPS & taken.keys():
            if not isinstance(taken[name], dict):
                raise ValueError(
                    f"a schedule's {name} is {str(taken[name])[:80]!r}, of the wrong type: expected a mapping"
                )
            taken[name] = {_steps(steps, name): value for steps, value in taken[name].items()}
        return cls(**taken)


def _steps(key: Any, name: str) -> int:
    """Return the number of steps that is a key of a mapping, of JSON too."""
    text = str(key)[:40]
    if isinstance(key, bool) or not (text.isascii() and text.isdigit()) or text[0] == "0" or int(text) > MOST_STEPS:
        raise ValueError(f"a schedule's {name} has {text!r} for a number of steps from 1 to {MOST_STEPS:,}")
    return int(text)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))
