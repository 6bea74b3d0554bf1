"""Guidance that is baked in: its target, its labels, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers import gaussian_data, gaussian_map, generator
from helpers.objectives import LIVE
from helpers.small_networks import small

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import generate, nfe
from flowmaps.networks import UNet
from flowmaps.networks.conditioning import soft_label, with_guidance, without_label
from flowmaps.objectives import OBJECTIVES
from flowmaps.pipeline import FlowMapPipeline
from samplers import SAMPLERS, uniform_times


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", [name for name in LIVE if name != "consistency"])
def test_guidance_moves_the_target_to_the_guided_drift(name, drawn):
    """Class 1 stands for "no label": with dI_s/ds replaced by its mean given I_s and the label, the network's own drift
    is right where it equals w b(x; label) + (1 - w) b(x; no label), and not where it is b(x; label)."""
    options = {"guidance_max" if drawn else "guidance": 3.0, "guidance_mix": 0.0}
    objective, exact = OBJECTIVES[name](**options), gaussian_map("linear", 0.5, classes=True)
    exact.info = FlowMapInfo(shape=(3,), num_classes=1)
    x1, _ = gaussian_data(exact, 64)
    label = (torch.arange(64) % 4 == 3).long()
    draws = objective.draw(exact, x1, generator())
    w = draws.guidance
    assert bool((w == 3).all()) != drawn and bool(((w >= 1) & (w <= 3)).all())
    x_s = exact.interpolant.point(draws.x0, x1, draws.s)
    none = torch.ones_like(label)
    b, u = exact.drift(x_s, draws.s, label), exact.drift(x_s, draws.s, none)
    w = torch.where(label == 1, 1.0, w)
    target, seen = objective.guided_target(exact, x_s, draws.s, label, b, draws.guidance, exact.drift)
    torch.testing.assert_close(target, w[:, None] * b + (1 - w[:, None]) * u)
    assert torch.equal(seen, with_guidance(label, w, 1) if drawn else label)
    with pytest.raises(UserError, match="labels"):
        objective(exact, x1, None, generator=generator())


@pytest.mark.parametrize("options", [{"guidance": 3.0}, {"guidance_max": 3.0}])
def test_guidance_may_be_limited_to_some_times(options):
    objective = OBJECTIVES["mean_flow"](**options, guidance_times=(0.3, 0.6), diagonal=0.5)
    exact = gaussian_map("linear", 0.5, classes=True)
    draws = objective.draw(exact, gaussian_data(exact, 4000)[0], generator())
    inside = (draws.s >= 0.3) & (draws.s <= 0.6)
    assert 0.3 < inside.double().mean() < 0.7 and bool((draws.guidance[~inside] == 1).all())
    free = OBJECTIVES["mean_flow"](**options, diagonal=0.5).draw(exact, gaussian_data(exact, 4000)[0], generator())
    assert torch.equal(draws.guidance[inside], free.guidance[inside]) and bool((free.guidance[~inside] > 1).all())


def test_guidance_keeps_augmentation_and_refuses_nonsense():
    rows = soft_label(torch.tensor([0, 2]), torch.tensor([[0.5], [0.7]]), 2)
    unlabelled, has = without_label(rows, 2)
    torch.testing.assert_close(unlabelled, torch.tensor([[0, 0, 1, 0.5], [0, 0, 1, 0.7]]))
    assert has.tolist() == [True, False]
    assert with_guidance(rows, torch.tensor([2.0, 1.0]), 2)[:, 4].tolist() == [2, 1]
    for options in (
        {"guidance": 0.5},
        {"guidance": 2.0, "guidance_max": 2.0},
        {"guidance_times": (0.2, 0.7)},
        {"guidance": 2.0, "guidance_times": (0.7, 0.2)},
    ):
        with pytest.raises(UserError, match="guidance"):
            OBJECTIVES["lagrangian"](**options)


def test_network_takes_a_guidance_weight_and_one_is_neutral():
    torch.manual_seed(0)
    network = UNet(8, 1, 16, (1,), 1, (), num_classes=3, augment_dim=2, guidance=True)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    plain, rows = network(x, t, t, label), soft_label(label, torch.zeros(4, 2), 3)
    torch.testing.assert_close(network(x, t, t, with_guidance(rows, torch.ones(4), 3)), plain)
    assert (network(x, t, t, with_guidance(rows, torch.full((4,), 2.0), 3)) - plain).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="guidance=True"):
        network(x, t, t, label[:, None].float())
    with pytest.raises(ValueError, match="num_classes is 0"):
        UNet(8, 1, 16, (1,), 1, (), guidance=True)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("objective.guidance", 2.0, "label_dropout"),
        ("objective.guidance_max", 2.0, "network.guidance=True"),
        ("network.guidance", True, "network.guidance=False"),
    ],
)
def test_guidance_that_cannot_be_learned_is_refused(field, value, named):
    from configs.digits import get_config as digits

    config = digits("lagrangian,smoke")
    config.data.label_dropout = 0.0 if named == "label_dropout" else 0.1
    section, _, name = field.partition(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=named):
        config.validate()


@pytest.mark.parametrize("augment_dim", [0, 2])
def test_generate_and_pipeline_pass_the_weight_on(augment_dim):
    """A weight changes the samples, 1 is what no weight means, and the pipeline does the same; augmentation or not."""
    torch.manual_seed(0)
    network = UNet(8, 1, 16, (1,), 1, (), num_classes=3, augment_dim=augment_dim, guidance=True)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    fm = FlowMap(network.eval(), info=FlowMapInfo(shape=(1, 8, 8), num_classes=3, guidance_max=4.0, label_dropout=0.1))

    def made(weight):
        return torch.cat([x for x, _ in generate(fm, uniform_times(2), 4, 0, guidance=weight)])

    torch.testing.assert_close(made(1.0), made(None))
    assert not torch.allclose(made(3.0), made(None), atol=1e-3)
    pipeline = FlowMapPipeline.from_flow_map(fm)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(num_inference_steps=2, guidance_scale=3.0, latents=fm.noise(4, 0), output_type="latent").images
    torch.testing.assert_close(found, made(3.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="from 1 to 4"):
        pipeline(guidance_scale=5.0)


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if row.of == "drift"])
def test_a_solver_guides_any_model_that_knows_no_label(sampler):
    """Classifier-free guidance equals the solver on w b(label) + (1 - w) b(no label), at twice the evaluations."""
    fm = small("UNet", guidance=False)
    fm.info = replace(fm.eval().info, kind="drift", label_dropout=0.1)
    classes, times = fm.info.num_classes, uniform_times(3)

    def drift(x, t, label):
        return 2.5 * fm.drift(x, t, label) - 1.5 * fm.drift(x, t, torch.full_like(label, classes))

    found, label = next(generate(fm, times, 4, 0, sampler=sampler, guidance=2.5))
    with torch.no_grad():
        torch.testing.assert_close(found, SAMPLERS[sampler].run(drift, fm.noise(4, 0), times, label))
    assert nfe(fm.info, sampler, 3, 2.5) == 2 * nfe(fm.info, sampler, 3)
    fm.info = replace(fm.info, label_dropout=0.0)
    with pytest.raises(UserError, match="or without labels"):
        next(generate(fm, times, 4, 0, sampler=sampler, guidance=2.5))


def test_the_pipeline_guides_a_drift_as_generate_does():
    fm = small("UNet", guidance=False)
    fm.info = replace(fm.eval().info, kind="drift", label_dropout=0.1)
    pipeline = FlowMapPipeline.from_flow_map(fm)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "latents": fm.noise(4, 0), "output_type": "latent"}
    for weight in (None, 1.0, 2.5):
        native, _ = next(generate(fm, uniform_times(3), 4, 0, sampler="euler", guidance=weight))
        torch.testing.assert_close(pipeline(**options, guidance_scale=weight).images, native, rtol=0, atol=1e-6)
    assert not torch.allclose(native, pipeline(**options).images, atol=1e-3)
    fm.info = replace(fm.info, label_dropout=0.0)
    with pytest.raises(UserError, match="guidance=2: this model was not trained"):
        FlowMapPipeline.from_flow_map(fm)(**options, guidance_scale=2.0)
