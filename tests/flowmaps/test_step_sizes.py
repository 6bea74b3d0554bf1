"""Schedules: fitted to a model, in files and checkpoints, in diffusers, and by the scripts that use them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from helpers import gaussian_map, run_script
from PIL import Image

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.export import store_schedule
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.step_sizes import COSTS, costs, fit
from samplers import Schedule, euler, heun, rollout, uniform_times

SKEWED = Schedule({1: (0, 1), 2: (0, 0.7, 1)}, sampler="euler", cost="end", noises=8, errors={1: 2.0, 2: 0.5})


def narrow():
    """The exact drift of data far narrower than the noise, where most of the path is bent at its end."""
    fm = gaussian_map()
    fm.network.std = fm.network.std * 0.05
    return fm


@pytest.mark.parametrize("cost", COSTS)
def test_fitted_grids_beat_equal_steps_on_other_noises(cost):
    fm = narrow()
    schedule = fit(fm, [2, 4], sampler="euler", cost=cost, noises=64).schedule
    x = fm.noise(200, seed=9)
    with torch.no_grad():
        end = heun(fm.drift, x, uniform_times(400))
        for steps in (2, 4):
            ours, equal = (
                (euler(fm.drift, x, times) - end).square().mean().sqrt()
                for times in (schedule[steps], uniform_times(steps))
            )
            assert ours < 0.75 * equal and schedule.errors[steps] < 0.75 * schedule.uniform_errors[steps]
    facts = (schedule.sampler, schedule.cost, schedule.noises, schedule.seed, schedule.fine)
    assert facts == ("euler", cost, 64, 1, 96) and schedule.checkpoint == fm.fingerprint()


def test_equal_steps_are_kept_where_they_are_better():
    """Both grids are compared on separate noise, and the better one is written."""
    fm = gaussian_map()
    for cost in COSTS:
        schedule = fit(fm, [2, 3, 8], sampler="euler", cost=cost, noises=16, fine=24).schedule
        for steps, times in schedule.items():
            if schedule.errors[steps] >= schedule.uniform_errors[steps]:
                assert torch.equal(times, uniform_times(steps))


@pytest.mark.parametrize("sampler", ["euler", "heun", "map"])
def test_batches_do_not_change_the_costs(sampler):
    fm = gaussian_map()
    fm.network.bent.data += 0.1  # a map that is not exact: its costs are not all zero
    plain = tuple(name for name in COSTS if not COSTS[name].propagate)
    a, b = (costs(fm, sampler, plain, noises=20, fine=8, batch=batch) for batch in (7, 20))
    for name in plain:
        torch.testing.assert_close(a[name], b[name])
        assert a[name][0, 8] > 1e-6


def test_the_exact_map_costs_nothing():
    fm = gaussian_map()
    squared = [name for name in COSTS if not COSTS[name].sqrt]
    coarse, fine = (costs(fm, "map", squared, noises=8, fine=steps) for steps in (16, 32))
    for name in squared:  # but the error of Heun's solution: of order 2, here squared
        assert coarse[name].max() < 1e-2 and fine[name].max() < coarse[name].max() / 12
        assert costs(fm, "euler", (name,), noises=8, fine=16)[name].max() > 0.1


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(UserError, match="steps=2,9: must be different, from 1 to the 8 steps of the fine grid"):
        fit(gaussian_map(), [2, 9], sampler="euler", fine=8)
    with pytest.raises(UserError, match="cost=least: choose one of"):
        fit(gaussian_map(), [2], cost="least")
    with pytest.raises(UserError, match="sampler=stochastic: step sizes are for"):
        fit(gaussian_map(), [2], sampler="stochastic")
    broken = gaussian_map()
    broken.network.wrong.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        fit(broken, [2], sampler="euler", fine=4, noises=4)


def test_a_schedule_is_a_mapping_and_survives_json():
    again = Schedule.from_json(SKEWED.to_json())
    assert again == SKEWED and hash(again) == hash(SKEWED) and dict(again).keys() == {1, 2} and 3 not in again
    assert again[2].dtype == torch.float64 and again[2].tolist() == [0, 0.7, 1]
    assert SKEWED.only(2).grids.keys() == {2} and SKEWED.only(2).errors == {2: 0.5}
    assert Schedule.uniform(4)[4].equal(uniform_times(4)) and again != Schedule.uniform(1, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grids": {"2": [0, 0.5, 0.9]}}, "from 0 to 1"),
        ({"grids": {"2": [0, 0.7, 0.6, 1]}}, "increase"),
        ({"grids": {"3": [0, 0.5, 1]}}, "must be 4"),
        ({"grids": {"2": [0, None, 1]}}, "list of numbers"),
        ({"grids": {"2": [0, float("nan"), 1]}}, "list of numbers"),
        ({"grids": {"2": [0, True, 1]}}, "list of numbers"),
        ({"grids": {"2": [0, 10**400, 1]}}, "list of numbers"),
        ({"grids": {"2": "abc"}}, "list of numbers"),
        ({"grids": {"two": [0, 0.5, 1]}}, "grids has 'two' for a number of steps"),
        ({"grids": {"-1": []}}, "grids has '-1' for a number of steps"),
        ({"grids": {"1e9": [0, 1]}}, "for a number of steps"),
        ({"grids": {str(10**12): [0, 1]}}, "for a number of steps from 1 to 100,000"),
        ({"grids": {"\u0662": [0, 0.5, 1]}}, "for a number of steps"),
        ({"grids": 3}, "wrong type"),
        ({"colour": "red"}, "no field colour"),
        ({"noises": "many"}, "noises is 'many', of the wrong type"),
        ({"noises": True}, "noises"),
        ({"noises": -1}, "noises"),
        ({"seed": 2**64}, "seed"),
        ({"sampler": ["euler"]}, "sampler"),
        ({"checkpoint": None}, "checkpoint"),
        ({"guidance": "much"}, "guidance is 'much', of the wrong type"),
        ({"guidance": float("inf")}, "guidance"),
        ({"errors": {"2": None}}, "errors"),
        ({"errors": {"2": float("nan")}}, "errors"),
        ({"errors": [1.0]}, "errors"),
        ({"uniform_errors": {"x": 1.0}}, "uniform_errors has 'x'"),
    ],
)
def test_schedules_that_are_damaged_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Schedule.from_json(json.dumps({**json.loads(SKEWED.to_json()), **change}))
    for text in ("[]", "{}", "null", "{", 100_000 * "["):
        with pytest.raises(ValueError):
            Schedule.from_json(text)


def test_the_mark_of_a_file_is_no_field_and_a_step_count_that_is_missing_is_refused():
    assert Schedule.from_dict({"written_by": "flowmaps", **json.loads(SKEWED.to_json())}) == SKEWED
    with pytest.raises(ValueError, match="1, 2 steps has no grid of 3"):
        SKEWED.only(2, 3)


def test_only_grids_that_are_known_to_beat_equal_steps_are_kept():
    known = replace(SKEWED, uniform_errors={1: 2.0, 2: 0.6})
    assert list(known.better()) == [2] and list(SKEWED.better()) == []
    schedule = fit(gaussian_map(), [2, 3, 8], sampler="euler", cost="local_root", noises=16, fine=24).schedule
    better = [n for n in schedule if schedule.errors[n] < schedule.uniform_errors[n]]
    assert list(schedule.better()) == better and all(not torch.equal(schedule[n], uniform_times(n)) for n in better)


def digits(folder):
    """Write the trained digits without their step sizes."""
    fm = FlowMap.from_pretrained("assets/digits")
    fm.info = replace(fm.info, schedules={})
    fm.save_pretrained(folder)
    return folder


def test_a_grid_is_stored_only_if_its_distance_is_smaller_too(tmp_path):
    model, file = digits(tmp_path / "model"), tmp_path / "schedule.json"
    store_schedule(model, replace(SKEWED, grids={7: uniform_times(7)}, errors={}))
    done = run_script(
        "scripts/schedule.py", f"--checkpoint={model}", "--steps=1,2,3,6", "--store", f"--out={file}", "--noises=8",
        "--fine=12", "--sampler=euler", "--reference=assets/references/digits.npz", "--num=300", check=True,
    )  # fmt: skip
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[:6]]
    assert header == ["steps", "error", "error of equal steps", "FD-digits", "FD-digits of equal steps", "grid"]
    expected = [int(n) for n, e, f, d, g, _ in rows if float(e) < float(f) and float(d or "inf") < float(g or 0)]
    stored = FlowMap.from_pretrained(model).info.schedules["euler"]  # in the place of the one with 7 steps
    assert list(stored) == expected and 1 not in expected  # there is one grid of one step
    written = Schedule.from_json(file.read_text())
    for n in (1, 2, 3, 6):
        assert torch.equal(written[n], stored[n] if n in stored else uniform_times(n))
    assert [row[-1] == "equal steps" for row in rows] == [n not in stored for n in (1, 2, 3, 6)]


@pytest.mark.parametrize("scheduler", [FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_sigmas_give_diffusers_the_same_samples(scheduler):
    """Noise at sigma = 1 and the final 0 implied: one list for both of its flow schedulers, u = -v."""
    fm, schedule = narrow(), fit(narrow(), [1, 3, 6], sampler="euler", noises=16).schedule
    for steps, times in schedule.items():
        made = scheduler()
        made.set_timesteps(sigmas=schedule.sigmas(steps))
        x = fm.noise(10, seed=4).float()
        expected = euler(fm.drift, x, times)
        for k, timestep in enumerate(made.timesteps):
            b = fm.drift(x, (1 - made.sigmas[k]).expand(10))
            x = made.step(-b.float(), timestep, x, return_dict=False)[0]
        torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_stored_schedule_is_used_by_the_pipeline_for_its_step_counts(start, tmp_path):
    fm = FlowMap.from_pretrained(start)
    fm.save_pretrained(tmp_path)
    store_schedule(tmp_path, SKEWED)
    fm, pipeline = FlowMap.from_pretrained(tmp_path), FlowMapPipeline.from_pretrained(tmp_path)
    assert fm.info.schedules == {"euler": SKEWED}
    x, label = fm.noise(4, 0), torch.arange(4)
    for steps, times in ((2, SKEWED[2]), (4, uniform_times(4))):
        made = pipeline(latents=x, num_inference_steps=steps, class_labels=label, output_type="latent").images
        with torch.no_grad():
            torch.testing.assert_close(made, euler(fm.drift, x, times, label), rtol=1e-5, atol=1e-6)
    other = replace(SKEWED, grids={2: (0, 0.2, 1)}, errors={})
    store_schedule(tmp_path, other)  # in the place of the first
    assert FlowMap.from_pretrained(tmp_path).info.schedules == {"euler": other}


def test_a_map_has_a_schedule_of_its_own():
    fm = gaussian_map()
    fm.info = replace(fm.info, schedules={"map": Schedule({2: (0, 0.3, 1)}, sampler="map")})
    assert fm.info.times("map", 2).tolist() == [0, 0.3, 1] and fm.info.times("euler", 2) is None
    x = fm.noise(3, 0)
    torch.testing.assert_close(rollout(fm, x, fm.info.times("map", 2)), rollout(fm, x, uniform_times(1)))


def samples(out, count):
    return np.load(out / f"samples-{count}.npz")["arr_0"]


def test_script_writes_stores_and_draws_and_samples_follow(tmp_path):
    model, file = digits(tmp_path / "model"), tmp_path / "schedule.json"
    done = run_script(
        "scripts/schedule.py", f"--checkpoint={model}", "--steps=2,3", f"--out={file}", "--store", "--noises=8",
        "--fine=12", "--sampler=euler", f"--plot={tmp_path / 'plot.png'}", check=True,
    )  # fmt: skip
    assert "error of equal steps" in done.stdout
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 500
    schedule, fm = Schedule.from_json(file.read_text()), FlowMap.from_pretrained(model)
    assert fm.info.schedules == {"euler": schedule.better()} and schedule.checkpoint == fm.fingerprint()
    assert 3 in schedule.better() and "stored for 3" in done.stdout
    file.write_text(replace(schedule, grids={3: (0, 0.2, 0.9, 1)}, errors={}, uniform_errors={}).to_json())
    usual = ["scripts/sample.py", f"--checkpoint={model}", "--sampler=euler", "--num=4"]
    for flag in ("stored", "uniform", file):
        run_script(*usual, "--steps=3", f"--schedule={flag}", f"--out={tmp_path / 'out'}", check=True)
        times = {"stored": schedule[3], "uniform": uniform_times(3)}.get(flag, torch.tensor([0, 0.2, 0.9, 1]))
        with torch.no_grad():
            expected = euler(fm.drift, fm.noise(4, 0), times, torch.arange(4))
        made = torch.from_numpy(samples(tmp_path / "out", 3)).movedim(-1, 1).float()
        assert (made - (expected * 127.5 + 127.5).clamp(0, 255)).abs().max() <= 1

    missing = run_script(*usual, "--steps=5", f"--schedule={file}", f"--out={tmp_path / 'no'}")
    assert (
        missing.returncode == 2
        and "has no grid of 5 steps, only 3" in missing.stderr
        and not (tmp_path / "no").exists()
    )
    file.write_text(replace(schedule, checkpoint="another").to_json())
    warned = run_script(*usual, "--steps=2", f"--schedule={file}", f"--out={tmp_path / 'out'}", check=True)
    assert "fitted to a checkpoint other than" in warned.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--out=x.json"], "--checkpoint: missing"),
        (["--checkpoint=CHECKPOINT"], "--out=FILE.json, or --store"),
        (
            ["--checkpoint=CHECKPOINT", "--out=x.json", "--steps=2,97"],
            "--steps=2,97: must be different, from 1 to the 96 steps of the fine grid",
        ),
        (["--checkpoint=CHECKPOINT", "--out=x.json", "--steps=two"], "--steps=two"),
        (["--checkpoint=CHECKPOINT", "--out=x.json", "--sampler=map"], "no map to jump with"),
        (["--checkpoint=CHECKPOINT", "--out=x.json", "--cost=least"], "least"),
        (["--checkpoint=CHECKPOINT", "--out=/dev/null/x.json"], "--out"),
        (["--checkpoint=nowhere", "--out=x.json", "--plot=plot"], "--plot=plot: must end in .png"),
        (["--checkpoint=nowhere", "--out=x.json", "--steps=2,2"], "--steps=2,2: must be different"),
        (["--checkpoint=nowhere", "--out=x.json", "--sampler=heum"], "--sampler=heum"),
        (["--checkpoint=nowhere", "--out=x.json", "--fine=99999"], "--fine=99999: must be from 1 to 1024"),
        (["--checkpoint=owner/name", "--store"], "--checkpoint=owner/name: needs a directory for --store"),
        (["--checkpoint=CHECKPOINT", "--out=x.json", "--reference=nowhere.npz"], "--reference=nowhere.npz"),
        (
            ["--checkpoint=CHECKPOINT", "--out=x.json", "--reference=assets/references/fashion_mnist.npz"],
            "--reference=assets/references/fashion_mnist.npz: images differ in size",
        ),
    ],
)
def test_mistakes_are_one_line(start, flags, reason):
    done = run_script("scripts/schedule.py", *(flag.replace("CHECKPOINT", str(start)) for flag in flags))
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_a_schedule_file_that_is_none_is_named(start, tmp_path):
    (tmp_path / "s.json").write_text('{"grids": {"2": [0, 0.6, 0.5, 1]}}')
    (tmp_path / "deep.json").write_text(100_000 * "[" + 100_000 * "]")
    (tmp_path / "long.json").write_text('{"grids": {"2": [0, 0.5, 1]}, "seed": ' + 10_000 * "9" + "}")
    reasons = {"s.json": "increase", "t.json": "No such file", "deep.json": "deeply", "long.json": "digits"}
    for file, reason in reasons.items():
        flags = [f"--checkpoint={start}", "--sampler=euler", "--steps=2", f"--schedule={tmp_path / file}"]
        done = run_script("scripts/sample.py", *flags, f"--out={tmp_path / 'out'}")
        assert done.returncode == 2 and reason in done.stderr and file in done.stderr and done.stderr.count("\n") == 1


def test_info_of_another_kind_is_refused_when_fitting():
    fm = gaussian_map()
    fm.info = FlowMapInfo(shape=(3,), kind="consistency")
    with pytest.raises(UserError, match="step sizes are for"):
        fit(fm, [2])
