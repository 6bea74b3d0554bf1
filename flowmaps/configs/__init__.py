"""The shipped configs, one module per data set: the files of configs/ in a checkout, which a wheel has here.

``--config=folder:small`` finds them by name, and your own config imports from them: ``from flowmaps.configs.folder
import get_config``. They are programs over ``training``; nothing in the packages imports them.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / "folder.py").is_file() else _HERE.parents[1] / "configs"
if FOLDER != _HERE:
    __path__.append(str(FOLDER))


def shipped_configs() -> dict[str, Path]:
    """Return the file of each shipped config by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.py")) if file.stem != "__init__"}
