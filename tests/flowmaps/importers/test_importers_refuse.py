"""Checkpoints of families that have no network here are refused by the name of what differs."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers import released, released_state_dicts

from flowmaps import UserError
from flowmaps.importers import import_checkpoint


class FourierEmbedding(released.PositionalEmbedding):
    """The embedding of the noise level in an NCSN++."""


def altered_edm(path, change):
    net = released.edm("ddpm++", path)
    change(net)
    released.dump({"ema": net}, path)


def fourier(net):
    net.model.map_noise = FourierEmbedding(16)


def scaled(net):
    net.model.enc["16x16_block0"].skip_scale = 1.0


def filtered(net):
    net.model.enc["8x8_down"].conv0.resample_filter = torch.full((1, 1, 4, 4), 1 / 16)


def headed(net):
    net.model.dec["8x8_in0"].num_heads = 4


@pytest.mark.parametrize(
    ("change", "reason"), [(fourier, "NCSN"), (scaled, "skip_scale"), (filtered, "resample_filter"), (headed, "num_heads")]
)
def test_edm(change, reason, tmp_path):
    altered_edm(tmp_path / "net.pkl", change)
    with pytest.raises(UserError, match=reason):
        import_checkpoint("edm", tmp_path / "net.pkl")


def test_formats_do_not_take_each_other_s_files(tmp_path):
    released.edm("ddpm++", tmp_path / "edm")
    torch.save(released_state_dicts.Transformer().w, tmp_path / "dit")
    released_state_dicts.NCSNpp().save(tmp_path / "rectified_flow")
    with pytest.raises(UserError, match=r"^src=\S+edm: is a file: give the folder"):
        import_checkpoint("diffusers_unet", tmp_path / "edm")
    with pytest.raises(UserError, match=r"is a directory, not a file"):
        import_checkpoint("edm", tmp_path)
    for form in ("edm", "edm2", "dit", "sit", "rectified_flow"):
        for file in ("edm", "dit", "rectified_flow"):
            if form != file and (form, file) != ("sit", "dit"):
                with pytest.raises(UserError, match=r"^src=.*: is not a checkpoint of this format"):
                    import_checkpoint(form, tmp_path / file, image_size=32 if form == "rectified_flow" else None)


def moved(w):
    w["pos_embed"] = w["pos_embed"].flip(1)


def oblong(w):
    w["pos_embed"] = w["pos_embed"][:, :15]


def headless(w):
    del w["final_layer.linear.bias"]


def wider(w):
    w["blocks.1.mlp.fc1.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (moved, "table of sines"),
        (oblong, "not a square number"),
        (headless, "final_layer.linear.bias"),
        (wider, r"blocks\.1\.mlp\.0\.bias is \(3,\), expected"),
    ],
)
def test_dit(change, reason, tmp_path):
    w = released_state_dicts.Transformer().w
    change(w)
    torch.save(w, tmp_path / "net.pt")
    with pytest.raises(UserError, match=reason):
        import_checkpoint("dit", tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("options", "scheduler", "reason"),
    [
        ({"attention_head_dim": 16}, {}, "attention_head_dim"),
        ({"act_fn": "gelu"}, {}, "act_fn"),
        ({"block_out_channels": (64, 64)}, {}, "block_out_channels"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}, {}, "down_block_types"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({}, {"prediction_type": "v_prediction"}, "prediction_type"),
    ],
)
def test_diffusers(options, scheduler, reason, tmp_path):
    usual = {"block_out_channels": (128, 128), "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    usual |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "sample_size": 8, "layers_per_block": 1}
    DDPMPipeline(UNet2DModel(**{**usual, **options}), DDPMScheduler(**scheduler)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        import_checkpoint("diffusers_unet", tmp_path)


def test_a_damaged_folder_of_diffusers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": 8}))
    for content in (b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"):
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"^src="):
            import_checkpoint("diffusers_unet", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json"):
        import_checkpoint("diffusers_unet", tmp_path)
