"""Optimiser, learning-rate schedule, and detection of gradient spikes."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from training.config import Decay, Optim, Optimizer
from training.fsdp import copy_into_shard, full_tensor
from training.loss_module import LossModule


def build_optimizer(config: Optim, module: LossModule) -> torch.optim.Optimizer:
    """Create RAdam (the paper's choice), AdamW or Muon over what is trained in ``module``."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.name is Optimizer.muon:
        return Muon(config, list(matrices(module.fm.network, config.muon_kernels).values()), parameters)
    if config.name is Optimizer.radam:
        return torch.optim.RAdam(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return _adamw(config, parameters)


def _adamw(config: Optim, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Create AdamW, fused where torch has that: one kernel per step. RAdam and NAdam have no such form.

    torch's NAdam warms its momentum up from half of the first beta. The large ``momentum_decay`` ends that at once.
    """
    options: Any = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.nesterov:
        return torch.optim.NAdam(parameters, momentum_decay=1e6, decoupled_weight_decay=True, **options)
    return torch.optim.AdamW(parameters, fused={p.device.type for p in parameters} <= {"cpu", "cuda"}, **options)


def matrices(network: nn.Module, kernels: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters of ``network`` that Muon updates, by name: the trained 2-D weights of its layers.

    With ``kernels`` also those of convolutions. Tables of embeddings have two dimensions too, but their rows are not
    used together.
    """
    return {
        f"{name}.{own}".lstrip("."): p
        for name, layer in network.named_modules()
        for own, p in layer.named_parameters(recurse=False)
        if p.requires_grad
        and (p.ndim == 2 or (kernels and p.ndim > 2))
        and own.endswith("weight")
        and not isinstance(layer, nn.Embedding)
    }


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all other parameters, at one learning rate (Jordan et al. 2024).

    Both are torch's. The state of a matrix is its momentum alone. torch's Muon takes nothing but matrices; here the
    kernel [out, in, ...] of a convolution takes the step of the matrix [out, in ...]. On a sharded matrix torch's would
    round products of shards, and fail where a process holds none of it; here every process gathers the matrix, its
    gradient and its momentum, takes the complete step, and keeps its own part.
    """

    def __init__(self, config: Optim, matrices: list[nn.Parameter], parameters: list[nn.Parameter]) -> None:
        """``matrices``: those of ``parameters`` for Muon."""
        if not matrices:
            raise UserError("needs a layer with a trained 2-D weight: choose adamw", field="optim.name", value="muon")
        known = set(matrices)
        others = [p for p in parameters if p not in known]
        options: Any = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "original"}
        muon = torch.optim.Muon([nn.Parameter(torch.empty(1, 1))], **options)  # it refuses kernels
        muon.param_groups[0]["params"] = matrices
        self.parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self.parts.append(_adamw(config, others))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that are there."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # both are new objects after a load
            if isinstance(part, torch.optim.Muon):
                for p in group["params"]:
                    self._matrix_step(part, group, p)
            else:
                part.step()

    def _matrix_step(self, muon: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> None:
        if p.grad is None:
            return
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"]
        whole, moved = (full_tensor(tensor).flatten(1).clone() for tensor in (p, momentum))
        matrix = nn.Parameter(whole)
        matrix.grad = full_tensor(p.grad).flatten(1)
        muon.state = defaultdict(dict, {matrix: {"momentum_buffer": moved}})
        muon.param_groups = [group | {"params": [matrix]}]
        muon.step()
        copy_into_shard(p, whole.view(p.shape))
        copy_into_shard(momentum, moved.view(p.shape))


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Return the rate of step ``step`` = 0 .. ``steps - 1``: linear warm-up, then the chosen decay."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.decay is Decay.cosine:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    elif config.decay is Decay.linear:
        decay = 1 - step / steps
    elif config.decay is Decay.inverse_sqrt:
        decay = 1 / math.sqrt(max(step / config.decay_start, 1))
    else:
        decay = 1.0
    return config.lr * warm * decay


WINDOW = 128  # steps whose gradient norms define the usual one


class Spikes:
    """Detector of outliers among gradient norms, for objectives whose gradient has rare large ones.

    The window is that of OLMo's optimiser (Walsh et al. 2025, arXiv 2501.00656, section 3.4), with the median in place
    of mean and deviation, which outliers would move. Outliers enter the window too, so that a lasting change becomes
    the new normal after half a window.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.norms = list(norms)  # latest last
        self.count = 0  # spikes since the start or resume

    def is_spike(self, norm: float, factor: float) -> bool:
        """Return whether ``norm`` exceeds ``factor`` times the median of the full window before it, and record it.

        Factor 0 disables the detector.
        """
        if not factor:
            return False
        found = len(self.norms) == WINDOW and norm > factor * statistics.median(self.norms)
        self.norms = [*self.norms, norm][-WINDOW:]
        self.count += found
        return found
