"""Damaged and hostile files, and outputs that overwrite inputs.

Expected of each: a one-line error and exit code 2 within 60 s; no code in a file runs, and no other file is touched.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
from common import CLONE, TMP, case
from PIL import Image

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{TMP}/bin:{os.environ['PATH']}"}
DIGITS, HELD = "assets/digits", "assets/references/digits.npz"


def call(*args, limit=60):
    try:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=CLONE,
            env=ENV,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
        return done.returncode, done.stderr.strip()
    except subprocess.TimeoutExpired:
        return "no end", ""


def refused(name, *args, also=lambda: True, limit=60):
    code, err = call(*args, limit=limit)
    lines = [line for line in err.splitlines() if line.strip()] or [
        ""
    ]  # the error is the last; a banner or progress may stand before it
    good = code == 2 and "Traceback" not in err and "error" in lines[-1] and len(lines[-1]) < 1000 and also()
    case(name, good, "" if good else f"exit {code}: {lines[-1][:140] if lines else ''}")


def images(folder, n=6, size=12):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (size, size), (i, 40 * i, 9)).save(folder / f"{i}.png")
    return folder


# a file name in checksums.json that points elsewhere: the set is made again, and what is named is deleted
src, out, other = images(TMP / "images"), TMP / "set", TMP / "elsewhere"
call("scripts/prepare_data.py", "imagenet", f"--src={src}", f"--out={out}", "--size=8", "--shard=3")
other.mkdir()
(other / "mine.txt").write_text("mine")
sums = json.loads((out / "checksums.json").read_text())
sums["../elsewhere/mine.txt"] = {"rows": 0, "bytes": 4, "sha256": "0", "left_out": []}
(out / "checksums.json").write_text(json.dumps(sums))
call("scripts/prepare_data.py", "imagenet", f"--src={src}", f"--out={out}", "--size=8", "--shard=3")
case("checksums.json names ../elsewhere/mine.txt: the file stays", (other / "mine.txt").exists())

# an image that starts another program (Pillow's EPS reader calls Ghostscript): "gs" first on the path leaves a mark
(TMP / "bin").mkdir()
gs = TMP / "bin/gs"
gs.write_text(f"#!/bin/sh\ntouch {TMP}/called\nexit 1\n")
gs.chmod(0o755)
eps = images(TMP / "eps")
(eps / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n%%EOF\n")
call("scripts/prepare_data.py", "imagenet", f"--src={eps}", f"--out={TMP / 'eps-set'}", "--size=8")
case("an EPS file called 0.png starts no Ghostscript", not (TMP / "called").exists())

# JSON that is deep, or not what it should be
model = TMP / "model"
shutil.copytree(CLONE / DIGITS, model)
(model / "model_index.json").write_text("[" * 100_000)
refused(
    "model_index.json of 100,000 brackets",
    "scripts/sample.py",
    f"--checkpoint={model}",
    "--steps=1",
    "--num=2",
    f"--out={TMP / 'o2'}",
)


def edited(name, change):
    d = TMP / name
    shutil.copytree(CLONE / DIGITS, d)
    p = d / "model_index.json"
    index = json.loads(p.read_text())
    change(index)
    p.write_text(json.dumps(index))
    return d


def classes(index):
    for value in index.values():
        if isinstance(value, dict) and "num_classes" in value:
            value["num_classes"] = 10**12
    if "num_classes" in index:
        index["num_classes"] = 10**12


d = edited("classes", classes)
refused(
    "a checkpoint that says it has 10**12 classes",
    "scripts/fid.py",
    f"--checkpoint={d}",
    "--steps=1",
    "--num=20",
    f"--reference={HELD}",
    f"--json={TMP / 'o3.json'}",
)
schedule = TMP / "s.json"
schedule.write_text("[" * 100_000)
refused(
    "a schedule of 100,000 brackets",
    "scripts/sample.py",
    f"--checkpoint={DIGITS}",
    "--steps=2",
    "--num=2",
    f"--out={TMP / 'o4'}",
    f"--schedule={schedule}",
)


# arrays whose header promises more than there is, and moments that are none
def npz(name, **arrays):
    held = dict(np.load(CLONE / HELD))
    held.update(arrays)
    np.savez(TMP / name, **held)
    return TMP / name


header, held = TMP / "big.npz", dict(np.load(CLONE / HELD))
with zipfile.ZipFile(header, "w") as z:
    for name, array in held.items():
        with z.open(f"{name}.npy", "w") as f:
            np.lib.format.write_array(f, np.asarray(array), allow_pickle=False)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
with zipfile.ZipFile(TMP / "t.npz", "w") as z, zipfile.ZipFile(header) as old:
    for name in old.namelist():
        z.writestr(name, content if name == "mu.npy" else old.read(name))
header = TMP / "t.npz"
refused(
    "statistics whose header promises 8 TB",
    "scripts/fid.py",
    f"--checkpoint={DIGITS}",
    "--steps=1",
    "--num=20",
    f"--reference={header}",
)
sigma = np.load(CLONE / HELD)["sigma"].copy()
n = len(sigma)
off = np.random.default_rng(0).normal(size=(n, n)) * 1e4
off = off + off.T
np.fill_diagonal(off, 0)
refused(
    "a 'covariance' with negative eigenvalues (any samples score 0 against it)",
    "scripts/fid.py",
    f"--checkpoint={DIGITS}",
    "--steps=1",
    "--num=200",
    f"--reference={npz('indefinite.npz', sigma=sigma + off)}",
)

# archives and images that unpack to more than there is
bomb = TMP / "bomb.zip"
with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
    with z.open("a/0.png", "w", force_zip64=True) as f:
        for _ in range(3 * 1024):
            f.write(bytes(1 << 20))
code = subprocess.run(
    [
        sys.executable,
        "-c",
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        "scripts/prepare_data.py",
        "imagenet",
        f"--src={bomb}",
        f"--out={TMP / 'o5'}",
        "--size=8",
    ],
    cwd=CLONE,
    env={**ENV, "PYTHONPATH": str(CLONE)},
    capture_output=True,
    text=True,
)
case(
    "a zip entry of 3 GB of zeros, called 0.png",
    code.returncode == 2 and "Traceback" not in code.stderr,
    f"exit {code.returncode}: {code.stderr.strip().splitlines()[-1][:100] if code.stderr.strip() else ''}",
)
fifo = TMP / "x.zip"
os.mkfifo(fifo)
refused(
    "a named pipe as --src",
    "scripts/prepare_data.py",
    "imagenet",
    f"--src={fifo}",
    f"--out={TMP / 'o6'}",
    "--size=8",
    limit=30,
)

# prepared sets: a row is missing in the card, a bit is flipped, the pictures have changed
call(
    "scripts/prepare_data.py",
    "trajectories",
    f"--teacher={DIGITS}",
    f"--out={TMP / 'walks'}",
    "--num=64",
    "--shard=16",
    "--steps=4",
)
card = TMP / "walks/trajectories.json"
content = json.loads(card.read_text())
content.pop("times", None)
card.write_text(json.dumps(content))
refused(
    "trajectories.json without times",
    "scripts/train.py",
    "--config=configs/digits.py:mid_training,smoke",
    f"--workdir={TMP / 'w1'}",
    "--config.teacher=",
    "--config.init_from=",
    f"--config.trajectories.files={TMP / 'walks'}",
    "--config.trajectories.steps=4",
    "--config.steps=2",
    "--config.batch=8",
)
src2, out2 = images(TMP / "pictures"), TMP / "prepared"
prepare = ("scripts/prepare_data.py", "imagenet", f"--src={src2}", f"--out={out2}", "--size=8", "--shard=3")
call(*prepare)
before = {p.name: p.read_bytes() for p in out2.glob("*.safetensors")}
for i in range(6):
    Image.new("RGB", (12, 12), (200, 9, 30 * i)).save(src2 / f"{i}.png")
code, err = call(*prepare)
after = {p.name: p.read_bytes() for p in out2.glob("*.safetensors")}
case(
    "other pictures under the same names: prepared anew, or refused",
    code == 2 or before != after,
    f"exit {code}, the old pictures are kept",
)
shard = sorted(out2.glob("*.safetensors"))[0]
content = bytearray(shard.read_bytes())
content[-5] ^= 64
shard.write_bytes(content)
refused(
    "a bit of a prepared shard is flipped",
    "scripts/train.py",
    "--config=configs/folder.py:flow_matching,smoke",
    f"--workdir={TMP / 'w2'}",
    "--config.data.name=prepared",
    f"--config.data.root={out2}",
    "--config.network.image_size=8",
    "--config.network.num_classes=0",
    "--config.network.channel_mult=1",
    "--config.steps=2",
    "--config.batch=2",
    "--config.data.workers=0",
)

# outputs over inputs
mine = TMP / "mine.npz"
shutil.copy(CLONE / HELD, mine)
call("scripts/fid.py", f"--checkpoint={DIGITS}", "--steps=1", "--num=100", f"--reference={mine}", f"--json={mine}")
case("--json names the --reference: the reference stays", mine.read_bytes() == (CLONE / HELD).read_bytes())
