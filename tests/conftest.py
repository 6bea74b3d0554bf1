import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests/helpers


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # for several workers of pytest on two cores; also makes sums reproducible


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))  # read when it is imported
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A folder with small files in the real format of every data set that is read from files."""
    from helpers.makers import write_data_root

    return write_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def imagenet_root(tmp_path_factory) -> Path:
    """A folder with sets of 32 images as written by prepare_data.py: imagenet64, imagenet256, imagenet512."""
    from helpers.makers import write_imagenet_sets

    return write_imagenet_sets(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The directory of a flow-matching run on the digits."""
    from configs.digits import get_config
    from training.loop import train

    config = get_config("flow_matching,smoke")
    config.optim.warmup = 0
    train(config, folder := tmp_path_factory.mktemp("start"))
    return folder
