"""Rectified flow's DDPM++, in the code of Song et al. 2021."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.importers.build import Options, Source, attention_weights, check_empty, layer, layers
from flowmaps.importers.inert import Unsupported
from flowmaps.importers.torch_files import Weights, network_weights, read_tensors

FIRST = "all_modules.2.weight"  # the first is of the time, and differs between networks


def rectified_flow(path: Path, options: Options) -> Source:
    """Read ``checkpoint_*.pth`` of rectified flow, as used by BOSS, for images of a given size: the EMA of a DDPM++.

    The average is a plain list, in the order of the trained parameters of ``model``.
    """
    size = options.settle("image_size", None)
    content = read_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # not its average, which has no names
        model, average = network_weights(content["model"], FIRST)[0], content.get("ema")
    else:
        model, average = network_weights(content, FIRST)[0], None
    trained = {name: tensor for name, tensor in model.items() if name.startswith("all_modules.")}
    if average is None:
        options.assumed["weights"] = "an average, or as good as one"
    shadow = average.get("shadow_params") if isinstance(average, dict) else list(trained.values())
    if not isinstance(shadow, list) or not all(isinstance(w, Tensor) for w in shadow):
        raise UnpicklingError("its ema is not a list of weights")
    if [w.shape for w in shadow] != [w.shape for w in trained.values()]:
        raise UnpicklingError("it is not a DDPM++: its ema does not have the parameters of its model in order")
    parts: dict[int, Weights] = {}
    for name, tensor in zip(trained, shadow, strict=True):
        _, number, key = name.split(".", 2)
        parts.setdefault(int(number), {})[key] = tensor
    if "W" in parts[0]:
        raise Unsupported("it is an NCSN++ with Fourier features, as at 256 x 256, which has no network here")
    linear1, linear2, stem, *inside, norm, conv = (parts[i] for i in range(len(parts)))
    blocks: list[tuple[Weights, Weights | None]] = []  # each with the attention after it
    for part in inside:
        if "NIN_0.W" in part and blocks:
            blocks[-1] = (blocks[-1][0], part)
        else:
            blocks.append((part, None))
    resampling = [_inputs(block) == _outputs(block) and "Conv_2.weight" in block for block, _ in blocks]
    levels = 1 + sum(resampling) // 2
    each = (len(blocks) - 2 - 2 * (levels - 1) - levels) // (2 * levels)
    width, channels = stem["weight"].shape[:2]
    if size % (1 << (levels - 1)):
        raise UserError(f"must be a multiple of {1 << (levels - 1)} for {levels} levels", "image_size", size)
    kept = [pair for pair, change in zip(blocks, resampling, strict=True) if not change][: levels * each : each]
    attention = tuple(size >> level for level, (_, attends) in enumerate(kept) if attends is not None)
    mult = tuple(_outputs(block) // width for block, _ in kept)
    first = levels * each + levels - 1  # of the middle
    ours: Weights = {
        "embedding.start.0.weight": torch.roll(linear1.pop("weight"), width // 2, dims=1),  # sines first
        "embedding.start.0.bias": linear1.pop("bias"),
        **layer("embedding.start.2", linear2),
        **layer("stem", stem),
        **layer("head.0", norm),
        **layer("head.2", conv),
    }
    names = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "modulation": "Dense_0", "norm2": "GroupNorm_1"}
    names |= {"conv2": "Conv_1", "skip": "Conv_2"}
    for n, (block, attends) in enumerate(blocks):
        place = f"down.{n}" if n < first else f"middle.{n - first}" if n < first + 2 else f"up.{n - first - 2}"
        ours |= layers(place, block, names)
        if attends is not None:
            ours |= layer(f"{place}.attention.norm", attends, "GroupNorm_0.")
            qkv = [attends.pop(f"NIN_{i}.W").T for i in range(3)], [attends.pop(f"NIN_{i}.b") for i in range(3)]
            out = attends.pop("NIN_3.W").T, attends.pop("NIN_3.b")
            ours |= attention_weights(place, torch.cat(qkv[0]), torch.cat(qkv[1]), *out)
    check_empty(f"all_modules.{number}.{key}" for number, part in parts.items() for key in part)
    arguments = {
        "image_size": size,
        "channels": channels,
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "num_classes": 0,
        "variant": "ddpm++",
        "convention": "rectified_flow",
        "base_std": 1.0,
    }
    taken = "model" if average is None else "ema"
    others = [str(name) for name in content if name != taken] if isinstance(content.get("model"), dict) else []
    return Source("UNet", arguments, ours, left_out=tuple(others))


def _inputs(block: Weights) -> int:
    return block["Conv_0.weight"].shape[1]


def _outputs(block: Weights) -> int:
    return block["Conv_0.weight"].shape[0]
