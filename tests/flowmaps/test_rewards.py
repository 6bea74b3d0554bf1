"""Rewards and measurements from pictures, classes and functions, and samples steered by them."""

from dataclasses import replace

import pytest
import torch
from helpers import gaussian_map
from helpers.makers import write_vae
from helpers.pictures import bright, counted, digit, fails, not_a_number, save, wrong_shape
from PIL import Image

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import generate, nfe, spread
from flowmaps.images import from_uint8, to_pil
from flowmaps.rewards import as_reward, class_reward, measured, named_reward, pictures
from samplers import SAMPLERS, Score, uniform_times


@pytest.fixture(scope="module")
def fm():
    return FlowMap.from_pretrained("assets/digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pictures"))


def steered(fm, reward, n=8, steps=4, **options):
    made = list(generate(fm, uniform_times(steps), n, 0, sampler="stochastic", reward=reward, **options))
    return torch.cat([x for x, _ in made]), torch.cat([y for _, y in made])


@pytest.mark.parametrize("kind", ["file", "pil", "tensor", "batch", "list", "equal channels"])
def test_pictures_of_all_kinds_are_the_same_numbers(fm, folder, kind):
    image = digit(3)
    unit = image.float() / 255
    given = {
        "file": str(folder / "digit.png"),
        "pil": to_pil(image),
        "tensor": unit,
        "batch": unit[None],
        "list": [to_pil(image)],
        "equal channels": Image.merge("RGB", [to_pil(image)] * 3),
    }[kind]
    torch.testing.assert_close(pictures(fm.info, given, "x"), from_uint8(image)[None])


def test_a_mask_leaves_the_black_part_and_means_are_those_of_the_picture(fm, folder):
    x = pictures(fm.info, digit(3).float() / 255, "x")
    half = measured(fm.info, folder / "digit.png", folder / "mask.png")
    assert half.observed.item() == 32 and half.error(x).item() == 0
    changed = x.clone()
    changed[..., 4:] = 0.3
    assert half.error(changed).item() == 0
    changed[..., 0, 0] += 1
    assert half.error(changed).item() == pytest.approx(32**-0.5)
    for given in ({"image": folder / "digit.png", "factor": 2}, {"image": folder / "small.png"}):
        means = measured(fm.info, **given)
        assert means.observed.item() == 16 and means.gain == 0.25
        assert means.error(x).item() < 0.003  # rounded to uint8


MISTAKES = {
    "mask of another size": ({"mask": "wide.png"}, r"mask: is 8 x 9 pixels, and has to be 8 x 8"),
    "picture of another size": ({"image": "wide.png", "mask": "mask.png"}, r"measurement: is 8 x 9 pixels"),
    "all white": ({"mask": "white.png"}, "mask: is all white"),
    "all black": ({"mask": "black.png"}, "mask: is all black"),
    "no mask": ({}, "measurement: give a mask, or a smaller picture"),
    "colour": ({"image": "colour.png", "mask": "mask.png"}, "has 3 channels, not 1"),
    "damaged": ({"image": "broken.png", "mask": "mask.png"}, "not an intact picture"),
    "missing": ({"image": "none.png", "mask": "mask.png"}, "cannot be read"),
    "mask and factor": ({"mask": "mask.png", "factor": 2}, "downsample=2"),
    "odd factor": ({"factor": 3}, "downsample=3: must be at least 2 and divide 8 x 8"),
    "factor of 1": ({"factor": 1}, "downsample=1"),
    "small of another size": ({"image": "small.png", "factor": 4}, "measurement: is 4 x 4 pixels, and has to be 2 x 2"),
    "no noise": ({"mask": "mask.png", "std": 0.0}, "measurement_std=0.0"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_measurements_that_do_not_fit(fm, folder, change, message):
    options = {"image": "digit.png"} | change
    options = {k: folder / v if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        measured(fm.info, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(8, 8), "tensor must be"),
        (torch.full((1, 8, 8), 2.0), "0 .. 1"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "0 .. 1"),
        (7, "PIL image"),
        ([], "at least one"),
        ([torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)], "one size"),
    ],
)
def test_what_is_not_a_picture_is_refused(fm, given, message):
    with pytest.raises(UserError, match=message):
        pictures(fm.info, given, "x")


LATENTS = FlowMapInfo(shape=(4, 8, 8), latent_scale=(1.0,) * 4, latent_shift=(0.0,) * 4)


@pytest.mark.parametrize("info", [FlowMapInfo(shape=(2,)), LATENTS])
def test_points_and_latents_have_no_pixels(info):
    with pytest.raises(UserError, match="leave it out"):
        pictures(info, torch.zeros(1, 8, 8), "measurement")


def test_steered_samples_agree_with_the_measurement(fm, folder):
    """Rms over the seen pixels: near the noise of 0.05, unsteered 0.5."""
    half, means = measured(fm.info, folder / "digit.png", folder / "mask.png"), measured(fm.info, folder / "small.png")
    for reward in (half, means):
        x, label = steered(fm, reward, steps=8, particles=4, label=3)
        assert reward.error(x).square().mean().sqrt() < 0.07 and (label == 3).all()
        plain = torch.cat([x for x, _ in generate(fm, uniform_times(8), 8, 0, sampler="stochastic", label=3)])
        assert reward.error(plain).square().mean().sqrt() > 0.3


@pytest.mark.slow
def test_a_garment_half_seen():
    fm = FlowMap.from_pretrained("assets/fashion_mnist")
    x = next(generate(fm, uniform_times(4), 16, 0))[0]
    mask = torch.zeros(1, 32, 32)
    mask[..., 16:] = 1
    reward = measured(fm.info, (x[:1] / 2 + 0.5).clamp(0, 1), mask)
    made, _ = steered(fm, reward, 16, 8, particles=1, label=0)
    assert reward.error(made).square().mean().sqrt() < 0.07


def test_weights_choose_the_class_that_fits(fm, folder):
    """Without a label the particles of a sample have classes in turn; ten particles have all of them."""
    _, label = steered(fm, measured(fm.info, folder / "digit.png", folder / "mask.png"), 6, particles=10)
    assert (label == 3).sum() >= 4
    _, label = steered(fm, named_reward(fm, "class:7", 10.0), 6, particles=10)
    assert (label == 7).all()


def test_a_reward_of_zero_and_one_particle_is_the_stochastic_sampler(fm):
    zero = Score(lambda x: 0 * x.sum(dim=(1, 2, 3)))
    x, label = steered(fm, zero, particles=1)
    plain, same = next(generate(fm, uniform_times(4), 8, 0, sampler="stochastic"))
    assert torch.equal(x, plain) and torch.equal(label, same)


def test_samples_do_not_depend_on_the_batch(fm):
    reward = as_reward(fm, bright, 40.0)
    whole, label = steered(fm, reward, 6)
    parts, same = steered(fm, reward, 6, batch=10)  # two samples of four particles at a time
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=0)
    assert torch.equal(label, same)
    last = next(generate(fm, uniform_times(4), 2, 0, sampler="stochastic", reward=reward, first=4))[0]
    torch.testing.assert_close(last, whole[4:], atol=1e-3, rtol=0)


def test_evaluations_are_steps_times_particles(fm):
    calls, seen = [], []
    hook = fm.network.register_forward_hook(lambda *a: calls.append(len(a[2])))
    steered(fm, as_reward(fm, bright), 3, 5, particles=2, watch=lambda k, t, state: seen.append((k, len(state.x))))
    hook.remove()
    scale = calls.pop(0)
    assert scale == 64 and calls == [6] * 5 and nfe(fm.info, "stochastic", 5, particles=2) == 10
    assert seen == [(k, 6) for k in range(6)]


def test_a_function_is_guided_and_a_black_box_weighed(fm):
    plain, _ = steered(fm, as_reward(fm, bright, 0.0), particles=1)
    guided, _ = steered(fm, as_reward(fm, bright, 100.0))
    weighed, _ = steered(fm, Score(counted, 1.0, ascents=0), particles=16)
    assert bright(guided).mean() > bright(plain).mean() + 0.15
    assert counted(weighed).mean() > counted(plain).mean() + 3


FAILING = {
    "no gradient": (counted, "no gradient"),
    "shape": (wrong_shape, r"one number for each sample, \[32\], got \[32, 1\]"),
    "raises": (fails, "failed on samples .*KeyError"),
    "NaN": (not_a_number, "NaN or infinity"),
    "not a tensor": (lambda x: 1.0, "got float"),
}


@pytest.mark.parametrize(("function", "message"), FAILING.values(), ids=FAILING)
def test_rewards_that_fail(fm, function, message):
    with pytest.raises(UserError, match=rf"^reward.*{message}"):
        steered(fm, as_reward(fm, function))


NAMES = {
    "nowhere:f": "cannot be imported",
    "helpers.pictures:none": "cannot be imported",
    "helpers.pictures:constant": "function of images",
    "class:10": r"0 .. 9",
    "class:cat": "not the name of a class",
    "bright": "class:NUMBER_OR_NAME or module:function",
    "class:": "class:NUMBER_OR_NAME",
}


@pytest.mark.parametrize(("name", "message"), NAMES.items())
def test_names_that_mean_no_reward(fm, name, message):
    with pytest.raises(UserError, match=rf"^reward.*{message}"):
        named_reward(fm, name)


def test_named_rewards(fm):
    assert named_reward(fm, "helpers.pictures:bright", 2.0)(torch.full((1, 1, 8, 8), 0.5)).item() == 1.0
    assert named_reward(fm, "helpers.pictures:weighed", 2.0).scale == pytest.approx(0.2)
    with pytest.raises(UserError, match="reward_scale"):
        as_reward(fm, measured(fm.info, torch.zeros(1, 4, 4)), 2.0)
    with pytest.raises(UserError, match="reward_scale=-1"):
        as_reward(fm, bright, -1.0)


def test_a_classifier_of_other_data_is_refused(fm):
    other = FlowMap(fm.network, base_std=fm.base_std, info=replace(fm.info, data="mine"))
    with pytest.raises(UserError, match=r"classifier for models of digits, fashion_mnist.*mine"):
        class_reward(other, 3)
    wide = FlowMap(fm.network, base_std=fm.base_std, info=replace(fm.info, data="fashion_mnist"))
    with pytest.raises(UserError, match="32 x 32"):
        class_reward(wide, 3)


WRONG = {
    "sampler": ({"sampler": "map"}, "sampler=map: a reward steers"),
    "gamma": ({"gamma": 0.5}, "gamma=0.5"),
    "particles": ({"particles": 0}, "particles=0"),
    "half a particle": ({"particles": 1.5}, "particles=1.5"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_steering_options_that_do_not_fit(fm, change, message):
    options = {"sampler": "stochastic", "reward": as_reward(fm, bright)} | change
    with pytest.raises(UserError, match=message):
        next(generate(fm, [0.0, 0.5, 1.0], 2, 0, **options))


def test_labels_of_particles_follow_the_policy(fm):
    """Given classes are those of all particles of a sample; else particles have classes in turn, or drawn ones."""
    given = torch.tensor([5, 1, 8])
    zero = as_reward(fm, bright, 0.0)
    _, label = steered(fm, zero, 3, label_policy=given, particles=4)
    assert label.tolist() == [5, 1, 8]
    drawn, whole = (steered(fm, zero, n, label_policy="random", particles=4)[1] for n in (3, 6))
    assert torch.equal(drawn, whole[:3])


def test_a_drift_has_no_map_to_steer(fm):
    drift = FlowMap(fm.network, base_std=fm.base_std, info=replace(fm.info, kind="drift"))
    with pytest.raises(UserError, match="is a drift"):
        next(generate(drift, [0.0, 1.0], 2, 0, sampler="stochastic", reward=as_reward(fm, bright)))


def test_points_are_steered_towards_a_function():
    fm = gaussian_map()
    reward = as_reward(fm, lambda x: 2 * x[:, 1])
    x, _ = next(generate(fm, uniform_times(4), 400, 0, sampler="stochastic", reward=reward))
    assert x[:, 1].mean().item() == pytest.approx(-0.5 + 2, abs=0.2)  # N(-0.5, 1) tilted by exp(2 x)


def test_the_spread_of_the_data(fm):
    assert spread(fm) == pytest.approx(0.52, abs=0.03)
    assert spread(gaussian_map()) == pytest.approx(((0.16 + 1 + 4) / 3) ** 0.5, rel=0.1)


def test_rewards_of_latents_see_decoded_images_and_have_gradients(tmp_path):
    """A map of latents with a small VAE: the gradient of the brightness of the image reaches the latent."""
    from helpers.small_networks import small

    vae = write_vae(tmp_path / "vae")
    made = small("UNet", std=0.1, channels=4).eval()
    info = replace(made.info, latent_scale=(0.2,) * 4, latent_shift=(0.0,) * 4, vae=str(vae))
    fm = FlowMap(made.network, base_std=0.5, info=info).eval()
    reward = as_reward(fm, bright)
    x = torch.randn(2, *info.shape)
    value, slope = reward._gradient(x)
    assert value.shape == (2,) and slope.abs().max() > 0
    assert not fm.decode(x).requires_grad


def test_only_one_sampler_can_be_steered():
    assert [name for name, row in SAMPLERS.items() if row.renoises] == ["stochastic"]
