"""Published checkpoints: files of the true structure, made here, against evaluations written from the papers."""

import argparse
import copy
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import released, released_edm2, released_state_dicts, run_script

from flowmaps import FlowMap, UserError
from flowmaps.importers import import_checkpoint


def drift_of_denoiser(denoise, x, t, base_std, *rest):
    """(D(x / t, sigma) - x) / (1 - t)."""
    sigma, t = base_std * (1 - t) / t, t[:, None, None, None]
    return (denoise(x / t, sigma, *rest) - x) / (1 - t)


def close(ours, theirs, bound=1e-5):
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


T = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99])


@pytest.mark.parametrize("variant", ["ddpm++", "adm"])
def test_edm(variant, tmp_path):
    net = released.edm(variant, tmp_path / "net.pkl")
    fm = import_checkpoint("edm", tmp_path / "net.pkl")
    x, label = 0.5 * torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 4, 5])
    classes = torch.eye(6)[label][:, :5]  # 5: no label
    with torch.no_grad():
        theirs = drift_of_denoiser(net.double(), x.double(), T.double(), 0.5, classes.double())
        close(fm.double().drift(x.double(), T.double(), label), theirs)
    assert fm.info.t_range == (0.5 / 80.5, 0.5 / 0.502) and fm.info.kind == "drift"
    assert fm.network.config.dropout == 0.1 and fm.network.config.augment_dim == 9
    assert len(fm.info.origin["sha256"]) == 64 and "NC" in fm.info.origin["license"]
    fm.float().save_pretrained(tmp_path / "out")
    again = FlowMap.from_pretrained(tmp_path / "out")
    assert again.info == fm.info and again.fingerprint() == fm.fingerprint()


@pytest.mark.parametrize("classes", [0, 5])
def test_edm2(classes, tmp_path):
    net = released_edm2.edm2(tmp_path / "net.pkl", classes)
    fm = import_checkpoint("edm2", tmp_path / "net.pkl")
    x, label = 0.5 * torch.randn(5, 4, 16, 16), torch.tensor([0, 1, 2, 4, 5]) if classes else None
    given = torch.eye(6)[label][:, :5] if classes else torch.zeros(5, 0)
    with torch.no_grad():
        theirs = drift_of_denoiser(net.double(), x.double(), T.double(), 0.5, given.double())
        close(fm.double().drift(x.double(), T.double(), label), theirs)
    assert fm.info.vae == "stabilityai/sd-vae-ft-mse"
    assert fm.info.latent_scale[1] == pytest.approx(0.5 / 4.62) and fm.info.latent_shift[1] == pytest.approx(3.25)


@pytest.mark.parametrize("kind", ["dit", "sit"])
@pytest.mark.parametrize("training", [False, True])
def test_transformers(kind, training, tmp_path):
    """Released weights are a bare state dict; a training checkpoint has its EMA and argparse's namespace too."""
    model, file = released_state_dicts.Transformer(), tmp_path / "net.pt"
    plain = {k: torch.zeros_like(v) for k, v in model.w.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save({"model": plain, "ema": model.w, "opt": {"state": {}}, "args": args} if training else model.w, file)
    fm = import_checkpoint(kind, file)
    x, label, t = torch.randn(5, 4, 8, 8).double(), torch.tensor([0, 1, 2, 4, 5]), T.double().clamp(0.01, 0.985)
    if kind == "sit":
        theirs = model(x, t, label)
    else:
        a = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        k = torch.tensor([990, 700, 400, 30, 0])
        t = 1 / (1 + ((1 - a[k]) / a[k]).sqrt())  # where sigma = (1 - t) / t is that of step k
        z = x / t[:, None, None, None] * a[k].sqrt()[:, None, None, None]
        theirs = (x - model(z, k.double(), label)) / t[:, None, None, None]
    with torch.no_grad():
        close(fm.double().drift(x, t, label), theirs)
    assert fm.info.num_classes == 5 and fm.info.label_dropout > 0 and fm.base_std == 1
    assert fm.info.latent_scale == 4 * (0.18215,)


def test_rectified_flow(tmp_path):
    model = released_state_dicts.NCSNpp()
    model.save(tmp_path / "checkpoint_10.pth")
    fm = import_checkpoint("rectified_flow", tmp_path / "checkpoint_10.pth", image_size=32)
    x, t = torch.randn(5, 3, 32, 32).double(), torch.cat([T, torch.tensor([0.0004])])[[5, 1, 2, 3, 4]].double()
    with torch.no_grad():
        close(fm.double().drift(x, t), model(x, 999 * t.clamp(min=1e-3)))  # as in training: t from 1e-3 to 1
    assert fm.info.num_classes == 0 and fm.info.t_range == (0, 1) and fm.base_std == 1


@pytest.mark.parametrize("kind", ["ddpm", "diffusers"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers(kind, pipeline, tmp_path):
    """Against diffusers' own UNet2DModel and its DDPM scheduler's table."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    old = {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None if kind == "ddpm" else 8,
        num_class_embeds=None if kind == "ddpm" else 5,
        **(old if kind == "ddpm" else {}),
    )
    net, scheduler = released.randomise(net, 0.05).double(), DDPMScheduler()
    DDPMPipeline(net, scheduler).save_pretrained(tmp_path) if pipeline else net.save_pretrained(tmp_path)
    fm = import_checkpoint("diffusers_unet", tmp_path).double()
    x, label = torch.randn(4, 3, 8, 8).double(), None if kind == "ddpm" else torch.tensor([0, 1, 2, 4])
    k, a = torch.tensor([999, 500, 20, 0]), scheduler.alphas_cumprod.double()
    t = 1 / (1 + ((1 - a[k]) / a[k]).sqrt())
    z, wide = x / t[:, None, None, None] * a[k].sqrt()[:, None, None, None], t[:, None, None, None]
    with torch.no_grad():
        theirs = (x - net(z, k, label).sample) / wide
        close(fm.drift(x, t, label), theirs)


class Shell:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


class Evil(released.Persistent):
    """A record of persistence whose source writes a file."""


def raw_tensor_bytes(content):
    """Write a storage of torch as it is in a plain pickle, with other contents."""

    class Inside:
        def __reduce__(self):
            return (torch.storage._load_from_bytes, (content,))

    return pickle.dumps({"ema": Inside()})


def deflated(path):
    """A file of torch.save in which one entry unpacks to a thousand times its size."""
    torch.save({"ema": {"w": torch.zeros(3)}}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, bytes(50_000_000) if name.endswith("data/0") else content)


def overlapping(path):
    """A file of torch.save whose directory lists one stored entry a thousand times."""
    torch.save({"ema": {"w": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(1000):
            again = copy.copy(largest)
            again.filename = f"net/data/{i + 10}"
            archive.filelist.append(again)
        archive._didModify = True  # so that the directory is written anew


def hostile(kind, path, ran):
    """Write a hostile file of ``kind``; if any of it runs, the file ``ran`` appears. Returns the format to try."""
    Evil.source = f"open({str(ran)!r}, 'w').close()"
    if kind == "shell in a pickle":
        path.write_bytes(pickle.dumps({"ema": Shell(ran)}))
    elif kind == "shell in an old pickle":
        path.write_bytes(pickle.dumps({"ema": Shell(ran)}, protocol=0))
    elif kind == "foreign source":
        released.dump({"ema": Evil()}, path)
    elif kind == "foreign source next to a good network":
        net = released.edm("ddpm++", path)
        released.dump({"ema": net, "augment_pipe": Evil()}, path)
    elif kind == "shell in the source's state":
        net = released.edm("ddpm++", path)
        net.model.extra = [{"deep": Shell(ran)}]
        released.dump({"ema": net}, path)
    elif kind == "shell in a tensor":
        path.write_bytes(raw_tensor_bytes(pickle.dumps(Shell(ran))))
    elif kind == "shell in a tensor's file":
        buffer = io.BytesIO()
        torch.save(Shell(ran), buffer, _use_new_zipfile_serialization=False)
        path.write_bytes(raw_tensor_bytes(buffer.getvalue()))
    elif kind == "changed class":
        path.write_bytes(
            b"\x80\x02ctorch.nn.modules.container\nModuleList\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00as\x86b."
        )
    elif kind == "memo bomb":
        path.write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    elif kind == "truncated pickle":
        released.edm("ddpm++", path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "expanded tensor":
        net = released.edm("ddpm++", path)
        net.model.map_layer0._parameters["weight"] = torch.zeros(1).expand(10**6, 10**6)
        released.dump({"ema": net}, path)
    elif kind == "nothing":
        path.write_bytes(b"")
    else:
        return hostile_torch_file(kind, path, ran)
    return "edm"


def hostile_torch_file(kind, path, ran):
    if kind == "shell in a state dict":
        torch.save({"ema": {"w": torch.ones(2)}, "opt": [Shell(ran)]}, path)
    elif kind == "shell in an old state dict":
        torch.save({"ema": Shell(ran)}, path, _use_new_zipfile_serialization=False)
    elif kind == "zip bomb":
        deflated(path)
    elif kind == "overlapping zip":
        overlapping(path)
    elif kind == "truncated state dict":
        torch.save(released_state_dicts.Transformer().w, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "expanded state dict":
        torch.save({"ema": released_state_dicts.Transformer().w | {"x": torch.zeros(1).expand(10**6, 10**6)}}, path)
    elif kind == "other network":
        torch.save({"ema": {"w": torch.ones(2)}}, path)
    return "dit"


KINDS = (
    *("shell in a pickle", "shell in an old pickle", "foreign source", "foreign source next to a good network"),
    *("shell in the source's state", "shell in a tensor", "shell in a tensor's file", "changed class", "memo bomb"),
    *("truncated pickle", "expanded tensor", "nothing", "shell in a state dict", "shell in an old state dict"),
    *("zip bomb", "overlapping zip", "truncated state dict", "expanded state dict", "other network"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused_in_one_line_and_nothing_runs(kind, tmp_path):
    file, ran = tmp_path / "net.pkl", tmp_path / "ran"
    form = hostile(kind, file, ran)
    with pytest.raises(UserError, match=r"^src=\S+net\.pkl: is not a checkpoint") as refused:
        import_checkpoint(form, file)
    assert "\n" not in str(refused.value) and not ran.exists()
    if "shell" in kind and kind != "shell in a tensor":
        assert "system" in str(refused.value)
    if kind == "overlapping zip":
        assert "more than the file" in str(refused.value)
    if "foreign" in kind:
        assert "Evil" in str(refused.value)


def test_the_script_from_file_to_samples(tmp_path):
    """Import, sample with both solvers; a hostile file ends in one line and exit code 2 and leaves nothing."""
    released.edm("ddpm++", tmp_path / "net.pkl")
    out = tmp_path / "made"
    done = run_script("scripts/import_checkpoint.py", "--format=edm", f"--src={tmp_path}/net.pkl", f"--out={out}")
    assert done.returncode == 0 and "NC" in done.stdout
    card = (out / "README.md").read_text()
    assert all(text in card for text in ("sha256", "license", "0.00621", "edm"))
    for solver in ("euler", "heun"):
        arguments = (f"--checkpoint={out}", f"--sampler={solver}", "--steps=2", "--num=4", f"--out={tmp_path}/{solver}")
        assert run_script("scripts/sample.py", *arguments).returncode == 0
        assert np.load(tmp_path / solver / "samples-2.npz")["arr_0"].shape == (4, 16, 16, 3)
    refused = run_script("scripts/sample.py", f"--checkpoint={out}", "--steps=2", f"--out={tmp_path}/map")
    assert refused.returncode == 2 and "drift" in refused.stderr
    form = hostile("shell in a pickle", tmp_path / "bad.pkl", tmp_path / "ran")
    bad = run_script(
        "scripts/import_checkpoint.py", f"--format={form}", f"--src={tmp_path}/bad.pkl", f"--out={tmp_path}/bad"
    )
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and "posix.system" in bad.stderr
    assert not (tmp_path / "bad").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["edm", "edm2", "dit", "rectified_flow"])
def test_an_imported_network_ignores_t_at_first(form, tmp_path):
    """v_{s,t}(x) is the drift at s for every t: the second time starts as nothing, and can be trained."""
    file = tmp_path / "net"
    if form == "dit":
        torch.save(released_state_dicts.Transformer().w, file)
    else:
        {"edm": lambda: released.edm("ddpm++", file), "edm2": lambda: released_edm2.edm2(file)}.get(
            form, lambda: released_state_dicts.NCSNpp().save(file)
        )()
    fm = import_checkpoint(form, file, **({"image_size": 32} if form == "rectified_flow" else {}))
    x, s = torch.randn(4, *fm.info.shape), torch.tensor([0.0, 0.2, 0.5, 1.0])
    t = torch.tensor([0.0, 0.9, 0.6, 1.0])
    label = torch.arange(4) if fm.info.num_classes else None
    v = fm.velocity(x, s, t, label)
    assert torch.equal(v, fm.drift(x, s, label)) and v.isfinite().all()
    v.square().mean().backward()
    second = [
        p.grad for name, p in fm.network.named_parameters() if name.startswith(("embedding.gap.2", "embedding.gains"))
    ]
    assert any(grad is not None and grad.abs().max() > 0 for grad in second)
