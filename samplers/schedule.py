"""Step sizes fitted to a model: time grids by number of steps, and how they were found."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from samplers.grids import check_times, uniform_times

BY_STEPS = {"grids", "errors", "uniform_errors"}  # fields that are mappings from step counts


@dataclass(frozen=True, eq=False)
class Schedule(Mapping[int, Tensor]):
    """Time grids by number of steps: ``schedule[4]`` is a float64 tensor of 5 times from 0 (noise) to 1 (data).

    The other fields record what the grids are for and how they were found; an empty field means unknown.

    Args:
        grids: {steps: times}, each with ``steps + 1`` increasing times from 0 to 1.

    Raises:
        ValueError: A grid has the wrong length or ends, or does not increase.

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
            grid = check_times(torch.as_tensor(times, dtype=torch.float64))
            if len(grid) != steps + 1 or grid[0] != 0 or grid[-1] != 1:
                raise ValueError(f"times of {steps} steps must be {steps + 1}, from 0 to 1, got {grid.tolist()}")
            grids[steps] = tuple(grid.tolist())
        object.__setattr__(self, "grids", dict(sorted(grids.items())))

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
        """Return the same schedule with only the grids for these numbers of steps."""
        kept = {name: {n: v for n, v in getattr(self, name).items() if n in steps} for name in BY_STEPS}
        return replace(self, **kept)  # type: ignore[arg-type]

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
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Rebuild from plain values, whose keys may be text as in JSON; ValueError for an unknown field."""
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key != "written_by"}  # of schedule.py --out
        if not isinstance(values, dict) or "grids" not in values:
            raise ValueError("not a schedule: it has no grids")
        kinds = {f.name: f.type for f in fields(cls)}
        if unknown := sorted(set(values) - set(kinds)):
            raise ValueError(f"a schedule has no field {', '.join(map(str, unknown))}")
        taken = dict(values)
        try:
            for name in BY_STEPS & set(taken):
                taken[name] = {int(steps): value for steps, value in taken[name].items()}
            for name, value in taken.items():
                if kinds[name] in (str, int) and type(value) is not kinds[name]:
                    raise TypeError(f"{name} is {value!r}")
            if not isinstance(taken.get("guidance"), (int, float, type(None))):
                raise TypeError(f"guidance is {taken['guidance']!r}")
            return cls(**taken)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a schedule's field is of the wrong type: {error}") from None
