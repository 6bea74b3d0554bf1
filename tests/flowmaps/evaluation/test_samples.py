"""Writing samples: batches of any size make one set of files, and none is left after a failure."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.makers import encoded, photograph, write_folder
from PIL import Image

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.data import ShuffledOrder
from flowmaps.data.image_folder import open_images
from flowmaps.evaluation.samples import grid_image, write_samples
from flowmaps.images import to_uint8
from flowmaps.networks import UNet


def batches(x, sizes):
    for part in x.split(sizes):
        yield part, torch.arange(len(part))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sizes", [[120], [7, 100, 13], [1] * 120])
def test_files_hold_all_batches(sizes, channels, tmp_path):
    x = torch.rand(120, channels, 4, 6) * 2 - 1
    shown = write_samples(batches(x, sizes), tmp_path, 2)
    with np.load(tmp_path / "samples-2.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "label", "written_by"]
        assert (archive["arr_0"] == to_uint8(x).movedim(1, -1).numpy()).all()
        assert (archive["label"] == np.concatenate([np.arange(n) for n in sizes])).all()
        for i, picture in enumerate(archive["arr_0"]):
            with Image.open(tmp_path / "steps-2" / f"{i:06d}.png") as image:
                assert (np.asarray(image).reshape(picture.shape) == picture).all()
    assert torch.equal(shown, x[: len(shown)]) and len(shown) >= 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-2.npz", "steps-2"]


def test_of_two_calls_at_a_time_the_last_one_s_files_stay_complete(tmp_path):
    """Threads stand for processes; each writes one value, in pictures and archive."""

    def write(value):
        for _ in range(5):
            write_samples([(torch.full((30, 1, 4, 4), value), None)], tmp_path, 2)
            write_samples([(torch.full((30, 2), value), None)], tmp_path, 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, (-1.0, -0.5, 0.5, 1.0)))
    with np.load(tmp_path / "samples-2.npz", allow_pickle=False) as archive:
        [value] = np.unique(archive["arr_0"])
    pictures = sorted((tmp_path / "steps-2").iterdir())
    assert len(pictures) == 30 and {np.asarray(Image.open(file)).max() for file in pictures} == {value}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-1.npz", "samples-2.npz", "steps-2"]


@pytest.mark.parametrize("name", ["steps-2/mine.png", "steps-2/notes/a", "steps-2/empty/", "samples-2.npz"])
def test_files_of_the_user_stay(tmp_path, name):
    mine = tmp_path / name
    (mine if name.endswith("/") else mine.parent).mkdir(parents=True, exist_ok=True)
    if not name.endswith("/"):
        mine.write_text("mine")
    with pytest.raises(UserError, match="flowmaps did not write"):
        write_samples([(torch.zeros(4, 1, 4, 4), None)], tmp_path, 2)
    assert mine.is_dir() or mine.read_text() == "mine"


def test_points_have_no_pictures(tmp_path):
    x = torch.randn(50, 2)
    assert torch.equal(write_samples(((part, None) for part in x.split(20)), tmp_path, 1), x)
    with np.load(tmp_path / "samples-1.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "written_by"] and (archive["arr_0"] == x.numpy()).all()
    assert [path.name for path in tmp_path.iterdir()] == ["samples-1.npz"]


def test_a_failure_leaves_what_was_there(tmp_path):
    x = torch.zeros(20, 1, 4, 4)
    write_samples([(x, None)], tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="NaN"):
        write_samples([(x + 1, None), (x * float("nan"), None)], tmp_path, 1)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_first_row_of_a_grid_is_the_data_as_the_network_sees_them(tmp_path):
    files = {f"{i}.png": encoded(photograph(i, 40, 30), "png") for i in range(5)}
    data = open_images(write_folder(tmp_path / "mine", files), size=48)
    network = UNet(image_size=48, width=8, channel_mult=(1,), blocks=1, attention_resolutions=(), patch=4)
    fm = FlowMap(network, info=FlowMapInfo(shape=(3, 48, 48)))
    rows = np.asarray(grid_image(fm, (1,), seed=0, columns=4, data=data))
    without = np.asarray(grid_image(fm, (1,), seed=0, columns=4))
    assert rows.shape[0] == 2 * without.shape[0] and (rows[52:] == without).all()
    drawn = data.fetch(ShuffledOrder(5, 0).indices(0, 4))[0]
    for i, image in enumerate(drawn):
        assert (rows[2:50, 52 * i + 2 : 52 * i + 50] == image.movedim(0, -1).numpy()).all()
