"""The flags that sample.py and fid.py share, and what they mean."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from absl import flags
from torch import Tensor
from tqdm import tqdm

from flowmaps import FlowMap, UserError
from flowmaps.distributed import pick_device
from flowmaps.generate import check_sampling, generate, labels_for, nfe
from flowmaps.run_weights import run_weights, take_weights
from flowmaps.step_sizes import read_schedule
from flowmaps.vae import DTYPES, Decoder
from samplers import SAMPLERS, Schedule, uniform_times


@dataclass(frozen=True)
class Setting:
    """One way to sample: by what, with which step sizes (stored, uniform or a file), in how many steps."""

    sampler: str
    schedule: str
    steps: int


@cache
def _schedule(file: str) -> Schedule:
    return read_schedule(file)


class SamplingFlags:
    """Defines the flags below and samples as they say; ``several``: lists of samplers, schedules and averages too."""

    def __init__(self, num: int, several: bool = False) -> None:
        self.several, more = several, " (several: a,b)" if several else ""
        self.checkpoint = flags.DEFINE_string("checkpoint", None, "Exported directory, run directory or hub id")
        self.steps = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Step counts")
        self.num = flags.DEFINE_integer("num", num, "Samples for each step count", lower_bound=1)
        self.seed = flags.DEFINE_integer("seed", 0, "Sample i depends on (seed, i) alone")
        self.sampler = flags.DEFINE_list(
            "sampler", ["map"], "; ".join(f"{name}: {row.summary}" for name, row in SAMPLERS.items()) + more
        )
        self.ema = flags.DEFINE_list(
            "ema", [], f"Weights of a run: the decay of an average, raw, or a width [what it exports]{more}"
        )
        self.label = flags.DEFINE_integer("label", None, "Class of all samples; without it sample i has i mod classes")
        self.guidance = flags.DEFINE_float(
            "guidance", None, "Guidance weight, of a model that takes one or of a solver", 1.0
        )
        self.gamma = flags.DEFINE_float("gamma", 1.0, "Share of noise --sampler=stochastic renews a step", 0.0, 1.0)
        self.schedule = flags.DEFINE_list(
            "schedule",
            ["stored"],
            f"Step sizes: stored (in the checkpoint, else uniform), uniform, or a schedule file{more}",
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

    def settings(self) -> list[Setting]:
        """Every combination of ``--sampler``, ``--schedule`` and ``--steps``, checked."""
        for flag in (self.sampler, self.schedule, self.ema):
            given = f"--{flag.name}={','.join(flag.value)}"
            if len(set(flag.value)) < len(flag.value) or (not flag.value and flag is not self.ema):
                raise UserError(f"{given}: give different ones, at least one")
            if len(flag.value) > 1 and not self.several:
                raise UserError(f"{given}: one at a time")
        if unknown := [name for name in self.sampler.value if name not in SAMPLERS]:
            raise UserError(f"--sampler={unknown[0]}: choose from {', '.join(SAMPLERS)}")
        return [Setting(*way) for way in product(self.sampler.value, self.schedule.value, self.counts())]

    def load(self, more: Sequence[Setting] = ()) -> FlowMap:
        """The flow map of ``--checkpoint``, on the accelerator if there is one.

        Checked against the other flags, and the ways to sample that there are besides theirs.
        """
        if self.checkpoint.value is None:
            raise UserError("--checkpoint is missing: a run directory, an exported directory or a hub id")
        settings = [*self.settings(), *more]
        fm = FlowMap.from_pretrained(self.checkpoint.value)
        labels_for(fm.info, 1, self.label.value)  # refuse a wrong label before any work
        for setting in settings:
            check_sampling(fm, setting.sampler, setting.steps, self.gamma.value, self.guidance.value)
            self.grid(fm, setting)
        for file in {setting.schedule for setting in settings} - {"stored", "uniform"}:
            if _schedule(file).checkpoint not in ("", fm.fingerprint()):
                print(
                    f"warning: --schedule={file} was fitted to another checkpoint than "
                    f"--checkpoint={self.checkpoint.value}",
                    file=sys.stderr,
                )
        for ema in self.ema.value:
            run_weights(str(self.checkpoint.value), ema)
        self._open_vae(fm)
        return fm.to(pick_device())

    def averages(self, fm: FlowMap) -> Iterator[FlowMap]:
        """``fm`` with the weights of each of ``--ema`` in turn; as it is without that flag."""
        if not self.ema.value:
            yield fm
        for ema in self.ema.value:
            take_weights(fm, str(self.checkpoint.value), ema)
            yield fm

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

    def grid(self, fm: FlowMap, setting: Setting) -> tuple[str, Tensor]:
        """What step sizes the setting has, and their times."""
        equal = uniform_times(setting.steps)
        if setting.schedule == "uniform":
            return "uniform", equal
        if setting.schedule == "stored":
            times = fm.info.times(setting.sampler, setting.steps, self.guidance.value)
            return ("uniform", equal) if times is None else ("stored", times)
        return setting.schedule, self._given(setting)[setting.steps]

    def _given(self, setting: Setting) -> Schedule:
        """The schedule file of the setting, which must be made for it."""
        flag = f"--schedule={setting.schedule}"
        schedule = _schedule(setting.schedule)
        if schedule.sampler not in ("", setting.sampler):
            raise UserError(f"{flag} is for --sampler={schedule.sampler}, not {setting.sampler}")
        if setting.steps not in schedule:
            raise UserError(f"{flag} has no {setting.steps} steps, only {', '.join(map(str, schedule))}: see --steps")
        if (schedule.guidance or 1) != (self.guidance.value or 1):
            raise UserError(f"{flag} was made with --guidance={schedule.guidance}, not {self.guidance.value}")
        return schedule

    def nfe(self, fm: FlowMap, setting: Setting) -> int:
        """Network evaluations of a sample."""
        return nfe(fm.info, setting.sampler, setting.steps, self.guidance.value)

    def batches(
        self, fm: FlowMap, setting: Setting, seed: int | None = None, items: range | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Samples, latents decoded, and labels, batch by batch; a progress bar on a terminal.

        By default all samples of ``--num`` with ``--seed``.
        """
        items = range(self.num.value) if items is None else items
        made = generate(
            fm,
            self.grid(fm, setting)[1],
            len(items),
            self.seed.value if seed is None else seed,
            sampler=setting.sampler,
            label=self.label.value,
            gamma=self.gamma.value,
            guidance=self.guidance.value,
            batch=self.batch.value,
            first=items.start,
        )
        title = f"{setting.sampler}, {setting.steps} steps"
        with tqdm(total=len(items), desc=title, unit="sample", disable=None, leave=False) as bar:
            for x, label in made:
                bar.update(len(x))
                yield fm.decode(x), label
