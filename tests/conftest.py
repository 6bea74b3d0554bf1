import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests/helpers.py


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # pytest -n 2 on two cores; also makes sums reproducible


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parent.parent
