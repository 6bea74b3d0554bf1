"""The life of an imported map: sampled, scored, scheduled, exported, loaded again, and trained further."""

from dataclasses import replace

import pytest
import torch
from helpers import run_script
from helpers.makers import small_inception, write_inception
from helpers.released_maps import Map
from helpers.released_mean_flows import MeanFlow
from helpers.released_tvm import save

from flowmaps import FlowMap
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.export import store_schedule
from flowmaps.importers import FORMATS, import_checkpoint
from flowmaps.metrics import FeatureStats
from flowmaps.metrics.extractors import load_extractor
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.step_sizes import fit
from flowmaps.vae import Decoder
from training.config import DropoutRows, network
from training.config_rows import load_row
from training.loop import train

CLASSES = 32
ROWS = {"soflow": "soflow", "meanflow_sit": "mean_flow", "dmf": "dmf", "tvm": "terminal_velocity"}
ROWS |= {"imf": "imf_b2", "pmf": "pmf"}
OPTIONS = {"meanflow_sit": {"guidance": 2.0}, "dmf": {"decoupled": 1}, "tvm": {"guidance": 2.0}}
OPTIONS |= {"imf": {"image_size": 8}, "pmf": {"base_std": 2.0}}


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def written(form, path):
    """Write the file of a map of ``CLASSES`` classes, for latents of 8 x 8 or for images of 64 x 64."""
    sizes = {"width": 64, "heads": 1, "depth": 2, "blocks": 1, "classes": CLASSES}
    if form in ("imf", "pmf"):
        pixels = {"size": 64, "patch": 16, "bottleneck": 8} if form == "pmf" else {}
        MeanFlow(form, classes=CLASSES, shared=1, head=1, **pixels).save(path)
    elif form == "tvm":
        save(path, **sizes)
    else:
        Map(form, **sizes).save(path)
    return path


@pytest.fixture(scope="module")
def latents(imagenet_root, tmp_path_factory):
    """32 images of 64 x 64 as latents of 8 x 8."""
    out = tmp_path_factory.mktemp("latents") / "set"
    flags = [f"--src={imagenet_root / 'train'}", f"--vae={imagenet_root / 'vae'}", "--size=64", f"--out={out}"]
    run_script("scripts/prepare_data.py", "latents", *flags, check=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("form", ROWS)
def test_an_imported_map_lives_as_any_other(form, imagenet_root, latents, inception, tmp_path):
    fm = import_checkpoint(form, written(form, tmp_path / "net"), **OPTIONS.get(form, {}))
    if fm.info.guidance_interval:  # as a file of the published size has it
        fm.info = replace(fm.info, recommended_guidance=(3.0, 0.2, 0.6))
    if fm.info.latent_scale:
        fm.decoder = Decoder(str(imagenet_root / "vae"), fm.info)
        fm.open_decoder()
    with small_inception(tmp_path):
        extractor = load_extractor("inception", inception, torch.device("cpu"))
        images = torch.randint(0, 256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        reference = open_reference(extractor.stats([images]), "inception", inception)
        record = evaluate(fm, reference, steps=(1, 2, 4), num=5, batch=5)
    assert [row["steps"] for row in record["results"]] == [1, 2, 4]
    told = (3.0, [0.2, 0.6]) if form in ("imf", "pmf") else (None, None)
    assert (record["guidance"], record["guidance_interval"]) == told
    assert {row["sampler"] for row in record["results"]} == {fm.info.sampler}
    assert all(row["FID"] > 0 for row in record["results"]) and isinstance(reference.stats, FeatureStats)

    fm.save_pretrained(tmp_path / "map")
    schedule = fit(fm, [2, 3], noises=8, fine=12, batch=8).schedule
    assert schedule.sampler == "map" and list(schedule) == [2, 3]
    store_schedule(tmp_path / "map", schedule)
    again = FlowMap.from_pretrained(tmp_path / "map")
    assert again.fingerprint() == fm.fingerprint() and again.info.schedules["map"] == schedule
    assert again.info.usual_guidance() == fm.info.usual_guidance()
    assert again.info.recommended_sampler == fm.info.recommended_sampler and again.info.guidance == fm.info.guidance
    pipe = FlowMapPipeline.from_pretrained(tmp_path / "map")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, num_inference_steps=2).images[0].size == (64, 64)

    config = load_row("configs/imagenet256.py", f"{ROWS[form]},smoke")
    config.network = network(type(fm.network), **{k: v for k, v in fm.network.config.items() if not k.startswith("_")})
    config.init_from, config.steps, config.data.root, config.data.workers = str(tmp_path / "map"), 2, str(latents), 0
    config.base_std = fm.base_std
    if form == "pmf":
        config.data.root = str(imagenet_root / "imagenet64")
    config.data.latent_shift, config.data.latent_scale = fm.info.latent_shift, fm.info.latent_scale
    trained = train(config, tmp_path / "run")
    before, after = fm.network.state_dict(), trained.network.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    card = (tmp_path / "run/model/README.md").read_text()
    assert FORMATS[form].license in card and fm.info.origin["sha256"] in card
    taught = load_row("configs/imagenet256.py", "lagrangian,smoke")  # a student with another network
    taught.network.channels, taught.network.image_size, _ = fm.info.shape
    taught.network.num_classes, taught.base_std = CLASSES, fm.base_std
    taught.teacher, taught.steps = str(tmp_path / "map"), 2
    taught.data = replace(config.data, dropout_rows=DropoutRows.all)  # without a diagonal there are no others
    taught.objective.diagonal = 0.0 if fm.info.guidance else 0.5
    student = train(taught, tmp_path / "taught")
    assert student.info.origin["teacher's license"] == FORMATS[form].license
    assert student.info.guidance == fm.info.guidance
