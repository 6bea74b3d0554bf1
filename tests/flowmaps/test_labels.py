"""Labels: by number and by name, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small_networks import small

from flowmaps import FlowMapInfo, UserError
from flowmaps.data.builtin import CIFAR, FASHION
from flowmaps.labels import SHOWN, class_number, flat, label_policy_text, labels_for, read_label_policy, sample_labels

CLOTHES = FlowMapInfo(num_classes=10, class_names=tuple(FASHION.split(",")))
FOLDERS = FlowMapInfo(num_classes=3, class_names=("1", "10", "2"))  # in order of name


@pytest.mark.parametrize(
    ("info", "label", "number"),
    [
        (CLOTHES, "Shirt", 6),  # exactly, although it is a word of T-shirt/top too
        (CLOTHES, "shirt", 6),
        (CLOTHES, "ANKLE BOOT", 9),
        (CLOTHES, "boot", 9),
        (CLOTHES, "Boot", 9),
        (CLOTHES, "top", 0),
        (CLOTHES, "boot ankle", 9),
        (CLOTHES, "7", 7),
        (CLOTHES, 7, 7),
        (CLOTHES, np.int64(7), 7),
        (CLOTHES, torch.tensor(7), 7),
        (FOLDERS, "10", 1),  # a name comes before a number
        (FOLDERS, 1, 1),
        (FOLDERS, "0", 0),
        (replace(CLOTHES, label_dropout=0.1), 10, 10),
        (FlowMapInfo(num_classes=2, class_names=("cat", "Cat")), "Cat", 1),
        (FlowMapInfo(num_classes=2, class_names=("golden_retriever", "poodle")), "retriever", 0),
    ],
)
def test_a_class_by_number_or_name(info, label, number):
    assert class_number(info, label) == number


@pytest.mark.parametrize(
    ("info", "label", "reason"),
    [
        (CLOTHES, "bootz", "did you mean Ankle boot"),
        (CLOTHES, "Troussers", "did you mean Trouser"),
        (CLOTHES, "qqq", "not the name of a class: There are T-shirt/top, Trouser"),
        (CLOTHES, "", "not the name"),
        (CLOTHES, "!", "not the name"),
        (CLOTHES, 10, r"must be 0 \.\. 9, or one of T-shirt/top"),
        (CLOTHES, "10", r"must be 0 \.\. 9"),
        (CLOTHES, "-1", r"must be 0 \.\. 9"),
        (CLOTHES, -1, r"must be 0 \.\. 9"),
        (CLOTHES, 1.0, r"must be 0 \.\. 9"),
        (CLOTHES, True, r"must be 0 \.\. 9"),
        (CLOTHES, float("nan"), r"must be 0 \.\. 9"),
        (CLOTHES, None, r"must be 0 \.\. 9"),
        (CLOTHES, "9" * 5000, "not the name"),
        (FlowMapInfo(num_classes=10), "boot", "no class names"),
        (FlowMapInfo(num_classes=2, class_names=("red car", "blue car")), "car", r"red car \(0\), blue car \(1\)"),
        (FlowMapInfo(num_classes=2, class_names=("crane", "crane")), "crane", "fits several"),
    ],
)
def test_what_is_not_a_class_is_refused_in_one_line(info, label, reason):
    with pytest.raises(UserError, match=reason) as error:
        class_number(info, label)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_long_list_of_names_is_cut():
    names = tuple(f"class {'x' * 200} {i}" for i in range(1000))
    with pytest.raises(UserError, match=f"and {1000 - SHOWN} more") as error:
        class_number(FlowMapInfo(num_classes=1000, class_names=names), "z")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("label", [[1, 2], [[1], [2]], [[1, 2]], (1, 2), torch.tensor([[1], [2]]), np.array([1, 2])])
def test_lists_nested_or_not_are_one_label_each(label):
    assert flat(label) == [1, 2] and labels_for(CLOTHES, 2, label).tolist() == [1, 2]
    with pytest.raises(UserError, match="has 2 labels for 3 samples"):
        labels_for(CLOTHES, 3, label)


def test_labels_of_samples_by_index():
    assert labels_for(CLOTHES, 4, start=8).tolist() == [8, 9, 0, 1]
    assert labels_for(CLOTHES, 2, ["boot", 3]).tolist() == [9, 3]
    assert labels_for(CLOTHES, 3, ["boot"]).tolist() == [9, 9, 9]
    assert labels_for(FlowMapInfo(), 3) is None
    with pytest.raises(UserError, match="label=3: this model is unconditional"):
        labels_for(FlowMapInfo(), 3, 3)


@pytest.mark.parametrize("names", [FASHION, CIFAR])
def test_names_of_the_data_sets_are_found_by_themselves(names):
    info = FlowMapInfo(num_classes=10, class_names=tuple(names.split(",")))
    assert [class_number(info, name) for name in names.lower().split(",")] == list(range(10))


@pytest.mark.parametrize(
    ("names", "reason"),
    [(("a",), "class_names: has 1 for 2 classes"), (("a", ""), "1 to 255"), (("a", "b" * 256), "1 to 255")],
)
def test_names_are_checked(names, reason):
    with pytest.raises(UserError, match=reason):
        FlowMapInfo(num_classes=2, class_names=names)
    with pytest.raises(UserError, match=reason):
        FlowMapInfo.from_dict({"num_classes": 2, "class_names": list(names)})


def test_names_are_optional_facts_that_round_trip():
    """A version that does not know them ignores them; a checkpoint without names has no trace of them."""
    values = CLOTHES.to_dict()
    assert values["optional"] == ["class_names"] and FlowMapInfo.from_dict(values) == CLOTHES
    assert not {"class_names", "optional"} & FlowMapInfo(num_classes=10).to_dict().keys()
    with pytest.raises(UserError, match=r"class_names\[0\]"):
        FlowMapInfo.from_dict({"num_classes": 1, "class_names": [3]})


def test_a_flow_map_refuses_a_label_that_it_was_never_trained_on():
    """Without a label a network answers from the embedding of "no label", which only label dropout trains."""
    fm = small("UNet").eval()
    x, s, t = fm.noise(3, 0), torch.zeros(3), torch.ones(3)
    for call in (lambda label: fm(x, s, t, label), lambda label: fm.drift(x, t, label)):
        for label in (None, torch.tensor([0, 1]), torch.tensor([0, 1, 5]), torch.tensor([0, 1, -1]), 4, "cat"):
            with pytest.raises(UserError, match="label"):
                call(label)
    fm.train()(x, s, t)  # training may learn that embedding
    fm.eval()
    fm.info = replace(fm.info, label_dropout=0.1, class_names=("a", "b", "c", "d"))
    torch.testing.assert_close(fm(x, s, t), fm(x, s, t, 4))
    torch.testing.assert_close(fm(x, s, t, "b"), fm(x, s, t, torch.tensor([1, 1, 1])))


def test_times_may_be_numbers_for_all_rows():
    fm = small("UNet").eval()
    x, label = fm.noise(3, 0), torch.arange(3)
    expected = fm(x, torch.full((3,), 0.25), torch.ones(3), label)
    for s, t in ((0.25, 1.0), (0.25, 1), (torch.tensor(0.25), torch.ones(3)), (0.25, torch.tensor(1.0))):
        torch.testing.assert_close(fm(x, s, t, label), expected)
    torch.testing.assert_close(fm.drift(x, 0.5, 2), fm.drift(x, torch.full((3,), 0.5), torch.full((3,), 2)))
    for s, t in ((0.5, 0.2), (-0.1, 1), (0, 1.5), (float("nan"), 1)):
        with pytest.raises(UserError, match="0 <= s <= t <= 1"):
            fm(x, s, t, label)


def test_samples_of_another_shape_are_refused():
    fm = small("UNet").eval()
    with pytest.raises(UserError, match=r"x is \[2, 1, 16, 16\]"):
        fm(torch.randn(2, 1, 16, 16), 0, 1, 0)


SHARED = FlowMapInfo(num_classes=3, class_shares=(0.7, 0.2, 0.1))


@pytest.mark.parametrize("info", [CLOTHES, SHARED], ids=["equal", "shares"])
def test_random_labels_depend_on_seed_and_index_and_have_the_shares(info):
    drawn = sample_labels(info, 0, 3000, 1, policy="random")
    assert torch.equal(drawn[700:900], sample_labels(info, 700, 200, 1, policy="random"))
    assert not torch.equal(drawn, sample_labels(info, 0, 3000, 2, policy="random"))
    shares = torch.tensor(info.class_shares or [0.1] * 10)
    found = torch.bincount(drawn, minlength=info.num_classes) / 3000
    assert ((found - shares).abs() < 4 * (shares * (1 - shares) / 3000).sqrt()).all()
    assert not torch.equal(found, torch.bincount(labels_for(info, 3000), minlength=info.num_classes) / 3000)


def test_labels_of_a_file(tmp_path):
    file = tmp_path / "labels.json"
    file.write_text('[3, "boot", "7", 0, 0]')
    labels = read_label_policy(CLOTHES, file, 4)
    assert labels.tolist() == [3, 9, 7, 0] and sample_labels(CLOTHES, 1, 2, 5, policy=labels).tolist() == [9, 7]
    assert sample_labels(CLOTHES, 0, 2, 5, 1, "balanced").tolist() == [1, 1]  # one given for all
    assert label_policy_text(labels).startswith("sha256:") and label_policy_text("random") == "random"
    assert label_policy_text(labels) != label_policy_text(labels.flip(0))


@pytest.mark.parametrize(
    ("info", "text", "label", "named"),
    [
        (CLOTHES, "[1, 2]", None, "has 2 labels for 3"),
        (CLOTHES, "[1, 2, 10]", None, r"0 \.\. 9"),
        (CLOTHES, "[1, 2, true]", None, "not a list of classes"),
        (CLOTHES, "{}", None, "not a list of classes"),
        (CLOTHES, "[1, 2", None, "labels.json"),
        (CLOTHES, None, None, "balanced or random"),
        (CLOTHES, "[1, 2, 3]", 4, "given label"),
        (FlowMapInfo(), "[1, 2, 3]", None, "unconditional"),
    ],
)
def test_files_of_labels_that_are_refused(tmp_path, info, text, label, named):
    file = tmp_path / "labels.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=named) as error:
        read_label_policy(info, str(file), 3, label)
    assert error.value.field == "label_policy" and "\n" not in str(error.value)
