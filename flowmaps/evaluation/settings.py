"""The settings that a model is sampled with: sampler and time grid, checked against what the model allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import Interval, check_sampling
from flowmaps.labels import labels_for
from flowmaps.step_sizes import read_schedule
from samplers import SAMPLERS, Schedule, uniform_times
from samplers.grids import MOST_STEPS, is_step_count


@dataclass(frozen=True)
class Setting:
    """One way to sample: a sampler and the times that it steps through."""

    sampler: str
    grid: str  # where the times are from: "uniform", "stored" in the checkpoint, a schedule file, or "given"
    times: Tensor

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.times) - 1


def sampling_settings(
    fm: FlowMap,
    steps: Sequence[int],
    samplers: Sequence[str],
    schedules: Sequence[str | Schedule] = ("stored",),
    *,
    label: int | str | None = None,
    guidance: float | None = None,
    guidance_interval: Interval = None,
    gamma: float = 1.0,
) -> list[Setting]:
    """Return every combination of sampler, schedule and step count; refuse what the model was not trained for."""
    check_choices(steps, samplers, schedules)
    labels_for(fm.info, 1, fm.conditions if label is None else label)
    found = []
    for sampler, schedule, count in product(samplers, schedules, steps):
        check_sampling(fm, sampler, count, gamma, guidance, guidance_interval)
        found.append(_setting(fm, sampler, schedule, count, guidance, guidance_interval))
    return found


def check_choices(
    steps: Sequence[int], samplers: Sequence[str], schedules: Sequence[str | Schedule] = ("stored",)
) -> None:
    """Refuse choices that no model allows, such as a step count of 0 or an unknown sampler."""
    if not steps or not all(map(is_step_count, steps)) or len(set(steps)) < len(steps):
        given = ",".join(map(str, steps))
        reason = f"give different whole numbers from 1 to {MOST_STEPS:,}"
        raise UserError(reason, field="steps", value=given)
    for field, values in (("sampler", samplers), ("schedule", schedules)):
        if not values or len(set(values)) < len(values):
            raise UserError("give at least one, all different", field=field, value=",".join(map(str, values)))
    if unknown := [name for name in samplers if name not in SAMPLERS]:
        raise UserError(f"choose from {', '.join(SAMPLERS)}", field="sampler", value=unknown[0])


def _setting(
    fm: FlowMap, sampler: str, schedule: str | Schedule, steps: int, guidance: float | None, interval: Interval
) -> Setting:
    stored = None if interval else fm.info.times(sampler, steps, guidance)  # which is for guidance at all times
    if schedule == "stored" and stored is not None:
        return Setting(sampler, "stored", stored)
    if schedule in ("stored", "uniform"):
        return Setting(sampler, "uniform", uniform_times(steps))
    name = "given" if isinstance(schedule, Schedule) else schedule
    schedule = schedule if isinstance(schedule, Schedule) else read_schedule(schedule)
    if schedule.sampler not in ("", sampler):
        raise UserError(f"made for sampler={schedule.sampler}, not {sampler}", field="schedule", value=name)
    if steps not in schedule:
        raise UserError(
            f"has no grid of {steps} steps, only {', '.join(map(str, schedule))}: see steps",
            field="schedule",
            value=name,
        )
    if (schedule.guidance or 1) != (guidance or 1):
        raise UserError(f"made with guidance={schedule.guidance}, not {guidance}", field="schedule", value=name)
    if interval:
        raise UserError("made for guidance at all times: leave guidance_interval out", field="schedule", value=name)
    return Setting(sampler, name, schedule[steps])
