"""Graphs for torch.export and ONNX: equal to PyTorch at other batches than traced, nothing of the machine inside."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import run_script
from helpers.makers import write_vae
from helpers.small_networks import LABELLED, SMALL, small

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.deployment import onnx_files
from flowmaps.deployment.graphs import Agreement, graphs, write_graphs, write_pt2
from flowmaps.deployment.onnx_files import quantised, runner, write_onnx
from flowmaps.images import to_uint8
from samplers import rollout, uniform_times

onnxruntime = pytest.importorskip("onnxruntime")
slow = pytest.mark.slow


def guided(name):
    """A small network that takes a guidance weight, or with times of guidance, as a model that was trained so."""
    fm = small(name).eval()
    interval = fm.network.config.get("guidance_interval", False)
    fm.info = replace(fm.info, guidance_max=8.0, guidance_interval=interval)
    return fm


def metadata(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_directory_of_graphs_with_their_facts(tmp_path, ending):
    """A program without flowmaps finds all that it needs; equal to the float at another batch than the traced one."""
    fm = small("MLP").eval()
    fm.info = replace(fm.info, t_range=(0.0, 0.9))
    out = tmp_path / "out"
    lines = write_graphs(fm, out, ending, write_onnx if ending == "onnx" else write_pt2)
    assert [line.split(":")[0] for line in lines] == [f"velocity.{ending}", f"one_step.{ending}"]
    facts = json.loads((out / "flow_map.json").read_text())
    assert FlowMapInfo.from_dict(facts["info"]) == fm.info and facts["base_std"] == fm.base_std
    assert facts["weights"] == fm.fingerprint()
    assert facts["graphs"][f"velocity.{ending}"]["inputs"] == {"x": ["batch", 2], "s": ["batch"], "t": ["batch"]}
    assert {file.name for file in out.iterdir()} == {"flow_map.json", f"velocity.{ending}", f"one_step.{ending}"}
    if ending == "onnx":
        found = metadata(out / "velocity.onnx")
        assert FlowMapInfo.from_dict(json.loads(found["info"])) == fm.info and float(found["base_std"]) == fm.base_std
        for file in out.glob("*.onnx"):
            content = file.read_bytes()
            assert not [text for text in (b"site-packages", b".py", b"pkg.torch", b"/tmp", b"/home") if text in content]
    write_graphs(fm, out, ending, write_onnx if ending == "onnx" else write_pt2)  # replaces its own
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match="flowmaps did not write"):
        write_graphs(fm, out, ending, write_pt2)


def test_weights_beyond_the_limit_of_a_file_are_in_a_second_one(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LARGEST_FILE", 1000)
    [line, _] = write_graphs(small("MLP").eval(), tmp_path / "out", "onnx", write_onnx)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"velocity.onnx", "velocity.onnx.data"}
    assert "differs from PyTorch by at most" in line


@slow
@pytest.mark.parametrize("name", SMALL)
def test_onnxruntime_agrees_with_pytorch(tmp_path, name):
    fm = small(name).eval()
    velocity = graphs(fm)[0]
    agreement = write_onnx(velocity, fm, tmp_path / "velocity.onnx")
    assert agreement.difference <= 1e-4 * max(1, agreement.largest)


@slow
@pytest.mark.parametrize("name", ["UNet adm", "EDM2UNet edm", "DiT qk_norm", "IMFDiT"])
def test_guidance_is_an_input_of_its_own(tmp_path, name):
    fm = guided(name)
    [velocity, _] = graphs(fm)
    assert velocity.inputs(3)["guidance"].shape == (3, 3 if fm.info.guidance_interval else 1)
    write_onnx(velocity, fm, tmp_path / "v.onnx")
    run = runner(tmp_path / "v.onnx", "velocity")
    given = velocity.inputs(4)
    given["guidance"] = given["guidance"].clone()
    given["guidance"][:, 0] = 5.0
    other = velocity.inputs(4)
    assert not torch.allclose(run(given), run(other))
    with torch.no_grad():
        torch.testing.assert_close(run(given), velocity.module(**given), rtol=1e-4, atol=1e-5)


@slow
@pytest.mark.parametrize("name", ["UNet", "EDM2UNet", "DiT", "IMFDiT"])
def test_torch_export_is_exact(tmp_path, name):
    for graph in graphs(fm := small(name).eval()):
        assert write_pt2(graph, fm, tmp_path / "graph.pt2").difference <= 1e-6


@slow
@pytest.mark.parametrize(("storage", "most"), [("float32", 1e-5), ("float16", 5e-3), ("int8", 0.2)])
def test_steps_with_the_velocity_graph_are_those_of_rollout(tmp_path, storage, most):
    """A loop of x += (t - s) v, in NumPy, from the shipped model; smaller weights cost what the table says."""
    fm = FlowMap.from_pretrained("digits")
    velocity, one_step = graphs(fm)
    write_onnx(velocity, fm, tmp_path / "velocity.onnx", storage)
    session = onnxruntime.InferenceSession(tmp_path / "velocity.onnx", providers=["CPUExecutionProvider"])
    x, label = fm.noise(6, seed=0), torch.arange(6)
    y, rows = x.numpy(), np.ones(6, np.float32)
    for s, t in ((0.0, 0.5), (0.5, 1.0)):
        given = {"x": y, "s": s * rows, "t": t * rows, "label": label.numpy()}
        y = y + np.float32(t - s) * session.run(None, given)[0]
    with torch.no_grad():
        expected = rollout(fm, x, uniform_times(2), label)
    assert np.abs(y - expected.numpy()).max() <= most
    with torch.no_grad():
        images = one_step.module(x, label)
    assert write_onnx(one_step, fm, tmp_path / "one_step.onnx").difference <= 1
    with torch.no_grad():
        torch.testing.assert_close(images, to_uint8(rollout(fm, x, uniform_times(1), label)).permute(0, 2, 3, 1))


@slow
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_latents_have_a_decoder_of_their_own(tmp_path, ending):
    fm = small("UNet", channels=4).eval()
    scaling = {"latent_scale": (0.2, 0.3, 0.4, 0.5), "latent_shift": (0.1, 0.0, -0.2, 0.3), "vae_range": (0.0, 1.0)}
    fm.info = replace(fm.info, shape=(4, 8, 8), vae=str(write_vae(tmp_path / "vae")), **scaling)
    made = {graph.name: graph for graph in graphs(fm)}
    assert list(made) == ["velocity", "one_step", "decoder"] and made["one_step"].output == "sample"
    latents = fm.noise(3, seed=1)
    with torch.no_grad():
        images = made["decoder"].module(latents)
    torch.testing.assert_close(images, to_uint8(fm.decode(latents)).permute(0, 2, 3, 1), rtol=0, atol=1)
    write = write_onnx if ending == "onnx" else write_pt2
    assert write(made["decoder"], fm, tmp_path / f"decoder.{ending}").difference <= 1


def test_a_drift_has_no_graph_of_one_step():
    fm = small("MLP").eval()
    fm.info = replace(fm.info, kind="drift")
    assert [graph.name for graph in graphs(fm)] == ["velocity"]
    with pytest.raises(UserError, match="train mode"):
        graphs(small("MLP"))


@pytest.mark.parametrize("name", LABELLED[:3])
def test_examples_have_every_class_and_different_times(name):
    given = graphs(guided(name))[0].inputs(5)
    assert given["label"].tolist() == [0, 1, 2, 3, 0] and (given["s"] <= given["t"]).all()
    assert len({*given["s"].tolist()}) == 5


def test_int8_is_off_by_half_a_step_of_each_channel():
    numbers = np.random.default_rng(0).normal(size=(6, 5, 3, 3)).astype(np.float32)
    numbers[2] = 0
    for axis in (0, 1):
        integers, scale = quantised(numbers, axis)
        shape = [-1 if i == axis else 1 for i in range(4)]
        step = scale.reshape(shape)
        assert integers.dtype == np.int8 and (np.abs(integers * step - numbers) <= step * 0.5001).all()


def test_a_graph_that_disagrees_is_refused():
    Agreement(9e-5, 0.5, 1.0, False).check("velocity.onnx")
    Agreement(1.0, 255.0, 0.1, True).check("one_step.onnx")
    for wrong in (Agreement(2e-4, 0.5, 1.0, False), Agreement(2.0, 255.0, 0.1, True), Agreement(np.nan, 1, 1, False)):
        with pytest.raises(UserError, match="differs from PyTorch"):
            wrong.check("velocity.onnx")
    graph = graphs(small("MLP").eval())[0]
    with pytest.raises(UserError, match="at a batch of 5"):  # a batch size that was frozen
        graph.compare(lambda given: torch.zeros(1, 2))


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no")

    with pytest.raises(UserError):
        write_graphs(small("MLP").eval(), tmp_path / "out", "onnx", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--storage=int8", "--out=unused"], "--storage=int8: needs --onnx"),
        (["--onnx=x", "--license=mit", "--how=README.md"], "--how=README.md: needs --out"),
        (["--onnx=same", "--torch_export=same"], "is also"),
        (["--web=page.txt"], "must end in .html"),
        ([], "--out: missing"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(flags, message):
    done = run_script("scripts/export.py", "--checkpoint=digits", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="needs onnxscript: pip install onnxscript"):
        onnx_files.check_installed()


@slow
def test_command_writes_graphs_and_says_how_they_agree(tmp_path):
    flags = [f"--onnx={tmp_path}/a", "--storage=float16", f"--torch_export={tmp_path}/b"]
    done = run_script("scripts/export.py", "--checkpoint=assets/checkerboard", *flags, check=True)
    assert f"wrote    {tmp_path}/a/velocity.onnx: " in done.stdout and "differs from PyTorch by at most" in done.stdout
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"flow_map.json", "velocity.pt2", "one_step.pt2"}
