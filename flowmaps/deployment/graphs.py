"""The graphs that a flow map is exported as: modules of tensors alone, traced for any batch size."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import flowmaps
from flowmaps.errors import UserError
from flowmaps.files import Layout, new_directory, to_json
from flowmaps.flow_map import FlowMap
from flowmaps.images import to_uint8
from flowmaps.networks.conditioning import soft_label, with_guidance
from flowmaps.networks.conditions import condition_rows

FACTS = "flow_map.json"  # in the directory of the graphs: what is known about them, for programs without flowmaps
GRAPHS = Layout(FACTS, b'"written_by": "flowmaps"', (FACTS, "*.onnx", "*.onnx.data", "*.pt2"))
TRACED = 2  # batch size; 0 and 1 would be taken for constants
BATCHES, DECODED = (1, 4096), (2, 63)  # batches of a graph; diffusers' decoder has another branch from 64 on
TOLERANCE = 1e-4  # of numbers, relative to the largest one if that is above 1; integers may differ by 1


class Velocity(nn.Module):
    """v_{s,t}(x) of a flow map for x [B, ...], s and t [B], as its network takes them.

    ``label`` is int64 [B], or a condition, float [B, ...]; absent for an unconditional model.
    ``guidance``, float [B, 1] or [B, 3], is the weight and, for a network that takes them, the first and last time at
    which it applies; absent for other networks.
    """

    def __init__(self, fm: FlowMap) -> None:
        super().__init__()
        network: Any = fm.network
        self.network = network.for_sampling() if hasattr(network, "for_sampling") else network
        self.label_size, self.condition = fm.info.label_size, fm.info.condition
        self.augment_dim = getattr(network, "config", {}).get("augment_dim", 0)

    def forward(
        self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        if label is not None and guidance is not None:
            given = condition_rows(label, self.condition)
            rows = soft_label(given, x.new_zeros(x.shape[0], self.augment_dim), self.label_size)
            label = with_guidance(rows, guidance, self.label_size)
        v: Tensor = self.network(x, s, t, label)
        return v


class OneStep(nn.Module):
    """Noise x [B, ...] with the model's ``base_std``, and conditions, to samples X_{0,1}(x).

    Images are uint8 [B, height, width, channels]; latents and points are floats of the shape of x.
    """

    def __init__(self, fm: FlowMap) -> None:
        super().__init__()
        self.velocity, self.images = Velocity(fm), is_image(fm)

    def forward(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        zeros = noise.new_zeros(noise.shape[0])
        x = noise + self.velocity(noise, zeros, torch.ones_like(zeros), label, guidance)
        return to_uint8(x).permute(0, 2, 3, 1) if self.images else x


class Decoder(nn.Module):
    """Latents [B, C, h, w], as a model makes them, to images uint8 [B, height, width, 3]."""

    def __init__(self, fm: FlowMap) -> None:
        super().__init__()
        vae = fm.open_decoder().open()
        self.decoder, self.after = vae.decoder, vae.post_quant_conv
        shift, scale = (torch.tensor(v)[:, None, None] for v in (fm.info.latent_shift, fm.info.latent_scale))
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.low, self.high = fm.info.vae_range

    shift: Tensor
    scale: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        z = latents / self.scale + self.shift
        pixels = self.decoder(z if self.after is None else self.after(z))
        pixels = (2 * pixels - self.high - self.low) / (self.high - self.low)
        return to_uint8(pixels).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Graph:
    """A graph to export: its module, and the tensors that it takes, by name, for a number of rows."""

    name: str  # of the file
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    output: str  # the name of what it returns
    batches: tuple[int, int] = BATCHES

    def compare(self, run: Callable[[dict[str, Tensor]], Tensor]) -> "Agreement":
        """Compare ``run``, this graph in another runtime, with the module at batches it was not traced with."""
        largest, difference, share = 0.0, 0.0, 0.0
        for size in (1 if self.batches[0] == 1 else 3, 5):
            given = self.inputs(size)
            with torch.no_grad():
                expected = self.module(**given)
            found = run(given)
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise UserError(f"{self.name}: {list(found.shape)} for {list(expected.shape)} at a batch of {size}")
            largest = max(largest, float(expected.double().abs().max()))
            apart = (found.double() - expected.double()).abs()
            difference = max(difference, float(apart.max()))
            share = max(share, float((apart > 0).double().mean()))
        return Agreement(difference, largest, share, self.output == "image")


@dataclass(frozen=True)
class Agreement:
    """The largest difference between two runtimes, the largest value, and the share of values that differ."""

    difference: float
    largest: float
    share: float
    integers: bool

    def check(self, where: str) -> None:
        """Refuse a graph of float32 numbers that differs by more than rounding explains."""
        if not self.difference <= (1 if self.integers else TOLERANCE * max(1.0, self.largest)):  # NaN fails this too
            raise UserError(f"{where} differs from PyTorch by {self.difference:.2g}: this network cannot be exported")

    def __str__(self) -> str:
        if self.integers:
            return f"{self.share:.2%} of the pixels differ from PyTorch, by at most {self.difference:.0f}"
        return f"differs from PyTorch by at most {self.difference:.2g} (largest value {self.largest:.2g})"


def is_image(fm: FlowMap) -> bool:
    """Return whether samples of the flow map are images themselves, neither latents nor points."""
    return len(fm.info.shape) == 3 and not fm.info.latent_scale


def conditions(fm: FlowMap, n: int) -> dict[str, Tensor]:
    """Return what the model takes besides x and times, for ``n`` rows: labels, and weights above 1."""
    info, given = fm.info, {}
    if info.label_size:
        given["label"] = torch.arange(n) % max(1, info.num_classes)
        if info.condition:
            given["label"] = torch.linspace(-1, 1, n * info.label_size).reshape(n, *info.condition)
        if fm.info.guidance_max is not None:
            weight = torch.linspace(1, fm.info.guidance_max, n)[:, None]
            times = torch.tensor([[0.25, 0.75]]).expand(n, -1)
            given["guidance"] = torch.cat([weight, times], dim=1) if info.guidance_interval else weight
    return given


def graphs(fm: FlowMap) -> list[Graph]:
    """Return the graphs of a model in eval mode: ``velocity``, ``one_step`` of a map, ``decoder`` of latents.

    Raises:
        UserError: The shape of samples is unknown, or the VAE of latents is missing.
    """
    if fm.network.training:
        raise UserError("the network is in train mode: call eval() first")

    def velocity(n: int) -> dict[str, Tensor]:
        s = torch.linspace(0, 1, n)
        return {"x": fm.noise(n, seed=0), "s": s, "t": (s + 1) / 2, **conditions(fm, n)}

    def noise(n: int) -> dict[str, Tensor]:
        return {"noise": fm.noise(n, seed=0), **conditions(fm, n)}

    made = [Graph("velocity", Velocity(fm), velocity, "velocity")]
    if fm.info.kind != "drift":
        made.append(Graph("one_step", OneStep(fm), noise, "image" if is_image(fm) else "sample"))
    if fm.info.latent_scale:

        def latents(n: int) -> dict[str, Tensor]:
            return {"latents": fm.noise(n, seed=0) / fm.base_std}

        made.append(Graph("decoder", Decoder(fm), latents, "image", DECODED))
    return made


def facts(fm: FlowMap) -> dict[str, str]:
    """Return what a program without flowmaps needs to know, as texts: they travel inside each graph."""
    return {
        "flowmaps": flowmaps.__version__,
        "info": json.dumps(fm.info.to_dict()),
        "interpolant": fm.interpolant_name,
        "base_std": f"{fm.base_std:g}",
        "weights": fm.fingerprint(),
    }


def write_graphs(
    fm: FlowMap, directory: Path, ending: str, write: Callable[[Graph, FlowMap, Path], Agreement]
) -> list[str]:
    """Write each of ``graphs(fm)`` by ``write`` and FACTS into a directory, complete or not at all.

    Returns:
        A line for each file: its name, size and agreement with PyTorch.
    """
    lines, written = [], {}
    with new_directory(directory, GRAPHS) as folder:
        for graph in graphs(fm):
            file = folder / f"{graph.name}.{ending}"
            agreement = write(graph, fm, file)
            size = sum(part.stat().st_size for part in folder.glob(f"{file.name}*"))
            lines.append(f"{file.name}: {size / 1e6:.2f} MB, {agreement}")
            shapes = {name: ["batch", *value.shape[1:]] for name, value in graph.inputs(1).items()}
            written[file.name] = {"inputs": shapes, "output": graph.output, "difference": agreement.difference}
        known = {**facts(fm), "info": fm.info.to_dict(), "base_std": fm.base_std}
        (folder / FACTS).write_bytes(to_json({**known, "graphs": written}))
    return lines


def trace(graph: Graph) -> ExportedProgram:
    """Trace ``graph`` by torch.export, for its range of batches."""
    batch = Dim("batch", min=graph.batches[0], max=graph.batches[1])
    given = graph.inputs(TRACED)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(graph.module, (), kwargs=given, dynamic_shapes={name: {0: batch} for name in given})


def write_pt2(graph: Graph, fm: FlowMap, path: Path) -> Agreement:
    """Write ``graph`` for torch.export.load and compare the file with the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(trace(graph), path, extra_files={FACTS: json.dumps(facts(fm))})
        module = torch.export.load(path).module()
    with torch.no_grad():
        agreement = graph.compare(lambda given: module(**given))
    agreement.check(path.name)
    return agreement
