"""The diffusers interface: a scheduler and a pipeline over a flow map, with noise at sigma = 1 and data at sigma = 0.

Only this module uses diffusers' direction of time. A network output v(x, s, t) is their u = -v at
sigma = 1 - s, so that x + (t - s) v = x - (sigma_s - sigma_t) u.
"""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

import flowmaps.networks  # noqa: F401  # diffusers resolves a network only from modules that are imported
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import check_sampling, check_steps, guided_drift, guided_label
from flowmaps.hub import shipped
from flowmaps.info import FlowMapInfo
from flowmaps.labels import Label, flat, labels_for
from flowmaps.pipeline_parts import (
    check_finite,
    check_output,
    checked_sigmas,
    converted,
    given_conditions,
    sample_count,
    start,
)
from flowmaps.pipeline_steering import Asked, Watched
from flowmaps.vae import decode

Callback = Callable[["FlowMapPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

# diffusers warns of layers that should stay in float32 even if a network has none.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)


class FlowMapScheduler(FlowMapEulerDiscreteScheduler, SchedulerMixin):  # diffusers looks the mixin up in this module
    """z_r = z_t - (sigma_t - sigma_r) u over the grid of ``set_timesteps``: one map evaluation per interval."""


@dataclass
class _Call:
    """State of one call that its callback may read and change."""

    guidance: float | None
    steps: int
    running: bool = True
    interrupted: bool = False


class FlowMapPipeline(DiffusionPipeline):
    """Sample images (or points) from a flow map in ``num_inference_steps`` steps.

    A drift (``info["kind"] == "drift"``) is integrated by Euler steps on the same grid. A model of latents has the
    component ``vae`` (``pipe.vae.enable_tiling()`` for large images); to use another VAE, pass
    ``FlowMapPipeline.from_pretrained(directory, vae=AutoencoderKL.from_pretrained(...))``.

    Several threads may call one pipeline at a time: each call has its own copy of the scheduler. Moving or offloading
    the weights meanwhile is not safe. ``pipe._interrupt = True`` stops the call of the thread that sets it, or all
    running calls if that thread has none; they return what they have.

    Args:
        network: The network of a ``FlowMap``.
        scheduler: The scheduler, which holds the grid of a call.
        interpolant: As in ``FlowMap``. The pipelines of a network remember this and the next two, so that
            ``FlowMapPipeline(**pipe.components)`` has them too.
        base_std: As in ``FlowMap``.
        info: ``FlowMapInfo.to_dict()`` of the model.
        vae: The VAE of a model of latents.

    Raises:
        UserError: ``info`` is missing for a network that never had any, or does not fit.
    """

    model_cpu_offload_seq = "network->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        network: nn.Module,
        scheduler: FlowMapScheduler,
        interpolant: str | None = None,
        base_std: float | None = None,
        info: dict[str, Any] | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        given = {"interpolant": interpolant, "base_std": base_std, "info": info}
        facts = {"interpolant": "linear", "base_std": 1.0, **getattr(network, "_flow_map_facts", {})}
        facts |= {name: value for name, value in given.items() if value is not None}
        if "info" not in facts:
            raise UserError("missing: use from_flow_map, or pass **pipe.parameters with **pipe.components", "info")
        self._calls: dict[int, _Call] = {}  # the latest one of each thread
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(**facts)
        _ = self.flow_map  # which refuses facts that do not fit
        network._flow_map_facts = facts  # type: ignore[assignment]

    @classmethod
    def from_flow_map(cls, fm: FlowMap) -> Self:
        """Wrap ``fm``; the pipeline shares its network, and its VAE if that is loaded."""
        vae = None if fm.decoder is None else fm.decoder.vae
        return cls(fm.network, FlowMapScheduler(), fm.interpolant_name, fm.base_std, fm.info.to_dict(), vae)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a directory, a shipped checkpoint by its name ("digits"), or a hub id; ``options`` are diffusers'."""
        named = None if Path(source).is_dir() else shipped(str(source))
        return cast(Self, super().from_pretrained(str(named or source), **options))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **changed: Any) -> Self:
        """Return a new pipeline with the components and facts of ``pipeline``, but for those in ``changed``.

        They share the weights. These keep their type, unless ``dtype`` asks for another, for both pipelines.
        """
        dtypes = [changed.pop(name, None) for name in ("dtype", "torch_dtype")]
        made = cls(**{**pipeline.components, **pipeline.parameters, **changed})
        made.register_to_config(_name_or_path=pipeline.name_or_path)
        return made.to(dtype=dtypes[0] or dtypes[1]) if any(dtypes) else made

    @property
    def flow_map(self) -> FlowMap:
        """The flow map, which shares this pipeline's network."""
        info = FlowMapInfo.from_dict(dict(self.config.info))
        return FlowMap(self.network, self.config.interpolant, self.config.base_std, info)

    @property
    def _call(self) -> _Call:
        return self._calls.get(threading.get_ident()) or _Call(None, 0, running=False)

    @property
    def num_timesteps(self) -> int:
        """The number of steps of this thread's latest call."""
        return self._call.steps

    @property
    def guidance_scale(self) -> float | None:
        """The guidance weight of this thread's latest call; a callback changes it by ``pipe._guidance_scale``."""
        return self._call.guidance

    @property
    def _guidance_scale(self) -> float | None:
        return self._call.guidance

    @_guidance_scale.setter
    def _guidance_scale(self, weight: float | None) -> None:
        self._call.guidance = weight

    @property
    def interrupt(self) -> bool:
        """True if this thread's latest call was interrupted."""
        return self._call.interrupted

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        for call in [self._call] if self._call.running else list(self._calls.values()):
            call.interrupted = value

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        num_inference_steps: int = 1,
        sigmas: Sequence[float] | None = None,
        class_labels: Label | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        decode_batch: int = 8,
        batch_size: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        measurement: Any = None,
        mask: Any = None,
        measurement_std: float = 0.05,
        reward: Any = None,
        reward_scale: float = 1.0,
        particles: int = 4,
        invert: Any = None,
        edit_labels: Label | None = None,
        condition: Any = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate samples: as many as there are ``class_labels`` or ``latents``, else ``num_images``, else one.

        Args:
            num_images: The number of samples.
            num_inference_steps: The number of steps. Without ``sigmas`` they are those of the model's schedule, if it
                has one of this length, else equal.
            sigmas: Start points of the steps, decreasing from 1 (diffusers' direction); the final 0 is implied.
            class_labels: One label for all samples or a list, also nested, or tensor of one each: numbers of classes
                or their names (``info["class_names"]``), of which a part that fits no other will do ("boot": Ankle
                boot). None cycles through the classes.
            guidance_scale: The weight for a model that takes one (``info["guidance_max"]``), or for a drift that was
                also trained without labels (classifier-free, twice the evaluations). None and 1 mean no guidance.
            guidance_interval: The times from which and up to which the weight applies, 0 noise and 1 data, for a model
                that takes them (``info["guidance_interval"]``); None: all times.
            generator: The random stream of the noise, or one for each sample.
            latents: Noise [n, *shape] of standard deviation ``base_std`` to start from.
            output_type: "pil", "np" ([n, h, w, c]) or "pt" ([n, c, h, w]), images in 0 .. 1; or "latent", what the
                network makes: latents before the VAE, or images about in -1 .. 1. Points are "pt" or "latent".
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.
            callback_on_step_end: Called as ``callback(pipe, k, timestep, {"latents": x})`` after step k; "latents" that
                it returns replace x.
            decode_batch: Latents that the VAE decodes at a time.
            batch_size: Another name for ``num_images``, which other pipelines have.
            callback_on_step_end_tensor_inputs: The tensors that the callback is given, of
                ``_callback_tensor_inputs``.
            measurement: What samples should agree with, where ``mask`` is black or when made smaller: a PIL image, a
                file, or a tensor [C, h, w] in 0 .. 1; or one for each sample.
            mask: White where pixels are to be filled in, black where they are given.
            measurement_std: The noise of the measurement, of a range of 2.
            reward: What to steer towards: a function of images [n, C, H, W] about in -1 .. 1 that returns [n],
                "class:3", or a reward of ``samplers``.
            reward_scale: Its factor.
            particles: Steered particles per sample, of which one is drawn by weight.
            invert: Images of the classes ``class_labels``, like ``measurement``, to carry to noise and back.
            edit_labels: The classes to rebuild them as.
            condition: Of a model with a condition: floats [n, *condition] or one of them for all; images also as PIL.

        Returns:
            The samples, as ``images``.

        Raises:
            UserError: The model was not trained for the guidance, labels or number of steps, or lacks a VAE; arguments
                do not fit each other or the model; or samples are not finite.

        Example:
            >>> pipe = FlowMapPipeline.from_pretrained("assets/fashion_mnist")
            >>> pipe(class_labels=["boot", "bag"], num_inference_steps=2).images[0].size
            (32, 32)
        """
        fm, device = self.flow_map, self._execution_device
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_output(fm, output_type, decode_batch, self.vae is not None)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"choose from {known}", "callback_on_step_end_tensor_inputs", min(unknown))
        asked = Asked(measurement, mask, measurement_std, reward, reward_scale, particles, invert, edit_labels)
        given = asked.given(fm, latents)
        counts = {"num_images": num_images, "batch_size": batch_size, "class_labels": flat(class_labels)}
        conditions = given_conditions(fm.info, condition)
        if conditions is not None and len(conditions) > 1:
            counts["condition"] = list(conditions)
        n = sample_count(**counts, latents=latents, **asked.count(given))
        asked_label, field = (conditions, "condition") if fm.info.condition else (class_labels, "class_labels")
        label = labels_for(fm.info, n, asked_label, field=field)
        label = None if label is None else label.to(device)
        sampler = "stochastic" if asked.steers else "euler" if fm.info.kind == "drift" else "map"
        if sigmas is not None:
            sigmas = checked_sigmas(sigmas, complete=latents is None)
        steps = num_inference_steps if sigmas is None else len(sigmas)
        check_steps(steps, "num_inference_steps")
        check_sampling(fm, sampler, steps, guidance=guidance_scale, interval=guidance_interval)
        times = None if guidance_interval else fm.info.times(sampler, steps, guidance_scale)
        if sigmas is None and times is not None:
            sigmas = (1 - times[:-1]).tolist()
        scheduler = copy.copy(self.scheduler)  # of this call alone
        scheduler.set_timesteps(steps, device=device, sigmas=sigmas)
        grid = 1 - scheduler.sigmas.to(torch.float32)  # our times, 0 .. 1
        call = self._calls[threading.get_ident()] = _Call(guidance_scale, steps)
        try:
            if asked.special:
                guided = partial(guided_label, fm, weight=guidance_scale, interval=guidance_interval)
                watch = Watched(self, call, scheduler.timesteps, callback_on_step_end)
                x = asked.made(fm, given, grid, n, asked_label, guided, generator, device, self.network.dtype, watch)
                return self._finished(fm, x, output_type, decode_batch, return_dict)
            x = start(fm, n, generator, latents, device, self.network.dtype)
            for k, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                if call.interrupted:
                    break
                fm.info.check_guidance(call.guidance, sampler, guidance_interval)  # a callback may have changed it
                told = guided_label(fm, label, call.guidance, guidance_interval)
                s, t = grid[k].expand(n), grid[k + 1].expand(n)
                v = guided_drift(fm, call.guidance)(x, s, told) if sampler == "euler" else fm.velocity(x, s, t, told)
                x = scheduler.step(-v, timestep, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": x}[name] for name in callback_on_step_end_tensor_inputs}
                    x = (callback_on_step_end(self, k, timestep, tensors) or {}).get("latents", x)
        finally:
            call.running = False
        return self._finished(fm, x, output_type, decode_batch, return_dict)

    def _finished(self, fm: FlowMap, x: Tensor, output_type: str, decode_batch: int, return_dict: bool) -> Any:
        """Return samples in the form that was asked for."""
        check_finite(x, "samples", self.network.dtype)
        if fm.info.latent_scale and output_type != "latent":
            x = decode(self.vae, x, fm.info, decode_batch)
            check_finite(x, "images of the VAE", self.vae.dtype)
        self.maybe_free_model_hooks()
        images = converted(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
