"""What is scored: the samples of a model in every way that the command line asks for, or images that are there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flowmaps import FlowMap
from flowmaps.cli.sampling_flags import SamplingFlags
from flowmaps.data import DataSet, iterate
from flowmaps.distributed import Team
from flowmaps.evaluation.evaluate import Row, generated

Samplings = list[Iterable[Tensor]]  # for each seed, a process's share of uint8 image batches


class Scored(Protocol):
    """What the functions that score ask for."""

    @property
    def num(self) -> int:
        """How many images are scored at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image; empty if that is known only later."""

    def facts(self) -> dict[str, Any]:
        """What a record says of all."""

    def samplings(self, team: Team) -> Iterator[tuple[Row, Samplings]]:
        """Facts and images of each row, to be used before the next one is asked for."""


@dataclass(frozen=True)
class Model:
    """The samples of ``fm`` by each average, sampler, schedule and step count of ``flags``, with ``repeats`` seeds."""

    flags: SamplingFlags
    fm: FlowMap
    repeats: int = 1

    @property
    def num(self) -> int:
        return int(self.flags.num.value)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.fm.info.latent_scale else self.fm.info.shape

    def _seeds(self) -> list[int]:
        return [self.flags.seed.value + k for k in range(self.repeats)]

    def facts(self) -> dict[str, Any]:
        named = {name: getattr(self.flags, name).value for name in ("label", "guidance", "gamma")}
        return {"source": self.flags.checkpoint.value, "num": self.num, "seeds": self._seeds(), **named}

    def samplings(self, team: Team) -> Iterator[tuple[Row, Samplings]]:
        share = team.share(self.num)
        for fm in self.flags.averages(self.fm):
            weights = fm.fingerprint()
            for way in self.flags.settings():
                grid, times = self.flags.grid(fm, way)
                row: Row = {"ema": fm.info.ema, "sampler": way.sampler, "grid": grid, "steps": way.steps}
                row |= {"nfe": self.flags.nfe(fm, way), "weights": weights, "times": times.tolist()}
                yield row, [generated(self.flags.batches(fm, way, seed, share)) for seed in self._seeds()]


@dataclass(frozen=True)
class Given:
    """``images`` that are there, called ``source``, ``batch`` at a time."""

    images: DataSet
    source: str
    batch: int = 500

    @property
    def num(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def facts(self) -> dict[str, Any]:
        return {"source": self.source, "num": self.num, "seeds": [], "label": None, "guidance": None, "gamma": None}

    def samplings(self, team: Team) -> Iterator[tuple[Row, Samplings]]:
        yield {}, [(images for images, _ in iterate(self.images, team.share(self.num), self.batch))]
