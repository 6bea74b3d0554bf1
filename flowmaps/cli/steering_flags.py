"""The flags of sample.py that steer samples or start from a picture."""

from typing import TYPE_CHECKING, Any

from absl import flags

from flowmaps.cli.sampling_flags import SamplingFlags
from flowmaps.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowmaps.flow_map import FlowMap
    from samplers.steer import Reward


class SteeringFlags:
    """Define the flags, and make what they ask for: a reward, or images to invert."""

    def __init__(self, sampling: SamplingFlags) -> None:
        self.sampling = sampling
        self.reward = flags.DEFINE_string(
            "reward", None, "Steer towards class:NUMBER_OR_NAME, or module:function of images that returns one number"
        )
        self.reward_scale = flags.DEFINE_float("reward_scale", 1.0, "Factor of --reward", 0.0)
        self.measurement = flags.DEFINE_string(
            "measurement", None, "Picture that samples should agree with where --mask is black, or when made smaller"
        )
        self.mask = flags.DEFINE_string("mask", None, "Picture: white where pixels are to be filled in, black if given")
        self.downsample = flags.DEFINE_integer(
            "downsample", None, "Without --mask: pixels of a mean in --measurement, in one direction [by its size]"
        )
        self.measurement_std = flags.DEFINE_float(
            "measurement_std", 0.05, "Standard deviation of the noise in --measurement, of a range of 2", 0.0
        )
        self.particles = flags.DEFINE_integer("particles", 4, "Steered particles per sample, of which one is kept", 1)
        self.invert = flags.DEFINE_string("invert", None, "Picture of class --label to carry to noise and back")
        self.edit_label = flags.DEFINE_string("edit_label", None, "Class to rebuild --invert as, by number or name")
        self.reads = (self.measurement, self.mask, self.invert)

    @property
    def steers(self) -> bool:
        """True if a reward or a measurement is given."""
        return bool(self.reward.value or self.measurement.value)

    def check(self) -> None:
        """Refuse flags that have no effect or exclude each other, and choose the sampler that they need."""
        for chosen, needed in (
            (self.reward_scale, self.reward),
            (self.mask, self.measurement),
            (self.downsample, self.measurement),
            (self.measurement_std, self.measurement),
            (self.edit_label, self.invert),
        ):
            if chosen.present and not needed.value:
                raise UserError(f"needs --{needed.name}: add it, or leave this out", chosen.name, chosen.value)
        given = [flag.name for flag in (self.reward, self.measurement, self.invert) if flag.value]
        if len(given) > 1:
            raise UserError(f"use one of --{' and --'.join(given)}")
        if self.particles.present and not self.steers:
            raise UserError("needs --reward or --measurement: add one, or leave this out", "particles")
        sampler = flags.FLAGS[self.sampling.sampler.name]
        if self.steers and not sampler.present:
            sampler.parse("stochastic")
        if self.invert.value:
            named = {name: getattr(self.sampling, name) for name in ("num", "seed", "gamma", "guidance", "batch")}
            if idle := [name for name, flag in named.items() if flag.present]:
                raise UserError("has no effect on --invert: leave it out", idle[0], named[idle[0]].value)

    def chosen_reward(self, fm: "FlowMap") -> "Reward | None":
        """Return the reward that the flags ask for, tried on one sample, or None."""
        from flowmaps.generate import check_steering, generate
        from flowmaps.rewards import measured, named_reward
        from samplers.steer import Reward

        if not self.steers:
            return None
        check_steering(self.sampling.sampler.value[0], self.sampling.gamma.value, self.particles.value)
        reward: Reward
        if self.reward.value:
            reward = named_reward(fm, self.reward.value, self.reward_scale.value)
        else:
            picture, mask = self.measurement.value, self.mask.value
            factor, std = self.downsample.value, self.measurement_std.value
            reward = measured(fm.info, picture, mask, factor, std, next(fm.parameters()).device)
        tried = generate(
            fm, [0.0, 0.5, 1.0], 1, 0, sampler="stochastic", label=self.sampling.label.value, reward=reward, particles=1
        )
        next(tried)  # so that a reward that fails is refused before anything is written
        return reward

    def picture(self, fm: "FlowMap") -> "tuple[Tensor, Tensor | None, Tensor | None] | None":
        """Return the picture of ``--invert`` [1, C, H, W] with its label and the other one [1], or None."""
        from flowmaps.editing import inverting_sampler
        from flowmaps.labels import labels_for
        from flowmaps.rewards import check_size, pictures

        if not self.invert.value:
            return None
        x = pictures(fm.info, self.invert.value, "invert")
        check_size(x.shape[2:], fm.info.shape[1:], "invert")
        needed = inverting_sampler(fm.info)
        if self.sampling.sampler.value != [needed]:
            raise UserError(f"--invert needs {needed}: choose that", "sampler", ",".join(self.sampling.sampler.value))
        if fm.info.num_classes and self.sampling.label.value is None:
            raise UserError("missing: give the class of --invert", "label")
        label = labels_for(fm.info, 1, self.sampling.label.value)
        other = self.edit_label.value
        return x, label, None if other is None else labels_for(fm.info, 1, other, field="edit_label")

    def facts(self, guided: dict[str, Any]) -> dict[str, Any]:
        """Return what the flags ask for, and label and guidance among ``guided``, as a record has it."""
        used: list[flags.FlagHolder[Any]] = [self.invert, self.edit_label]
        if self.reward.value:
            used = [self.reward, self.reward_scale]
        elif self.measurement.value:
            used = [self.measurement, self.mask, self.downsample, self.measurement_std]
        found = {flag.name: flag.value for flag in used} | {name: guided[name] for name in guided if name != "gamma"}
        return {name: value for name, value in found.items() if value is not None}
