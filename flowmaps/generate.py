"""From a flow map to samples: noise and label by sample index, batch by batch; steered ones too."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.guidance import Guided
from flowmaps.info import FlowMapInfo
from flowmaps.labels import BALANCED, Label, labels_for, sample_labels
from flowmaps.networks.conditioning import soft_label, with_guidance
from flowmaps.networks.conditions import condition_rows
from flowmaps.rng import generator
from samplers import SAMPLERS, check_times
from samplers.callables import Drift
from samplers.grids import MOST_STEPS, STEP_COUNT, Times, is_step_count
from samplers.steer import Reward, Watch, steer

Interval = tuple[float, float] | None
MOST_PARTICLES = 10_000
SCALE_SAMPLES = 64  # one-step samples whose standard deviation a steered call takes for that of the data


def nfe(info: FlowMapInfo, sampler: str, steps: int, guidance: float | None = None, particles: int = 1) -> int:
    """Return the network evaluations of a sample; classifier-free guidance of a solver doubles them."""
    twice = guidance not in (None, 1) and info.guidance_max is None
    return steps * SAMPLERS[sampler].nfe * (1 + twice) * particles


def check_sampling(
    fm: FlowMap,
    sampler: str,
    steps: int = 1,
    gamma: float = 1.0,
    guidance: float | None = None,
    interval: Interval = None,
) -> None:
    """Refuse a way to sample that ``fm`` was not trained for or that its path does not allow: ``UserError``."""
    check_steps(steps)
    fm.info.check_sampler(sampler, steps, gamma)
    fm.info.check_guidance(guidance, sampler, interval)
    if SAMPLERS[sampler].linear and fm.interpolant_name != "linear":
        raise UserError(
            f"is for the linear path only, but this model has the {fm.interpolant_name} path: use heun",
            field="sampler",
            value=sampler,
        )


def check_steering(sampler: str, gamma: float, particles: object) -> None:
    """Refuse what a reward cannot steer: another sampler or gamma, or what is not a number of particles."""
    if not SAMPLERS[sampler].renoises:
        raise UserError("a reward steers the sampler stochastic: choose that", field="sampler", value=sampler)
    if gamma != 1:
        raise UserError("steering renews all noise: leave it out", field="gamma", value=gamma)
    if not isinstance(particles, int) or isinstance(particles, bool) or not 1 <= particles <= MOST_PARTICLES:
        raise UserError(f"must be a whole number from 1 to {MOST_PARTICLES:,}", field="particles", value=particles)


def check_steps(steps: object, field: str = "steps") -> None:
    """Refuse what is not a number of steps, such as 0 or NaN: ``UserError``."""
    if not is_step_count(steps):
        raise UserError(f"must be {STEP_COUNT}", field=field, value=steps)


def check_grid(times: Times, field: str = "times") -> Tensor:
    """Return ``times`` as a grid from noise (0) to data (1): ``UserError`` if they are none."""
    try:
        grid = check_times(times)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), field=field) from None
    if float(grid[0]) != 0 or float(grid[-1]) != 1:
        raise UserError("must lead from noise (time 0) to data (time 1)", field=field, value=grid.tolist())
    return grid


def guided_label(fm: FlowMap, label: Tensor | None, weight: float | None, interval: Interval = None) -> Tensor | None:
    """Return ``label`` [n] with the guidance ``weight`` and its times attached, if ``fm`` takes one.

    Conditions are rows in any case (``networks.conditioning``).
    """
    label = condition_rows(label, fm.info.condition)
    if label is None or weight is None or fm.info.guidance_max is None:
        return label
    augment_dim = getattr(getattr(fm.network, "config", None), "augment_dim", 0)
    unchanged = torch.zeros(len(label), augment_dim, device=label.device)
    rows = soft_label(label, unchanged, fm.info.label_size)
    told = torch.tensor([weight, *(interval or ())], dtype=torch.float32, device=label.device)
    return with_guidance(rows, told.expand(len(label), -1), fm.info.label_size)


def guided_drift(fm: FlowMap, weight: float | None) -> Drift:
    """Return the drift under guidance: classifier-free, unless the network takes the weight with the label."""
    if weight is None or fm.info.guidance_max is not None:
        return fm.drift
    return Guided(fm.drift, weight, fm.info.label_size)


@torch.no_grad()
def generate(
    fm: FlowMap,
    times: Times,
    n: int,
    seed: int,
    *,
    sampler: str = "map",
    label: Label | None = None,
    gamma: float = 1.0,
    guidance: float | None = None,
    guidance_interval: Interval = None,
    batch: int = 500,
    first: int = 0,
    reward: Reward | None = None,
    particles: int = 4,
    watch: Watch | None = None,
    label_policy: str | Tensor = BALANCED,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield samples ``first`` .. ``first + n - 1`` and their labels, batch by batch.

    Sample i depends on (``seed``, i) alone, whatever ``batch`` is (up to rounding).

    Args:
        fm: The model, on the device to sample on.
        times: Increasing times from 0 to 1, one more than there are steps.
        n: The number of samples.
        seed: The seed of their noise.
        sampler: A key of ``samplers.SAMPLERS``.
        label: The class of all samples, by number or name; None gives them those of ``label_policy``. Of a model with a
            condition: conditions [m, *condition], of which sample i has row i mod m; None gives them ``fm.conditions``.
        gamma: The share of noise that ``sampler="stochastic"`` renews per step.
        guidance: The weight for a model that takes one (``FlowMapInfo.guidance_max``), None for 1. ODE solvers guide
            any model that was also trained without labels (classifier-free guidance).
        guidance_interval: The times from which and up to which the weight applies, for a model that takes them
            (``FlowMapInfo.guidance_interval``), None for all times.
        batch: Samples at a time, of steered ones particles.
        first: The index of the first sample.
        reward: Steers ``sampler="stochastic"`` towards p_1(x) exp(r(x)) / Z (``samplers.steer``): a ``Score``, a
            ``Measurement``, or one of ``flowmaps.rewards``. Without ``label`` the particles of a sample have classes
            in turn, and their weights choose.
        particles: Particles per sample, of which one is drawn by weight.
        watch: Called as ``watch(k, t_k, particles)`` at every time of every batch of a steered call.
        label_policy: How samples without a ``label`` get theirs: see ``flowmaps.labels.sample_labels``.

    Yields:
        (samples [b, *shape], labels int64 [b] or conditions [b, ...], or None for an unconditional model).

    Raises:
        UserError: The model was not trained for the sampler, the label or the guidance, the times do not lead from
            noise to data, or the reward fails or has no gradient.

    Example:
        >>> fm = FlowMap.from_pretrained("assets/digits")
        >>> for images, labels in generate(fm, uniform_times(2), n=1000, seed=0):
        ...     print(images.shape, labels.shape)
        torch.Size([500, 1, 8, 8]) torch.Size([500])
        torch.Size([500, 1, 8, 8]) torch.Size([500])
    """
    grid = check_grid(times)
    check_sampling(fm, sampler, len(grid) - 1, gamma, guidance, guidance_interval)
    label = fm.conditions if label is None else label
    if reward is not None:
        check_steering(sampler, gamma, particles)
        guided = partial(guided_label, fm, weight=guidance, interval=guidance_interval)
        items, labels = range(first, first + n), (label, label_policy)
        yield from _steered(fm, grid, items, seed, *labels, guided, batch, reward, particles, watch)
        return
    row, device = SAMPLERS[sampler], next(fm.parameters()).device
    model = fm if row.of == "map" else guided_drift(fm, guidance)
    for start in range(first, first + n, batch):
        size = min(batch, first + n - start)
        y = sample_labels(fm.info, start, size, seed, label, label_policy)
        y = None if y is None else y.to(device, non_blocking=True)
        x0, options = fm.noise(size, seed, start), {}
        if row.renoises:
            options = {"path": fm.interpolant, "noise": partial(_renoise, fm, size, seed, start), "gamma": gamma}
        yield row.run(model, x0, grid, guided_label(fm, y, guidance, guidance_interval), **options), y


def _renoise(fm: FlowMap, n: int, seed: int, start: int, step: int) -> Tensor:
    return fm.noise(n, seed, start, draw=step + 1)


def _steered(
    fm: FlowMap,
    grid: Tensor,
    items: range,
    seed: int,
    label: Label | None,
    label_policy: str | Tensor,
    guided: Callable[[Tensor | None], Tensor | None],
    batch: int,
    reward: Reward,
    particles: int,
    watch: Watch | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the steered samples ``items``: particle p of sample i has its label and noise by (seed, i, p)."""
    data_std = spread(fm, label, guided)
    for start in items[:: max(1, batch // particles)]:
        size = min(max(1, batch // particles), items.stop - start)

        def noise(draw: int, start: int = start, size: int = size) -> Tensor:
            rows = [fm.noise(size, seed, start, draw + p * (MOST_STEPS + 1)) for p in range(particles)]
            return torch.stack(rows, dim=1).flatten(0, 1)

        def uniform(step: int, start: int = start, size: int = size) -> Tensor:
            streams = (generator(seed, "resampling", i, step) for i in range(start, start + size))
            return torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in streams])

        x0 = noise(0)
        shared = bool(fm.info.condition) or isinstance(label_policy, Tensor)  # by the particles of a sample
        each = 1 if shared else particles
        y = sample_labels(fm.info, start * each, size * each, seed, label, label_policy)
        y = None if y is None else y.repeat_interleave(particles // each, dim=0).to(x0.device)
        try:
            found = steer(
                fm,
                x0,
                grid,
                reward,
                guided(y),
                watch,
                path=fm.interpolant,
                noise=lambda k: noise(k + 1),
                uniform=uniform,
                base_std=fm.base_std,
                data_std=data_std,
                particles=particles,
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error), field="reward") from None
        rows = found.pick(uniform(len(grid)))
        yield found.x[rows], None if y is None else y[found.origin[rows]]


@torch.no_grad()
def spread(
    fm: FlowMap, label: Label | None = None, guided: Callable[[Tensor | None], Tensor | None] = lambda y: y
) -> float:
    """Return the standard deviation of the data about their mean, of ``SCALE_SAMPLES`` one-step samples."""
    y, x0 = labels_for(fm.info, SCALE_SAMPLES, label), fm.noise(SCALE_SAMPLES, 0)
    x = fm(x0, 0.0, 1.0, guided(None if y is None else y.to(x0.device))).float()
    return max(float((x - x.mean(dim=0)).square().mean().sqrt()), 1e-3 * fm.base_std)
