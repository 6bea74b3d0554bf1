"""CUDA without a GPU: fake tensors on the device, under CUDA's autocast lists, and a record of who waits for it.

A fake tensor has a shape, a type and a device, and no numbers. Operations choose their types as on a GPU, which
differs from a CPU: CUDA's autocast runs pow, group_norm, softmax and nearest-neighbour resizing in float32. Tensors on
the host are real. Forward passes only: torch cannot run a backward pass on fake CUDA tensors without a GPU.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowmaps.data import Latents
from flowmaps.objectives import LogVariance, TrajectoryObjective
from training.build import build_flow_map
from training.config import build_objective
from training.ema import EMA
from training.loss_module import LossModule
from training.optim import build_optimizer
from training.precision import step_precision
from training.teacher_trajectories import TrajectorySolver, TrajectorySource, trajectory_times
from training.trainer import Trainer

ATEN = torch.ops.aten
PACKAGES = ("flowmaps", "samplers", "training", "scripts")
# Operations whose result, shape or error check the host reads; on a fake tensor most of them raise.
WAITS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN._linalg_check_errors}


def caller() -> str:
    """The innermost function of this repository's packages on the stack, as "module.function"."""
    frame = sys._getframe()
    while frame is not None:
        name, function = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname.partition(".<locals>")[0]
        if name.partition(".")[0] in PACKAGES and not function.startswith("AnalyticTangents."):
            return f"{name}.{function}"
        frame = frame.f_back
    return "test"


class Watch(TorchDispatchMode):
    """Runs operations on host tensors for real, and records by function of this repository what a GPU would be asked.

    Numbers that the host reads from the device are made up: each is larger than the one before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # for the device: "operation in function"
        self.copies: list[str] = []  # from the host to the device that do not wait
        self.wide: set[tuple[str, str]] = set()  # float32 results under autocast that are large: operation, function
        self.large = 0  # results of more numbers are large; 0: none
        self.autocast = False  # torch's own answer is always False in here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not fake and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in WAITS or self.masked(func, args):
            self.waits.append(f"{func.overloadpacket.__name__} in {caller()}")
            if func.overloadpacket is ATEN._local_scalar_dense:
                return True if args[0].dtype == torch.bool else len(self.waits) / 100
        out = func(*args, **kwargs)
        if func.overloadpacket in (ATEN._to_copy, ATEN.copy_):
            self.copied(args[func.overloadpacket is ATEN.copy_], out, kwargs.get("non_blocking") or True in args[2:])
        if self.large and self.autocast:
            for result in tree_leaves(out):
                if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.numel() > self.large:
                    self.wide.add((func.overloadpacket.__name__, caller()))
        return out

    @staticmethod
    def masked(func, args) -> bool:
        """True if a mask on the device chooses entries, whose number the host must know."""
        if func.overloadpacket not in (ATEN.index, ATEN.index_put, ATEN.index_put_):
            return False
        return any(index is not None and index.dtype == torch.bool for index in args[1])

    def copied(self, source: torch.Tensor, out: torch.Tensor, non_blocking: bool) -> None:
        before, after = (t.fake_device.type if isinstance(t, FakeTensor) else "cpu" for t in (source, out))
        if before == after:
            return
        if after == "cuda" and non_blocking:
            self.copies.append(caller())
        else:  # torch waits for the device's queue at the end of a blocking copy, in either direction
            self.waits.append(f"copy from {before} to {after} in {caller()}")


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Make tensors on "cuda" fake inside the block, and ``torch.autocast("cuda")`` believe that there is a device.

    Generators are the CPU's, and torch's states of random numbers are left alone.
    """

    def on_cpu(seed: int, purpose: str, index: int, part: int = 0, device: object = "cpu") -> torch.Generator:
        return torch.Generator().manual_seed(0)

    enable, exact_attention = torch.set_autocast_enabled, F.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As on a GPU: without one, torch would choose its float32 kernel under autocast too."""
        if not watch.autocast:
            return exact_attention(q, k, v)
        return ATEN._scaled_dot_product_flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]

    def enable_and_tell(device: str, enabled: bool) -> None:
        enable(device, enabled)
        if device == "cuda":
            watch.autocast = enabled

    watch = Watch()
    with (
        mock.patch("torch.set_autocast_enabled", enable_and_tell),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
        mock.patch("torch.random.fork_rng", lambda *args, **kwargs: nullcontext()),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch("torch.Tensor.pin_memory", lambda x: x),
        mock.patch("torch.manual_seed", lambda seed: None),
        mock.patch("training.trainer.generator", on_cpu),
        FakeTensorMode(allow_non_fake_inputs=True),
        watch,
    ):
        yield watch


def fake_trainer(config, batch: int, bf16: bool) -> tuple[Trainer, int]:
    """A trainer on the device inside ``fake_cuda``, and the numbers in a batch of samples; no file is read.

    The data are zeros of the right shape and type, and a teacher is a network like the trained one. There is no
    backward pass: gradients are zero.
    """
    net, objective, device = config.network, build_objective(config), torch.device("cuda")
    image = not hasattr(net, "dim")
    shape = (net.channels, net.image_size, net.image_size) if image else (net.dim,)
    classes = getattr(net, "num_classes", 0)
    with device:
        fm = build_flow_map(config, shape, classes)
        learned = config.weight
        weight = LogVariance(limit=learned.limit, log_floor=learned.log_floor) if learned.learned else None
        teacher = build_flow_map(config, shape, classes) if config.teacher or objective.teacher_ema else None
    module = LossModule(fm, objective, weight, teacher)
    paths, rows = None, 1
    if isinstance(objective, TrajectoryObjective):
        times = trajectory_times(config.trajectories)
        rows = objective.rows(times)
        paths = TrajectorySource(None, times, rows, TrajectorySolver(teacher, config.trajectories))
    items, data = math.ceil(batch / rows), None
    x = torch.zeros(items, *shape, dtype=torch.uint8 if image else torch.float32)
    if image and net.channels == 4:
        data = Latents(Path(), {"shape": shape, "latent_shift": 4 * (0.0,), "latent_scale": 4 * (0.18,)}, [items])
        x = torch.zeros(items, 2, *shape, dtype=torch.float16)
    label = torch.arange(items) % classes if classes else None

    def wrapped(*args):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return module(*args)

    def backward(loss: torch.Tensor) -> None:
        for p in module.parameters():
            p.grad = torch.zeros_like(p)

    accelerator = SimpleNamespace(
        device=device,
        process_index=0,
        backward=backward,
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        no_sync=lambda module: nullcontext(),
    )
    optimizer = build_optimizer(config.optim, module)
    ema = EMA(fm.network, (*config.ema, *[objective.teacher_ema] * bool(objective.teacher_ema)), meta=fm.network)
    loader = SimpleNamespace(batch=lambda k: (x, label))
    precision = step_precision(config, objective, device)
    trainer = Trainer(config, data, loader, accelerator, module, wrapped, optimizer, ema, precision, paths=paths)
    return trainer, items * rows * math.prod(shape)
