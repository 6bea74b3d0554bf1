"""Export: native and pipeline round trips are bit-equal; damage is refused by file name."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.export import MODEL, check_output
from flowmaps.files import new_directory
from flowmaps.networks import MLP, UNet
from flowmaps.pipeline import FlowMapPipeline
from samplers import euler, rollout, uniform_times

WEIGHTS = "network/diffusion_pytorch_model.safetensors"


def build(kind="map"):
    torch.manual_seed(0)
    network = UNet(
        image_size=8, channels=1, width=8, channel_mult=(1,), blocks=1, attention_resolutions=(8,), num_classes=4
    )
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    names = ("T-shirt/top", "é", "4", "d" * 255)
    info = FlowMapInfo((1, 8, 8), 4, kind, data="digits", ema=0.99, images_seen=12, class_names=names)
    return FlowMap(network.eval(), "trigonometric", 0.5, info)


@pytest.fixture
def saved(tmp_path):
    fm = build()
    fm.save_pretrained(tmp_path / "model")
    return fm, tmp_path / "model"


def test_native_round_trip(saved):
    fm, path = saved
    again = FlowMap.from_pretrained(path)
    assert again.info == fm.info and again.base_std == fm.base_std
    assert again.interpolant_name == fm.interpolant_name and not again.training
    x, label = fm.noise(5, 0), torch.arange(5) % 4
    assert torch.equal(rollout(again, x, uniform_times(2), label), rollout(fm, x, uniform_times(2), label))
    assert not [p for p in path.rglob("*") if p.suffix not in (".json", ".safetensors") and p.is_file()]


def test_points_export_the_same_way(tmp_path):
    fm = FlowMap(MLP(width=8, depth=1, fourier_features=2), info=FlowMapInfo(shape=(2,)))
    fm.save_pretrained(tmp_path / "model")
    x = fm.noise(5, 0)
    assert torch.equal(
        rollout(FlowMap.from_pretrained(tmp_path / "model"), x, uniform_times(2)), rollout(fm, x, uniform_times(2))
    )
    pipeline = FlowMapPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(pipeline(latents=x, output_type="pt").images, rollout(fm, x, uniform_times(1)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["map", "drift"])
def test_pipeline_equals_native_sampler(tmp_path, kind, steps):
    fm = build(kind)
    fm.save_pretrained(tmp_path / "model")
    pipeline = FlowMapPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    x, label = fm.noise(6, 0), torch.arange(6) % 4
    with torch.no_grad():
        times = uniform_times(steps)
        native = rollout(fm, x, times, label) if kind == "map" else euler(fm.drift, x, times, label)
    images = pipeline(latents=x, num_inference_steps=steps, class_labels=label, output_type="latent").images
    torch.testing.assert_close(images, native, rtol=0, atol=1e-6)


def test_pipeline_takes_a_step_table_and_gives_images(saved):
    fm, path = saved
    pipeline = FlowMapPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    x, label = fm.noise(3, 0), torch.arange(3)
    with torch.no_grad():
        native = rollout(fm, x, torch.tensor([0.0, 0.7, 1.0]), label)
    images = pipeline(latents=x, sigmas=[1.0, 0.3], class_labels=label, output_type="latent").images
    torch.testing.assert_close(images, native, rtol=0, atol=1e-6)
    assert pipeline(3).images[0].size == (8, 8)
    assert pipeline(3, output_type="np").images.shape == (3, 8, 8, 1)
    with pytest.raises(UserError, match="label"):
        pipeline(2, class_labels=9)


def test_callback_sees_every_step_and_may_replace_the_state(saved):
    fm, path = saved
    pipeline = FlowMapPipeline.from_pretrained(path)
    x, label, seen = fm.noise(2, 0), torch.arange(2), []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, float(timestep), tensors["latents"]))
        return {"latents": tensors["latents"] + 1} if step == 0 else None

    options = {"latents": x, "num_inference_steps": 2, "class_labels": label, "output_type": "latent"}
    made = pipeline(**options, callback_on_step_end=callback).images
    with torch.no_grad():
        half = fm(x, torch.zeros(2), torch.full((2,), 0.5), label)
        expected = fm(half + 1, torch.full((2,), 0.5), torch.ones(2), label)
    assert [step for step, *_ in seen] == [0, 1] and seen[0][1] > seen[1][1]
    torch.testing.assert_close(seen[0][2], half)
    torch.testing.assert_close(made, expected)


def test_generators_one_each_or_one_for_all(saved):
    """A list gives each sample its own stream, whatever the others are."""
    pipeline = FlowMapPipeline.from_pretrained(saved[1])

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    options = {"class_labels": 1, "output_type": "latent"}
    pair = pipeline(2, generator=generators(3, 4), **options).images
    torch.testing.assert_close(pair[1:], pipeline(1, generator=generators(4), **options).images)
    one = [pipeline(2, generator=generators(3)[0], **options).images for _ in range(2)]
    assert torch.equal(*one) and not torch.equal(one[0], pair)


def test_half_precision(saved):
    """bfloat16 weights: samples of that type, near those of float32."""
    fm, path = saved
    pipeline = FlowMapPipeline.from_pretrained(path, dtype=torch.bfloat16)
    assert pipeline.network.dtype == torch.bfloat16
    options = {"num_inference_steps": 4, "class_labels": torch.arange(3)}
    x = fm.noise(3, 0)
    half = pipeline(latents=x, output_type="latent", **options).images
    full = FlowMapPipeline.from_flow_map(fm)(latents=x, output_type="latent", **options).images
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).square().mean().sqrt() < 0.03 * full.std()
    assert pipeline(3, **options).images[0].size == (8, 8)


@pytest.mark.parametrize("way", ["model", "group"])
def test_offloaded_is_the_same(saved, way):
    """The hooks that move weights to where they are needed fire; here from the CPU to the CPU."""
    fm, path = saved
    pipeline = FlowMapPipeline.from_pretrained(path)
    options = {"latents": fm.noise(3, 0), "num_inference_steps": 2, "class_labels": 1, "output_type": "latent"}
    before = pipeline(**options).images
    cpu = torch.device("cpu")
    if way == "model":
        pipeline.enable_model_cpu_offload(device=cpu)
    else:
        pipeline.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(pipeline(**options).images, before)


def test_progress_bar_counts_steps_and_can_be_silenced(saved, capsys):
    pipeline = FlowMapPipeline.from_pretrained(saved[1])
    capsys.readouterr()
    pipeline(1, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, num_inference_steps=3)
    assert capsys.readouterr().err == ""


def test_an_interrupted_export_leaves_the_old_one(saved, monkeypatch):
    _, path = saved
    monkeypatch.setattr(UNet, "save_pretrained", lambda self, d: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build().save_pretrained(path)
    monkeypatch.undo()
    FlowMap.from_pretrained(path)
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_is_repaired(saved):
    """The old export waits under another name; the next write puts it back before it begins."""
    fm, path = saved
    path.rename(path.with_name(f".{path.name}.old"))
    with pytest.raises(KeyError), new_directory(path, MODEL):
        raise KeyError
    assert FlowMap.from_pretrained(path).info == fm.info


@pytest.mark.parametrize("name", ["keep.txt", "network/notes.md", "src/", ".git/config", "network/old/"])
@pytest.mark.parametrize("first", [False, True])
def test_an_export_into_a_directory_of_the_users_deletes_nothing(tmp_path, name, first):
    """A project folder, or an export to which something was added."""
    target = tmp_path / "model"
    if first:
        build().save_pretrained(target)
    mine = target / name
    (mine if name.endswith("/") else mine.parent).mkdir(parents=True, exist_ok=True)
    if not name.endswith("/"):
        mine.write_text("mine")
    before = sorted(target.rglob("*"))
    for write in (build().save_pretrained, lambda path: check_output(str(path))):
        with pytest.raises(UserError, match="flowmaps did not write"):
            write(target)
    assert sorted(target.rglob("*")) == before and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("target", [".", "..", "../here", "model/.."])
def test_an_export_does_not_replace_the_current_directory(tmp_path, monkeypatch, target):
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "model").rmdir()
    monkeypatch.chdir(tmp_path / "here")
    if target == "model/..":
        (tmp_path / "here" / "model").mkdir()
    with pytest.raises(UserError, match="current directory"):
        build().save_pretrained(target)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_edited_card_is_kept(tmp_path):
    build().save_pretrained(tmp_path / "model", "# Card")
    build().save_pretrained(tmp_path / "model", "# Another")
    card = tmp_path / "model" / "README.md"
    card.write_text(card.read_text() + "\nMy own notes.\n")
    with pytest.raises(UserError, match=r"README\.md was edited by hand"):
        build().save_pretrained(tmp_path / "model")
    path = tmp_path / "model"
    path.rename(path.with_name(".model.old"))  # where a kill leaves it
    with pytest.raises(UserError, match=r"README\.md was edited by hand"):
        build().save_pretrained(path)
    assert "My own notes." in card.read_text() and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_export_does_not_replace_what_it_is_made_from(saved):
    run = saved[1].parent
    check_output(str(run / "other"), str(run))
    for out in (run / "model", run / "model" / ".." / "model"):
        for source in (run, run / "model"):
            with pytest.raises(UserError, match="is the checkpoint itself"):
                check_output(str(out), str(source))


def break_truncate(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    return WEIGHTS


def break_empty(path):
    (path / WEIGHTS).write_bytes(b"")
    return WEIGHTS


def break_missing(path):
    (path / WEIGHTS).unlink()
    return WEIGHTS


def break_pickle(path):
    torch.save({"a": 1}, path / WEIGHTS)
    return WEIGHTS


def break_shape(path):
    tensors = load_file(path / WEIGHTS)
    tensors["stem.weight"] = tensors["stem.weight"][:1]
    save_file(tensors, path / WEIGHTS)
    return WEIGHTS


def edit(path, file, **changes):
    values = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({k: v for k, v in (values | changes).items() if v != "delete"}))
    return file


def facts(path, **changes):
    index = json.loads((path / "model_index.json").read_text())
    return edit(path, "model_index.json", info=index["info"] | changes)


DAMAGE = [
    break_truncate,
    break_empty,
    break_missing,
    break_pickle,
    break_shape,
    lambda path: edit(path, "model_index.json", network=["os", "system"]),
    lambda path: edit(path, "model_index.json", network="delete"),
    lambda path: edit(path, "model_index.json", info={"colour": 1}),
    lambda path: edit(path, "model_index.json", info=3),
    lambda path: edit(path, "model_index.json", info="delete"),
    lambda path: edit(path, "model_index.json", interpolant="cubic"),
    lambda path: edit(path, "model_index.json", base_std="wide"),
    lambda path: edit(path, "model_index.json", info=[]),
    lambda path: edit(path, "model_index.json", info={"schedules": 3}),
    lambda path: edit(path, "model_index.json", info={"shape": 3, "num_classes": "ten"}),
    lambda path: edit(path, "model_index.json", network=["a", []]),
    lambda path: edit(path, "model_index.json", network=["a", "UNet", "b"]),
    lambda path: edit(path, "model_index.json", vae=["diffusers"]),
    lambda path: edit(path, "model_index.json", vae=3),
    lambda path: edit(path, "model_index.json", scheduler="delete"),
    lambda path: edit(path, "model_index.json", interpolant=None),
    lambda path: edit(path, "model_index.json", base_std=True),
    lambda path: edit(path, "model_index.json", colour=1),
    lambda path: edit(path, "scheduler/scheduler_config.json", shift=3.0),
    lambda path: edit(path, "scheduler/scheduler_config.json", shift="delete"),
    lambda path: edit(path, "scheduler/scheduler_config.json", num_train_timesteps="many"),
    lambda path: [(path / "scheduler/scheduler_config.json").write_text("[" * 9999), "scheduler_config.json"][1],
    lambda path: [(path / "model_index.json").write_text("[" * 100_000), "model_index.json"][1],
    lambda path: [(path / "network/config.json").write_text('{"width": 1' + "0" * 9999 + "}"), "config.json"][1],
    lambda path: facts(path, num_classes=10**12),
    lambda path: facts(path, shape=[3, 8, 8]),
    lambda path: facts(path, shape=[1, 8, 16]),
    lambda path: facts(path, shape=[1]),
    lambda path: edit(path, "network/config.json", blocks=10**9),
    lambda path: edit(path, "network/config.json", channel_mult=[1] * 10**6),
    lambda path: edit(path, "network/config.json", image_size=10**9),
    lambda path: edit(path, "network/config.json", width=10_000_000),
    lambda path: edit(path, "network/config.json", patch=0),
    lambda path: edit(path, "network/config.json", data_std=None),
    lambda path: edit(path, "network/config.json", bogus=1),
    lambda path: edit(path, "network/config.json", image_size="big"),
    lambda path: [(path / "network/config.json").write_text("{"), "network/config.json"][1],
    lambda path: [(path / "model_index.json").write_text("[]"), "model_index.json"][1],
    lambda path: [(path / "model_index.json").unlink(), "model_index.json"][1],
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line_that_names_the_file(saved, damage):
    _, path = saved
    file = damage(path)
    with pytest.raises(UserError, match=file) as error:
        FlowMap.from_pretrained(path)
    assert "\n" not in str(error.value)


def test_missing_directory_and_bad_hub_id():
    with pytest.raises(UserError, match="no directory"):
        FlowMap.from_pretrained("runs/nowhere/at/all")


class OwnNetwork(ModelMixin, ConfigMixin):
    """A network that is in no table of the package."""

    @register_to_config
    def __init__(self, width: int = 3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(width))

    def forward(self, x, s, t, label=None):
        return self.scale * x


def test_a_network_class_of_the_users_own(tmp_path):
    fm = FlowMap(OwnNetwork(2), info=FlowMapInfo(shape=(2,)))
    fm.save_pretrained(tmp_path / "model")
    again = FlowMap.from_pretrained(tmp_path / "model", network_class=OwnNetwork)
    assert torch.equal(again.network.scale, fm.network.scale)
    for given, remedy in ((None, "network_class"), (MLP, "expected one of MLP")):
        with pytest.raises(UserError, match=remedy):
            FlowMap.from_pretrained(tmp_path / "model", network_class=given)
    with pytest.raises(UserError, match="Linear cannot be saved"):
        FlowMap(torch.nn.Linear(1, 1)).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("origin", [{}, {"format": "edm", "license": "NC"}])
def test_export_writes_what_the_pipeline_writes(tmp_path, origin):
    fm = build()
    fm.info = replace(fm.info, origin=origin)
    fm.save_pretrained(tmp_path / "ours")
    FlowMapPipeline.from_flow_map(fm).save_pretrained(tmp_path / "theirs")
    names = [path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert (tmp_path / "ours" / "README.md").exists() == bool(origin)
