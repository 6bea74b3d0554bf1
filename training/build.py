"""Build what one optimiser step touches from a config: the parts of ``Trainer.build``, one function each.

Errors name the field at fault relative to the config: "batch", "data.flip".
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import Tensor

from flowmaps.data import DataSet, Latents, Loader, ShuffledOrder, as_dataset, download, open_dataset
from flowmaps.data.augment import PARAMETERS
from flowmaps.data.conditions import Conditions, Paired, check_pairs, open_conditions
from flowmaps.distributed import ON_CPU
from flowmaps.errors import UserError, blame, within
from flowmaps.flow_map import FlowMap
from flowmaps.info import FlowMapInfo
from flowmaps.objectives import LogVariance, Objective
from flowmaps.vae import Decoder, fingerprint
from training.config import Config, Precision, build_network, build_objective
from training.ema import EMA
from training.initialise import build_teacher, init_from_checkpoint
from training.lora import add_lora
from training.loss_module import LossModule
from training.teacher_trajectories import TrajectorySource

SHOWN_CONDITIONS = 1000  # from the first items on, in sample grids and scores of a run


def build_accelerator(config: Config) -> Accelerator:
    """Create the accelerator; the environment decides nothing (no fp16, no other accumulation or sharding)."""
    accelerator = Accelerator(
        cpu=ON_CPU,
        mixed_precision="bf16" if config.precision is Precision.bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of gradients
            # The cast of a gathered weight, left in the cache by a pass without gradient, would have none in the next.
            AutocastKwargs(cache_enabled=not config.shard),
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; remove that and set shard=True, "
            "which shards by FSDP2",
            field="shard",
        )
    if config.shard and accelerator.num_processes == 1:
        raise UserError("needs several processes, got one: start the run with torchrun", field="shard")
    return accelerator


def micro_batch_size(config: Config, processes: int) -> int:
    """Return the number of images in one micro-step of one process."""
    if config.batch % (processes * config.accumulate):
        raise UserError(
            f"not divisible by {processes} processes x accumulate={config.accumulate}",
            field="batch",
            value=config.batch,
        )
    return config.batch // (processes * config.accumulate)


def build_data(config: Config, accelerator: Accelerator, given: Any = None) -> DataSet:
    """Open the data set of ``config.data``, or adapt the ``given`` one, and check that the config fits it."""
    if given is not None:
        data: DataSet = as_dataset(given)
    else:
        size = getattr(config.network, "image_size", None)
        with accelerator.local_main_process_first():  # the first process downloads and checks; the others find it done
            with within("data"):
                if config.data.download:
                    download(config.data.name, config.data.root)
                named = config.data
                look = {"fit": named.fit.value, "background": named.background.value}
                data = open_dataset(named.name, root=named.root, size=size, skip_corrupt=named.skip_corrupt, **look)
    data = scaled(config, data)
    _check_augmentation(config, data)
    return data


def build_conditions(config: Config, data: DataSet) -> Conditions | None:
    """Open the conditions of ``config.data.condition``, one for each item of ``data``; None if there are none."""
    if not config.data.condition:
        return None
    with within("data"):
        conditions = open_conditions(config.data.condition, tuple(getattr(config.network, "condition", ())))
        with blame("condition", config.data.condition):
            check_pairs(data, conditions)
    return conditions


def scaled(config: Config, data: DataSet) -> DataSet:
    """Return ``data``, latents with the VAE and scaling that ``config`` sets for them."""
    given = {name: getattr(config.data, name) for name in ("vae", "latent_shift", "latent_scale")}
    given = {name: value for name, value in given.items() if value}
    if not isinstance(data, Latents):
        if given:
            raise UserError(f"only for latents, {config.data.name} has none", field=f"data.{next(iter(given))}")
        return data
    channels = data.shape[0]
    for name in ("latent_shift", "latent_scale"):
        if len(given.get(name, data.facts[name])) != channels or 0 in given.get("latent_scale", ()):
            raise UserError(f"must be {channels} numbers, one per channel", field=f"data.{name}", value=given[name])
    return replace(data, facts={**data.facts, **given})


def _check_augmentation(config: Config, made: DataSet) -> None:
    """Refuse augmentation that the data or the network cannot take."""
    data = config.data
    if (data.flip or data.augment) and (len(made.shape) != 3 or isinstance(made, Latents)):
        kind = "latents (of mirror images too, if prepared with flip)" if len(made.shape) == 3 else "points"
        raise UserError(f"only for images, {data.name} has {kind}", field="data.flip" if data.flip else "data.augment")
    wanted, room = (PARAMETERS if data.augment else 0), getattr(config.network, "augment_dim", 0)
    if wanted != room and (wanted or not config.init_from):  # weights may know augmentation that this run leaves out
        raise UserError(
            f"needs network.augment_dim={wanted}, got {room}: the network is conditioned on the augmentation",
            field="data.augment",
            value=f"{data.augment:g}",
        )


def build_flow_map(
    config: Config, shape: tuple[int, ...], num_classes: int, class_names: tuple[str, ...] = (), **facts: Any
) -> FlowMap:
    """Wrap a fresh network in a flow map for samples of ``shape``; ``facts`` are further fields of its info."""
    wants: Any = config.network
    if hasattr(wants, "dim") or hasattr(wants, "image_size"):
        expected = (wants.dim,) if hasattr(wants, "dim") else (wants.channels, wants.image_size, wants.image_size)
        if expected != shape:
            raise UserError(f"made for samples of shape {expected}, {config.data.name} has {shape}", "network")
    classes = num_classes if getattr(wants, "num_classes", 0) else 0
    if classes and wants.num_classes != num_classes:
        raise UserError(f"{config.data.name} has {num_classes}", field="network.num_classes", value=wants.num_classes)
    objective = build_objective(config)
    info = FlowMapInfo(
        shape=shape,
        num_classes=classes,
        condition=tuple(getattr(wants, "condition", ())),
        class_names=class_names if classes else (),
        kind=objective.kind,
        data=config.data.name,
        ema=config.ema[0],
        label_dropout=config.data.label_dropout,
        guidance=objective.guidance if objective.guidance > 1 else None,
        guidance_max=objective.guidance_max if objective.guidance_max > 1 else None,
        guidance_interval=objective.guidance_interval,
        schedules=objective.schedules,
        **facts,
    )
    return FlowMap(build_network(config), config.interpolant, config.base_std, info)


def build_model(
    config: Config, data: DataSet, conditions: Conditions | None = None
) -> tuple[FlowMap, LogVariance | None, str]:
    """Build the flow map at step 0, the learned weight if any, and the fingerprint of ``config.init_from``.

    The weights depend on the seed alone: torch's global generator is seeded here and restored afterwards. The order
    of the parts is part of the seed's meaning, and LoRA comes last, on top of the weights that the run starts from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        facts = data.info if isinstance(data, Latents) else {}
        if getattr(config.network, "num_classes", 0):
            facts = {**facts, "class_shares": getattr(data, "class_shares", ())}
        names = getattr(data, "class_names", ())  # a data set of the user's own class may have none
        fm = build_flow_map(config, data.shape, data.num_classes, names, **facts)
        given = conditions.shape if conditions else tuple(getattr(data, "condition", ()))
        if fm.info.condition != given:
            raise UserError(f"the data have {given or 'none'}", "network.condition", fm.info.condition)
        if given:  # of sample grids and scores
            first = torch.arange(min(len(data), SHOWN_CONDITIONS))
            fm.conditions = conditions.fetch(first) if conditions else data.fetch(first)[1]
        init_fingerprint = init_from_checkpoint(config, fm) if config.init_from else ""
        learned = config.weight
        weight = LogVariance(limit=learned.limit, log_floor=learned.log_floor) if learned.learned else None
        if config.lora:
            add_lora(fm.network, config.lora)
    return fm, weight, init_fingerprint


def open_decoder(config: Config, data: Latents) -> Decoder:
    """Open the VAE of a run, which sample grids, scores and exports need."""
    decoder = Decoder(data.facts["vae"], FlowMapInfo(data.shape, **data.info))
    with within("data"):
        decoder.open()
    if fingerprint(decoder.open()) != data.facts["vae_sha256"]:
        print(
            f"warning: data.vae={decoder.source} is not the VAE that made data.root={config.data.root}: correct only "
            "if it has the same encoder",
            file=sys.stderr,
        )
    return decoder


def check_diagonal(objective: Objective, size: int) -> None:
    """Refuse a share of diagonal rows that rounds to none in a micro-step of ``size`` rows."""
    if objective.diagonal and not objective.diagonal_rows(size):
        raise UserError(
            f"leaves no diagonal row in a micro-batch of {size}: raise batch or lower accumulate",
            field="objective.diagonal",
            value=f"{objective.diagonal:g}",
        )


def build_loss_module(
    config: Config, fm: FlowMap, objective: Objective, weight: LogVariance | None, device: torch.device
) -> LossModule:
    """Assemble the loss on ``device``, in the memory layout, with the recomputation and compilation of ``config``."""
    fm.to(device)  # before the teacher, which goes where the flow map is
    module = LossModule(fm, objective, weight, build_teacher(config, fm, objective))
    module.to(device)
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        _checkpoint_gradients(fm.network)
    if config.compile:  # before sharding, so that the compiled forward is inside what gathers the shards
        compiled = torch.compile(module.forward, mode=config.compile_mode.value)
        module.forward = compiled  # type: ignore[method-assign]
    return module


def _checkpoint_gradients(network: Any) -> None:
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(f"{type(network).__name__} has no blocks to recompute", field="gradient_checkpointing")
    network.enable_gradient_checkpointing()


def build_ema(config: Config, objective: Objective, network: torch.nn.Module, meta: torch.nn.Module) -> EMA:
    """Start the averages that are sampled, and the one that serves as teacher."""
    teaching = (objective.teacher_ema,) if objective.teacher_ema else ()
    return EMA(network, tuple(dict.fromkeys((*config.ema, *teaching))), config.ema_widths, meta, config.ema_ramp)


def build_loader(
    config: Config,
    accelerator: Accelerator,
    data: DataSet,
    paths: TrajectorySource | None,
    size: int,
    conditions: Conditions | None = None,
) -> Loader:
    """Read micro-batches of ``size`` rows, of which each item of a trajectory source gives several."""
    items, rows = (paths.data, paths.rows) if paths else (data, 1)
    if size % rows:
        raise UserError(
            f"a micro-step of {size} rows does not divide into trajectories of {rows} rows: choose a multiple",
            field="batch",
            value=config.batch,
        )
    indices = _micro_step_indices(config, ShuffledOrder(len(items), config.seed), accelerator.process_index, size, rows)
    read = Paired(items, conditions) if conditions else items
    return Loader(read, indices, config.data.workers, pin=accelerator.device.type == "cuda")


def _micro_step_indices(
    config: Config, order: ShuffledOrder, rank: int, size: int, rows: int
) -> Callable[[int], Tensor]:
    def indices(k: int) -> Tensor:
        """Items of micro-step k of this process, counted from the start of the run."""
        step, micro = divmod(k, config.accumulate)
        part = rank * config.accumulate + micro
        return order.indices((step * config.batch + part * size) // rows, size // rows)

    return indices
