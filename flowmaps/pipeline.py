"""The diffusers interface: a scheduler and a pipeline over a flow map, with noise at sigma = 1 and data at sigma = 0.

Only this module uses diffusers' direction of time. A network output v(x, s, t) is their u = -v at
sigma = 1 - s, so that x + (t - s) v = x - (sigma_s - sigma_t) u.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import flowmaps.networks  # noqa: F401  # diffusers resolves a network only from modules that are imported
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.generate import check_sampling, guided_drift, guided_label, labels_for
from flowmaps.images import to_pil, to_uint8
from flowmaps.info import FlowMapInfo
from flowmaps.vae import decode
from samplers import SAMPLERS

Callback = Callable[["FlowMapPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class FlowMapScheduler(FlowMapEulerDiscreteScheduler, SchedulerMixin):  # diffusers looks the mixin up in this module
    """z_r = z_t - (sigma_t - sigma_r) u over the grid of ``set_timesteps``: one map evaluation per interval."""


class FlowMapPipeline(DiffusionPipeline):
    """Sample images (or points) from a flow map in ``num_inference_steps`` steps.

    A drift (``info["kind"] == "drift"``) is integrated by Euler steps on the same grid. A model of latents has the
    component ``vae`` (``pipe.vae.enable_tiling()`` for large images); to use another VAE, pass
    ``FlowMapPipeline.from_pretrained(directory, vae=AutoencoderKL.from_pretrained(...))``.
    """

    model_cpu_offload_seq = "network->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        network: nn.Module,
        scheduler: FlowMapScheduler,
        interpolant: str = "linear",
        base_std: float = 1.0,
        info: dict[str, Any] | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(interpolant=interpolant, base_std=base_std, info=info)

    @classmethod
    def from_flow_map(cls, fm: FlowMap) -> "FlowMapPipeline":
        """Wrap ``fm``; the pipeline shares its network, and its VAE if that is loaded."""
        vae = None if fm.decoder is None else fm.decoder.vae
        return cls(fm.network, FlowMapScheduler(), fm.interpolant_name, fm.base_std, fm.info.to_dict(), vae)

    @property
    def flow_map(self) -> FlowMap:
        """The flow map, which shares this pipeline's network."""
        info = FlowMapInfo.from_dict(dict(self.config.info))
        return FlowMap(self.network, self.config.interpolant, self.config.base_std, info)

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        num_inference_steps: int = 1,
        sigmas: Sequence[float] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        decode_batch: int = 8,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate ``num_images`` samples, or one for each row of ``latents``.

        Args:
            num_images: The number of samples.
            num_inference_steps: The number of steps. Without ``sigmas`` they are those of the model's schedule, if it
                has one of this length, else equal.
            sigmas: Start points of the steps, decreasing from 1 (diffusers' direction); the final 0 is implied.
            class_labels: One label for all samples or one each; None cycles through the classes.
            guidance_scale: The weight for a model that takes one (``info["guidance_max"]``), or for a drift that was
                also trained without labels (classifier-free, twice the evaluations).
            generator: The random stream of the noise, or one for each sample.
            latents: Noise [n, *shape] of standard deviation ``base_std`` to start from.
            output_type: "pil", "np" ([n, h, w, c] in 0 .. 1), "pt" (images in -1 .. 1, or points) or "latent" (samples
                before the VAE).
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.
            callback_on_step_end: Called as ``callback(pipe, k, timestep, {"latents": x})`` after step k; "latents" that
                it returns replace x.
            decode_batch: Latents that the VAE decodes at a time.

        Returns:
            The samples, as ``images``.

        Raises:
            UserError: The model was not trained for the guidance, labels or number of steps, or lacks a VAE.

        Example:
            >>> pipe = FlowMapPipeline.from_pretrained("assets/digits")
            >>> pipe(4, num_inference_steps=2, class_labels=7).images[0].size
            (8, 8)
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError("must be 'pil', 'np', 'pt' or 'latent'", field="output_type", value=repr(output_type))
        fm, device = self.flow_map, self._execution_device
        if fm.info.latent_scale and output_type != "latent" and self.vae is None:
            raise UserError(
                "this model makes latents and came without a VAE: from_pretrained(directory, vae=AutoencoderKL...), or "
                "output_type='latent'"
            )
        sampler = "euler" if fm.info.kind == "drift" else "map"
        steps = num_inference_steps if sigmas is None else len(sigmas)
        check_sampling(fm, sampler, steps, guidance=guidance_scale)
        drift = guided_drift(fm, guidance_scale) if SAMPLERS[sampler].of == "drift" else None
        if latents is None:
            shape = (num_images, *fm.info.shape)
            latents = fm.base_std * randn_tensor(shape, generator=generator, device=device, dtype=self.network.dtype)
        x = latents.to(device=device, dtype=self.network.dtype)
        label = labels_for(fm.info, len(x), class_labels)
        label = guided_label(fm, None if label is None else label.to(device), guidance_scale)
        if sigmas is None and (times := fm.info.times(sampler, num_inference_steps, guidance_scale)) is not None:
            sigmas = (1 - times[:-1]).tolist()
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=list(sigmas), device=device)
        grid = 1 - self.scheduler.sigmas.to(torch.float32)  # our times, 0 .. 1
        for k, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            s, t = grid[k].expand(len(x)), grid[k + 1].expand(len(x))
            v = drift(x, s, label) if drift else fm.velocity(x, s, t, label)
            x = self.scheduler.step(-v, timestep, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, k, timestep, {"latents": x}) or {}).get("latents", x)
        if fm.info.latent_scale and output_type != "latent":
            x = decode(self.vae, x, fm.info, decode_batch)
        self.maybe_free_model_hooks()
        images: Any = x
        if output_type in ("pil", "np") and x.ndim != 4:
            raise UserError(f"samples of shape {tuple(x.shape[1:])} are not images: use output_type='pt'")
        if output_type == "pil":
            images = [to_pil(image) for image in to_uint8(x)]
        elif output_type == "np":
            images = (x.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
