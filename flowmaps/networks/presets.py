"""The networks of published results, by name."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A network of a paper: class, arguments, its published size in millions of parameters, and the source.

    The package's second time adds up to 0.3 % to a network that was published with one time.
    """

    network: str
    options: dict[str, Any]
    millions: float
    source: str


_CIFAR10 = {"width": 128, "channel_mult": (2, 2, 2), "blocks": 4, "attention_resolutions": (16,), "dropout": 0.13}
_64 = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "blocks": 3}
_EDM2 = {**_64, "attention_resolutions": (16, 8)}
_LATENTS_512 = {"channels": 4, "num_classes": 1000, **_EDM2}
_LATENTS_256 = {"image_size": 32, "channels": 4, "num_classes": 1000, "data_std": 1.0}

BOFFI, EDM2 = "Boffi et al. 2025 (arXiv 2505.18825)", "Karras et al. 2024 (arXiv 2312.02696)"
DIT = "Peebles and Xie 2023 (arXiv 2212.09748)"
TERMINAL_VELOCITY = "heads as in Terminal Velocity Matching 2025 (arXiv 2511.19797)"
PIXEL_MEAN_FLOW = "pixel MeanFlow 2026 (arXiv 2601.22158), with the second head"
IMPROVED_MEAN_FLOW = "Geng et al. 2025 (arXiv 2512.02012), with the second head"
EDM, TWO_TIMES = "Karras et al. 2022 (arXiv 2206.00364)", "Geng et al. 2025 (arXiv 2505.13447), two times"


def _dit(patch: int, width: int, depth: int, heads: int, millions: float, source: str) -> Preset:
    sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads}
    return Preset(
        "DiT", {"image_size": 32, "channels": 4, "num_classes": 1000, "data_std": 1.0, **sizes}, millions, source
    )


def _imf(width: int, depth: int, heads: int, millions: float) -> Preset:
    options = {"patch": 2, "width": width, "depth": depth, "heads": heads, "guidance": True, "guidance_interval": True}
    return Preset("IMFDiT", {**_LATENTS_256, **options}, millions, IMPROVED_MEAN_FLOW)


def _pmf(image_size: int, width: int, depth: int, bottleneck: int, millions: float) -> Preset:
    sizes = {"image_size": image_size, "channels": 3, "patch": image_size // 16, "bottleneck": bottleneck}
    sizes |= {"width": width, "depth": depth, "heads": 12 if width == 768 else 16}
    sizes |= {"hidden": 3416} if width == 1280 else {}  # rounded up to a multiple of 8
    told = {"num_classes": 1000, "data_std": 1.0, "guidance": True, "guidance_interval": True}
    return Preset("IMFDiT", {**sizes, **told, "prediction": "data", "rotation": "grid"}, millions, PIXEL_MEAN_FLOW)


PRESETS = {
    "edm2-cifar10": Preset("EDM2UNet", _CIFAR10, 54.67, BOFFI),
    "edm2-64": Preset("EDM2UNet", {**_EDM2, "width": 128}, 124.26, BOFFI),
    "edm2-s-imagenet64": Preset("EDM2UNet", {**_EDM2, "num_classes": 1000, "width": 192}, 280.0, EDM2),
    "edm2-s-imagenet512": Preset("EDM2UNet", {**_LATENTS_512, "width": 192}, 280.0, EDM2),
    "edm2-xxl-imagenet512": Preset("EDM2UNet", {**_LATENTS_512, "width": 448, "dropout": 0.1}, 1523.0, EDM2),
    "ddpm++-cifar10": Preset("UNet", {**_CIFAR10, "variant": "ddpm++"}, 55.7, EDM),
    "adm-imagenet64": Preset(
        "UNet",
        {
            **_64,
            "width": 192,
            "attention_resolutions": (32, 16, 8),
            "dropout": 0.1,
            "num_classes": 1000,
            "variant": "adm",
        },
        296.0,
        EDM,
    ),
    "dit-b4-imagenet256": _dit(4, 768, 12, 12, 131.0, TWO_TIMES),
    "dit-b2-imagenet256": _dit(2, 768, 12, 12, 131.0, TWO_TIMES),
    "dit-l2-imagenet256": _dit(2, 1024, 24, 16, 459.0, TWO_TIMES),
    "dit-xl2-imagenet256": _dit(2, 1152, 28, 16, 675.1, DIT),
    "dit-xl2-heads64-imagenet256": _dit(2, 1152, 28, 18, 675.1, f"{DIT}, {TERMINAL_VELOCITY}"),
    "imf-b2-imagenet256": _imf(768, 12, 12, 145.60),
    "imf-m2-imagenet256": _imf(768, 24, 12, 230.57),
    "imf-l2-imagenet256": _imf(1024, 32, 16, 509.75),
    "imf-xl2-imagenet256": _imf(1024, 48, 16, 711.11),
    "pmf-b16-imagenet256": _pmf(256, 768, 16, 128, 175.5),
    "pmf-l16-imagenet256": _pmf(256, 1024, 32, 128, 511.8),
    "pmf-h16-imagenet256": _pmf(256, 1280, 48, 256, 1113.9),
    "pmf-b32-imagenet512": _pmf(512, 768, 16, 128, 179.3),
    "pmf-l32-imagenet512": _pmf(512, 1024, 32, 128, 516.8),
    "pmf-h32-imagenet512": _pmf(512, 1280, 48, 256, 1120.4),
}
