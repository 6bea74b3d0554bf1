"""A folder of diffusers says more than its weights: every key is used, compared or refused by name."""

import json

import pytest
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from flowmaps import UserError
from flowmaps.importers import import_checkpoint

USUAL = {
    "block_out_channels": (128, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "sample_size": 8,
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def network():
    return UNet2DModel(**USUAL)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_eps": 1e-4}, "norm_eps"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"center_input_sample": True}, "center_input_sample is True"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        ({"block_out_channels": (64, 96)}, "block_out_channels have 96, and only multiples of the first"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}, "down_block_types"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"sample_size": (8, 16)}, "sample_size"),
    ],
)
def test_networks(options, reason, tmp_path):
    UNet2DModel(**{**USUAL, **options}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        import_checkpoint("diffusers_unet", tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"novelty": 1}, "novelty is unknown"),
        ({"_class_name": "UNet2DConditionModel"}, "does not describe a UNet2DModel"),
        ({"layers_per_block": 10**9}, "layers each"),
        ({"norm_num_groups": 0}, "norm_num_groups, 0"),
        ({"norm_num_groups": 48}, "norm_num_groups, 48"),
        ({"attention_head_dim": -1}, "attention_head_dim, -1"),
        ({"layers_per_block": "2"}, "layers_per_block is '2', expected int"),
        ({"num_class_embeds": 10**12}, "class_embedding.weight"),
        ({"dropout": 3}, "dropout"),
        ({"in_channels": 4}, r"is \(3,\), expected \(4,\)"),
    ],
)
def test_configs(change, reason, network, tmp_path):
    network.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"^src=.*{reason}"):
        import_checkpoint("diffusers_unet", tmp_path)


PLACES = {"pipeline": ("unet", "scheduler"), "beside": ("", ""), "within": ("unet", ""), "with it": ("unet", "unet")}


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize(
    ("options", "convention"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "ddpm:noise:squaredcos_cap_v2:1000"),
        ({"prediction_type": "v_prediction"}, "ddpm:velocity:linear:1000:0.0001:0.02"),
        ({"prediction_type": "sample", "beta_end": 0.012}, "ddpm:data:linear:1000:0.0001:0.012"),
        ({"num_train_timesteps": 4000}, "ddpm:noise:linear:4000:0.0001:0.02"),
        ({"trained_betas": [0.1, 1e-5]}, "ddpm:noise:betas:0.1:1e-05"),
        ({"rescale_betas_zero_snr": True}, "ddpm:noise:linear:1000:0.0001:0.02:zero_snr"),
        ({}, "ddpm"),
    ],
)
def test_schedules_wherever_they_lie(layout, options, convention, network, tmp_path):
    """That they are converted rightly: ``test_diffusers_dit``."""
    unet, scheduler = PLACES[layout]
    network.save_pretrained(tmp_path / unet)
    DDPMScheduler(**options).save_pretrained(tmp_path / scheduler)
    fm = import_checkpoint("diffusers_unet", tmp_path)
    assert "assumed" not in fm.info.origin and fm.network.config.convention == convention


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', and only linear, scaled_linear, squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"beta_end": 2}, "num_train_timesteps, beta_start or beta_end is out of range"),
        ({"beta_end": "much"}, "num_train_timesteps, beta_start or beta_end is out of range"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps, beta_start or beta_end is out of range"),
        ({"num_train_timesteps": [1]}, "num_train_timesteps, beta_start or beta_end is out of range"),
        ({"trained_betas": [0.1]}, "trained_betas is out of range"),
        ({"trained_betas": [0.1, "0.2:zero_snr"]}, "trained_betas is out of range"),
        ({"trained_betas": {"a": 1}}, "trained_betas is out of range"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr is 'no'"),
    ],
)
def test_schedules_out_of_range(change, reason, network, tmp_path):
    network.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"^src=\S+: cannot be imported: its scheduler's {reason}"):
        import_checkpoint("diffusers_unet", tmp_path)


def test_a_network_inside_its_pipeline(network, tmp_path):
    DDPMPipeline(network, DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    config = import_checkpoint("diffusers_unet", tmp_path / "unet").network.config
    assert config.convention == "ddpm:data:linear:1000:0.0001:0.02"


def test_two_schedulers_that_differ(network, tmp_path):
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"its scheduler_config\.json, of which it has more than one, differ"):
        import_checkpoint("diffusers_unet", tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "a 'EDMEulerScheduler', and only DDPMScheduler"),
        ({"predict_epsilon": "no"}, "predict_epsilon is 'no'"),
        ({"sigma_max": 80}, "sigma_max is 80, which is unknown here"),
    ],
)
def test_other_schedulers(change, reason, network, tmp_path):
    network.save_pretrained(tmp_path)
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing").save_pretrained(tmp_path)
    assert import_checkpoint("diffusers_unet", tmp_path).info.kind == "drift"
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        import_checkpoint("diffusers_unet", tmp_path)


def test_what_nobody_says_is_assumed_aloud_or_asked_for(network, tmp_path):
    network.save_pretrained(tmp_path)
    assert "prediction noise" in import_checkpoint("diffusers_unet", tmp_path).info.origin["assumed"]
    with pytest.raises(UserError, match="prediction is score, and only noise, velocity, data"):
        import_checkpoint("diffusers_unet", tmp_path, prediction="score")
    told = import_checkpoint("diffusers_unet", tmp_path, prediction="v_prediction")
    assert told.network.config.convention == "ddpm:velocity:linear:1000:0.0001:0.02"
    with pytest.raises(UserError, match=r"^image_size=16: but the file says 8"):
        import_checkpoint("diffusers_unet", tmp_path, image_size=16)
    UNet2DModel(**{**USUAL, "sample_size": None}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^image_size: is needed"):
        import_checkpoint("diffusers_unet", tmp_path)
    assert import_checkpoint("diffusers_unet", tmp_path, image_size=16).info.shape == (3, 16, 16)


def test_a_damaged_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": 8}))
    with pytest.raises(UserError, match=r"^src=.*block_out_channels is missing"):
        import_checkpoint("diffusers_unet", tmp_path)
    for text in ("[]", "{", "[" * 100000, '{"sample_size": ' + "1" * 10000 + "}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^src=.*config\.json"):
            import_checkpoint("diffusers_unet", tmp_path)


def test_damaged_weights(network, tmp_path):
    network.save_pretrained(tmp_path)
    for content in (b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"\xff" * 64):
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"^src=.*is not a checkpoint of this format"):
            import_checkpoint("diffusers_unet", tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^src=.*diffusion_pytorch_model.bin cannot be read"):
        import_checkpoint("diffusers_unet", tmp_path)


def test_compiled_networks_in_bfloat16(network, tmp_path):
    import torch
    from safetensors.torch import save_file

    network.save_pretrained(tmp_path)
    weights = {f"_orig_mod.{name}": w.bfloat16() for name, w in network.state_dict().items()}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    fm = import_checkpoint("diffusers_unet", tmp_path)
    assert torch.equal(fm.network.stem.weight, network.conv_in.weight.bfloat16().float())
