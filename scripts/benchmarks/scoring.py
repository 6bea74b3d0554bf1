"""Bench of scoring: images/s, memory and disk use of the package's single pass, torch-fidelity, and PNG files first.

Each route samples the same small model in one step, then takes Inception features of its images and the Fréchet
distance to the same statistics. It runs in a separate process, timed from the first sample to the number. Inception has
random weights here: its time does not depend on them, and no distance is reported.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flowmaps import FlowMap, FlowMapInfo
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.evaluation.samples import write_samples
from flowmaps.generate import generate
from flowmaps.images import to_uint8
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.extractors import load_extractor
from flowmaps.networks import UNet
from samplers import uniform_times

SEED, BATCH = 0, 64  # torch-fidelity's batch
SHAPE = (3, 32, 32)


def model() -> FlowMap:
    """An untrained UNet of CIFAR's shape, whose sampling is a small part of the time."""
    torch.manual_seed(SEED)
    network = UNet(image_size=32, channels=3, width=32, channel_mult=(1, 2), blocks=1, attention_resolutions=())
    return FlowMap(network.eval(), info=FlowMapInfo(shape=SHAPE))


def write_weights(file: Path) -> None:
    """Inception in torch-fidelity's file format, its numbers random."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file.touch()
    with mock.patch("torch.load", return_value={}), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(network.state_dict(), file)


def _one_pass(folder: Path, num: int) -> Callable[[], float]:
    fm, reference = model(), open_reference(folder / "stats.npz", "inception", folder / "weights.pth")
    return lambda: float(evaluate(fm, reference, num=num, seeds=(SEED,))["results"][0]["FID"])


def _torch_fidelity(folder: Path, num: int) -> Callable[[], float]:
    from torch_fidelity import GenerativeModelBase

    fm = model()

    class Generator(GenerativeModelBase):  # type: ignore[misc]
        z_size, z_type, num_classes = 3 * 32 * 32, "normal", 0

        def forward(self, z: Tensor) -> Tensor:
            x = z.reshape(-1, *SHAPE)
            return to_uint8(fm(x, torch.zeros(len(x)), torch.ones(len(x))))

    return lambda: _calculate(folder, Generator().eval(), input1_model_num_samples=num)


def _png_first(folder: Path, num: int) -> Callable[[], float]:
    fm, out = model(), folder / "png"

    def work() -> float:
        write_samples(generate(fm, uniform_times(1), num, SEED), out, 1)
        return _calculate(folder, str(out / "steps-1"))

    return work


def _calculate(folder: Path, samples: Any, **options: Any) -> float:
    """torch-fidelity's distance to statistics that its cache has, under the name of the reference."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=samples,
        input2=torch.utils.data.TensorDataset(torch.zeros(1)),
        input2_cache_name="reference",
        cache_root=str(folder / "cache"),
        fid=True,
        cuda=False,
        batch_size=BATCH,
        feature_extractor_weights_path=str(folder / "weights.pth"),
        verbose=False,
        **options,
    )
    return float(found["frechet_inception_distance"])


ROUTES: dict[str, Callable[[Path, int], Callable[[], float]]] = {
    "fid.py's one pass": _one_pass,
    "torch-fidelity": _torch_fidelity,
    "PNG files, then torch-fidelity": _png_first,
}


def _timed(name: str, folder: str, num: int, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    work = ROUTES[name](Path(folder), num)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))


def fid_costs(num: int = 512, rounds: int = 3, done: Collection[tuple[str, int]] = ()) -> Iterator[dict[str, Any]]:
    """A record for each of ``ROUTES`` that is not ``done``; medians of interleaved rounds."""
    names = [name for name in ROUTES if (name, 0) not in done]
    spawn, seen = multiprocessing.get_context("spawn"), {name: list[tuple[float, float, float]]() for name in names}
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder))
                before, results = _size(Path(folder)), spawn.Queue()
                process = spawn.Process(target=_timed, args=(name, folder, num, torch.get_num_threads(), results))
                process.start()
                seconds, memory = results.get()
                process.join()
                seen[name].append((seconds, memory, (_size(Path(folder)) - before) / 2**20))
    for name in names:
        seconds, memory, written = (statistics.median(values) for values in zip(*seen[name], strict=True))
        scores = {"s": seconds, "images/s": num / seconds, "peak MiB": memory, "MiB on disk": written}
        yield {"row": name, "seed": 0, "images": num, "scores": scores}


def prepare(folder: Path) -> None:
    write_weights(folder / "weights.pth")
    extractor = load_extractor("inception", folder / "weights.pth")
    stats = FeatureStats(extractor.dim, extractor.origin).update(torch.randn(3000, extractor.dim))
    stats.save(folder / "stats.npz")
    (folder / "cache").mkdir()
    moments = {"mu": stats.mean.float().numpy(), "sigma": stats.cov.numpy()}
    torch.save(moments, folder / "cache" / "reference-inception-v3-compat-stat-fid-2048.pt")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
