"""Rows of a config file with changed settings, as benchmark.py's --rows takes them."""

import ast
import dataclasses
import enum
from typing import Any

from flowmaps import UserError
from flowmaps.networks import DiT
from training.config import Config, Optimizer, network
from training.config_rows import load_row

TRANSFORMERS = {
    "DiT": network(DiT, image_size=8, channels=1, patch=1, width=128, depth=4, heads=4, num_classes=10),
    "small_DiT": network(DiT, image_size=8, channels=1, patch=2, width=64, depth=4, heads=4, num_classes=10),
    "garment_DiT": network(DiT, image_size=32, channels=1, patch=4, width=96, depth=4, heads=3, num_classes=10),
}


def row_config(row: str, file: str = "configs/digits.py", **changes: Any) -> Config:
    """Load a row with what follows it after plus signs.

    Args:
        row: "ROW", or "ROW+PART+...", where a part is a setting such as ``optim.lr=1e-3``, one of TRANSFORMERS, an
            optimiser, or a variant of the file such as ``cpu``.
        file: The config file.
        changes: Fields of the config to set.

    Returns:
        The config.

    Raises:
        UserError: There is no such row, variant or field.

    Example:
        >>> config = row_config("imf+network.head_depth=0")
    """
    name, *parts = row.split("+")
    known = {*TRANSFORMERS, *Optimizer.__members__}
    variants = [part for part in parts if "=" not in part and part not in known]
    try:
        config = dataclasses.replace(load_row(file, ",".join([name, *variants])), **changes)
        for part in parts:
            if part in TRANSFORMERS:
                config.network = TRANSFORMERS[part]
            elif part in Optimizer.__members__:
                config.optim.name = Optimizer[part]
            elif "=" in part:
                _set(config, *part.split("=", 1))
    except UserError as error:
        raise UserError(
            f"--rows={row}: {error}; after + may be a setting, a variant, {', '.join(sorted(known))}"
        ) from None
    return config


def _set(config: Config, path: str, text: str) -> None:
    *sections, name = path.split(".")
    section: Any = config
    for step in sections:
        section = getattr(section, step, None)
    if not dataclasses.is_dataclass(section) or name not in {f.name for f in dataclasses.fields(section)}:
        raise UserError(f"there is no field {path}")
    old = getattr(section, name)
    try:
        value = type(old)[text] if isinstance(old, enum.Enum) else ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError):
        value = text  # the config's own check names the values that the field takes
    setattr(section, name, value)
