"""Latents: the VAE between images and a flow map, in the checkpoint, the pipeline and the scripts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import generator, released_edm2, run_script
from helpers.makers import write_vae
from helpers.small_networks import small

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.generate import generate
from flowmaps.images import to_uint8
from flowmaps.importers import import_checkpoint
from flowmaps.pipeline import FlowMapPipeline
from flowmaps.vae import Decoder, decode, fingerprint, moments, open_vae, reduction, scaling, vae_directory
from samplers import uniform_times

SHIFT, SCALE = (0.5, -1.0, 0.0, 2.0), (0.2, 0.5, 1.0, 0.3)
INFO = FlowMapInfo((4, 8, 8), latent_shift=SHIFT, latent_scale=SCALE)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def checkpoint(vae_folder, tmp_path_factory):
    """A small model of latents, exported with its VAE."""
    fm = small("DiT", channels=4).eval()
    fm.info = replace(fm.info, vae="some/name", latent_shift=SHIFT, latent_scale=SCALE)
    fm.decoder = Decoder(str(vae_folder), INFO)
    fm.open_decoder()
    fm.save_pretrained(folder := tmp_path_factory.mktemp("model") / "model")
    return folder


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [
        ({}, (0.0,) * 4, (0.18215,) * 4),
        ({"shift_factor": 0.1, "scaling_factor": 0.4}, (0.1,) * 4, (0.4,) * 4),
        (
            {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0], "scaling_factor": 0.5},
            (1.0, 2.0, 3.0, 4.0),
            (0.5, 0.25, 0.125, 0.0625),
        ),
    ],
)
def test_scaling_comes_from_the_vaes_config(options, shift, scale, tmp_path):
    vae = open_vae(str(write_vae(tmp_path / "vae", levels=2, **options)))
    assert scaling(vae) == (shift, scale) and reduction(vae) == 2


def test_moments_and_decoding_equal_the_vaes(vae_folder):
    vae = open_vae(str(vae_folder))
    images = 2 * torch.rand(5, 3, 32, 32, generator=generator()) - 1
    with torch.no_grad():
        z = vae.encode(images).latent_dist
        theirs = vae.decode(z.mean).sample
    made = moments(vae, images)
    assert made.shape == (5, 2, 4, 4, 4) and reduction(vae) == 8
    assert torch.equal(made[:, 0], z.mean) and torch.equal(made[:, 1], z.std)
    x = (z.mean - torch.tensor(SHIFT)[:, None, None]) * torch.tensor(SCALE)[:, None, None]
    for batch in (1, 2, 8):
        torch.testing.assert_close(decode(vae, x, INFO, batch), theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_and_tiles_decode_to_nearly_the_same(tmp_path):
    vae_folder = write_vae(tmp_path / "vae", sample_size=256)  # tiles of 256 pixels, 32 of the latents
    x = torch.randn(2, 4, 48, 48, generator=generator())
    whole = Decoder(str(vae_folder), INFO)(x)
    rough = Decoder(str(vae_folder), INFO, dtype=torch.bfloat16)(x)
    tiled = Decoder(str(vae_folder), INFO, tiling=True)
    assert rough.dtype == torch.float32 and 0 < (rough - whole).std() < 0.03 * whole.std()
    assert 0 < (tiled(x) - whole).std() < 0.5 * whole.std()  # tiles have other group norms


def test_a_checkpoint_carries_its_vae(checkpoint, vae_folder):
    assert json.loads((checkpoint / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    fm = FlowMap.from_pretrained(checkpoint)
    assert fm.info.latent_scale == SCALE and fm.decoder.vae is None  # opened when asked for
    x = torch.randn(3, 4, 8, 8, generator=generator())
    expected = decode(open_vae(str(vae_folder)), x, INFO)
    torch.testing.assert_close(fm.decode(x), expected)
    assert (
        "vae" not in dict(fm.named_modules()) and fm.fingerprint() == FlowMap.from_pretrained(checkpoint).fingerprint()
    )
    pixels = FlowMap(fm.network, info=FlowMapInfo((4, 8, 8), 4))
    assert pixels.decode(x) is x


@pytest.mark.parametrize("saved", [{"variant": "fp16"}, {"max_shard_size": "20KB"}])
def test_a_vae_in_shards_or_of_a_variant_is_opened(checkpoint, tmp_path, saved):
    FlowMapPipeline.from_pretrained(checkpoint).save_pretrained(tmp_path, **saved)
    assert not (tmp_path / "vae/diffusion_pytorch_model.safetensors").exists()
    x = torch.randn(2, 4, 8, 8, generator=generator())
    expected = FlowMap.from_pretrained(checkpoint).decode(x)
    torch.testing.assert_close(FlowMap.from_pretrained(tmp_path).decode(x), expected)


def test_pipeline_gives_the_images_of_the_samplers(checkpoint):
    fm, pipe = FlowMap.from_pretrained(checkpoint), FlowMapPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    noise = fm.noise(5, seed=1)
    label = torch.arange(5) % 4
    x, _ = next(generate(fm, uniform_times(2), 5, seed=1))
    raw = pipe(latents=noise, class_labels=label, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(raw, x, rtol=1e-4, atol=1e-5)
    images = pipe(latents=noise, class_labels=label, num_inference_steps=2, output_type="pt", decode_batch=2).images
    torch.testing.assert_close(images, (fm.decode(x) / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)
    pil = pipe(latents=noise, class_labels=label, num_inference_steps=2).images
    assert pil[0].size == (64, 64) and len(pil) == 5
    bare = FlowMapPipeline(pipe.network, pipe.scheduler, "linear", 0.5, fm.info.to_dict())
    with pytest.raises(UserError, match="without a VAE"):
        bare(1)
    assert bare(1, output_type="latent").images.shape == (1, 4, 8, 8)


def test_sample_py_with_the_stored_and_another_vae(checkpoint, vae_folder, tmp_path):
    flags = [f"--checkpoint={checkpoint}", "--steps=1", "--num=6", "--vae_batch=4"]
    run_script("scripts/sample.py", *flags, f"--out={tmp_path / 'a'}", check=True)
    fm = FlowMap.from_pretrained(checkpoint)
    x, _ = next(generate(fm, uniform_times(1), 6, seed=0))
    made = np.load(tmp_path / "a/samples-1.npz")["arr_0"]
    expected = to_uint8(fm.decode(x)).movedim(1, -1).numpy().astype(int)
    assert made.shape == (6, 64, 64, 3) and np.abs(made - expected).max() <= 1
    other = write_vae(tmp_path / "other", levels=3)
    run_script("scripts/sample.py", *flags, f"--vae={other}", f"--out={tmp_path / 'b'}", check=True)
    assert np.load(tmp_path / "b/samples-1.npz")["arr_0"].shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "no AutoencoderKL"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "no AutoencoderKL"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"short"),
            "is damaged",
        ),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model"),
    ],
)
def test_a_damaged_or_missing_vae_is_refused(change, reason, checkpoint, tmp_path):
    change(write_vae(tmp_path / "vae"))
    done = run_script(
        "scripts/sample.py", f"--checkpoint={checkpoint}", f"--out={tmp_path}", f"--vae={tmp_path / 'vae'}"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--vae={tmp_path / 'vae'}" in done.stderr and reason in done.stderr
    assert not list(tmp_path.glob("steps-*"))


def test_a_vae_that_does_not_fit_is_refused(checkpoint, tmp_path):
    narrow = write_vae(tmp_path / "narrow", channels=3)
    with pytest.raises(UserError, match="latents of 3 channels, the model of 4"):
        Decoder(str(narrow), INFO).open()
    with pytest.raises(UserError, match="not a hub id"):
        open_vae("no/such/vae")
    assert vae_directory(checkpoint) == checkpoint / "vae" and vae_directory(tmp_path) is None
    with pytest.raises(UserError, match="latent_scale"):
        FlowMapInfo((4, 8, 8), latent_shift=SHIFT)
    with pytest.raises(UserError, match="latent_scale"):
        FlowMapInfo((3, 8, 8), latent_shift=SHIFT, latent_scale=SCALE)
    fm = FlowMap.from_pretrained(checkpoint)
    fm.decoder, fm.info = None, replace(fm.info, vae="")
    with pytest.raises(UserError, match="vae: missing"):
        fm.decode(torch.zeros(1, 4, 8, 8))
    small("DiT").save_pretrained(tmp_path / "pixels")
    done = run_script(
        "scripts/sample.py", f"--checkpoint={tmp_path / 'pixels'}", f"--vae={narrow}", f"--out={tmp_path}"
    )
    assert done.returncode == 2 and "does not make latents" in done.stderr


def test_pickles_are_never_read(tmp_path):
    folder = write_vae(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(vae.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        open_vae(str(folder))
    assert len(fingerprint(vae)) == 64


def test_a_vae_for_pixels_in_0_to_1_takes_and_gives_those(vae_folder):
    """EDM2's range: the encoder sees (x + 1) / 2, and its decoder's y is the image 2 y - 1."""
    vae = open_vae(str(vae_folder))
    images = 2 * torch.rand(3, 3, 32, 32, generator=generator()) - 1
    z = torch.randn(3, 4, 4, 4, generator=generator())
    with torch.no_grad():
        theirs, pixels = vae.encode((images + 1) / 2).latent_dist, vae.decode(z).sample
    made = moments(vae, images, (0.0, 1.0))
    torch.testing.assert_close(made, torch.stack([theirs.mean, theirs.std], dim=1))
    x = (z - torch.tensor(SHIFT)[:, None, None]) * torch.tensor(SCALE)[:, None, None]
    info = replace(INFO, vae_range=(0.0, 1.0))
    torch.testing.assert_close(decode(vae, x, info), 2 * pixels - 1, rtol=1e-4, atol=1e-5)
    assert (decode(vae, x, info) - decode(vae, x, INFO)).std() > 0.1 * pixels.std()
    for wrong in ((1.0, 0.0), (0.0, 0.0), (0.0, float("nan")), (0.0, 1.0, 2.0)):
        with pytest.raises(UserError, match=r"vae_range=.*: must be two increasing numbers"):
            replace(INFO, vae_range=wrong)


def test_edm2s_latents_are_decoded_as_edm2_does(vae_folder, tmp_path):
    """Its pixels are 255 times the VAE's output for (x - bias) / scale, clamped to [0, 1]; ours may be rounded up."""
    released_edm2.edm2(tmp_path / "net.pkl")
    fm = import_checkpoint("edm2", tmp_path / "net.pkl")
    assert fm.info.vae_range == (0.0, 1.0)
    fm.decoder = Decoder(str(vae_folder), fm.info)
    fm.save_pretrained(tmp_path / "model")
    fm = FlowMap.from_pretrained(tmp_path / "model")
    fm.decoder = Decoder(str(vae_folder), fm.info)
    x, encoder = torch.randn(2, 4, 8, 8, generator=generator()), released_edm2.StabilityVAEEncoder()
    scale, bias = (torch.from_numpy(v)[:, None, None] for v in (encoder.scale, encoder.bias))
    with torch.no_grad():
        theirs = open_vae(str(vae_folder)).decode((x - bias) / scale).sample.clamp(0, 1) * 255
    assert (to_uint8(fm.decode(x)) - theirs).abs().max() < 0.51


def test_what_checkpoints_without_the_range_mean(checkpoint):
    """They were made for [-1, 1], except those of EDM2, whose range was lost."""
    values = FlowMap.from_pretrained(checkpoint).info.to_dict()
    del values["vae_range"]
    assert FlowMapInfo.from_dict(values).vae_range == (-1.0, 1.0)
    with pytest.raises(UserError, match=r"^vae_range: missing.* import it again"):
        FlowMapInfo.from_dict({**values, "origin": {"format": "edm2"}})


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"latents_mean": 4 * [0.0], "latents_std": [1.0, 0.0, 1.0, 1.0]}, "scaling"),
        ({"latents_mean": 4 * [0.0], "latents_std": [1.0, 2.0]}, "scaling"),
        ({"latents_mean": 4 * ["a"], "latents_std": 4 * [1.0]}, "scaling"),
        ({"scaling_factor": 0}, "scaling"),
        ({"scaling_factor": "big"}, "scaling"),
        ({"shift_factor": [1]}, "scaling"),
        ({"in_channels": 1, "out_channels": 1}, "not an intact"),
        ({"layers_per_block": 10**9}, "more layers or channels"),
        ({"block_out_channels": [32, 10**9]}, "more layers or channels"),
        ({"latent_channels": 10**12}, "more layers or channels"),
        ({"layers_per_block": None}, "layers_per_block is None"),
    ],
)
def test_facts_of_a_vae_are_checked(values, reason, tmp_path):
    folder = write_vae(tmp_path / "vae")
    change(folder, **values)
    with pytest.raises(UserError, match=reason) as error:
        open_vae(str(folder))
    assert error.value.field == "vae"


def test_a_vae_of_other_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="images of 1 and 3 channels, not of 3"):
        open_vae(str(write_vae(tmp_path / "vae", in_channels=1)))
