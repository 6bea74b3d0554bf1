"""Wrong values and damaged files on every command: each call ends as promised and touches nothing of the user's."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers import ROOT, pictures
from helpers.fuzz import NUMBERS, TEXTS, Server, damage, fault, foreign, seeded, tree
from helpers.makers import photograph, write_folder
from helpers.released import edm
from helpers.released_mean_flows import MeanFlow
from helpers.released_tvm import save

pytestmark = pytest.mark.slow

REFERENCE = str(ROOT / "assets/references/digits.npz")
COMMANDS = {  # script: module, a call that succeeds, and its outputs
    "sample.py": ("flowmaps.cli.sample", "--checkpoint=assets/digits --steps=1 --num=4", ["out"]),
    "fid.py": (
        "flowmaps.cli.fid",
        f"--checkpoint=assets/digits --steps=1 --num=70 --reference={REFERENCE}",
        ["json", "junit"],
    ),
    "stats.py": ("flowmaps.cli.stats", "--data=digits:heldout", ["out"]),
    "schedule.py": (
        "flowmaps.cli.schedule",
        "--checkpoint=assets/digits --steps=2 --noises=4 --fine=4",
        ["out", "plot"],
    ),
    "export.py": ("flowmaps.cli.export", "--checkpoint=assets/checkerboard", ["out"]),
    "import_checkpoint.py": ("flowmaps.cli.import_checkpoint", "--format=edm --src={files}/edm.pkl", ["out"]),
    "prepare_data.py": (
        "training.cli.prepare",
        "trajectories --teacher=assets/digits --num=4 --steps=2",
        ["out"],
    ),
    "train.py": (
        "training.cli.train",
        "--config=configs/digits.py:lagrangian,smoke --config.steps=1 --config.batch=8",
        ["workdir"],
    ),
    "train_extractor.py": ("training.cli.extractor", "--data=digits --epochs=1", ["out"]),
}
OUT = {"stats.py": ".npz", "train_extractor.py": ".safetensors"}
SUFFIX = {"json": ".json", "junit": ".xml", "plot": ".png"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("current")

    def of(script):
        if script not in made:
            made[script] = Server(COMMANDS[script][0], script, folder)
        return made[script]

    yield of
    for server in made.values():
        server.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of every kind that the commands read, each by the command or the maker that writes it."""
    folder = tmp_path_factory.mktemp("files")
    edm("ddpm++", folder / "edm.pkl")
    write_folder(folder / "images", {f"{c}/{i}.png": photograph_bytes(i) for c in "ab" for i in range(3)})
    return folder


def photograph_bytes(seed):
    import io

    buffer = io.BytesIO()
    photograph(seed).save(buffer, "png")
    return buffer.getvalue()


def arguments(script, files, place, **changes):
    """Return the arguments of the good call with some flags changed; a flag of None is left out."""
    _, good, outputs = COMMANDS[script]
    words = [word.format(files=files) for word in good.split()]
    given = {name: str(place / f"{name}{SUFFIX.get(name, '')}") for name in outputs} | changes
    if "out" in given and "out" not in changes:
        given["out"] += OUT.get(script, "")
    kept = [word for word in words if word.lstrip("-").partition("=")[0] not in given]
    return kept + [f"--{name}={value}" for name, value in given.items() if value is not None]


def own_flags(script):
    """Return {flag: values to try} from the command's help, and for train.py the fields of its config."""
    import re
    import subprocess
    import sys

    done = subprocess.run([sys.executable, f"scripts/{script}", "--help"], capture_output=True, text=True, cwd=ROOT)
    flags = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    if script == "train.py":
        from configs.digits import get_config

        flags += [f"config.{name}" for name in fields(get_config("lagrangian,smoke"))]
    return flags


def fields(section, prefix=""):
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{f.name}.")
        elif f.init:
            yield prefix + f.name


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_with_wrong_values(script, servers, files, tmp_path):
    targets, server, broken, calls = foreign(tmp_path / "mine"), servers(script), [], 0
    before, rng = tree(tmp_path / "mine"), seeded(script)
    kept = tree(files)
    code, stderr = server(arguments(script, files, tmp_path / "good"))
    assert code in (0, 1), stderr
    for flag in own_flags(script):
        values = [*rng.sample(NUMBERS, 4), *rng.sample(TEXTS, 4), *rng.sample(targets, 6)]
        if "." in flag:  # of a config, which has many
            values = rng.sample(values, 4)
        for i, value in enumerate(values):
            out = tmp_path / f"out-{flag}-{i}"
            call = arguments(script, files, out, **{flag: value})
            calls += 1
            if why := fault(*server(call)):
                broken.append((call, why))
            if (after := tree(tmp_path / "mine")) != before:  # its own files may stand next to the user's
                shutil.rmtree(tmp_path / "mine")
                foreign(tmp_path / "mine")
            if before.items() - after.items() or tree(files) != kept:
                broken.append((call, "a file of the user's changed"))
            if left := [path.name for path in tmp_path.rglob(".flowmaps-*")]:
                broken.append((call, f"left {left}"))
            shutil.rmtree(out, ignore_errors=True)
    print(f"{script}: {calls} calls, {len(broken)} broken")
    assert not broken, "\n".join(f"{' '.join(call)[:400]}\n    {why}" for call, why in broken)


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("largest", [0, 700])
def test_a_full_disk_leaves_nothing_half_written(script, largest, servers, files, tmp_path):
    out = tmp_path / "out"
    code, stderr = servers(script)(arguments(script, files, out), largest)
    assert code == 2 and fault(code, stderr) is None, stderr
    assert not list(tmp_path.rglob(".flowmaps-*"))


def _stats(folder, call):
    call("stats.py", f"--data=digits:heldout --out={folder / 'stats.npz'}")


def _samples(folder, call):
    call("sample.py", f"--checkpoint=assets/digits --steps=1 --num=70 --out={folder / 'samples'}")


def _record(folder, call):
    call("fid.py", f"--checkpoint=assets/digits --steps=1 --num=70 --reference={REFERENCE} --json={folder / 'r.json'}")


def _schedule(folder, call):
    call("schedule.py", f"--checkpoint=assets/digits --steps=2 --noises=4 --fine=4 --out={folder / 'schedule.json'}")


def _checkpoint(folder, call):
    shutil.copytree(ROOT / "assets/digits", folder / "model")


def _run(folder, call):
    row = "--config=configs/digits.py:lagrangian,smoke --config.batch=8"
    call("train.py", f"{row} --workdir={folder / 'run'} --config.steps=2 --config.ema_widths=(0.05,0.1)")


def _trajectories(folder, call):
    call("prepare_data.py", f"trajectories --teacher=assets/digits --num=4 --steps=2 --out={folder / 'paths'}")


def _prepared(folder, call):
    write_folder(folder / "source", {f"{c}/{i}.png": photograph_bytes(i) for c in "ab" for i in range(3)})
    call("prepare_data.py", f"imagenet --src={folder / 'source'} --size=8 --out={folder / 'set'}")
    shutil.rmtree(folder / "source")


def _images(folder, call):
    write_folder(folder / "images", {f"{c}/{i}.png": photograph_bytes(i) for c in "ab" for i in range(3)})


def _pictures(folder, call):
    pictures.save(folder)
    for name in ("small", "white", "black", "wide", "colour", "broken"):
        (folder / f"{name}.png").unlink()


def _arrays(folder, call):
    np.savez(folder / "images.npz", samples=np.zeros((9, 8, 8, 1), np.uint8), label=np.arange(9))


def _edm(folder, call):
    edm("ddpm++", folder / "edm.pkl")


def _maps(folder, call):
    save(folder / "im256_w2.pkl", width=64, heads=1, depth=1)


def _mean_flows(folder, call):
    MeanFlow("pmf", shared=0, head=1).save(folder / "pMF.pt")


TRAIN = "--config=configs/digits.py:lagrangian,smoke --config.batch=8"
FOLDER = "--config=configs/folder.py:lagrangian,smoke --config.batch=8 --config.steps=1"
KINDS = {  # what makes the files, and a command that reads them
    "statistics": (_stats, "fid.py", "--checkpoint=assets/digits --steps=1 --num=70 --reference={files}/stats.npz"),
    "samples": (_samples, "fid.py", f"--samples={{files}}/samples/samples-1.npz --reference={REFERENCE}"),
    "pictures": (_samples, "fid.py", f"--samples={{files}}/samples/steps-1 --reference={REFERENCE}"),
    "record": (_record, "fid.py", COMMANDS["fid.py"][1] + " --max_regression={files}/r.json"),
    "card": (_record, "export.py", "--checkpoint=assets/digits --results={files}/r.json"),
    "schedule": (_schedule, "sample.py", COMMANDS["sample.py"][1] + " --schedule={files}/schedule.json"),
    "checkpoint": (_checkpoint, "sample.py", "--checkpoint={files}/model --steps=1 --num=4"),
    "run": (_run, "train.py", f"{TRAIN} --workdir={{files}}/run --config.steps=3 --config.ema_widths=(0.05,0.1)"),
    "weights": (_run, "sample.py", "--checkpoint={files}/run --ema=0.07 --steps=1 --num=4"),
    "trajectories": (
        _trajectories,
        "train.py",
        "--config=configs/digits.py:mid_training,smoke --config.batch=8 --config.steps=1 "
        "--config.init_from=assets/digits --config.trajectories.files={files}/paths",
    ),
    "resumed set": (_trajectories, "prepare_data.py", COMMANDS["prepare_data.py"][1] + " --out={files}/paths"),
    "prepared set": (_prepared, "stats.py", "--data={files}/set --extractor=digits"),
    "images": (_images, "train.py", f"{FOLDER} --config.data.root={{files}}/images"),
    "measurement": (
        _pictures,
        "sample.py",
        "--checkpoint=assets/digits --steps=2 --num=2 --measurement={files}/digit.png --mask={files}/mask.png",
    ),
    "arrays": (_arrays, "stats.py", "--data={files}/images.npz"),
    "edm": (_edm, "import_checkpoint.py", "--format=edm --src={files}/edm.pkl"),
    "published maps": (_maps, "import_checkpoint.py", "--src={files}/im256_w2.pkl"),
    "told maps": (_mean_flows, "import_checkpoint.py", "--src={files}/pMF.pt --base_std=2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, servers, tmp_path, rounds=45):
    make, script, good = KINDS[kind]
    (tmp_path / "sound").mkdir()
    make(tmp_path / "sound", lambda name, words: servers(name)(words.split()))
    paths = [path.relative_to(tmp_path / "sound") for path in sorted((tmp_path / "sound").rglob("*")) if path.is_file()]
    assert paths
    broken = []
    for number in range(rounds):
        rng, files = seeded(kind, number), tmp_path / "damaged"
        shutil.copytree(tmp_path / "sound", files)
        damaged = files / rng.choice(paths)
        damage(damaged, rng)
        _, _, outputs = COMMANDS[script]
        words = [word.format(files=files) for word in good.split()]
        have = {word.lstrip("-").partition("=")[0] for word in words}
        out = [f"--{o}={tmp_path / 'out' / o}{SUFFIX.get(o, '')}" for o in outputs if o not in have]
        if script == "stats.py":
            out[0] += ".npz"
        if why := fault(*servers(script)([*words, *out])):
            broken.append(f"{number}: {damaged.relative_to(files)}: {why}")
        if left := [path.name for path in tmp_path.rglob(".flowmaps-*")]:
            broken.append(f"{number}: left {left}")
        shutil.rmtree(files)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    print(f"{kind}: {rounds} calls, {len(broken)} broken")
    assert not broken, "\n".join(broken)
