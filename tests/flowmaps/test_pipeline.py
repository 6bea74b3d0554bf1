"""The pipeline as diffusers has pipelines: loading, batches, callbacks, output, threads, and what is refused."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from helpers import ROOT, generator
from helpers.small_networks import small

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import generate
from flowmaps.networks import MLP
from flowmaps.pipeline import FlowMapPipeline, FlowMapScheduler
from samplers import Schedule, rollout, uniform_times


def wrapped(kind="map", **facts):
    fm = small("UNet", guidance=bool(facts.get("guidance_max")), std=0.1).eval()
    fm.info = replace(fm.info, kind=kind, class_names=("a", "b cat", "c", "d"), **facts)
    pipe = FlowMapPipeline.from_flow_map(fm)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return wrapped()


@pytest.fixture
def noise(pipe):
    return pipe.flow_map.noise(3, 0)


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float16}])
def test_the_generic_loader_finds_the_class(tmp_path, pipe, given):
    pipe.flow_map.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", **given)
    assert type(loaded) is FlowMapPipeline and loaded.network.dtype == given.get("dtype", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import flowmaps", "import diffusers", "from importlib.util import find_spec"])
def test_the_generic_loader_finds_the_class_whatever_is_imported_first(first):
    code = (
        f"{first}; import flowmaps, sys; 'find_spec' in dir() and find_spec('diffusers')\n"
        "assert 'torch' not in sys.modules or 'diffusers' in sys.modules\n"
        "from diffusers import DiffusionPipeline\n"
        "import diffusers; assert not hasattr(diffusers, 'NoSuchName')\n"
        "print(DiffusionPipeline.from_pretrained('assets/digits')(2).images)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "8x8" in done.stdout, done.stderr


@pytest.mark.parametrize("how", ["from_pipe", "components", "parameters"])
def test_a_pipeline_of_the_same_components_is_the_same(pipe, noise, how):
    if how == "from_pipe":
        again = FlowMapPipeline.from_pipe(pipe)
    else:
        again = FlowMapPipeline(**pipe.components, **(pipe.parameters if how == "parameters" else {}))
    assert again.network is pipe.network and again.config.base_std == 0.5 and again.flow_map.info == pipe.flow_map.info
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(latents=noise, output_type="pt").images, pipe(latents=noise, output_type="pt").images)


def test_from_pipe_keeps_the_type_of_the_weights_and_takes_changes():
    half = wrapped().to(torch.bfloat16)
    assert FlowMapPipeline.from_pipe(half).network.dtype == torch.bfloat16
    assert FlowMapPipeline.from_pipe(half, base_std=0.7).flow_map.base_std == 0.7
    assert FlowMapPipeline.from_pipe(half, dtype=torch.float32).network.dtype == torch.float32


def test_a_network_without_facts_is_refused():
    with pytest.raises(UserError, match="info: missing: use from_flow_map"):
        FlowMapPipeline(MLP(width=8, depth=1), FlowMapScheduler())
    with pytest.raises(UserError, match="kind"):
        FlowMapPipeline(MLP(width=8, depth=1), FlowMapScheduler(), info={"kind": "jump"})


@pytest.mark.parametrize(
    "saved", [{"variant": "fp16"}, {"max_shard_size": "3KB"}, {"variant": "a", "max_shard_size": "3KB"}]
)
def test_variants_and_shards_are_read(tmp_path, noise, saved):
    pipe = wrapped()
    before = pipe(latents=noise, output_type="pt").images
    pipe.save_pretrained(tmp_path, **saved)
    assert len(list((tmp_path / "network").glob("*.safetensors"))) == 1 or "max_shard_size" in saved
    again = FlowMapPipeline.from_pretrained(tmp_path, variant=saved.get("variant"))
    for loaded in (again, FlowMapPipeline.from_flow_map(FlowMap.from_pretrained(tmp_path))):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(latents=noise, output_type="pt").images, before)


@pytest.mark.parametrize(
    ("how", "images"),
    [
        ({}, 1),
        ({"num_images": 3}, 3),
        ({"batch_size": 3}, 3),
        ({"batch_size": 3, "num_images": 3}, 3),
        ({"class_labels": [1, 2, 3]}, 3),
        ({"class_labels": [[1], [2], [3]]}, 3),
        ({"class_labels": torch.tensor([1, 2, 3])}, 3),
        ({"class_labels": ["a", "CAT", 2]}, 3),
        ({"class_labels": 2}, 1),
        ({"class_labels": "cat", "num_images": 2}, 2),
        ({"class_labels": [2], "num_images": 2}, 2),
        ({"latents": torch.zeros(2, 1, 8, 8)}, 2),
        ({"latents": torch.zeros(2, 1, 8, 8), "class_labels": [1, 2]}, 2),
        ({"generator": [generator(1), generator(2)], "num_images": 2}, 2),
        ({"generator": generator(1), "num_images": 2}, 2),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 1}, 1),
        ({"sigmas": (1.0, 0.5)}, 1),
        ({"sigmas": torch.tensor([1.0, 0.5])}, 1),
        ({"sigmas": [0.5, 0.2], "latents": torch.zeros(2, 1, 8, 8)}, 2),
    ],
)
def test_arguments_agree_on_the_number_of_samples(pipe, how, images):
    assert len(pipe(**how).images) == images


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        *[({"num_inference_steps": n}, "num_inference_steps") for n in (0, -1, float("nan"), 1.5, True, None, "2")],
        *[({"num_images": n}, "num_images=") for n in (0, -1, 1.5, "2")],
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "num_images": 3}, "num_images and batch_size give 3 and 2 samples"),
        ({"class_labels": [1, 2], "num_images": 3}, "num_images and class_labels give 3 and 2 samples"),
        ({"class_labels": []}, "class_labels=0"),
        ({"class_labels": [4]}, r"class_labels=4: must be 0 \.\. 3"),
        ({"class_labels": 1.5}, r"class_labels=1.5: must be 0 \.\. 3"),
        ({"class_labels": "dog"}, "class_labels=dog: not the name"),
        ({"generator": [generator()] * 2, "num_images": 3}, "generator: has 2 for 3 samples"),
        ({"generator": [generator()] * 5, "num_images": 2}, "generator: has 5 for 2 samples"),
        ({"generator": 7}, r"generator: must be a torch\.Generator"),
        ({"latents": torch.zeros(2, 1, 16, 16)}, r"latents=.*16, 16\]: must be noise .* \[2, 1, 8, 8\]"),
        ({"latents": torch.zeros(2, 8, 8)}, "latents="),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "floating"),
        ({"latents": np.zeros((2, 1, 8, 8))}, "latents="),
        ({"latents": torch.zeros(2, 1, 8, 8), "num_images": 3}, "num_images and latents give 3 and 2 samples"),
        ({"latents": torch.full((1, 1, 8, 8), float("nan"))}, "NaN"),
        ({"guidance_scale": 7.5}, "guidance=7.5"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": "3"}, "guidance=3: must be a number"),
        *[({"sigmas": s}, "sigmas=") for s in ([], [0.5], [1.0, 1.0], [1.0, 0.0], [float("nan")], [2.0], "ab")],
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"decode_batch": 0}, "decode_batch=0"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds: choose from latents"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipe, how, reason):
    with pytest.raises(UserError, match=reason) as error:
        pipe(**how)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_float_type_of_latents_is_converted(pipe, noise):
    torch.testing.assert_close(
        pipe(latents=noise.double(), output_type="pt").images, pipe(latents=noise, output_type="pt").images
    )


def test_output_types_show_one_picture(pipe, noise):
    """pt and np lie in [0, 1] as in diffusers, PIL is their 8 bits, and latent is what the map gives."""
    made = {kind: pipe(latents=noise, output_type=kind).images for kind in ("pt", "np", "pil", "latent")}
    raw = made["latent"]
    with torch.no_grad():
        torch.testing.assert_close(raw, rollout(pipe.flow_map, noise, uniform_times(1), torch.arange(3)))
    assert raw.min() < -1.1 and raw.max() > 1.1  # so that clamping shows
    assert made["pt"].min() == 0 and made["pt"].max() == 1
    torch.testing.assert_close(made["pt"], (raw / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(made["np"], made["pt"].movedim(1, -1).numpy())
    assert np.abs(np.stack([np.asarray(p) for p in made["pil"]])[..., None] / 255 - made["np"]).max() < 0.5 / 255 + 1e-3
    assert pipe(latents=noise, output_type="np", return_dict=False)[0].shape == (3, 8, 8, 1)


def test_points_stay_points():
    pipe = FlowMapPipeline.from_flow_map(FlowMap(MLP(width=8, depth=1), info=FlowMapInfo(shape=(2,))))
    assert pipe(5, output_type="pt", generator=generator()).images.min() < 0
    with pytest.raises(UserError, match="not images"):
        pipe(5)


def test_the_callback_is_given_what_it_asks_for(pipe, noise):
    seen = []

    def callback(pipe, k, timestep, tensors):
        seen.append((k, sorted(tensors), pipe.num_timesteps, pipe.guidance_scale))
        if k == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    for asked in (["latents"], FlowMapPipeline._callback_tensor_inputs):
        last = pipe(
            latents=noise,
            num_inference_steps=2,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=asked,
        ).images
        assert not last.any()
    assert seen == 2 * [(0, ["latents"], 2, None), (1, ["latents"], 2, None)]
    pipe(
        num_inference_steps=2, callback_on_step_end=lambda *a: seen.append(a[3]), callback_on_step_end_tensor_inputs=[]
    )
    assert seen[-2:] == [{}, {}]


def test_a_callback_object_of_diffusers_says_what_it_asks_for(pipe):
    class Counting(PipelineCallback):
        tensor_inputs = ("latents",)
        steps = 0

        def callback_fn(self, pipeline, k, timestep, tensors):
            self.steps += 1
            return tensors

    counting = Counting(cutoff_step_ratio=1.0)
    pipe(num_inference_steps=3, callback_on_step_end=counting)
    assert counting.steps == 3


def test_a_callback_changes_the_guidance_of_the_steps_to_come():
    """As diffusers' documentation of dynamic guidance has it."""
    pipe = wrapped("drift", label_dropout=0.1)
    noise, label = pipe.flow_map.noise(2, 0), torch.tensor([0, 1])

    def callback(pipe, k, timestep, tensors):
        pipe._guidance_scale += 1.0

    made = pipe(
        latents=noise,
        class_labels=label,
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=callback,
    ).images
    assert pipe.guidance_scale == 4.0
    x, fm = noise, pipe.flow_map
    with torch.no_grad():
        for t, weight in ((0.0, 2.0), (0.5, 3.0)):
            x = x + 0.5 * torch.lerp(fm.drift(x, t), fm.drift(x, t, label), weight)
    torch.testing.assert_close(made, x)

    def wrong(pipe, k, timestep, tensors):
        pipe._guidance_scale = float("nan")

    with pytest.raises(UserError, match="guidance=nan"):
        pipe(num_inference_steps=2, guidance_scale=2.0, callback_on_step_end=wrong)


def test_an_interrupted_call_returns_what_it_has(pipe, noise):
    steps = []

    def stop(pipe, k, timestep, tensors):
        steps.append(tensors["latents"])
        pipe._interrupt = k == 1

    made = pipe(latents=noise, num_inference_steps=8, output_type="latent", callback_on_step_end=stop).images
    assert len(steps) == 2 and pipe.interrupt and torch.equal(made, steps[1])
    pipe(num_inference_steps=2)  # the next call is not
    assert not pipe.interrupt


def test_an_interrupt_from_another_thread_stops_every_running_call(pipe):
    def call(_):
        def stop(pipe, k, timestep, tensors):
            with ThreadPoolExecutor(1) as other:
                other.submit(setattr, pipe, "_interrupt", True).result()

        pipe(num_inference_steps=8, callback_on_step_end=stop)
        return pipe.interrupt

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [True, True]


class Waiting(ModelMixin, ConfigMixin):
    """A network that lets other threads run in the middle of every step."""

    @register_to_config
    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.randn(num_classes, 3, generator=generator()))

    def forward(self, x, s, t, label=None):
        time.sleep(2e-4)
        return (self.mean[label] - x) * (1 + s + t)[:, None]


def test_one_pipeline_in_many_threads_gives_the_samples_of_one():
    """100 calls of different steps, labels and grids; some are interrupted, which must not stop the others."""
    schedules = {"map": Schedule({3: (0, 0.2, 0.7, 1)})}
    pipe = FlowMapPipeline.from_flow_map(FlowMap(Waiting(), info=FlowMapInfo((3,), 4, schedules=schedules)))
    pipe.set_progress_bar_config(disable=True)

    def call(i):
        options = {"num_inference_steps": 1 + i % 5, "class_labels": [i % 4, 3], "generator": generator(i)}
        if i % 3 == 0:
            options["sigmas"] = [1.0, 0.9 - 0.05 * (i % 7), 0.1]
        if i % 4 == 0:
            options["callback_on_step_end"] = lambda pipe, k, *_: setattr(pipe, "_interrupt", k == 1)
        return pipe(**options, output_type="latent").images

    expected = [call(i) for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(call, range(100)))
    assert [i for i in range(100) if not torch.equal(made[i], expected[i])] == []


def test_a_single_sample_is_that_of_a_batch(pipe):
    streams = [generator(i) for i in range(4)]
    batch = pipe(class_labels=[3, 1, 2, 0], generator=streams, num_inference_steps=2, output_type="np").images
    single = pipe(class_labels=2, generator=generator(2), num_inference_steps=2, output_type="np").images
    np.testing.assert_allclose(batch[2:3], single, atol=1e-5)


def test_the_type_of_the_weights_changes_without_a_warning(capfd):
    pipe = wrapped()
    logging.enable_default_handler()
    pipe.to(torch.bfloat16)
    assert pipe.network.dtype == torch.bfloat16 and "float32: []" not in capfd.readouterr().err
    assert pipe(2, output_type="pt").images.dtype == torch.bfloat16


def test_class_names_choose_labels():
    pipe = FlowMapPipeline.from_pretrained(ROOT / "assets/fashion_mnist")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 1, "output_type": "latent"}
    named = pipe(class_labels=["boot", "bag"], generator=generator(), **how).images
    assert torch.equal(named, pipe(class_labels=[9, 8], generator=generator(), **how).images)
    fm = pipe.flow_map
    by_name, by_number = (next(generate(fm, uniform_times(1), 2, 0, label=label)) for label in ("boot", 9))
    assert torch.equal(by_name[0], by_number[0]) and by_name[1].tolist() == [9, 9]


def test_a_name_of_a_shipped_checkpoint(tmp_path, monkeypatch):
    """A folder of the same name comes first."""
    named, other = FlowMapPipeline.from_pretrained("digits"), FlowMap.from_pretrained("checkerboard")
    assert named.flow_map.fingerprint() == FlowMap.from_pretrained(ROOT / "assets/digits").fingerprint()
    FlowMapPipeline.from_flow_map(other).save_pretrained(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert FlowMapPipeline.from_pretrained("digits").flow_map.fingerprint() == other.fingerprint()
