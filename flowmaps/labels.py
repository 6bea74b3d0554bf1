"""Labels by number or class name: the one place that decides what a label may be."""

import difflib
import hashlib
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmaps.errors import UserError, blame, shorten
from flowmaps.reading import read_json
from flowmaps.rng import generator

if TYPE_CHECKING:
    from flowmaps.info import FlowMapInfo

Label = int | str | Sequence[Any] | Tensor  # a number or name, or several, also nested; conditions are a tensor
POLICIES = BALANCED, RANDOM = "balanced", "random"  # how samples without a given label get theirs
SHOWN = 20  # names that an error lists
GOLDEN = (5**0.5 - 1) / 2  # whose multiples, mod 1, fill any interval evenly
SEARCHED = 10_000  # names among which a similar one is looked for


def flat(label: object) -> list[Any] | None:
    """Return the labels of a list, array or tensor, nested or not, in one list; None for a single label."""
    if hasattr(label, "tolist"):
        label = label.tolist()
    if not isinstance(label, Sequence) or isinstance(label, (str, bytes)):
        return None
    parts = [(flat(part), part) for part in label]
    return [one for inner, part in parts for one in ([part] if inner is None else inner)]


def labels_for(
    info: "FlowMapInfo", n: int, label: Label | None = None, start: int = 0, field: str = "label"
) -> Tensor | None:
    """Return the labels of samples ``start`` .. ``start + n - 1``: the given ones, else index mod classes.

    If the training images had classes of unequal shares, any stretch of samples has them in these shares, so that a
    score compares like with like: sample i has the class at i times the golden ratio, mod 1, of their cumulative sum.

    Args:
        info: Facts about the model.
        n: The number of samples.
        label: One label for all samples or one for each: the number of a class or its name (see ``class_number``).
            The number ``num_classes`` asks a model trained with label dropout for "no label". Of a model with a
            condition: a tensor [m, *condition]; sample i has row i mod m.
        start: The index of the first sample.
        field: What errors call the label.

    Returns:
        int64 [n] or conditions [n, ...], on the CPU; None for an unconditional model, or "no condition".

    Raises:
        UserError: The model is unconditional, there is no such class, or the number of labels is not n.
    """
    if info.condition:
        given = check_conditions(info, label, field)
        return None if given is None else given[torch.arange(start, start + n) % len(given)]
    if not info.num_classes:
        if label is not None:
            raise UserError("this model is unconditional: leave it out", field=field, value=label)
        return None
    if label is None:
        index = torch.arange(start, start + n)
        if not info.class_shares:
            return index % info.num_classes
        ends = torch.tensor(info.class_shares, dtype=torch.float64).cumsum(0)
        return torch.searchsorted(ends[:-1].contiguous(), index.double() * GOLDEN % 1, right=True)
    several = flat(label)
    numbers = [class_number(info, one, field) for one in ([label] if several is None else several)]
    if len(numbers) not in (1, n):
        raise UserError(f"has {len(numbers)} labels for {n} samples: pass one for all or one for each", field=field)
    return torch.tensor(numbers).expand(n)


def check_conditions(info: "FlowMapInfo", label: object, field: str = "label") -> Tensor | None:
    """Return the conditions [m, *condition] that ``label`` gives, one of them without its first dimension too.

    Raises:
        UserError: They are missing although the model was never trained without, or are not floats of that shape.
    """
    if label is None:
        if info.label_dropout:
            return None
        raise UserError(f"missing: this model needs a condition of shape {_shape(info)}", field=field)
    kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
    if not isinstance(label, Tensor) or not label.is_floating_point():
        raise UserError(f"must be floats of shape {_shape(info)}, not {kind}", field=field)
    found = label[None] if label.shape == info.condition else label
    if tuple(found.shape[1:]) != tuple(info.condition) or not len(found):
        raise UserError(f"must be floats of shape {_shape(info)}, got {list(label.shape)}", field=field)
    return found


def _shape(info: "FlowMapInfo") -> str:
    return f"[n, {', '.join(map(str, info.condition))}]"


def sample_labels(
    info: "FlowMapInfo", start: int, n: int, seed: int, label: Label | None = None, policy: "str | Tensor" = BALANCED
) -> Tensor | None:
    """Return labels int64 [n] of the samples ``start`` .. ``start + n - 1`` of ``seed``; None if unconditional.

    Args:
        info: Facts about the model.
        start: The index of the first sample.
        n: The number of samples.
        seed: That of the samples.
        label: One label for all; None leaves them to ``policy``.
        policy: ``"balanced"``, the shares that ``labels_for`` gives any stretch of samples; ``"random"``, drawn with
            these probabilities, sample i by (seed, i) alone; or int64 labels of all samples, whatever the seed.
    """
    if label is not None or not info.num_classes or (isinstance(policy, str) and policy == BALANCED):
        return labels_for(info, n, label, start)
    if isinstance(policy, Tensor):
        return policy[start : start + n]
    shares = torch.tensor(info.class_shares or [1.0] * info.num_classes, dtype=torch.float64)
    items = range(start, start + n)
    drawn = [torch.rand((), generator=generator(seed, "label", i), dtype=torch.float64) for i in items]
    ends = (shares.cumsum(0) / shares.sum())[:-1].contiguous()
    return torch.searchsorted(ends, torch.stack(drawn), right=True)


def read_label_policy(info: "FlowMapInfo", choice: str | Path, num: int, label: Label | None = None) -> "str | Tensor":
    """Return what ``sample_labels`` takes: ``"balanced"``, ``"random"``, or int64 labels read from a file.

    Args:
        info: Facts about the model.
        choice: One of ``POLICIES``, or a JSON file: a list with a class, by number or name, for each sample.
        num: Samples; the file may have more labels.
        label: The class of all samples, which leaves nothing to choose.

    Raises:
        UserError: The model is unconditional, a label is given too, or the file is missing, damaged or too short.
    """
    if choice == BALANCED:
        return BALANCED
    with blame("label_policy", choice):
        if label is not None or not info.num_classes:
            why = "this model is unconditional" if label is None else "all samples have the given label"
            raise UserError(f"{why}: leave it out")
        if choice == RANDOM:
            return RANDOM
        remedy = f"give {' or '.join(POLICIES)}, or a JSON list with a class for each sample"
        found = read_json(Path(choice), remedy)
        if not isinstance(found, list) or not all(type(one) in (int, str) for one in found):
            raise UserError(f"it is not a list of classes: {remedy}")
        if len(found) < num:
            raise UserError(f"has {len(found):,} labels for {num:,} samples: {remedy}")
        numbers = {one: class_number(info, one, "class") for one in set(found[:num])}
        return torch.tensor([numbers[one] for one in found[:num]])


def label_policy_text(policy: "str | Tensor") -> str:
    """Return a policy as a record has it: its name, or the SHA-256 of the labels of a file."""
    if isinstance(policy, str):
        return policy
    return f"sha256:{hashlib.sha256(policy.numpy().tobytes()).hexdigest()}"


def class_number(info: "FlowMapInfo", label: object, field: str = "label") -> int:
    """Return the number of the class that ``label`` means.

    A number means itself. Text is compared with the class names: exactly, then as a number, then without case, then
    as the only name that has all its words ("boot": Ankle boot).

    Raises:
        UserError: There is no such class, or several names match; the message lists names.
    """
    if hasattr(label, "tolist"):  # a number of numpy or torch
        label = label.tolist()
    most = info.num_classes if info.label_dropout else info.num_classes - 1
    number = _by_name(info.class_names, label, field) if isinstance(label, str) else _integer(label)
    if number is None or not 0 <= number <= most:
        no_label = f", or {info.num_classes} for no label" if info.label_dropout else ""
        names = f", or one of {listed(info.class_names)}" if info.class_names else ""
        raise UserError(f"must be 0 .. {info.num_classes - 1}{no_label}{names}", field=field, value=label)
    return number


def listed(names: Sequence[str]) -> str:
    """Return the first of ``names`` for a message of one line, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return shorten(", ".join(shorten(name, 60) for name in names[:SHOWN])) + more


def given_label(info: "FlowMapInfo", label: Label | None, x: Tensor, training: bool = False) -> Tensor | None:
    """Return the ``label`` of a call of the flow map on x [B, ...] as its network takes it.

    A tensor of one label per row passes as it is; integers on the CPU are compared with the number of classes, those
    on a GPU are not, since reading them would make every step wait. In ``training`` labels may be missing, and they
    come from the data set, which has compared them.

    Raises:
        UserError: A label is missing although the model was never trained without, or does not fit.
    """
    if info.condition:
        return _given_condition(info, label, x, training)
    if label is None:
        if not training and info.num_classes and not info.label_dropout:
            raise UserError(
                f"missing: this model was never trained without labels, give one of its {info.num_classes:,} classes "
                "for each sample",
                field="label",
            )
        return None
    if not isinstance(label, Tensor) or not label.ndim:
        found = labels_for(info, x.shape[0], label)
        return None if found is None else found.to(x.device)
    if label.shape[0] != x.shape[0]:  # len(x) would freeze the batch in an export
        raise UserError(f"has {len(label)} rows for {len(x)} samples: pass one for each", field="label")
    if info.num_classes and not training and _readable(label):
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > info.num_classes:
            wrong = low if low < 0 else high
            raise UserError(f"must be 0 .. {info.num_classes - 1}", field="label", value=wrong)
    return label


def _given_condition(info: "FlowMapInfo", label: object, x: Tensor, training: bool) -> Tensor | None:
    """Return conditions, or their rows (see ``networks.conditioning``), as they are; one of them for every row of x."""
    if label is None and training:
        return None
    rows = isinstance(label, Tensor) and label.is_floating_point() and label.ndim == 2
    if rows and label.shape[1] > info.label_size:  # type: ignore[attr-defined]
        given: Tensor | None = label  # type: ignore[assignment]
    else:
        given = check_conditions(info, label)
    if given is None:
        return None
    if given.shape[0] not in (1, x.shape[0]):  # len(x) would freeze the batch in an export
        raise UserError(f"has {len(given)} rows for {len(x)} samples: pass one for each", field="label")
    return given.to(x.device).expand(x.shape[0], *given.shape[1:])


def _readable(label: Tensor) -> bool:
    """Return whether ``label`` holds integers at hand: not on a GPU, and not while a graph is recorded."""
    plain = type(label) is Tensor and label.device.type == "cpu" and label.numel() > 0
    return plain and not label.is_floating_point() and not torch.compiler.is_compiling()


def _integer(label: object) -> int | None:
    try:
        return None if isinstance(label, bool) else operator.index(label)  # type: ignore[arg-type]
    except TypeError:
        return None


def _by_name(names: Sequence[str], text: str, field: str) -> int:
    """Return the number of the only class that ``text`` names, or the number that it spells."""
    if text not in names and re.fullmatch(r"\s*-?\d{1,18}\s*", text):
        return int(text)
    if not names:
        raise UserError("this checkpoint has no class names: give the number of a class", field=field, value=text)
    wanted, words = text.casefold().strip(), set(_words(text))
    ways = (
        lambda name: name == text,
        lambda name: name.casefold() == wanted,
        lambda name: bool(words) and words <= set(_words(name)),
    )
    for way in ways:
        if found := [number for number, name in enumerate(names) if way(name)]:
            if len(found) > 1:
                several = listed([f"{names[number]} ({number})" for number in found])
                raise UserError(f"fits several classes, {several}: write one in full", field=field, value=text)
            return found[0]
    keys = {key: name for name in names[:SEARCHED] for key in (*_words(name), name.casefold())}
    close = difflib.get_close_matches(wanted[:100], keys, n=1)
    meant = f"did you mean {shorten(keys[close[0]], 60)}? " if close else ""
    raise UserError(f"not the name of a class: {meant}There are {listed(names)}", field=field, value=text)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
