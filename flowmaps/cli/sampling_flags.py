"""The flags that sample.py and fid.py share."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, which help and mistakes need not wait for
    from torch import Tensor

    from flowmaps.evaluation.settings import Setting
    from flowmaps.flow_map import FlowMap

SAMPLER_NAMES = ["map", "stochastic", "euler", "heun", "dpm_solver", "midpoint"]  # of samplers.SAMPLERS
DTYPE_NAMES = ["float32", "bfloat16", "float16"]  # of flowmaps.vae.DTYPES


class SamplingFlags:
    """Define the flags and open the model that they ask for.

    Args:
        num: Default of ``--num``.
        several: Allow lists of samplers, schedules and averages.
    """

    def __init__(self, num: int, several: bool = False) -> None:
        self.several, more = several, " (several: a,b)" if several else ""
        self.checkpoint = flags.DEFINE_string(
            "checkpoint", None, "Exported or run directory, digits (shipped), or hub id"
        )
        self.steps = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Step counts")
        self.num = flags.DEFINE_integer("num", num, "Samples for each step count", lower_bound=1)
        self.seed = flags.DEFINE_integer("seed", 0, "Sample i depends only on (seed, i)")
        self.sampler = flags.DEFINE_list(
            "sampler",
            ["map"],
            "map: jump with the map; stochastic: jump, adding fresh noise; or a solver of the drift: "
            + ", ".join(SAMPLER_NAMES[2:])
            + f"; of a published map the one of its authors{more}",
        )
        self.ema = flags.DEFINE_list(
            "ema", [], f"Weights of a run: the decay of an average, raw, or a width [what it exports]{more}"
        )
        self.label = flags.DEFINE_string(
            "label", None, "Class of all samples, by number or name; without it, shares as in the data"
        )
        self.condition = flags.DEFINE_string(
            "condition",
            None,
            "Conditions, of a model that takes them: an .npy file [n, ...], a picture, or a folder or zip file; sample "
            "i has row i, from the first again after the last",
        )
        self.guidance = flags.DEFINE_float(
            "guidance",
            None,
            "Guidance weight, for a model conditioned on one or for a solver; of a published map that of its authors",
            1.0,
        )
        self.guidance_interval = flags.DEFINE_list(
            "guidance_interval", None, "LOW,HIGH: times between which it applies, for a model that takes them [0,1]"
        )
        self.gamma = flags.DEFINE_float(
            "gamma", 1.0, "Share of the noise that --sampler=stochastic renews per step", 0.0, 1.0
        )
        self.schedule = flags.DEFINE_list(
            "schedule",
            ["stored"],
            f"Step sizes: stored (in the checkpoint, else uniform), uniform, or a schedule file{more}",
        )
        self.vae = flags.DEFINE_string(
            "vae", None, "VAE that decodes latents: directory or hub id [that of the checkpoint]"
        )
        self.vae_dtype = flags.DEFINE_enum("vae_dtype", "float32", DTYPE_NAMES, "Precision of the VAE")
        self.vae_batch = flags.DEFINE_integer("vae_batch", 8, "Latents decoded at a time", lower_bound=1)
        self.vae_tiling = flags.DEFINE_bool("vae_tiling", False, "Decode in overlapping tiles: less memory")
        self.batch = flags.DEFINE_integer("batch", 500, "Samples at a time", 1, 1_000_000)

        self.reads = (self.checkpoint, self.schedule, self.vae, self.condition)

    def all(self) -> "list[flags.FlagHolder[Any]]":
        """Return all flags defined here."""
        return [flag for flag in vars(self).values() if isinstance(flag, flags.FlagHolder)]

    def typed(self) -> list[str]:
        """Return those that were given and say how a model is sampled, as they are typed."""
        names = "steps sampler schedule ema guidance guidance_interval gamma vae".split()
        return [flags.FLAGS[name].serialize() for name in names if flags.FLAGS[name].present]

    def counts(self) -> list[int]:
        """Return the step counts of ``--steps``."""
        from flowmaps.evaluation.settings import check_choices

        given = ",".join(self.steps.value)
        try:
            counts = [int(value) for value in self.steps.value]
        except ValueError:
            raise UserError("give different whole numbers of at least 1", field="steps", value=given) from None
        check_choices(counts, self.sampler.value, self.schedule.value)
        return counts

    def interval(self) -> tuple[float, float] | None:
        """Return the times of ``--guidance_interval``, None if it was left out."""
        given = self.guidance_interval.value
        if given is None:
            return None
        try:
            low, high = map(float, given)
        except ValueError:
            raise UserError("must be two times, such as 0.4,0.6", "guidance_interval", ",".join(given)) from None
        return low, high

    def load(self) -> "FlowMap":
        """Open the flow map of ``--checkpoint``, on the accelerator if there is one, and check all flags against it."""
        from flowmaps.distributed import pick_device
        from flowmaps.flow_map import FlowMap
        from flowmaps.run_weights import run_weights
        from flowmaps.step_sizes import read_schedule

        source = required(self.checkpoint, "runs/digits")
        self._check()
        fm = FlowMap.from_pretrained(source)
        if fm.info.recommended_sampler and not self.sampler.present:
            flags.FLAGS[self.sampler.name].value = [fm.info.recommended_sampler]
        if usual := not (self.guidance.present or self.guidance_interval.present) and fm.info.usual_guidance():
            flags.FLAGS[self.guidance.name].value = usual["guidance"]
            flags.FLAGS[self.guidance_interval.name].value = list(map(str, usual["guidance_interval"]))
        self._open_conditions(fm)
        self.settings(fm)
        for file in set(self.schedule.value) - {"stored", "uniform"}:
            if read_schedule(file).checkpoint not in ("", fm.fingerprint()):
                print(
                    f"warning: --schedule={file} was fitted to a checkpoint other than --checkpoint={source}",
                    file=sys.stderr,
                )
        for ema in self.ema.value:
            run_weights(source, ema)
        self._open_vae(fm)
        return fm.to(pick_device())

    def _check(self) -> None:
        """Refuse what needs no checkpoint to be refused."""
        from flowmaps.step_sizes import read_schedule

        self.counts()
        self.interval()
        for file in set(self.schedule.value) - {"stored", "uniform"}:
            read_schedule(file)
        if len(set(self.ema.value)) < len(self.ema.value):
            raise UserError("give different ones", field="ema", value=",".join(self.ema.value))
        for flag in (self.sampler, self.schedule, self.ema):
            if len(flag.value) > 1 and not self.several:
                raise UserError("one at a time", field=flag.name, value=",".join(flag.value))

    def settings(self, fm: "FlowMap") -> list["Setting"]:
        """Return every combination of ``--sampler``, ``--schedule`` and ``--steps``, checked against ``fm``."""
        from flowmaps.evaluation.settings import sampling_settings

        return sampling_settings(
            fm,
            self.counts(),
            self.sampler.value,
            self.schedule.value,
            label=self.label.value,
            guidance=self.guidance.value,
            guidance_interval=self.interval(),
            gamma=self.gamma.value,
        )

    def averages(self) -> dict[float | None, Callable[[], dict[str, "Tensor"]]]:
        """Return the loaders of the weights that ``--ema`` names, by the decay of the average (None: raw weights)."""
        from flowmaps.run_weights import run_weights

        load = partial(run_weights, self.checkpoint.value or "")
        return {None if ema == "raw" else float(ema): partial(load, ema) for ema in self.ema.value}

    def _open_conditions(self, fm: "FlowMap") -> None:
        """Give a map that takes conditions those of ``--condition``, as many as there are samples."""
        import torch

        from flowmaps.data.conditions import open_conditions
        from flowmaps.labels import check_conditions

        source, shape = self.condition.value, fm.info.condition
        if not shape:
            if source:
                raise UserError("this model takes no condition: leave it out", field="condition", value=source)
            return
        if source:
            found = open_conditions(source, shape)
            fm.conditions = found.fetch(torch.arange(min(len(found), self.num.value)))
        else:
            check_conditions(fm.info, None, "condition")

    def _open_vae(self, fm: "FlowMap") -> None:
        """Give a map of latents the VAE that the flags describe, and open it."""
        from flowmaps.vae import DTYPES, Decoder

        if not fm.info.latent_scale:
            if self.vae.value:
                raise UserError("this model does not make latents, leave it out", field="vae", value=self.vae.value)
            return
        known = fm.decoder.source if fm.decoder else fm.info.vae
        dtype = DTYPES[self.vae_dtype.value]
        fm.decoder = Decoder(self.vae.value or known, fm.info, dtype, self.vae_batch.value, self.vae_tiling.value)
        fm.open_decoder()
