"""Checkpoints and snapshots of a run, damaged: refused by file and part."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from flowmaps import UserError
from flowmaps.posthoc_ema import list_snapshots, reconstruct, write_snapshot
from flowmaps.run_weights import read_checkpoint, run_weights

TENSORS = save({"a": torch.ones(3)})
SHA256 = hashlib.sha256(TENSORS).hexdigest()
STATE = {
    "format": 1,
    "step": 5,
    "images_seen": 40,
    "files": {"network.safetensors": SHA256, "ema-0.99.safetensors": SHA256},
}


def checkpoint(run, **changes):
    path = run / "checkpoints" / "step-00000005"
    path.mkdir(parents=True)
    for name in STATE["files"]:
        (path / name).write_bytes(TENSORS)
    (path / "text.safetensors").write_text("text")
    (path / "state.json").write_text(json.dumps({k: v for k, v in (STATE | changes).items() if v != "delete"}))
    return path


@pytest.mark.parametrize("more", [{}, {"written_by": "flowmaps"}, {"skipped": 3, "score": None}])
def test_a_checkpoint_is_read_with_what_training_adds(tmp_path, more):
    state, tensors = read_checkpoint(checkpoint(tmp_path, **more))
    assert state == STATE | more and tensors.keys() == {"network", "ema-0.99"}
    for which in ("raw", "0.99", "0.990", ".99"):
        assert torch.equal(run_weights(str(tmp_path), which)["a"], torch.ones(3))


DAMAGE = {
    "format": [None, "1", 2, True],
    "step": [6, -1, None, "5", "endless"],
    "images_seen": ["delete", []],
    "files": [
        "delete", None, [], {"network.safetensors": 3}, {"network.safetensors": "0"},
        {"../network.safetensors": SHA256},
        {"/etc/passwd": SHA256}, {"gone.safetensors": SHA256},
        {"text.safetensors": hashlib.sha256(b"text").hexdigest()},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGE.items() for value in values])
def test_a_damaged_state_is_refused(tmp_path, name, value):
    if value == "endless":
        path = checkpoint(tmp_path)
        (path / "state.json").write_text('{"step": 1' + 5000 * "0" + "}")
    else:
        path = checkpoint(tmp_path, **{name: value})
    with pytest.raises(UserError, match=str(path)) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", "[" * 100_000, ""])
def test_a_state_that_is_something_else(tmp_path, text):
    path = checkpoint(tmp_path)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json .*: delete "):
        read_checkpoint(path)


@pytest.mark.parametrize("which", ["", "nan", "1e-3", "width-0.05", "../0.99", "0.98", "2"])
def test_weights_that_a_run_does_not_have(tmp_path, which):
    checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"^ema={which}"):
        run_weights(str(tmp_path), which)


def snapshots(run):
    for step in (2, 4):
        write_snapshot(
            run, step, {width: {"a": torch.full((3,), width), "n": torch.tensor(step)} for width in (0.05, 0.1)}
        )
    return list_snapshots(run)


def test_snapshots_are_read(tmp_path):
    snapshots(tmp_path)
    made = reconstruct(tmp_path, 0.07)
    assert 0.05 < made["a"].min() < 0.1 and made["n"] == 4


def rename(file):
    file.rename(file.with_name("step-00000003.safetensors"))


def rewrite(change, step="2"):
    def damage(file):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"step": step, "sha256": "0"})

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (rename, "it says step 2"),
        (rewrite(lambda t: None), "its checksum differs"),
        (rewrite(lambda t: None, "2.0"), "it says step"),
        (rewrite(lambda t: t.pop("0.1/a")), "its parameters are not"),
        (rewrite(lambda t: t.update({"0.1/a": torch.zeros(4)})), "its parameters are not"),
        (rewrite(lambda t: t.update({"wide/a": torch.zeros(3)})), "'wide/a'"),
        (rewrite(lambda t: t.update({"0.3/a": torch.zeros(3), "0.3/n": torch.zeros(())})), "'0.3/"),
        (rewrite(lambda t: t.clear()), "it says step"),
    ],
)
def test_a_damaged_snapshot_is_refused_by_name(tmp_path, damage, reason):
    damage(snapshots(tmp_path)[0])
    with pytest.raises(UserError, match=f"{reason}.*delete it") as error:
        reconstruct(tmp_path, 0.07)
    assert "step-0000000" in str(error.value)
