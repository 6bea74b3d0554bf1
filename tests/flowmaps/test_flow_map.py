from dataclasses import dataclass, field

import pytest
import torch
from helpers import CASES, gaussian_data, gaussian_map

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import check_sampling
from flowmaps.networks import MLP
from flowmaps.rng import generator
from samplers import SAMPLERS, Schedule, euler, rollout, uniform_times


@pytest.mark.parametrize("case", CASES)
def test_gaussian_map_is_a_flow_map(case):
    """The fixture itself: identity on the diagonal, semigroup, and it carries noise to data."""
    fm = gaussian_map(*case)
    x1, label = gaussian_data(fm, 200)
    s, u, t = torch.rand(3, 200, dtype=torch.float64).sort(dim=0).values
    torch.testing.assert_close(fm(x1, s, s, label), x1)
    torch.testing.assert_close(fm(fm(x1, s, u, label), u, t, label), fm(x1, s, t, label))
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    noise = fm.base_std * torch.randn_like(x1)
    mean = fm.network.mean_of(label)
    torch.testing.assert_close(fm(noise, zero, one, label), mean + fm.network.std / fm.base_std * noise)


@pytest.mark.parametrize("case", CASES)
def test_drift_generates_the_map(case):
    """Fine Euler steps of v_{t,t}, extrapolated to step size 0, end where the map ends."""
    fm = gaussian_map(*case)
    x, label = gaussian_data(fm, 20)
    coarse, fine = (euler(fm.drift, x, uniform_times(n), label) for n in (1000, 2000))
    torch.testing.assert_close(2 * fine - coarse, rollout(fm, x, uniform_times(1), label), rtol=1e-4, atol=1e-4)


def test_noise_of_a_sample_depends_on_seed_and_index_alone():
    fm = FlowMap(torch.nn.Linear(1, 1), base_std=0.5, info=FlowMapInfo(shape=(2, 4, 4)))
    whole = fm.noise(7, seed=3)
    torch.testing.assert_close(torch.cat([fm.noise(3, seed=3), fm.noise(4, seed=3, start=3)]), whole, rtol=0, atol=0)
    assert not torch.equal(whole, fm.noise(7, seed=4))
    many = fm.noise(2000, seed=0)
    assert len(many.flatten(1).unique(dim=0)) == 2000
    assert abs(many.std().item() - 0.5) < 0.005


def test_generators_differ_in_every_part_of_their_key():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    draws = [torch.rand(1, generator=generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    seeds = {generator(0, "noise", i).initial_seed() % 2**32 for i in range(20_000)}
    assert len(seeds) == 20_000  # torch's CPU engine keeps 32 bits


def test_a_drift_refuses_to_jump():
    fm = gaussian_map()
    drift = FlowMap(fm.network, info=FlowMapInfo(shape=(3,), kind="drift"))
    x = drift.noise(2, 0)
    assert euler(drift.drift, x, uniform_times(2)).shape == x.shape
    with pytest.raises(UserError, match="euler"):
        rollout(drift, x, uniform_times(1))


@pytest.mark.parametrize("wrong", [{"interpolant": "cubic"}, {"base_std": 0.0}])
def test_bad_arguments_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        FlowMap(torch.nn.Linear(1, 1), **wrong)


def test_info_round_trip_and_unknown_field():
    info = FlowMapInfo(
        shape=(1, 8, 8), num_classes=10, schedules={"map": Schedule({2: (0.0, 0.4, 1.0)})}, images_seen=7
    )
    assert FlowMapInfo.from_dict(info.to_dict()) == info
    with pytest.raises(UserError, match="newer"):
        FlowMapInfo.from_dict({"colour": "red"})


def test_optional_facts_of_a_newer_version_are_ignored_by_name_and_others_refused():
    @dataclass(frozen=True)
    class Newer(FlowMapInfo):
        note: str = field(default="", metadata={"optional": True})
        warp: float = 0.0  # changes the function

    with pytest.raises(UserError, match="warp"):
        FlowMapInfo.from_dict(Newer(note="hello", warp=2.0).to_dict())
    values = Newer(shape=(2,), note="hello").to_dict()
    assert values["optional"] == ["note"] and Newer.from_dict(values).note == "hello"
    del values["warp"]
    with pytest.warns(UserWarning, match="note"):
        assert FlowMapInfo.from_dict(values) == FlowMapInfo(shape=(2,))
    assert "optional" not in FlowMapInfo().to_dict()


FACTS = [
    ({"shape": [1, 0, 8]}, "shape"),
    ({"shape": [1, 8.0, 8]}, r"shape\[1\]"),
    ({"shape": [1, 10**6, 10**6]}, "shape"),
    ({"shape": 3}, "shape"),
    ({"num_classes": 10**12}, "num_classes"),
    ({"num_classes": True}, "num_classes"),
    ({"num_classes": "ten"}, "num_classes"),
    ({"kind": 1}, "kind"),
    ({"kind": "jump"}, "kind"),
    ({"data": None}, "data"),
    ({"ema": "0.9"}, "ema"),
    ({"ema": float("nan")}, "ema"),
    ({"images_seen": -1}, "images_seen"),
    ({"guidance": [2]}, "guidance"),
    ({"guidance_max": 0.5}, "guidance_max"),
    ({"schedules": 3}, "schedules"),
    ({"schedules": {"eular": {"grids": {"1": [0, 1]}}}}, "schedules"),
    ({"schedules": {"map": {"grids": {"1": [0, 1]}, "sampler": "euler"}}}, "schedules"),
    ({"schedules": {"map": {"grids": {"1": [0, 2]}}}}, "schedules: map"),
    ({"t_range": [0.5]}, "t_range"),
    ({"t_range": [0.9, 0.1]}, "t_range"),
    ({"t_range": [0.0, float("nan")]}, "t_range"),
    ({"label_dropout": 2.0}, "label_dropout"),
    ({"vae": 3}, "vae"),
    ({"vae_range": [0, 1, 2]}, "vae_range"),
    ({"vae_range": [1, 0]}, "vae_range"),
    ({"shape": [1, 8, 8], "latent_shift": [0], "latent_scale": [float("inf")]}, "latent_scale"),
    ({"shape": [1, 8, 8], "latent_shift": ["a"], "latent_scale": [1]}, "latent_shift"),
    ({"origin": {"format": 3}}, "origin: format"),
    ({"optional": "note"}, "optional"),
    ([], "flow map facts"),
    (None, "flow map facts"),
]


@pytest.mark.parametrize(("values", "reason"), FACTS)
def test_facts_that_are_wrong_are_refused_by_name_in_one_line(values, reason):
    with pytest.raises(UserError, match=reason) as error:
        FlowMapInfo.from_dict(values)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_guidance_weight_must_be_finite():
    info = FlowMapInfo(shape=(3,), label_dropout=0.1)
    info.check_guidance(2.0, "euler")
    for weight in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"guidance=(nan|inf): must be finite"):
            info.check_guidance(weight, "euler")


@pytest.mark.parametrize("kind", ["map", "drift", "consistency"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_refused_by_the_facts_in_the_table(kind, sampler):
    info = FlowMapInfo(shape=(3,), kind=kind)
    drift = SAMPLERS[sampler].of == "drift"
    allowed = {"map": True, "drift": drift, "consistency": SAMPLERS[sampler].renoises}[kind]
    if allowed:
        info.check_sampler(sampler, steps=2)
    else:
        with pytest.raises(UserError, match=f"sampler={sampler}: this model is a {kind}"):
            info.check_sampler(sampler, steps=2)


def test_unknown_samplers_and_those_of_the_linear_path_are_refused():
    with pytest.raises(UserError, match="sampler=rk4: choose from map"):
        FlowMapInfo().check_sampler("rk4")
    check_sampling(gaussian_map("linear"), "dpm_solver")
    with pytest.raises(UserError, match="sampler=dpm_solver: is for the linear path only"):
        check_sampling(gaussian_map("trigonometric"), "dpm_solver")


@pytest.mark.parametrize("part", ["network", "layer", "in place"])
def test_the_fingerprint_of_a_compiled_network_is_that_of_the_network(tmp_path, part):
    """Wrapping renames the weights; nothing is compiled before the first call."""
    fm = FlowMap(MLP(width=8, depth=2), info=FlowMapInfo(shape=(2,)))
    before = fm.fingerprint()
    if part == "network":
        fm.network = torch.compile(fm.network)
    elif part == "layer":
        name, layer = next(iter(fm.network.named_children()))
        setattr(fm.network, name, torch.compile(layer))
    else:
        fm.network.compile()
    assert fm.fingerprint() == before
    if part == "layer":
        with pytest.raises(UserError, match="compile"):
            fm.save_pretrained(tmp_path / "model")
    else:
        fm.save_pretrained(tmp_path / "model")
        assert FlowMap.from_pretrained(tmp_path / "model").fingerprint() == before
