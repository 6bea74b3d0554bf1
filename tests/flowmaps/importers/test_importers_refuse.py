"""Checkpoints of families that have no network here are refused by the name of what differs."""

import pytest
import torch
from helpers import released, released_edm2, released_state_dicts

from flowmaps import UserError
from flowmaps.importers import import_checkpoint


class FourierEmbedding(released.PositionalEmbedding):
    """The embedding of the noise level in an NCSN++."""


def altered_edm(path, change, variant="ddpm++"):
    net = released.edm(variant, path)
    change(net)
    released.dump({"ema": net}, path)


def altered(place, **attributes):
    """A change of attributes of the part ``place`` of a network."""

    def change(net):
        for key, value in attributes.items():
            setattr(net.get_submodule(place), key, value)

    return change


def fourier(net):
    net.model.map_noise = FourierEmbedding(16)


def scaled(net):
    net.model.enc["16x16_block0"].skip_scale = 1.0


def filtered(net):
    net.model.enc["8x8_down"].conv0.resample_filter = torch.full((1, 1, 4, 4), 1 / 16)


def headed(net):
    net.model.dec["8x8_in0"].num_heads = 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [(fourier, "NCSN"), (scaled, "skip_scale"), (filtered, "resample_filter"), (headed, "num_heads")],
)
def test_edm(change, reason, tmp_path):
    altered_edm(tmp_path / "net.pkl", change)
    with pytest.raises(UserError, match=reason):
        import_checkpoint("edm", tmp_path / "net.pkl")


def other_dropout(net):
    net.model.enc["16x16_block0"].dropout = 0.2


def extra(net):
    net.model.enc["16x16_block0"].conv9 = released.Conv2d(16, 16, 3)
    torch.nn.init.zeros_(net.model.enc["16x16_block0"].conv9.weight)


def renamed(net):
    net.model.enc["16x16_aux"] = released.Conv2d(16, 16, 1)


BLOCK = "model.enc.16x16_block0"


@pytest.mark.parametrize("variant", ["ddpm++", "adm"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (altered("model.map_noise", endpoint=None), "map_noise.endpoint"),
        (altered("model.map_noise", max_positions=100), "map_noise.max_positions is 100"),
        (altered("model.map_label", in_features=6), "map_label.in_features is 6"),
        (altered(BLOCK, adaptive_scale=None), "block0.adaptive_scale"),
        (altered(f"{BLOCK}.norm1", eps=1e-3), r"block0.norm1.eps is 0\.001"),
        (altered(f"{BLOCK}.norm0", num_groups=2), r"block0.norm0.num_groups is 2"),
        (altered("model.enc.16x16_conv", up=True), r"16x16_conv.up is True"),
        (altered(f"{BLOCK}.conv0", up=True), r"block0.conv0.up is True"),
        (altered("model.enc.8x8_down.conv0", fused_resample=True), r"8x8_down.conv0.fused_resample is True"),
        (altered("model.enc.8x8_down.skip", down=False), r"8x8_down.skip.down is False"),
        (altered("", img_resolution=32), "'16x16_conv' is where '32x32_conv' is expected"),
        (altered("", sigma_max=10.0), "sigma_max"),
        (altered("", sigma_data=float("nan")), "sigma_data is nan"),
        (altered("", label_dim=10**12), "10{12}|1000000000000"),
        (other_dropout, "dropout"),
        (extra, "conv9"),
        (renamed, "16x16_aux"),
    ],
)
def test_every_attribute_of_edm_is_compared(variant, change, reason, tmp_path):
    altered_edm(tmp_path / "net.pkl", change, variant)
    with pytest.raises(UserError, match=rf"^src=\S+net\.pkl: .*{reason}"):
        import_checkpoint("edm", tmp_path / "net.pkl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (altered("unet", label_balance=0.7), r"unet.label_balance is 0\.7, and only 0\.5 has a network here"),
        (altered("unet", concat_balance=0.3), "unet.concat_balance"),
        (altered("unet.enc.16x16_block0", res_balance=0.5), "16x16_block0.res_balance"),
        (altered("unet.dec.8x8_in0", attn_balance=0.5), "8x8_in0.attn_balance"),
        (altered("unet.dec.8x8_block1", clip_act=None), "8x8_block1.clip_act is None"),
        (altered("unet.dec.16x16_up", resample_filter=[1, 3, 3, 1]), r"16x16_up.resample_filter is \[1, 3, 3, 1\]"),
        (altered("unet.enc.8x8_down", resample_mode="keep"), "8x8_down.resample_mode is 'keep'"),
        (altered("unet.dec.8x8_block0", flavor="enc"), "8x8_block0.flavor is 'enc'"),
        (altered("unet.enc.8x8_block0", num_heads=1), "8x8_block0.num_heads is 1, and only 2"),
        (altered("unet.enc.8x8_block0", dropout=0.2), "dropout"),
        (altered("unet", extra=released.Linear(1, 1)), "extra"),
    ],
)
def test_every_attribute_of_edm2_is_compared(change, reason, tmp_path):
    net = released_edm2.edm2(tmp_path / "net.pkl")
    change(net)
    released.dump({"ema": net}, tmp_path / "net.pkl")
    with pytest.raises(UserError, match=rf"^src=\S+net\.pkl: .*{reason}"):
        import_checkpoint("edm2", tmp_path / "net.pkl")


def test_the_balance_of_labels_is_of_no_use_without_any(tmp_path):
    net = released_edm2.edm2(tmp_path / "net.pkl", classes=0)
    net.unet.label_balance = 0.7
    released.dump({"ema": net, "encoder": None}, tmp_path / "net.pkl")
    assert import_checkpoint("edm2", tmp_path / "net.pkl").info.num_classes == 0


def test_an_encoder_of_another_kind(tmp_path):
    net = released_edm2.edm2(tmp_path / "net.pkl")
    released.dump({"ema": net, "encoder": released.Linear(1, 1)}, tmp_path / "net.pkl")
    with pytest.raises(UserError, match="encoder"):
        import_checkpoint("edm2", tmp_path / "net.pkl")


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
