"""The pipeline steers, inverts and edits: the same numbers as without it, and one-line refusals."""

import pytest
import torch
from helpers import generator
from helpers.pictures import bright, digit, not_a_number, save

from flowmaps import UserError
from flowmaps.images import from_uint8, to_pil
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.rewards import class_reward, measured
from samplers import invert, rollout, uniform_times


@pytest.fixture(scope="module")
def pipe():
    pipe = FlowMapPipeline.from_pretrained("assets/digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    return mask


def test_inpainting_in_one_line(pipe, folder, mask):
    given = {"measurement": str(folder / "digit.png"), "mask": str(folder / "mask.png")}
    options = {"class_labels": 3, "num_inference_steps": 8, "output_type": "latent"}
    x = pipe(4, **given, **options, generator=generator()).images
    assert (
        measured(pipe.flow_map.info, folder / "digit.png", folder / "mask.png").error(x).square().mean().sqrt() < 0.08
    )
    again = {"measurement": to_pil(digit(3)), "mask": mask}
    assert torch.equal(x, pipe(4, **again, **options, generator=generator()).images)


def test_a_small_picture_is_enlarged(pipe, folder):
    x = pipe(
        2, measurement=str(folder / "small.png"), class_labels=3, num_inference_steps=8, output_type="latent"
    ).images
    assert measured(pipe.flow_map.info, folder / "small.png").error(x).square().mean().sqrt() < 0.1


def test_a_measurement_for_each_sample(pipe, mask):
    pictures = [to_pil(digit(n)) for n in (3, 7, 0)]
    options = {"mask": mask, "class_labels": [3, 7, 0], "num_inference_steps": 8, "output_type": "latent"}
    x = pipe(measurement=pictures, particles=3, generator=generator(), **options).images
    truth = torch.stack([from_uint8(digit(n)) for n in (3, 7, 0)])
    assert (x - truth)[..., :4].square().mean(dim=(1, 2, 3)).sqrt().max() < 0.12


def test_a_sample_depends_on_its_own_generator_alone(pipe):
    def made(*seeds):
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"class_labels": 3, "num_inference_steps": 4, "output_type": "latent", "reward_scale": 30.0}
        return pipe(len(seeds), reward=bright, generator=streams, **options).images

    torch.testing.assert_close(made(1, 2, 3)[1:2], made(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("reward", ["class:8", "helpers.pictures:bright", bright])
def test_rewards_by_name_and_function(pipe, reward):
    x = pipe(3, reward=reward, reward_scale=5.0, num_inference_steps=4, output_type="pt").images
    assert x.shape == (3, 1, 8, 8)


def test_without_labels_the_weights_choose_the_class(pipe):
    x = pipe(4, reward="class:7", reward_scale=10.0, particles=10, num_inference_steps=4, output_type="latent").images
    assert class_reward(pipe.flow_map, 7)(x).exp().min() > 0.5


def test_inversion_and_edits(pipe):
    x, label = torch.stack([from_uint8(digit(n)) for n in (3, 7)]), torch.tensor([3, 7])
    given = {"invert": [to_pil(digit(n)) for n in (3, 7)], "num_inference_steps": 4, "output_type": "latent"}
    fm, times = pipe.flow_map, pipe.flow_map.info.times("map", 4)
    found = invert(fm, x, uniform_times(4) if times is None else times, label)
    rebuilt = pipe(**given, class_labels=[3, 7]).images
    torch.testing.assert_close(rebuilt, found.rebuilt, atol=1e-4, rtol=0)
    with torch.no_grad():
        edited = rollout(fm, found.noise, uniform_times(4) if times is None else times, torch.tensor([8, 1]))
    made = pipe(**given, class_labels=[3, 7], edit_labels=["8", 1]).images
    torch.testing.assert_close(made, edited, atol=1e-3, rtol=0)


def test_callbacks_see_the_particles_and_may_interrupt(pipe):
    seen = []

    def stop(pipe, k, timestep, tensors):
        seen.append((k, float(timestep), tensors["latents"].shape))
        pipe._interrupt = k == 1

    options = {"reward": bright, "particles": 3, "num_inference_steps": 5, "output_type": "latent"}
    x = pipe(2, callback_on_step_end=stop, **options).images
    assert [k for k, _, _ in seen] == [0, 1] and seen[0][2] == (6, 1, 8, 8) and x.shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="must return nothing"):
        pipe(2, callback_on_step_end=lambda pipe, k, t, tensors: tensors, **options)


REFUSED = {
    "two": ({"reward": bright, "measurement": torch.zeros(1, 4, 4)}, "exclude each other"),
    "mask alone": ({"mask": torch.zeros(1, 8, 8)}, "mask: needs measurement"),
    "edit alone": ({"edit_labels": 3}, "edit_labels: needs invert"),
    "latents": ({"reward": bright, "latents": torch.zeros(2, 1, 8, 8)}, "latents: has no effect"),
    "particles": ({"reward": bright, "particles": 0}, "particles=0"),
    "counts": ({"invert": torch.zeros(2, 1, 8, 8), "num_images": 3, "class_labels": 3}, "make them agree"),
    "no label": ({"invert": torch.zeros(1, 8, 8)}, "class_labels: missing"),
    "size": ({"invert": torch.zeros(1, 8, 9), "class_labels": 1}, "invert: is 8 x 9 pixels"),
    "mask size": ({"measurement": torch.zeros(1, 8, 8), "mask": torch.zeros(1, 9, 9)}, "mask: is 9 x 9 pixels"),
    "reward": ({"reward": not_a_number, "num_inference_steps": 2}, "NaN or infinity"),
    "scale": ({"reward": bright, "reward_scale": float("nan")}, "reward_scale=nan"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe(**arguments)
