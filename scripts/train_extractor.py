"""Train one of the small classifiers whose features score small data sets (assets/extractors/).

python scripts/train_extractor.py --data=digits --out=assets/extractors/digits.safetensors
python scripts/train_extractor.py --data=fashion_mnist --epochs=3 --out=assets/extractors/fashion_mnist.safetensors
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from flowmaps.cli.run import required, run
from flowmaps.errors import blame
from flowmaps.files import WRITER, WRITTEN_BY, check_new_file, write_file

if TYPE_CHECKING:
    from flowmaps.data.dataset import DataSet
    from flowmaps.metrics.extractors import Classifier

DATA = flags.DEFINE_enum("data", None, ["digits", "fashion_mnist"], "Data set", required=False)
ROOT = flags.DEFINE_string("root", "data", "Folder of the data set's files")
OUT = flags.DEFINE_string("out", None, "Weight file to write (.safetensors)")
EPOCHS = flags.DEFINE_integer("epochs", 60, "Passes over the training split", lower_bound=1)
WRITES = (OUT,)
SEED = flags.DEFINE_integer("seed", 0, "Initialisation, order and shifts")
BATCH = 128


def accuracy(network: "Classifier", data: "DataSet") -> float:
    import torch

    from flowmaps.data import iterate
    from flowmaps.images import from_uint8

    network.eval()
    right = 0
    with torch.no_grad():
        for x, label in iterate(data):
            right += int((network(from_uint8(x)).argmax(dim=1) == label).sum())
    return right / len(data)


def main() -> None:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save

    from flowmaps.data import ShuffledOrder, open_dataset
    from flowmaps.images import from_uint8
    from flowmaps.metrics.extractors import CLASSIFIERS, Classifier

    data, out = required(DATA, "digits"), Path(required(OUT, "digits.safetensors"))
    with blame("out", out):
        check_new_file(out)
    train, heldout = (open_dataset(data, split, root=ROOT.value) for split in ("train", "heldout"))
    torch.manual_seed(SEED.value)
    network, order = Classifier(**CLASSIFIERS[data]), ShuffledOrder(len(train), SEED.value)
    steps = EPOCHS.value * (len(train) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        network.train()
        x, label = train.fetch(order.indices(step * BATCH, BATCH))
        assert label is not None
        shift = torch.randint(-1, 2, (2,)).tolist()  # features should not depend on a shift by one pixel
        loss = F.cross_entropy(network(from_uint8(x).roll(shift, dims=(2, 3))), label, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} held-out accuracy {accuracy(network, heldout):.4f}")
    weights = {k: v.contiguous() for k, v in network.eval().state_dict().items()}
    write_file(out, save(weights, {WRITTEN_BY: WRITER}))
    print(f"{out}: held-out accuracy {accuracy(network, heldout):.4f}")


if __name__ == "__main__":
    run(sys.modules[__name__])
