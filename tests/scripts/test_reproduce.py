"""reproduce.py on a folder in place of the hub, with small files of the true formats; and how far counting goes."""

import json
import math

import numpy as np
import pytest
import torch
from benchmarks.counting import bias, variance
from benchmarks.published import MAPS
from helpers import run_script
from helpers.makers import write_inception, write_vae
from helpers.released_maps import Map
from helpers.released_mean_flows import MeanFlow
from helpers.released_tvm import save

from flowmaps.importers import FORMATS
from flowmaps.metrics import FeatureStats, frechet_distance

FILES = {
    "soflow-b4": "zlab-princeton/SoFlow/B-4-cond/ckpts/400000.pt",
    "dmf-xl2": "kyungmnlee/DMF/dmf_xl_2_256.pt",
    "tvm-w2": "lumaai/tvm/im256_w2.pkl",
    "meanflow-sit-b4": "elsewhere/meanflow.pt",
    "imf-xl2": "Lyy0725/iMF/iMF-XL-2.pth",
    "pmf-b16": "Lyy0725/pMF/pMF-B-16.pt",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in place of the hub: maps of five classes, the two VAEs, ADM's statistics, and Inception's weights."""
    folder = tmp_path_factory.mktemp("hub")
    for name, file in FILES.items():
        (path := folder / file).parent.mkdir(parents=True)
        sizes = {"width": 64, "heads": 1, "depth": 21 if name == "dmf-xl2" else 2, "blocks": 20}
        if MAPS[name].form == "tvm":
            save(path, **sizes)
        elif MAPS[name].form in ("imf", "pmf"):
            MeanFlow(MAPS[name].form, size=16, patch=8, shared=0, head=1).save(path)
        else:
            Map(MAPS[name].form, **sizes).save(path)
    for kind in ("mse", "ema"):
        write_vae(folder / f"stabilityai/sd-vae-ft-{kind}")
    g = np.random.default_rng(0)
    features = g.normal(size=(4096, 2048))
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", mu=features.mean(0), sigma=np.cov(features.T))
    write_inception(folder / "inception.pth")
    return folder


def reproduce(hub, workdir, name, *flags):
    where = [f"--hub={hub}", f"--workdir={workdir}", f"--weights={hub}/inception.pth"]
    where += [f"--file={hub / FILES[name]}"] if not MAPS[name].hub else []
    return run_script("scripts/benchmarks/reproduce.py", f"--map={name}", *where, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), list(zip(FILES, ([1, 2], [4], [2], [1], [2], [1]), strict=True)))
def test_a_published_map_from_its_file_to_the_comparison(name, steps, hub, tmp_path):
    """One image of each class; the sampler is that of the authors, and what was read is in the record."""
    given = [] if steps == list(MAPS[name].fid) else [f"--steps={steps[0]}"]
    done = reproduce(hub, tmp_path / "run", name, "--num=5", *given)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/reproduce.json").read_text())
    chosen = MAPS[name]
    assert {row["steps"]: row["published"] for row in record["results"]} == {k: chosen.fid[k] for k in steps}
    sampler = "stochastic" if chosen.form == "soflow" else "map"
    for row in record["results"]:
        assert row["sampler"] == sampler and row["num"] == 5 and math.isfinite(row["fid"]) and row["tolerance"] > 0
        assert row["expected"] > row["published"]
        assert row.get("guidance_interval") == ([0.36, 0.64] if name == "imf-xl2" else None)
    assert record["origin"]["license"] == FORMATS[chosen.form].license and "sha256" in record["origin"]
    for text in ("published FID", "counting allows", "license: ", "please report it"):
        assert text in done.stdout


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_refuses_another_map(hub, tmp_path):
    one = ("--steps=1",)
    assert reproduce(hub, tmp_path / "a", "soflow-b4", *one, "--num=3").returncode == 0
    done = reproduce(hub, tmp_path / "a", "soflow-b4", *one, "--num=6")
    assert "6 of 6 samples" in done.stdout and "3 of" not in done.stdout
    whole = reproduce(hub, tmp_path / "b", "soflow-b4", *one, "--num=6")
    assert whole.returncode == 0
    found = [json.loads((tmp_path / name / "reproduce.json").read_text())["results"][0]["fid"] for name in "ab"]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    done = reproduce(hub, tmp_path / "a", "soflow-b4", *one, "--num=4")
    assert done.returncode == 2 and "--num=4: " in done.stderr and "6 samples already" in done.stderr
    done = reproduce(hub, tmp_path / "a", "soflow-b4", *one, "--num=8", "--seed=3")
    assert done.returncode == 2 and "has samples of seed 0, not 3" in done.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--map=soflow-b8"], "--map=soflow-b8: choose one of soflow-b4"),
        (["--map=soflow-b4"], "should have one file B-4-cond/*.pt, and has none"),
        (["--map=meanflow-sit-b4"], "--map=meanflow-sit-b4: its authors' file is not on the hub"),
        (
            ["--map=tvm-w2", "--file={tmp}/none.pkl", "--reference={tmp}/none.npz"],
            "--file={tmp}/none.pkl: no such file",
        ),
        (["--map=tvm-w2", "--file={tmp}/none.pkl"], "has no VIRTUAL_imagenet256_labeled.npz"),
        (["--map=tvm-w2", "--steps=one"], "--steps=one: give whole numbers"),
    ],
)
def test_mistakes_end_in_one_line(flags, reason, tmp_path):
    given = [flag.format(tmp=tmp_path) for flag in flags]
    done = run_script("scripts/benchmarks/reproduce.py", *given, f"--hub={tmp_path}", f"--workdir={tmp_path}/run")
    assert done.returncode == 2 and reason.format(tmp=tmp_path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bias_and_deviation_of_a_distance_are_those_of_many_samplings():
    """Normal features in 6 dimensions, 400 at a time, 2,000 times: within 10 percent."""
    g = torch.Generator().manual_seed(0)
    scale = torch.diag(torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.2], dtype=torch.float64))

    def moments(x):
        return FeatureStats(6).update(x)

    many = torch.randn(2000, 400, 6, generator=g, dtype=torch.float64) @ scale
    for shift, turned in ((0.0, 1.0), (0.7, 1.5)):
        reference = FeatureStats(6)
        reference.n, reference.mean = None, torch.full((6,), shift, dtype=torch.float64)
        reference.scatter = scale @ scale * turned
        exact = FeatureStats(6)
        exact.n, exact.mean, exact.scatter = None, torch.zeros(6, dtype=torch.float64), scale @ scale
        found = torch.tensor([frechet_distance(moments(x), reference) for x in many])
        if shift:
            assert found.var().item() == pytest.approx(variance(exact, reference) / 400, rel=0.1)
        else:
            truth = frechet_distance(exact, reference)
            assert found.mean().item() - truth == pytest.approx(bias(exact) / 400, rel=0.1)


@pytest.mark.parametrize("name", MAPS)
def test_every_row_names_a_format_and_where_its_file_is(name):
    chosen = MAPS[name]
    assert chosen.form in FORMATS and set(chosen.options) <= set(FORMATS[chosen.form].options)
    assert chosen.size in (256, 512) and bool(chosen.hub) == bool(chosen.file) and min(chosen.fid) == 1
