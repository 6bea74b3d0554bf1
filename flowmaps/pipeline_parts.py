"""The ends of a pipeline's call: its arguments, checked, and its samples in the form that was asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from flowmaps.data.image_io import to_pixels
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap
from flowmaps.images import from_uint8, to_pil, to_uint8
from flowmaps.info import FlowMapInfo
from flowmaps.labels import check_conditions
from samplers import check_times

Generators = torch.Generator | Sequence[torch.Generator] | None


OUTPUTS = ("pil", "np", "pt", "latent")


def check_output(fm: FlowMap, output_type: str, decode_batch: object, has_vae: bool) -> None:
    """Refuse what no model can do, and outputs that this one cannot give."""
    if output_type not in OUTPUTS:
        raise UserError("must be 'pil', 'np', 'pt' or 'latent'", field="output_type", value=repr(output_type))
    if fm.info.latent_scale and output_type != "latent" and not has_vae:
        raise UserError(
            "this model makes latents and came without a VAE: from_pretrained(directory, vae=AutoencoderKL...), or "
            "output_type='latent'"
        )
    if not fm.info.shape:
        raise UserError("FlowMapInfo.shape is empty: set it to the shape of one sample")
    if len(fm.info.shape) != 3 and output_type in ("pil", "np"):
        raise UserError(f"samples of shape {fm.info.shape} are not images: use output_type='pt'")
    check_count("decode_batch", decode_batch)


def check_count(name: str, count: object) -> None:
    """Refuse what is not a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError("must be a whole number of at least 1", field=name, value=count)


def sample_count(**given: Any) -> int:
    """Return the number of samples that the arguments agree on, as numbers or lengths; 1 if none of them says one."""
    counts = {
        name: len(value) if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0) else value
        for name, value in given.items()
    }
    if counts.get("class_labels") == 1:  # for all
        counts["class_labels"] = None
    counts = {name: count for name, count in counts.items() if count is not None}
    for name, count in counts.items():
        check_count(name, count)
    if len(set(counts.values())) > 1:
        raise UserError(
            f"{' and '.join(counts)} give {' and '.join(map(str, counts.values()))} samples: make them agree"
        )
    return next(iter(counts.values()), 1)


def given_conditions(info: FlowMapInfo, condition: Any) -> Tensor | None:
    """Return the argument ``condition`` as floats [m, *info.condition]; images of PIL and uint8 in [-1, 1].

    Raises:
        UserError: The model takes none, or one of another shape.
    """
    if not info.condition:
        if condition is not None:
            raise UserError("this model takes no condition: leave it out", field="condition")
        return None
    several = condition if isinstance(condition, (list, tuple)) else [condition]
    if condition is not None and all(isinstance(one, Image.Image) for one in several):
        pixels = [torch.from_numpy(to_pixels(one)).permute(2, 0, 1) for one in several]
        if len({tuple(one.shape) for one in pixels}) > 1:
            raise UserError("give images of one size", field="condition")
        condition = from_uint8(torch.stack(pixels))
    return check_conditions(info, condition, "condition")


def checked_sigmas(sigmas: Sequence[float] | Tensor, complete: bool) -> list[float]:
    """Return the start points of steps to data, which must decrease, from 1 (noise) if ``complete``."""
    try:
        found: list[float] = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
        fits = bool(check_times([1 - sigma for sigma in (*found, 0.0)])[0] == 0) or not complete
    except (ValueError, TypeError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(
            f"must decrease{' from 1 (noise)' * complete} and stay above 0 (data)", field="sigmas", value=sigmas
        )
    return found


def start(
    fm: FlowMap, n: int, generator: Generators, latents: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the noise [n, *shape] of n samples: ``latents`` if given, else drawn."""
    streams = [generator] if isinstance(generator, torch.Generator) else generator
    if streams is not None:
        if not isinstance(streams, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in streams):
            raise UserError("must be a torch.Generator, or a list of one for each sample", field="generator")
        if streams is generator and len(streams) != n:
            raise UserError(f"has {len(streams)} for {n} samples: pass one, or one for each", field="generator")
    shape = (n, *fm.info.shape)
    if latents is None:
        drawn: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return fm.base_std * drawn
    if not isinstance(latents, Tensor) or latents.shape != shape or not latents.is_floating_point():
        found = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"must be noise as a floating-point tensor {list(shape)}", field="latents", value=found)
    return latents.to(device=device, dtype=dtype)


def check_finite(x: Tensor, what: str, dtype: torch.dtype) -> None:
    """Refuse samples with NaN or infinity, which as pictures would be black."""
    if not bool(torch.isfinite(x).all()):
        narrow = dtype == torch.float16
        remedy = "float16 is too narrow for it, use bfloat16 or float32" if narrow else "check latents and weights"
        raise UserError(f"{what} hold NaN or infinity, nothing is returned: {remedy}")


def converted(x: Tensor, output_type: str) -> Any:
    """Return samples as ``output_type`` has them; points, and what is called "latent", stay as they are."""
    if output_type == "pil":
        return [to_pil(image) for image in to_uint8(x)]
    if output_type == "latent" or x.ndim != 4:
        return x
    images = (x / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.float().permute(0, 2, 3, 1).cpu().numpy()
