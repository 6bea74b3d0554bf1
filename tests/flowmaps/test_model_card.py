"""The model card, and its way to the hub."""

import json

import pytest
from helpers import run_script
from helpers.small_networks import UNET
from huggingface_hub import ModelCard
from PIL import Image

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.hub import check_upload, to_hub
from flowmaps.model_card import PICTURE, SOURCE, card
from flowmaps.networks import UNet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("card") / "run"
    run_script("scripts/train.py", "--config=configs/digits.py:lagrangian,smoke", f"--workdir={run}", check=True)
    score = ["--reference=digits:heldout", "--steps=1,2", "--num=40", "--sampler=map,euler", f"--json={run}/fid.json"]
    run_script("scripts/fid.py", f"--checkpoint={run}", *score, check=True)
    return run


def test_card_says_what_was_measured_and_how_to_use_it(run, tmp_path):
    (tmp_path / "how.md").write_text("Trained for 20 steps, which is nothing.")
    flags = [f"--results={run}/fid.json", f"--how={tmp_path}/how.md", "--license=apache-2.0", "--name=somebody/digits"]
    run_script("scripts/export.py", f"--checkpoint={run}", f"--out={tmp_path}/out", *flags, check=True)
    made = ModelCard.load(tmp_path / "out" / "README.md")  # as the hub reads it
    assert (
        made.data.license == "apache-2.0" and made.data.datasets == ["digits"] and made.data.library_name == "flowmaps"
    )
    results = json.loads((run / "fid.json").read_text())["results"]
    assert [r.metric_value for r in made.data.eval_results] == [round(row["FD-digits"], 4) for row in results]
    assert {r.metric_type for r in made.data.eval_results} == {"FD-digits"}  # no Inception, no FID
    text = made.text
    for part in (
        "which is nothing",
        'from_pretrained("somebody/digits")',
        "| map, uniform steps |",
        "jumps from noise",
        f"pip install git+{SOURCE}",
        f"[flowmaps]({SOURCE})",
        "| interpolant | linear |",
        "![samples](samples.png)",
        "flowmaps sample --checkpoint=somebody/digits --steps=1 ",
        "flowmaps fid --checkpoint=somebody/digits --reference=digits:heldout --num=40 --seed=0 --sampler=map,euler "
        "--schedule=uniform --steps=1,2\n",
    ):
        assert part in text
    assert str(run) not in made.content and "1 steps" not in made.content and "scripts/" not in made.content
    with Image.open(tmp_path / "out" / "samples.png") as picture:  # 1, 2, 4 and 8 steps of 8 images
        assert picture.size == (8 * 52, 4 * 52)
    fm = FlowMap.from_pretrained(tmp_path / "out")
    assert fm.fingerprint() in text and "FID" not in text.replace("fid.py", "").replace("FID-", "")


def test_the_command_of_a_guided_record_has_the_times_of_guidance(run):
    record = json.loads((run / "fid.json").read_text()) | {"guidance": 3.0, "guidance_interval": [0.2, 0.6]}
    assert " --guidance=3.0 --guidance_interval=0.2,0.6\n" in card(
        FlowMap.from_pretrained(run), "a/b", records=[record]
    )


@pytest.mark.parametrize(
    ("policy", "flag"),
    [("balanced", None), ("random", "--label_policy=random"), ("sha256:00", "--label_policy=LABELS.json")],
)
def test_the_command_of_a_record_has_its_label_policy(run, policy, flag):
    record = json.loads((run / "fid.json").read_text()) | {"label_policy": policy}
    text = card(FlowMap.from_pretrained(run), "a/b", records=[record])
    assert f" {flag}\n" in text if flag else "label_policy" not in text


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ({"data": "folder"}, False),  # how the images were stored, not what they are
        ({"data": "faces"}, True),
        ({"data": "faces", "kind": "drift"}, True),
    ],
)
def test_card_names_the_data_and_only_what_a_reader_has(facts, shown):
    fm = FlowMap(UNet(**UNET), info=FlowMapInfo(shape=(1, 8, 8), **facts))
    made = ModelCard(card(fm, "somebody/model"))
    assert made.data.datasets == (["faces"] if shown else None) and "folder" not in made.content
    assert ("| trained on | faces |" in made.text) == shown and PICTURE not in made.text
    assert ("--sampler=euler" in made.text) == (fm.info.kind == "drift")


def test_card_names_classes_in_harmless_letters():
    names = ("T-shirt/top", "a|b", "<b>\n# c", *(f"class {i}" for i in range(3, 30)))
    network = UNet(**UNET, num_classes=30)
    text = card(FlowMap(network, info=FlowMapInfo(shape=(1, 8, 8), num_classes=30, class_names=names)))
    assert "| classes | 30: T-shirt/top, a b,  b    c, class 3, " in text and "class 19, and 10 more |" in text


def test_a_picture_is_left_out_on_request(run, tmp_path):
    run_script("scripts/export.py", f"--checkpoint={run}", f"--out={tmp_path}/out", "--nopicture", check=True)
    assert not (tmp_path / "out" / PICTURE).exists() and PICTURE not in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_on_a_card(run, tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    for flags, named in (
        ([f"--results={tmp_path}/bad.json"], "bad.json: not a record"),
        ([f"--results={run}/fid.json", "--ema=raw"], "weights other than those"),
        ([f"--how={tmp_path}/none.md"], "--how"),
        (["--push_to_hub=abc"], "--push_to_hub=abc: not a hub id"),
        ([f"--out={run}/model"], "the checkpoint itself"),
    ):
        done = run_script("scripts/export.py", f"--checkpoint={run}", f"--out={tmp_path}/out", *flags)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists() and (run / "model").exists()


def test_upload_is_by_flag_alone(run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("flowmaps.hub.create_repo", lambda *a, **kw: calls.append(("create", a)) or "https://hub/x")
    monkeypatch.setattr("flowmaps.hub.upload_folder", lambda **kw: calls.append(("upload", kw)))
    assert to_hub(tmp_path, "me/model") == "https://hub/x"
    assert [name for name, _ in calls] == ["create", "upload"] and calls[1][1]["folder_path"] == tmp_path
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for hub_id, reason in (
        ("me/model", "offline|token"),
        ("abc", "owner/name"),
        ("a/b/c", "owner/name"),
        ("", "owner"),
    ):
        with pytest.raises(UserError, match=f"push_to_hub={hub_id}.*({reason})"):
            check_upload(hub_id)
    for hub_id in ("me/model", "not an id"):
        with pytest.raises(UserError, match=f"push_to_hub={hub_id}") as error:
            to_hub(tmp_path, hub_id)
        assert "\n" not in str(error.value)
