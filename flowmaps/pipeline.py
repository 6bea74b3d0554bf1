"""The diffusers side: a scheduler and a pipeline over a flow map, with noise at sigma = 1 and data at sigma = 0.

Only this module knows of diffusers' direction of time. A network output v(x, s, t) is their u = -v at
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
from flowmaps.generate import guided_label, labels_for
from flowmaps.images import to_pil, to_uint8
from flowmaps.info import FlowMapInfo
from flowmaps.vae import decode

Callback = Callable[["FlowMapPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class FlowMapScheduler(FlowMapEulerDiscreteScheduler, SchedulerMixin):  # diffusers looks the mixin up in this module
    """z_r = z_t - (sigma_t - sigma_r) u over the grid of ``set_timesteps``: one map evaluation an interval."""


class FlowMapPipeline(DiffusionPipeline):
    """Sample images (or points) from a flow map in ``num_inference_steps`` network evaluations.

    A drift (``info["kind"] == "drift"``) is integrated by Euler steps on the same grid. A model of latents has the
    component ``vae`` (``pipe.vae.enable_tiling()`` for large images), or is given one:
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
        """Wrap ``fm``; the pipeline shares its network, and its VAE if that is open."""
        vae = None if fm.decoder is None else fm.decoder.vae
        return cls(fm.network, FlowMapScheduler(), fm.interpolant_name, fm.base_std, fm.info.to_dict(), vae)

    @property
    def flow_map(self) -> FlowMap:
        """The flow map inside, sharing this pipeline's network."""
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
        """Generate ``num_images`` samples, or one for each row of ``latents`` (noise of standard deviation base_std).

        ``sigmas``: start points of the steps, decreasing from 1 (diffusers' direction); the final 0 is implied. Without
        them the steps are those of the model's schedule if it has one of this length, else equal.
        ``class_labels``: one label for all or one each; None cycles through the classes.
        ``guidance_scale``: weight for a model that takes one (``info["guidance_max"]``).
        ``output_type``: "pil", "np" ([n, h, w, c] in 0 .. 1), "pt" (images in -1 .. 1, or points) or "latent" (the raw
        samples). ``decode_batch``: latents that the VAE decodes at a time.
        ``callback_on_step_end(pipe, k, timestep, {"latents": x})`` is called after step k; "latents" that it returns
        take the place of x.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        fm, device = self.flow_map, self._execution_device
        if fm.info.latent_scale and output_type != "latent" and self.vae is None:
            raise UserError(
                "this model makes latents and came without a VAE: from_pretrained(directory, vae=AutoencoderKL...), or "
                "output_type='latent'"
            )
        solver = "euler" if fm.info.kind == "drift" else "map"
        fm.info.check_guidance(guidance_scale)
        fm.info.check_sampler(solver, num_inference_steps if sigmas is None else len(sigmas))
        if latents is None:
            shape = (num_images, *fm.info.shape)
            latents = fm.base_std * randn_tensor(shape, generator=generator, device=device, dtype=self.network.dtype)
        x = latents.to(device=device, dtype=self.network.dtype)
        label = labels_for(fm.info, len(x), class_labels)
        label = guided_label(fm, None if label is None else label.to(device), guidance_scale)
        if sigmas is None and (times := fm.info.times(solver, num_inference_steps, guidance_scale)) is not None:
            sigmas = (1 - times[:-1]).tolist()
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=list(sigmas), device=device)
        grid = 1 - self.scheduler.sigmas.to(torch.float32)  # our times, 0 .. 1
        for k, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            s, t = grid[k].expand(len(x)), grid[k + 1].expand(len(x))
            v = fm.velocity(x, s, s if solver == "euler" else t, label)
            x = self.scheduler.step(-v, timestep, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, k, timestep, {"latents": x}) or {}).get("latents", x)
        if fm.info.latent_scale and output_type != "latent":
            x = decode(self.vae, x, fm.info.latent_shift, fm.info.latent_scale, decode_batch)
        self.maybe_free_model_hooks()
        images: Any = x
        if output_type in ("pil", "np") and x.ndim != 4:
            raise UserError(f"samples of shape {tuple(x.shape[1:])} are no images: use output_type='pt'")
        if output_type == "pil":
            images = [to_pil(image) for image in to_uint8(x)]
        elif output_type == "np":
            images = (x.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
