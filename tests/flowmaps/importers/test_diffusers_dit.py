"""DiT as the hub has it, and every schedule of diffusers' schedulers, against diffusers' own classes."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler, UNet2DModel
from helpers import released
from safetensors.torch import load_file, save_file

from flowmaps import FlowMap, UserError
from flowmaps.importers import import_checkpoint

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}


def dit(**options):
    """A random network whose blocks share the embedder of time and class, as after conversion from DiT's own files."""
    net = released.randomise(DiTTransformer2DModel(**{**SIZES, **options}), 0.1)
    weights = net.state_dict()
    for name in weights:
        if ".norm1.emb." in name:
            weights[name] = weights[name.replace("transformer_blocks.1.", "transformer_blocks.0.")]
    net.load_state_dict(weights)
    return net


def saved(net, folder, name, **options):
    net.save_pretrained(folder / name)
    DDPMScheduler(**options).save_pretrained(folder / "scheduler")
    return folder


def ddim(net, scheduler, x, k, label):
    """The drift x1 - e at step k by what the scheduler says of the prediction, and its time t: sigma = (1 - t) / t."""
    a = scheduler.alphas_cumprod.double()[k][:, None, None, None]
    t = 1 / (1 + ((1 - a) / a).sqrt())
    z = a.sqrt() * x / t
    with torch.no_grad():
        out = net(z, k, label).sample[:, : x.shape[1]]
    kind = scheduler.config.prediction_type
    x1 = {
        "epsilon": (z - (1 - a).sqrt() * out) / a.sqrt(),
        "sample": out,
        "v_prediction": a.sqrt() * z - (1 - a).sqrt() * out,
    }[kind]
    return x1 - (z - a.sqrt() * x1) / (1 - a).sqrt(), t.flatten()


SCHEDULES = {
    "linear": {},
    "linear, 4000 steps": {"num_train_timesteps": 4000},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001, 0.02, 0.1, 0.3, 0.5]},
    "zero SNR": {"rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["DiT", "UNet"])
def test_every_schedule_and_prediction_is_converted(model, schedule, predicts, tmp_path):
    options = {**SCHEDULES[schedule], "prediction_type": predicts}
    if model == "DiT":
        net, form, name = dit(out_channels=8), "diffusers_dit", "transformer"
    else:
        net, form, name = released.randomise(narrow(num_class_embeds=5), 0.1), "diffusers_unet", "unet"
    fm = import_checkpoint(form, saved(net, tmp_path, name, **options)).double()
    scheduler = DDIMScheduler(**options)
    n = int((scheduler.alphas_cumprod > 1 / (1 + 157**2)).sum())  # times at which there is more than noise
    k, label = torch.tensor([n - 1, n // 2, n // 7, 0]), torch.tensor([0, 3, 4, 1])
    x = torch.randn(4, *fm.info.shape).double()
    theirs, t = ddim(net.double(), scheduler, x, k, label)
    with torch.no_grad():
        assert (fm.drift(x, t, label) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert fm.drift(x, torch.tensor([0.0, 1e-9, 1.0, 0.5]).double(), label).isfinite().all()
    assert theirs.std() > 0.01 and fm.info.kind == "drift"
    fm.float().save_pretrained(tmp_path / "out")
    assert FlowMap.from_pretrained(tmp_path / "out").fingerprint() == fm.fingerprint()


def narrow(**options):
    usual = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    return UNet2DModel(**{**usual, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 8, "attention_head_dim": 16},
        {"attention_head_dim": None, "flip_sin_to_cos": False},
        {"block_out_channels": (64, 64), "in_channels": 1, "out_channels": 1},
        {"norm_eps": 1e-6, "freq_shift": 1, "downsample_padding": 0, "norm_num_groups": 16},
        {"block_out_channels": (160, 320), "norm_num_groups": 32},
    ],
)
def test_narrow_networks_and_other_groups_and_heads(options, tmp_path):
    net = released.randomise(narrow(**options), 0.1)
    fm = import_checkpoint("diffusers_unet", saved(net, tmp_path, "unet")).double()
    x, k = torch.randn(3, *fm.info.shape).double(), torch.tensor([990, 400, 20])
    theirs, t = ddim(net.double(), DDIMScheduler(), x, k, None)
    with torch.no_grad():
        assert (fm.drift(x, t) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_guidance_of_the_class_that_means_none(tmp_path):
    net = dit()
    fm = import_checkpoint("diffusers_dit", saved(net, tmp_path, "transformer")).double()
    x, k, none = torch.randn(2, 4, 8, 8).double(), torch.tensor([500, 20]), torch.tensor([5, 5])
    theirs, t = ddim(net.double(), DDIMScheduler(), x, k, none)
    assert fm.info.num_classes == 5 and fm.info.label_dropout > 0
    with torch.no_grad():
        assert (fm.drift(x, t) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("layout", ["whole", "sharded", "fp16", "bin", "compiled", "module.model.", "former class"])
def test_files_of_weights(layout, tmp_path):
    net = dit()
    saved(net, tmp_path, "transformer")
    folder, name = tmp_path / "transformer", "diffusion_pytorch_model.safetensors"
    weights, bound = load_file(folder / name), 0.0
    if layout == "sharded":
        (folder / name).unlink()
        net.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*-of-*.safetensors"))) > 2 and not (folder / name).exists()
    elif layout == "fp16":
        (folder / name).unlink()
        net.half().save_pretrained(folder, variant="fp16")
        net, bound = net.float(), 1e-3
    elif layout == "bin":
        (folder / name).unlink()
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    elif layout == "former class":
        file = folder / "config.json"
        former = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "use_linear_projection": False}
        file.write_text(json.dumps(json.loads(file.read_text()) | former))
    elif layout != "whole":
        prefix = "_orig_mod." if layout == "compiled" else layout
        save_file({f"{prefix}{key}": weight for key, weight in weights.items()}, folder / name)
    for place in (tmp_path, folder):  # the pipeline, or the model in it, whose scheduler lies beside it
        fm = import_checkpoint("diffusers_dit", place)
        ours, theirs = fm.network.modulation.weight, weights["proj_out_1.weight"]
        assert (ours - theirs).abs().max() <= bound and "prediction" not in fm.info.origin.get("assumed", "")
    assert len(fm.info.origin["sha256"].split(", ")) == (1 if layout != "sharded" else len(list(folder.glob("*-of-*"))))


def test_the_vae_of_the_pipeline(tmp_path):
    saved(dit(), tmp_path, "transformer")
    assert "vae" in import_checkpoint("diffusers_dit", tmp_path).info.origin["assumed"]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
    info = import_checkpoint("diffusers_dit", tmp_path).info
    assert info.latent_scale == 4 * (0.5,) and info.vae == str(tmp_path / "vae") and "assumed" not in info.origin


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_eps": 1e-3}, r"norm_eps is 0\.001"),
        ({"caption_channels": 4}, "caption_channels is 4"),
        ({"num_embeds_ada_norm": 7}, "label table has 6 rows"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_layers": 3}, r"transformer_blocks\.2"),
        ({"sample_size": 10**6}, "sample_size is 1000000"),
        ({"in_channels": 8}, "in_channels is 8"),
        ({"novelty": 1}, "novelty is unknown"),
        ({"_class_name": "PixArtTransformer2DModel"}, "not describe a DiTTransformer2DModel, but 'PixArt"),
    ],
)
def test_configs(change, reason, tmp_path):
    file = saved(dit(), tmp_path, "transformer") / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"^src=.*{reason}") as refused:
        import_checkpoint("diffusers_dit", tmp_path)
    assert "download" not in str(refused.value)


def test_blocks_that_embed_time_each_in_its_own_way(tmp_path):
    net = dit()
    torch.nn.init.normal_(net.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias)
    with pytest.raises(UserError, match="its blocks embed time and class each in its own way"):
        import_checkpoint("diffusers_dit", saved(net, tmp_path, "transformer"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, "does not list files of this folder"),
        ({"weight_map": {"a": 1}}, "does not list files of this folder"),
        ([], "does not list files of this folder"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors cannot be read"),
    ],
)
def test_a_hostile_list_of_shards(change, reason, tmp_path):
    folder = saved(dit(), tmp_path, "transformer") / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=reason):
        import_checkpoint("diffusers_dit", tmp_path)


def test_a_folder_is_not_a_file_of_facebookresearch(tmp_path):
    with pytest.raises(UserError, match="is a folder: choose format diffusers_dit"):
        import_checkpoint("dit", saved(dit(), tmp_path, "transformer"))


def test_another_solver_of_the_same_levels(tmp_path):
    net = dit()
    EulerDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    net.save_pretrained(tmp_path / "transformer")
    convention = import_checkpoint("diffusers_dit", tmp_path).network.config.convention
    assert convention == "ddpm:noise:scaled_linear:1000:0.0001:0.02"
