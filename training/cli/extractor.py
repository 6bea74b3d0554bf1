"""Train a small classifier on a data set: its features then score samples of models of that data set.

python scripts/train_extractor.py --data=my/images --size=32
python scripts/train_extractor.py --data=digits --out=assets/extractors/digits.safetensors
python scripts/train_extractor.py --data=fashion_mnist --epochs=3 --out=assets/extractors/fashion_mnist.safetensors

The file is NAME.extractor.safetensors next to a folder, zip file or prepared set, unless --out says otherwise: there
fid.py, stats.py and a run's best model find it, and call the distance FD-NAME. It learns the classes, or where there
are none, by how many quarter turns an image was rotated (Gidaris et al. 2018, arXiv 1803.07728).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from flowmaps.cli import next_command
from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame
from flowmaps.files import WRITER, WRITTEN_BY, check_new_file, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from flowmaps.data import DataSet
    from flowmaps.metrics.classifier import Classifier, OwnExtractor

DATA = flags.DEFINE_string("data", None, "Data set NAME, folder, zip file, prepared set, hf:REPO or wds:SHARDS")
ROOT = flags.DEFINE_string("root", "data", "Folder of a named data set's files")
SIZE = flags.DEFINE_integer("size", None, "Crop and resize the images of a folder or zip to this", 4, 4096)
OUT = flags.DEFINE_string("out", None, "File to write (.safetensors) [NAME.extractor.safetensors next to --data]")
EPOCHS = flags.DEFINE_integer("epochs", None, "Passes over the images [200,000 images in all]", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Initialisation, order and shifts")
READS, WRITES = (DATA,), (OUT,)
BATCH, SEEN, LEAST = 128, 200_000, 20


@dataclass(frozen=True)
class Part:
    """Some of the images of a data set."""

    data: "DataSet"
    items: "Tensor"  # int64 [n]

    def batch(self, position: "Tensor", turned: bool) -> tuple["Tensor", "Tensor"]:
        """Return images [b, C, H, W] in [-1, 1] and what to tell of them: their class or their quarter turns."""
        import torch

        from flowmaps.images import from_uint8

        x, label = self.data.fetch(self.items[position])
        if turned:
            label = position % 4
            x = torch.stack([image.rot90(k, dims=(1, 2)) for image, k in zip(x, label.tolist(), strict=True)])
        assert label is not None
        return from_uint8(x), label

    def __len__(self) -> int:
        return len(self.items)


def main() -> None:
    source = required(DATA, "my/images")

    from flowmaps.data.registry import check_source, is_address
    from flowmaps.evaluation.real_images import built_in
    from flowmaps.metrics.classifier import CLASSIFIERS, SUFFIX, ClassifierOptions, OwnExtractor, own_file, own_name

    with blame("data", source):
        check_source(source)
    named = built_in(source)
    if (named or is_address(source)) and OUT.value is None:
        raise UserError("missing for data that is not a path, e.g. --out=mine.safetensors", field="out")
    out = Path(OUT.value or own_file(source))
    with blame("out", out):
        if out.suffix != SUFFIX:
            raise UserError(f"must end in {SUFFIX}")
        check_new_file(out)
    train, heldout = split(source, named)
    channels, size = train.data.shape[:2]
    classes, task = (train.data.num_classes, "classes") if train.data.num_classes else (4, "rotations")
    options = ClassifierOptions(channels, size, classes)
    own = OwnExtractor(named or own_name(source), CLASSIFIERS.get(named, options), task)
    print(f"{len(train):,} images of {size} x {size} to learn {classes} {task} from, {len(heldout):,} held out")
    weights = fit(train, heldout, own)

    from safetensors.torch import save

    write_file(out, save(weights, {WRITTEN_BY: WRITER, **own.metadata()}))
    flags = [] if not named and out.resolve() == own_file(source).resolve() else [f"--extractor={out}"]
    print(f"wrote    {out}, which gives FD-{own.name}")
    print(next_command.show(next_command.command("fid", f"--reference={source}", *flags, "--checkpoint=RUN")))


def split(source: str, named: str) -> tuple[Part, Part]:
    """Open the images to learn from and those held out: a data set's own, else every tenth in a shuffled order."""
    import torch

    from flowmaps.data import ShuffledOrder, open_dataset
    from flowmaps.evaluation.real_images import open_for_scoring

    if named:
        parts = (open_dataset(named, part, root=ROOT.value) for part in ("train", "heldout"))
        train, heldout = (Part(data, torch.arange(len(data))) for data in parts)
    else:
        with blame("data", source):
            data = open_for_scoring(source, ROOT.value, SIZE.value)
            if len(data) < LEAST:
                raise UserError(f"has {len(data)} images, at least {LEAST} are needed")
        order, tenth = ShuffledOrder(len(data), SEED.value).indices(0, len(data)), len(data) // 10
        train, heldout = Part(data, order[tenth:]), Part(data, order[:tenth])
    shape = train.data.shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 4:
        reason = "points" if len(shape) != 3 else f"images of {shape[1]} x {shape[2]} pixels"
        raise UserError(f"has {reason}: squares are needed, e.g. --size=32", field="data", value=source)
    return train, heldout


def fit(train: Part, heldout: Part, own: "OwnExtractor") -> "dict[str, Tensor]":
    """Train the classifier of ``own`` and return its weights."""
    import torch
    import torch.nn.functional as F

    from flowmaps.data import ShuffledOrder

    torch.manual_seed(SEED.value)
    network, order, turned = own.network.build(), ShuffledOrder(len(train), SEED.value), own.task == "rotations"
    batch = min(BATCH, len(train))
    steps = (EPOCHS.value or max(1, SEEN // len(train))) * (len(train) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        network.train()
        x, label = train.batch(order.indices(step * batch, batch), turned)
        shift = torch.randint(-1, 2, (2,)).tolist()  # features should not depend on a shift by one pixel
        loss = F.cross_entropy(network(x.roll(shift, dims=(2, 3))), label, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            found = accuracy(network, heldout, turned)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} held-out accuracy {found:.4f}", flush=True)
    return {name: value.contiguous() for name, value in network.eval().state_dict().items()}


def accuracy(network: "Classifier", part: Part, turned: bool) -> float:
    """Return the share of images that ``network`` tells right."""
    import torch

    network.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(part), 500):
            x, label = part.batch(torch.arange(start, min(start + 500, len(part))), turned)
            right += int((network(x).argmax(dim=1) == label).sum())
    return right / len(part)
