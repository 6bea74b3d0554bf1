"""The format of a checkpoint that its user does not name, by something that no other format has."""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmaps.errors import UserError
from flowmaps.importers.diffusers_dit import CLASSES
from flowmaps.importers.inert import refusal
from flowmaps.importers.pickles import Record, read_objects
from flowmaps.importers.snapshots import NETS, is_consistency
from flowmaps.importers.torch_files import MAGIC, family, read_tensors
from flowmaps.reading import read_json

FOLDERS = {"UNet2DModel": "diffusers_unet", **dict.fromkeys(CLASSES, "diffusers_dit")}  # by class of the model
ALIKE = "DiT and SiT have weights of the same names, and nothing in it says which it is: give format=dit or sit"
OF_SIT = ("path_type", "prediction")  # arguments of its training


def guess_format(src: str | Path) -> str:
    """Return the format of a published checkpoint, a key of ``importers.FORMATS``. Nothing in the file is executed.

    Raises:
        UserError: The file is missing, damaged or hostile, or it may be of two formats or is of none.
    """
    path = Path(src)
    if not path.exists():
        raise UserError("no such file or directory", field="src", value=src)
    try:
        found = _of_folder(path) if path.is_dir() else _of_file(path)
    except Exception as error:  # a foreign file can raise anything
        raise refusal(path, error) from None
    if not found:
        raise UserError("is of no format that is known here: give format to learn why", field="src", value=src)
    return found


def _of_folder(path: Path) -> str:
    file = next((file for name in ("unet", "transformer", ".") if (file := path / name / "config.json").exists()), None)
    config = {} if file is None else read_json(file, "choose another folder")
    name = config.get("_class_name") if isinstance(config, dict) else None
    return FOLDERS.get(name, "") if isinstance(name, str) else ""


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head[:1] == MAGIC[:1] and head[2:] != MAGIC[2:]:
        content = read_objects(path)
        if not isinstance(content, dict):
            return ""
        if isinstance(content.get("net"), Record):
            return "tvm"
        net = content.get("ema")
        if not isinstance(net, Record):
            return ""
        return "ect" if is_consistency(net, content) else NETS.get(net.name, "")
    content = read_tensors(path)
    names = _tensor_names(content)
    form = family(names)
    if form != "dit or sit":
        return form
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if any(name.startswith("projectors.") for name in names):
        return "sit"
    if isinstance(args, dict):
        return "sit" if any(args.get(key) is not None for key in OF_SIT) else "dit"
    raise UserError(ALIKE)


def _tensor_names(content: Any) -> list[str]:
    """Return the names of tensors in dictionaries, which may lie in one another, each once."""
    found, waiting, seen = [], [content], set[int]()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        found += [name for name, value in part.items() if isinstance(name, str) and isinstance(value, Tensor)]
        waiting += part.values()
    return found
