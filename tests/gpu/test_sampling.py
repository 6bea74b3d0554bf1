"""The pipeline, its offload, and scoring: on the GPU as on the CPU, with the shipped digits."""

import pytest
import torch
from helpers import ROOT

from flowmaps import FlowMap
from flowmaps.derivatives import tf32_products
from flowmaps.evaluation import evaluate, open_reference
from flowmaps.generate import generate
from flowmaps.images import to_uint8
from flowmaps.pipeline import FlowMapPipeline
from samplers import uniform_times

pytestmark = pytest.mark.gpu

DIGITS = ROOT / "assets" / "digits"


@pytest.fixture(scope="module")
def latents():
    fm = FlowMap.from_pretrained(DIGITS)
    return fm.noise(32, seed=0)


def pipeline():
    pipe = FlowMapPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [1, 4])
def test_the_pipeline_makes_the_samples_of_the_cpu(steps, latents, device, record_property):
    options = {"num_inference_steps": steps, "output_type": "latent", "class_labels": [i % 10 for i in range(32)]}
    with tf32_products(False):
        ours = pipeline().to(device)(latents=latents.to(device), **options).images.cpu()
    exact = pipeline()(latents=latents, **options).images
    error = float((ours - exact).abs().max())
    record_property("largest_error", error)
    assert error < 1e-3


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_nothing(offload, latents, device):
    if device.type == "cpu":
        pytest.skip("offloading needs an accelerator")
    options = {"num_inference_steps": 2, "output_type": "latent", "class_labels": 3}
    expected = pipeline().to(device)(latents=latents.to(device), **options).images
    pipe = pipeline()
    getattr(pipe, offload)()
    ours = pipe(latents=latents, **options).images
    assert next(pipe.network.parameters()).device.type != device.type  # back on the CPU, or on meta
    torch.testing.assert_close(ours.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


def test_samples_by_index_round_to_the_pixels_of_the_cpu(device, record_property):
    pixels = []
    for where in (device, torch.device("cpu")):
        fm = FlowMap.from_pretrained(DIGITS).to(where).eval()
        with tf32_products(False):
            batches = generate(fm, uniform_times(2), 64, seed=0, batch=48)
            pixels.append(torch.cat([to_uint8(x).cpu() for x, _ in batches]))
    differ = (pixels[0].int() - pixels[1].int()).abs()
    record_property("share_of_pixels_that_differ", float((differ > 0).double().mean()))
    assert differ.max() <= 1


def test_scores_agree_with_those_of_the_cpu(device, record_property):
    """``fid.py``'s record, by the digits' extractor: samples and features on the device."""
    scores = []
    for where in (device, torch.device("cpu")):
        fm = FlowMap.from_pretrained(DIGITS).to(where).eval()
        reference = open_reference("digits:heldout", device=where)
        record = evaluate(fm, reference, steps=(1, 2), num=500, seeds=(0,))
        scores.append([row["FD-digits"] for row in record["results"]])
    record_property("scores", scores)
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)
