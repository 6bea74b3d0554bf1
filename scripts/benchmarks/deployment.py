"""Bench of runtimes: one step of a shipped model in PyTorch and in onnxruntime, and the cost of smaller weights."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.objectives import Work, medians
from flowmaps import FlowMap, UserError
from flowmaps.deployment.graphs import Graph, graphs
from flowmaps.deployment.onnx_files import STORAGE, runner, write_onnx
from flowmaps.evaluation import evaluate, open_reference

Scores = dict[str, float]
Run = Callable[[dict[str, Tensor]], Tensor]
ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODELS = ["fashion_mnist", "digits"]
BATCHES = (1, 8, 64)


def runtimes(name: str, num: int | None = None, rounds: int = 15) -> Iterator[tuple[str, Scores]]:
    """Yield each runtime with file size, milliseconds per call, images per second and distance of ``num`` samples.

    Times are on one thread. ``pixels`` is the share that differs from PyTorch, and ``levels`` by how much at most.
    """
    if name not in MODELS:
        raise UserError(f"--rows={name}: choose from {', '.join(MODELS)}")
    fm, num = FlowMap.from_pretrained(ASSETS / name), num or 1000
    graph = next(graph for graph in graphs(fm) if graph.name == "one_step")
    reference = open_reference(ASSETS / "references" / f"{name}.npz", device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {storage: Path(folder) / f"{storage}.onnx" for storage in STORAGE}
        for storage, file in files.items():
            write_onnx(graph, fm, file, storage)
        runs: dict[str, Run] = {"PyTorch, eager": lambda given: graph.module(**given)}
        compiled = torch.compile(graph.module)
        runs["PyTorch, compiled"] = lambda given: compiled(**given)
        runs |= {f"onnxruntime, {storage}": runner(file, graph.output, threads=1) for storage, file in files.items()}
        seconds = {batch: medians(works(graph, runs, batch), rounds) for batch in BATCHES}
        images = {row: sampled(fm, graph, run, num) for row, run in runs.items()}
        for row in runs:
            storage = row.split(", ")[1]
            scores = {"MB": files[storage].stat().st_size / 1e6} if storage in files else {}
            for batch in BATCHES:
                scores[f"ms@{batch}"] = 1e3 * seconds[batch][row]
                scores[f"images/s@{batch}"] = batch / seconds[batch][row]
            apart = (images[row].int() - images["PyTorch, eager"].int()).abs()
            scores |= {"pixels": float((apart > 0).double().mean()), "levels": float(apart.max())}
            record = evaluate(images[row], reference, num=num)
            yield f"{name}, {row}", scores | {record["metric"]: record["results"][0][record["metric"]]}


def works(graph: Graph, runs: dict[str, Run], batch: int) -> dict[str, Work]:
    """Return one call of each runtime on ``batch`` rows."""
    given = graph.inputs(batch)
    return {row: lambda k, run=run: run(given) for row, run in runs.items()}  # type: ignore[misc]


def sampled(fm: FlowMap, graph: Graph, run: Run, num: int, batch: int = 100) -> Tensor:
    """Return ``num`` images uint8 [num, C, H, W] by one step, with the noise and labels of fid.py."""
    parts = []
    for start in range(0, num, batch):
        n = min(batch, num - start)
        label = torch.arange(start, start + n) % fm.info.num_classes
        parts.append(run({"noise": fm.noise(n, seed=0, start=start), "label": label}).permute(0, 3, 1, 2))
    return torch.cat(parts)
