"""Terminal Velocity Matching's pickles: the right map, and no text in them ever runs."""

import pickle

import pytest
import torch
from helpers import run_script
from helpers.released import Persistent
from helpers.released_maps import Map
from helpers.released_tvm import save

from flowmaps import FlowMap, UserError
from flowmaps.importers import guess_format, import_checkpoint
from samplers import rollout, uniform_times

LABEL = torch.tensor([0, 1, 2, 4, 5])  # the last: no label, whose guidance is 1


def points():
    g = torch.Generator().manual_seed(2)
    times = torch.rand(2, 5, generator=g).double().sort(dim=0).values
    return torch.randn(5, 4, 8, 8, generator=g).double(), *times


def unscaled(theirs, x, s, t):
    return theirs(x, s, t, LABEL) / torch.where(theirs.classes == LABEL, 1.0, theirs.scale)[:, None, None, None]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_published_map(scaled, tmp_path):
    theirs = save(tmp_path / "im256_w2.pkl", scaled=scaled)
    fm = import_checkpoint("tvm", tmp_path / "im256_w2.pkl").double()
    x, s, t = points()
    expect = theirs if scaled else lambda x, s, t, label: unscaled(theirs, x, s, t)
    with torch.no_grad():
        for start, end in ((s, t), (s, s), (0 * s, 0 * t + 1)):
            expected = expect(x, start, end, LABEL)
            assert expected.std() > 0.1
            assert (fm.velocity(x, start, end, LABEL) - expected).abs().max() <= 1e-5 * expected.abs().max()
        half = torch.full_like(s, 0.5)
        middle = x + 0.5 * expect(x, 0 * s, half, LABEL)
        expected = middle + 0.5 * expect(middle, half, 2 * half, LABEL)
        assert (rollout(fm, x, uniform_times(2), LABEL) - expected).abs().max() <= 1e-5 * expected.abs().max()
    info = fm.info
    assert (info.kind, info.guidance, info.num_classes, info.label_dropout) == ("map", 2.0, 5, 0.1)
    assert info.vae == "stabilityai/sd-vae-ft-ema" and info.latent_shift[1] == -0.27787343
    assert info.latent_scale[0] == pytest.approx(1 / 4.85503674)
    assert "NC" in info.origin["license"] and info.origin["left out"] == "dataset_kwargs"
    assert "guidance 2.0" in info.origin["assumed"]
    with pytest.raises(UserError, match="is baked into this model"):
        info.check_guidance(3.0)
    fm.float().save_pretrained(tmp_path / "out")
    again = FlowMap.from_pretrained(tmp_path / "out")
    assert again.info == info and "CC BY-NC-SA" in (tmp_path / "out/README.md").read_text()


def test_weight_and_scaling_where_the_file_does_not_say_them(tmp_path):
    """The names of the published files have the weight; one of them is not scaled."""
    for name, size, weight, scale in (("im256_w1p75", 8, 1.75, 1.75), ("im512_w2p5", 64, 2.5, 1.0)):
        save(tmp_path / f"{name}.pkl", Map("tvm", size=size, patch=size // 2, scale=weight), scaled=None)
        fm = import_checkpoint("tvm", tmp_path / f"{name}.pkl")
        assert (fm.info.guidance, fm.network.config.label_scale) == (weight, scale)
        assert "output times its weight" in fm.info.origin["assumed"]
    assert fm.info.latent_shift == (1.56, -0.695, 0.483, 0.729)
    (tmp_path / f"{name}.pkl").rename(tmp_path / "net.pkl")
    with pytest.raises(UserError, match=r"^guidance: is needed"):
        import_checkpoint("tvm", tmp_path / "net.pkl")
    assert import_checkpoint("tvm", tmp_path / "net.pkl", guidance=3.0).network.config.label_scale == 3.0


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_text_in_the_file_runs(protocol, tmp_path, monkeypatch):
    """The source of every class would leave a mark, in the usual reader; ours reads the same map, and leaves none."""
    mark = tmp_path / "mark"
    monkeypatch.setattr(Persistent, "source", f"open({str(mark)!r}, 'w').close()")
    theirs = save(tmp_path / "im256_w2.pkl", protocol=protocol)
    assert str(mark).encode() in (tmp_path / "im256_w2.pkl").read_bytes()
    fm = import_checkpoint("tvm", tmp_path / "im256_w2.pkl").double()
    assert guess_format(tmp_path / "im256_w2.pkl") == "tvm"
    done = run_script("scripts/import_checkpoint.py", f"--src={tmp_path}/im256_w2.pkl", f"--out={tmp_path}/made")
    assert done.returncode == 0 and "format   tvm" in done.stdout, done.stderr
    assert not mark.exists()
    x, s, t = points()
    with torch.no_grad():
        assert (fm.velocity(x, s, t, LABEL) - theirs(x, s, t, LABEL)).abs().max() < 1e-4


def test_persistence_in_a_folder_of_another_name(tmp_path):
    save(tmp_path / "a_w2.pkl")
    content = (tmp_path / "a_w2.pkl").read_bytes()
    (tmp_path / "b_w2.pkl").write_bytes(content.replace(b"torch_utils.persistence", b"other_utils.persistence"))
    one, two = (import_checkpoint("tvm", tmp_path / name) for name in ("a_w2.pkl", "b_w2.pkl"))
    assert one.fingerprint() == two.fingerprint() and one.info.origin["sha256"] != two.info.origin["sha256"]


def test_a_compiled_network(tmp_path):
    theirs = save(tmp_path / "a_w2.pkl", change=compiled)
    x, s, t = points()
    with torch.no_grad():
        found = import_checkpoint("tvm", tmp_path / "a_w2.pkl").double().velocity(x, s, t, LABEL)
        assert (found - theirs(x, s, t, LABEL)).abs().max() < 1e-4


def compiled(net):
    """Wrap the network as torch.compile does, under one more name."""
    net.model = torch.nn.ModuleDict({"_orig_mod": net.model})


class Strange(Persistent):
    """A class that no such file has."""


def altered(**changes):
    """Attributes of places in the network, by their dotted names with two underscores."""

    def change(net):
        for place, value in changes.items():
            *path, name = place.split("__")
            setattr(net.get_submodule(".".join(path)), name, value)

    return change


FIRST = "model__blocks__0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (altered(**{f"{FIRST}__attn__num_heads": 4}), "blocks.0.attn.num_heads is 4, and only 2 has a network here"),
        (altered(**{f"{FIRST}__attn__q_norm__eps": 1e-3}), r"q_norm.eps is 0\.001"),
        (altered(**{f"{FIRST}__mlp__act__approximate": "none"}), "approximate is 'none'"),
        (lambda net: net.add_module("other", Strange()), "brings its own code for 'Strange'"),
        (lambda net: net.add_module("other", torch.nn.Tanh()), "names torch.nn.modules.activation.Tanh"),
        (lambda net: net.model.blocks[0].add_module("more", torch.nn.Linear(1, 1)), "more.*is new"),
        (lambda net: delattr(net.model.blocks[1].attn, "qkv"), "is missing"),
        (lambda net: delattr(net.model, "guidance_embedder"), "it has no 'guidance_embedder.mlp.0.weight'"),
        (lambda net: net._init_kwargs.update(do_scale_param=1), "do_scale_param is 1"),
    ],
)
def test_other_networks_and_foreign_classes_are_refused_in_one_line(change, reason, tmp_path):
    save(tmp_path / "im256_w2.pkl", change=change)
    with pytest.raises(UserError, match=rf"^src=\S+pkl: .*{reason}") as refused:
        import_checkpoint("tvm", tmp_path / "im256_w2.pkl")
    assert "\n" not in str(refused.value)


def test_other_files(tmp_path):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": 3, "net": None}))
    with pytest.raises(UserError, match="it has no net"):
        import_checkpoint("tvm", tmp_path / "net.pkl")
    torch.save(Map("soflow").w, tmp_path / "net.pkl")
    with pytest.raises(UserError, match=r"zip archive, as torch\.save"):
        import_checkpoint("tvm", tmp_path / "net.pkl")
