"""Latents: a VAE between images and the flow map.

The map works on x = scale (z - shift), per channel, where z [B, C, h, w] is the output of the VAE's encoder; x then has
the standard deviation that the network expects. Rombach et al. 2022 (arXiv 2112.10752) have shift 0 and scale 0.18215.
The encoder takes and the decoder gives pixel values in the VAE's range: [-1, 1] as it was trained, or [0, 1] in EDM2.
"""

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowmaps.errors import UserError, blame
from flowmaps.hub import from_hub
from flowmaps.info import VAE_RANGE, FlowMapInfo
from flowmaps.reading import parse, read_json
from flowmaps.tensors import MODEL_FILE, merged, model_files, read_header

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FILES = ("config.json", MODEL_FILE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def vae_directory(source: str | Path) -> Path | None:
    """Return the folder of the VAE in the directory ``source``: itself, vae/ or model/vae/; None if there is none."""
    for folder in (Path(source), Path(source) / "vae", Path(source) / "model" / "vae"):
        try:
            config = read_json(folder / FILES[0], "download it again")
        except UserError:
            continue
        if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL":
            return folder
    return None


def open_vae(source: str, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
    """Open an ``AutoencoderKL`` on the CPU, for inference.

    Args:
        source: Directory or hub id; the VAE is there or in vae/. Only safetensors are read, never pickles.
        dtype: Type of the weights.

    Raises:
        UserError: The VAE is missing or damaged. The field is "vae".
    """
    from diffusers import AutoencoderKL

    wanted = [*FILES, *(f"vae/{name}" for name in FILES)]
    with blame("vae", source):
        folder = vae_directory(source if Path(source).is_dir() else from_hub(source, wanted))
        if folder is None:
            raise UserError("no AutoencoderKL there (config.json of that class, or vae/ with one)")
        variant = _check_claims(folder)
    try:
        options = {"torch_dtype": dtype, "variant": variant or None, "use_safetensors": True, "local_files_only": True}
        vae, found = AutoencoderKL.from_pretrained(folder, **options, output_loading_info=True)
        if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
            raise ValueError(f"{wrong[0]} is missing, new or of another shape")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is not an intact AutoencoderKL ({reason}): download it again", field="vae", value=source
        ) from None
    opened: AutoencoderKL = vae.requires_grad_(False).eval()
    with blame("vae", source):
        _check_facts(opened)
    return opened


def _check_claims(folder: Path) -> str:
    """Refuse a config that asks for more layers or channels than the weights have, before any is made.

    Returns the variant of the weights, such as "fp16", "" if they have none.
    """
    remedy = "download it again"
    files, variant = model_files(folder, remedy)
    shapes = merged([read_header(file, remedy)[0] for file in files], folder, remedy)
    config = read_json(folder / FILES[0], remedy)
    where = f"{folder / FILES[0]}: "
    channels = parse(tuple[int, ...], config.get("block_out_channels", []), f"{where}block_out_channels")
    layers = parse(int, config.get("layers_per_block", 1), f"{where}layers_per_block")
    latent = parse(int, config.get("latent_channels", 1), f"{where}latent_channels")
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if max(latent, *channels, 0) > largest or len(channels) * layers > len(shapes):
        raise UserError(f"{where}asks for more layers or channels than {files[0].name} has: {remedy}")
    return variant


def _check_facts(vae: "AutoencoderKL") -> None:
    """Refuse a VAE that is not for colour images, or whose config has no scaling that can be inverted."""
    inputs, outputs = vae.config.in_channels, vae.config.out_channels
    if (inputs, outputs) != (3, 3):
        raise UserError(f"takes and gives images of {inputs} and {outputs} channels, not of 3: choose another VAE")
    wanted = vae.config.latent_channels
    try:
        shift, scale = scaling(vae)
        fits = len(shift) == len(scale) == wanted and all(map(math.isfinite, (*shift, *scale))) and 0 not in scale
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f"its config.json has no scaling (scaling_factor, latents_std) for {wanted} channels: fix it")


def scaling(vae: "AutoencoderKL") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (shift, scale), one number per channel each, from the VAE's config."""
    config: Any = vae.config
    channels = int(config.latent_channels)
    if config.latents_mean is not None and config.latents_std is not None:
        return tuple(config.latents_mean), tuple(config.scaling_factor / std for std in config.latents_std)
    return channels * (float(config.shift_factor or 0.0),), channels * (float(config.scaling_factor),)


def reduction(vae: "AutoencoderKL") -> int:
    """Return the factor by which latents are smaller than images, in height and in width."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def fingerprint(vae: "AutoencoderKL") -> str:
    """Return a SHA-256 over the VAE's weights by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().float().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def middle_and_half(vae_range: tuple[float, float]) -> tuple[float, float]:
    """Return (m, h) such that m + h y in ``vae_range`` stands for a pixel value y in [-1, 1]."""
    low, high = vae_range
    return (high + low) / 2, (high - low) / 2


@torch.no_grad()
def moments(vae: "AutoencoderKL", images: Tensor, vae_range: tuple[float, float] = VAE_RANGE) -> Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] as mean and standard deviation of z: [B, 2, C, h, w]."""
    middle, half = middle_and_half(vae_range)
    z: Any = vae.encode((middle + half * images).to(vae.device, vae.dtype)).latent_dist
    return torch.stack([z.mean, z.std], dim=1)


def channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return one number per channel as [C, 1, 1], on the device and in the type of ``like``."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]


def decode(vae: "AutoencoderKL", x: Tensor, info: FlowMapInfo, batch: int = 8) -> Tensor:
    """Decode samples x [B, C, h, w] to float32 images [B, 3, H, W], about in [-1, 1], ``batch`` at a time.

    ``info`` has the scaling of the latents and the range of the VAE. Gradients are kept if x asks for them.
    """
    with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
        return _decode(vae, x, info, batch)


def _decode(vae: "AutoencoderKL", x: Tensor, info: FlowMapInfo, batch: int) -> Tensor:
    z = x.float() / channels(info.latent_scale, x.float()) + channels(info.latent_shift, x.float())
    middle, half = middle_and_half(info.vae_range)
    parts = [vae.decode(part.to(vae.device, vae.dtype)).sample for part in torch.split(z, batch)]
    return torch.cat([((part.float() - middle) / half).to(x.device) for part in parts])


@dataclass
class Decoder:
    """Decodes a flow map's latents to images; the VAE at ``source`` (directory or hub id) is opened on first use.

    ``info`` is the flow map's. ``tiling`` decodes an image in overlapping tiles, which takes less memory.
    """

    source: str
    info: FlowMapInfo
    dtype: torch.dtype = torch.float32
    batch: int = 8
    tiling: bool = False
    vae: "AutoencoderKL | None" = field(default=None, repr=False)

    def open(self) -> "AutoencoderKL":
        """Open the VAE; its latents must have as many channels as the map's.

        Raises:
            UserError: The VAE is missing, damaged or does not fit. The field is "vae".
        """
        if self.vae is None:
            if not self.source:
                raise UserError("missing: this model makes latents, and its checkpoint names no VAE", field="vae")
            vae = open_vae(self.source, self.dtype)
            if vae.config.latent_channels != len(self.info.latent_scale):
                raise UserError(
                    f"has latents of {vae.config.latent_channels} channels, the model of {len(self.info.latent_scale)}",
                    field="vae",
                    value=self.source,
                )
            if self.tiling:
                vae.enable_tiling()
            self.vae = vae
        return self.vae

    def __call__(self, x: Tensor) -> Tensor:
        """Decode samples x [B, C, h, w] to images [B, 3, H, W] on the device of x."""
        return decode(self.open().to(x.device), x, self.info, self.batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Decoder":
        return self  # the copy of a flow map for a teacher shares it
