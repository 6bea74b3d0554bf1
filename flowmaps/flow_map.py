"""The flow map: a two-time velocity network, the path it was trained on, and the facts known about it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowmaps.errors import UserError
from flowmaps.info import FlowMapInfo
from flowmaps.interpolants import INTERPOLANTS
from flowmaps.labels import Label, given_label
from flowmaps.rng import generator
from samplers.callables import expand

if TYPE_CHECKING:
    from flowmaps.vae import Decoder


# Arguments of networks that came later, at the value that changes nothing: fingerprints do not change with them.
ADDED = (
    ("variant", ""),
    ("norm_groups", 0),
    ("head_channels", 0),
    ("guidance_interval", False),
    ("decoupled", 0),
    ("norm", "layer"),
    ("label_scale", 1.0),
    ("gap_embedding", "narrow"),
    ("condition", ()),
)
Time = Tensor | float  # of each row, or of all


def _times(x: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
    """Return two times as [B] for x [B, ...]; numbers are checked, tensors pass unread."""
    numbers = [time for time in (s, t) if not isinstance(time, Tensor)]
    if not all(0 <= time <= 1 for time in numbers) or numbers != sorted(numbers):  # NaN fails this too
        raise UserError(f"times must be 0 <= s <= t <= 1 (0 = noise, 1 = data), got {' and '.join(map(str, numbers))}")
    dtype, batch = torch.promote_types(x.dtype, torch.float32), x.shape[0]  # len(x) would freeze it in an export
    rows = [v if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=x.device) for v in (s, t)]
    first, second = (row if row.ndim else row.expand(batch) for row in rows)
    return first, second


class FlowMap(nn.Module):
    """$X_{s,t}(x) = x + (t - s) v_{s,t}(x)$: jumps along the probability-flow ODE from time s to time t.

    Boffi, Albergo and Vanden-Eijnden 2025 (arXiv 2505.18825), parametrisation of section 3. Noise is at time 0, data at
    time 1. In all methods ``x`` is [B, ...] and times are floats [B] with s <= t, or one number for all rows. ``label``
    is int64 [B], or one class for all rows by number or name; of a model with a condition (``info.condition``, its
    shape) floats [B, *condition]. None means "no label": for an unconditional model, and
    for one that was also trained without labels (``info.label_dropout``). Another would answer from an embedding that
    was never trained, so in eval mode, as ``from_pretrained`` returns it, it refuses None; training may learn that row.

    Args:
        network: v(x, s, t, label), the average velocity between s and t: one of ``flowmaps.networks``, or any module.
        interpolant: The path from noise to data: "linear" or "trigonometric".
        base_std: The standard deviation of the noise.
        info: Facts about the network, which samplers respect.

    Raises:
        UserError: An argument is out of range, or the network's weights were made for another path or noise. Calls
            refuse a label that is missing or unknown, and numbers that are not times.

    Example:
        >>> network = UNet(image_size=8, channels=1, num_classes=10)
        >>> fm = FlowMap(network, base_std=0.5, info=FlowMapInfo(shape=(1, 8, 8), num_classes=10))
        >>> fm(fm.noise(4, seed=0), torch.zeros(4), torch.ones(4), torch.arange(4)).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        interpolant: str = "linear",
        base_std: float = 1.0,
        info: FlowMapInfo | None = None,
    ) -> None:
        super().__init__()
        if interpolant not in INTERPOLANTS:
            raise UserError(f"choose one of {', '.join(INTERPOLANTS)}", field="interpolant", value=interpolant)
        if not base_std > 0:
            raise UserError("must be positive", field="base_std", value=base_std)
        config = getattr(network, "config", {})
        convention = config.get("convention")
        other_path = interpolant != "linear" and convention != "velocity"  # a velocity is the drift of any path
        if convention and (other_path or base_std != config["base_std"]):
            raise UserError(
                f"the network's weights need {'the linear path and ' * other_path}base_std {config['base_std']:g}, "
                f"got {interpolant} and {base_std:g}"
            )
        self.network = network
        self.training = network.training
        self.interpolant_name = interpolant
        self.interpolant = INTERPOLANTS[interpolant]
        self.base_std = base_std
        self.info = info or FlowMapInfo()
        self.decoder: Decoder | None = None  # of latents, made when needed; not a submodule
        self.conditions: Tensor | None = None  # [m, *info.condition], of samples for which none are given; not saved

    def forward(self, x: Tensor, s: Time, t: Time, label: Label | None = None) -> Tensor:
        """Return $X_{s,t}(x)$, same shape as ``x``; refused for a drift, where only s = t was trained."""
        self.info.check_sampler("map")
        s, t = _times(x, s, t)
        return x + expand(t - s, x).to(x.dtype) * self.velocity(x, s, t, label)

    def velocity(self, x: Tensor, s: Time, t: Time, label: Label | None = None) -> Tensor:
        """Return $v_{s,t}(x)$, the average velocity between s and t: the network's output, unchanged."""
        if self.info.shape and x.shape[1:] != self.info.shape:
            raise UserError(f"x is {list(x.shape)}, this model's samples are {['n', *self.info.shape]}")
        given = given_label(self.info, label, x, training=self.training)
        v: Tensor = self.network(x, *_times(x, s, t), given)
        return v

    def drift(self, x: Tensor, t: Time, label: Label | None = None) -> Tensor:
        """Return $b_t(x) = v_{t,t}(x)$, the velocity of the probability-flow ODE."""
        return self.velocity(x, t, t, label)

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of samples x [B, ...]: latents decoded by the VAE to [B, 3, H, W], else x itself."""
        return self.open_decoder()(x) if self.info.latent_scale else x

    def open_decoder(self) -> "Decoder":
        """Return the decoder of latents with its VAE loaded."""
        from flowmaps.vae import Decoder  # needs diffusers, which `import flowmaps` does not load

        if self.decoder is None:
            self.decoder = Decoder(self.info.vae, self.info)
        self.decoder.open()
        return self.decoder

    def noise(self, n: int, seed: int, start: int = 0, draw: int = 0) -> Tensor:
        """Draw x0 of samples ``start`` .. ``start + n - 1``: [n, *shape], with standard deviation ``base_std``.

        Sample i has the same noise whatever ``n``, the batch size or the number of processes. ``draw`` = 1, 2, ... is
        further noise for the same samples, for samplers that need it.
        """
        if not self.info.shape:
            raise UserError("FlowMapInfo.shape is empty: set it to the shape of one sample to draw noise")
        streams = (generator(seed, "noise", i, draw) for i in range(start, start + n))
        rows = torch.stack([torch.randn(self.info.shape, generator=stream) for stream in streams])
        parameter = next(self.network.parameters(), torch.empty(0))  # a closed form has none
        if parameter.is_cuda:
            rows = rows.pin_memory()  # from other memory, a copy waits until the GPU is idle
        return self.base_std * rows.to(parameter.device, parameter.dtype, non_blocking=True)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the network's config and its weights by name, which records and schedules quote.

        It is the same for a network that torch.compile has wrapped, entirely or in parts.
        """
        config = {k: v for k, v in getattr(self.network, "config", {}).items() if not k.startswith("_")}
        config = {k: v for k, v in config.items() if (k, tuple(v) if isinstance(v, list) else v) not in ADDED}
        digest = hashlib.sha256(json.dumps([config, self.interpolant_name, self.base_std], sort_keys=True).encode())
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in self.network.state_dict().items()}
        for name, tensor in sorted(tensors.items()):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path, readme: str = "", picture: bytes = b"") -> None:
        """Write a diffusers pipeline directory: safetensors and JSON only, complete or not at all.

        Args:
            directory: The directory to write; an existing one is replaced.
            readme: Its model card. Weights that were imported get one in any case.
            picture: A PNG file for the card, samples.png.

        Raises:
            UserError: The network is not a diffusers model.
        """
        from flowmaps.export import save  # needs diffusers, which `import flowmaps` does not load
        from flowmaps.model_card import card

        readme = readme or (card(self) if self.info.origin else "")
        vae = None if self.decoder is None else self.decoder.vae
        save(Path(directory), self.network, self.interpolant_name, self.base_std, self.info, vae, readme, picture)

    @classmethod
    def from_pretrained(cls, source: str | Path, network_class: type[nn.Module] | None = None) -> "FlowMap":
        """Read what ``save_pretrained`` wrote, in eval mode on the CPU.

        Args:
            source: A directory, a run's directory, the name of a shipped checkpoint ("digits"), or a hub id.
            network_class: The class of the network, if it is not one of ``flowmaps.networks``; the directory must have
                been written with a class of that name.

        Returns:
            The flow map, with the facts that were stored with it.

        Raises:
            UserError: There is no such directory or hub id, or a file is missing, damaged or of a newer version.

        Example:
            >>> fm = FlowMap.from_pretrained("assets/digits")
            >>> fm.info.kind, fm.info.shape
            ('map', (1, 8, 8))
        """
        from flowmaps.export import load
        from flowmaps.vae import Decoder

        found = load(source, network_class)
        try:
            fm = cls(found.network, found.interpolant, found.base_std, found.info).eval()
        except (UserError, TypeError) as error:
            raise UserError(f"{found.file}: {error}") from None
        if found.has_vae:
            fm.decoder = Decoder(str(source), found.info)
        return fm
