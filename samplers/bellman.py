"""Optimal step sizes for a given number of steps: the grid of least summed error, by dynamic programming.

Bellman optimal step sizes, Nguyen et al. 2024 (arXiv 2312.16414). A fine trajectory x_0 .. x_N at times t_0 .. t_N is
integrated once; c[j, k] is the error of one step from x_j to t_k, relative to x_k. A coarse grid is a path through the
fine grid, and its cost is the sum over its steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.callables import Drift, Map
from samplers.grids import check_times
from samplers.trajectories import Trajectory, trajectory

Endpoints = Callable[[int], Tensor]  # j -> endpoints of single steps from state j to all later times: [N - j, B, ...]


def solve(cost: Tensor, steps: int) -> tuple[list[int], float]:
    """Return the path 0 = i_0 < ... < i_steps = N of least sum c[i_0, i_1] + c[i_1, i_2] + ... as (indices, value).

    Only the entries of ``cost`` [N + 1, N + 1] above the diagonal are used. Of several best paths, the one that comes
    first in lexicographic order is returned.
    """
    return solve_all(cost, steps)[steps]


def solve_all(cost: Tensor, most: int) -> dict[int, tuple[list[int], float]]:
    """Return ``solve`` for 1 .. ``most`` steps, found in one pass: O(most N^2).

    V_1(j) = c[j, N] and V_n(j) = min over m of c[j, m] + V_{n-1}(m); the minimising m are kept and followed from 0.
    """
    nodes = len(cost)
    if cost.ndim != 2 or cost.shape[1] != nodes or nodes < 2:
        raise ValueError(f"cost must be [N + 1, N + 1] with N >= 1, got {tuple(cost.shape)}")
    if not 1 <= most <= nodes - 1:
        raise ValueError(f"steps must be from 1 to the fine grid's {nodes - 1}, got {most}")
    above = torch.ones(nodes, nodes, dtype=torch.bool).triu(1)
    c = cost.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(c[above]).all()):
        raise ValueError("cost has entries that are not finite: the drift or the trajectory diverged")
    c = torch.where(above, c, torch.inf)
    value, choices = c[:, -1], list[Tensor]()
    found = {1: ([0, nodes - 1], float(value[0]))}
    for steps in range(2, most + 1):
        value, choice = (c + value).min(dim=1).values, (c + value).argmin(dim=1)  # argmin: the first of several
        choices.insert(0, choice)
        path = [0]
        for chosen in choices:
            path.append(int(chosen[path[-1]]))
        found[steps] = ([*path, nodes - 1], float(value[0]))
    return found


def euler_cost(
    drift: Drift,
    x: Tensor,
    times: Tensor,
    label: Tensor | None = None,
    *,
    sqrt: bool = False,
    batch: int = 64,
    num_probes: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """c[j, k] = E |x_j + (t_k - t_j) b_{t_j}(x_j) - x_k|^2 along Euler's path: float64 [N + 1, N + 1].

    From ``x`` [B, ...] at ``times[0]``, ``batch`` at a time; |.|^2 is a mean over dimensions, and ``sqrt`` takes its
    square root before the mean E over noise. N evaluations of the drift per path for all entries; c[j, j + 1] = 0.

    With ``num_probes`` > 0 an error e at t_k is propagated to the end: it counts as |J e|^2, where J is the derivative
    of the path from x_k to x_N. This is estimated by the mean of (w J e)^2 over ``num_probes`` normal vectors w from
    ``generator``, at N vector-Jacobian products per probe. With ``sqrt`` the sum of costs then bounds the error at the
    end, to first order, by the triangle inequality.
    """
    cost = torch.zeros(len(times), len(times), dtype=torch.float64)
    for i in range(0, len(x), batch):
        part, lab = x[i : i + batch], None if label is None else label[i : i + batch]
        walked = trajectory(drift, part, times, lab, "euler")
        weight = None
        if num_probes:
            w = torch.randn((num_probes, *part.shape), generator=generator, device=x.device, dtype=x.dtype)
            weight = vjp_to_end(drift, walked, w)
        cost += len(part) / len(x) * errors(walked, _extrapolated(walked), [(sqrt, weight)])[0]
    return cost


def _extrapolated(walked: Trajectory) -> Endpoints:
    """Return endpoints of Euler steps from states of an Euler path, which has evaluated their slopes already."""
    states, grid = walked.states, _like(walked.times, walked.states)
    shape = [-1] + [1] * (states.ndim - 1)

    def ends(j: int) -> Tensor:
        lengths = (grid[j + 1 :] - grid[j]) / (grid[j + 1] - grid[j])  # in first steps
        return torch.lerp(states[j], states[j + 1], lengths.to(states.dtype).view(shape))  # exact where it is 1

    return ends


def euler_endpoints(drift: Drift, walked: Trajectory) -> Endpoints:
    """Return endpoints of Euler steps from the states of any path, e.g. one by a solver of higher order."""
    states, label, grid = walked.states, walked.label, _like(walked.times, walked.states)
    shape = [-1] + [1] * (states.ndim - 1)

    def ends(j: int) -> Tensor:
        slope = drift(states[j], grid[j].expand(states.shape[1]), label)
        return states[j] + (grid[j + 1 :] - grid[j]).to(states.dtype).view(shape) * slope

    return ends


def vjp_to_end(drift: Drift, walked: Trajectory, w: Tensor) -> Tensor:
    """Return w J, where J is the derivative of Euler steps from each state to the last: [N + 1, C, B, ...].

    ``w`` [C, B, ...] are vectors at the end; the last entry of the result is ``w`` itself.
    """
    grid, count = _like(walked.times, w), walked.states.shape[1]
    found = [w]
    for k in range(len(grid) - 2, -1, -1):
        x = walked.states[k].detach().requires_grad_()
        with torch.enable_grad():
            b = drift(x, grid[k].expand(count), walked.label)
        step = grid[k + 1] - grid[k]
        last = len(w) - 1
        pulled = [torch.autograd.grad(b, x, p, retain_graph=i < last)[0] for i, p in enumerate(found[0])]
        found.insert(0, found[0] + step * torch.stack(pulled))
    return torch.stack(found)


def heun_endpoints(drift: Drift, walked: Trajectory) -> Endpoints:
    """Return endpoints of Heun steps: one first slope per state, one second slope per step."""
    states, label, grid = walked.states, walked.label, _like(walked.times, walked.states)
    count = states.shape[1]

    def ends(j: int) -> Tensor:
        b = drift(states[j], grid[j].expand(count), label)
        steps = [(t.expand(count), t - grid[j]) for t in grid[j + 1 :]]
        return torch.stack([states[j] + h / 2 * (b + drift(states[j] + h * b, t, label)) for t, h in steps])

    return ends


def map_endpoints(fm: Map, walked: Trajectory) -> Endpoints:
    """Return endpoints X_{t_j,t_k}(x_j) of a learned map."""
    states, label, grid = walked.states, walked.label, _like(walked.times, walked.states)
    count = states.shape[1]

    def ends(j: int) -> Tensor:
        start = grid[j].expand(count)
        return torch.stack([fm(states[j], start, t.expand(count), label) for t in grid[j + 1 :]])

    return ends


def heun_cost(drift: Drift, walked: Trajectory, *, sqrt: bool = False, weight: Tensor | None = None) -> Tensor:
    """Return c[j, k] of one Heun step from x_j to t_k, for the states of ``walked``: float64 [N + 1, N + 1].

    N + N (N + 1) / 2 evaluations per path. ``sqrt`` and ``weight`` as in ``errors``.
    """
    return errors(walked, heun_endpoints(drift, walked), [(sqrt, weight)])[0]


def map_cost(fm: Map, walked: Trajectory, *, sqrt: bool = False, weight: Tensor | None = None) -> Tensor:
    """Return c[j, k] = mean over paths of |X_{t_j,t_k}(x_j) - x_k|^2 for a learned map: float64 [N + 1, N + 1].

    N (N + 1) / 2 evaluations per path. ``sqrt`` and ``weight`` as in ``errors``.
    """
    return errors(walked, map_endpoints(fm, walked), [(sqrt, weight)])[0]


@torch.no_grad()
def errors(walked: Trajectory, ends: Endpoints, counts: Sequence[tuple[bool, Tensor | None]]) -> list[Tensor]:
    """Return c [N + 1, N + 1] for each (sqrt, weight) of ``counts``: the distance of ``ends`` from states j + 1 .. N.

    The mean over paths of the squared distance, which is a mean over dimensions; ``sqrt`` takes its square root first.
    With ``weight`` [N + 1, C, B, ...] from ``vjp_to_end``, the squared distance is replaced by the mean over C of the
    squared product of error and weight, i.e. the error propagated to the end.
    """
    nodes = len(walked.times)
    found = [torch.zeros(nodes, nodes, dtype=torch.float64) for _ in counts]
    for j in range(nodes - 1):
        error = (ends(j) - walked.states[j + 1 :]).flatten(2)  # [N - j, B, dim]
        for cost, (sqrt, weight) in zip(found, counts, strict=True):
            if weight is None:
                squared = error.square().mean(dim=2).double()  # [N - j, B]
            else:
                product = torch.einsum("kbd,kcbd->kcb", error, weight[j + 1 :].flatten(3))
                squared = (product.square().mean(dim=1) / error.shape[2]).double()
            cost[j, j + 1 :] = (squared.sqrt() if sqrt else squared).mean(dim=1).cpu()
    return found


def _like(times: Tensor, x: Tensor) -> Tensor:
    return check_times(times).to(x.device, torch.promote_types(x.dtype, torch.float32))


__all__ = ["errors", "euler_cost", "euler_endpoints", "heun_cost", "heun_endpoints", "map_cost", "map_endpoints"]
__all__ += ["solve", "solve_all", "vjp_to_end"]
