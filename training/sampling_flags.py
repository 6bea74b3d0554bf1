"""The flags that sample.py and fid.py share, and what they mean."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from absl import flags
from torch import Tensor
from tqdm import tqdm

from flowmaps import FlowMap, UserError
from flowmaps.files import read_schedule
from flowmaps.generate import SAMPLERS, generate, labels_for
from flowmaps.latents import DTYPES, Decoder
from samplers import Schedule, uniform_times
from training.outputs import pick_device


class SamplingFlags:
    """Defines the flags below and samples as they say."""

    def __init__(self, num: int) -> None:
        self.checkpoint = flags.DEFINE_string("checkpoint", None, "Exported directory, run directory or hub id")
        self.steps = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Step counts")
        self.num = flags.DEFINE_integer("num", num, "Samples for each step count", lower_bound=1)
        self.seed = flags.DEFINE_integer("seed", 0, "Sample i depends on (seed, i) alone")
        self.sampler = flags.DEFINE_enum(
            "sampler", "map", list(SAMPLERS), "map: jump; euler, heun: integrate the drift"
        )
        self.label = flags.DEFINE_integer("label", None, "Class of all samples; without it sample i has i mod classes")
        self.guidance = flags.DEFINE_float(
            "guidance", None, "Guidance weight, of a model that takes one or of a solver", 1.0
        )
        self.gamma = flags.DEFINE_float("gamma", 1.0, "Share of noise --sampler=stochastic renews a step", 0.0, 1.0)
        self.schedule = flags.DEFINE_string(
            "schedule",
            "stored",
            "Step sizes: stored (in the checkpoint, else uniform), uniform, or a schedule file",
        )
        self.vae = flags.DEFINE_string(
            "vae", None, "VAE that makes images of latents: directory or hub id [that of the checkpoint]"
        )
        self.vae_dtype = flags.DEFINE_enum("vae_dtype", "float32", list(DTYPES), "Precision of the VAE")
        self.vae_batch = flags.DEFINE_integer("vae_batch", 8, "Latents decoded at a time", lower_bound=1)
        self.vae_tiling = flags.DEFINE_bool("vae_tiling", False, "Decode in overlapping tiles: less memory")
        self.batch = flags.DEFINE_integer("batch", 500, "Samples at a time", lower_bound=1)

    def counts(self) -> list[int]:
        """The step counts of ``--steps``, checked."""
        try:
            counts = [int(v) for v in self.steps.value]
        except ValueError:
            counts = []
        if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
            raise UserError(f"--steps={','.join(self.steps.value)}: give different whole numbers of at least 1")
        return counts

    def load(self) -> FlowMap:
        """The flow map of ``--checkpoint``, on the accelerator if there is one, checked against the other flags.

        Its stored schedules are those of ``--schedule``.
        """
        if self.checkpoint.value is None:
            raise UserError("--checkpoint is missing: a run directory, an exported directory or a hub id")
        counts = self.counts()
        fm = FlowMap.from_pretrained(self.checkpoint.value)
        labels_for(fm.info, 1, self.label.value)  # refuse a wrong label before any work
        fm.info.check_guidance(self.guidance.value, self.sampler.value)
        fm.info.check_sampler(self.sampler.value, max(counts), self.gamma.value)
        if self.schedule.value != "stored":
            schedule = None if self.schedule.value == "uniform" else self._given(fm, counts)
            fm.info = replace(fm.info, schedules={} if schedule is None else {self.sampler.value: schedule})
        self._open_vae(fm)
        return fm.to(pick_device())

    def _open_vae(self, fm: FlowMap) -> None:
        """Give a map of latents the VAE that the flags say, open: before any other work."""
        if not fm.info.latent_scale:
            if self.vae.value:
                raise UserError(f"--vae={self.vae.value}: this model makes no latents, leave it out")
            return
        known = fm.decoder.source if fm.decoder else fm.info.vae
        shift, scale, dtype = fm.info.latent_shift, fm.info.latent_scale, DTYPES[self.vae_dtype.value]
        fm.decoder = Decoder(self.vae.value or known, shift, scale, dtype, self.vae_batch.value, self.vae_tiling.value)
        fm.open_decoder()

    def _given(self, fm: FlowMap, counts: list[int]) -> Schedule:
        """The schedule of the file ``--schedule``, which must have all the step counts."""
        flag = f"--schedule={self.schedule.value}"
        schedule = read_schedule(self.schedule.value, "--schedule")
        if schedule.sampler not in ("", self.sampler.value):
            raise UserError(f"{flag} is for --sampler={schedule.sampler}, not {self.sampler.value}")
        if missing := [count for count in counts if count not in schedule]:
            raise UserError(f"{flag} has no {missing[0]} steps, only {', '.join(map(str, schedule))}: see --steps")
        if (schedule.guidance or 1) != (self.guidance.value or 1):
            raise UserError(f"{flag} was made with --guidance={schedule.guidance}, not {self.guidance.value}")
        if schedule.checkpoint not in ("", fm.fingerprint()):
            print(
                f"warning: {flag} was fitted to another checkpoint than --checkpoint={self.checkpoint.value}",
                file=sys.stderr,
            )
        return schedule

    def grid(self, fm: FlowMap, count: int) -> tuple[str, Tensor]:
        """What step sizes ``count`` steps have, and their times."""
        times = fm.info.times(self.sampler.value, count, self.guidance.value)
        return ("uniform", uniform_times(count)) if times is None else (self.schedule.value, times)

    def batches(self, fm: FlowMap, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Samples, latents decoded, and labels, batch by batch, in ``count`` steps; a progress bar on a terminal."""
        made = generate(
            fm,
            self.grid(fm, count)[1],
            self.num.value,
            self.seed.value,
            sampler=self.sampler.value,
            label=self.label.value,
            gamma=self.gamma.value,
            guidance=self.guidance.value,
            batch=self.batch.value,
        )
        with tqdm(total=self.num.value, desc=f"{count} steps", unit="sample", disable=None, leave=False) as bar:
            for x, label in made:
                bar.update(len(x))
                yield fm.decode(x), label
