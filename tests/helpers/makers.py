"""Small data sets of the true formats, made by the tests."""

import gzip
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image


def write_fashion_mnist(root: Path, train: int = 600, heldout: int = 100, packed: bool = True) -> None:
    """Files of Fashion-MNIST's true layout and format with random content."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for part, n in (("train", train), ("t10k", heldout)):
        images = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=g).numpy().tobytes()
        labels = (torch.arange(n) % 10).to(torch.uint8).numpy().tobytes()
        for kind, header, content in (
            ("images-idx3", struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28), images),
            ("labels-idx1", struct.pack(">BBBBI", 0, 0, 8, 1, n), labels),
        ):
            file = folder / f"{part}-{kind}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(header + content))
            else:
                file.write_bytes(header + content)


class _Python2Pickler(pickle._Pickler):
    """Writes text, arrays and names as Python 2 and its NumPy did: what CIFAR's files are made of."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def text(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    def name(self, value: object, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())

    dispatch[str] = dispatch[bytes] = text
    dispatch[type] = dispatch[type(len)] = name
    save_global = name


def write_cifar10(root: Path, each: int = 60) -> None:
    """The six files of CIFAR-10's Python version with ``each`` random images, in torchvision's layout."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        names = [f"{i}.png" for i in range(each)]
        pixels = random.integers(0, 256, (each, 3072), dtype=np.uint8)
        content = {"batch_label": part, "labels": [i % 10 for i in range(each)], "data": pixels, "filenames": names}
        with (folder / part).open("wb") as file:
            _Python2Pickler(file, protocol=2).dump(content)


def encoded(image: Image.Image, suffix: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options)
    return buffer.getvalue()


def photograph(seed: int, height: int = 40, width: int = 30) -> Image.Image:
    """A smooth colour picture."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def zoo() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(good files, bad files): every kind of image that people's folders hold, in two sub-folders."""
    deep = Image.fromarray((np.arange(35 * 35).reshape(35, 35) * 53).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    good = {
        "cat/colour.png": encoded(photograph(0), "png"),
        "cat/grey.png": encoded(photograph(1).convert("L"), "png"),
        "cat/cmyk.jpg": encoded(photograph(2).convert("CMYK"), "jpg", quality=95),
        "dog/deep.png": encoded(deep, "png"),
        "dog/deep.tif": encoded(deep, "tif"),
        "dog/clear.png": encoded(photograph(3).convert("RGBA"), "png"),
        "dog/palette.png": encoded(photograph(4).quantize(16), "png"),
        "dog/bits.png": encoded(photograph(5).convert("1"), "png"),
        "dog/Turned.JPG": encoded(photograph(6), "jpg", exif=turned),
        "dog/web.webp": encoded(photograph(7), "webp"),
    }
    bad = {
        "cat/half.jpg": encoded(photograph(8, 200, 200), "jpg")[:-400],
        "cat/half.png": encoded(photograph(9), "png")[:-60],
        "dog/nothing.png": b"",
        "dog/page.png": b"<html>no such picture</html>",
        "dog/float.tif": encoded(Image.fromarray(np.ones((9, 9), np.float32)), "tif"),
    }
    return good, bad


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def write_data_root(root: Path) -> Path:
    """A root with the files of every data set that has any, and a folder of photographs in two classes."""
    write_fashion_mnist(root)
    write_cifar10(root)
    for i in range(12):
        write_folder(root / "folder", {f"{'ab'[i % 2]}/{i}.png": encoded(photograph(i), "png")})
    return root


def write_lpips(folder):
    """The two weight files of LPIPS as they are released, with random numbers for the features of VGG-16."""
    from torchvision.models.vgg import cfgs, make_layers

    g = torch.Generator().manual_seed(0)
    vgg = {"classifier.6.bias": torch.zeros(1000)}
    for name, value in make_layers(cfgs["D"]).state_dict().items():
        vgg[f"features.{name}"] = torch.randn(value.shape, generator=g) / max(1, value[0].numel()) ** 0.5
    torch.save(vgg, folder / "vgg16-397923af.pth")
    channels = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) / c for i, c in enumerate(channels)}
    torch.save(linear, folder / "weights-vgg16-lpips.pth")
    return folder


def synset(number: int) -> str:
    """A folder's name as in ImageNet; in order of number."""
    return f"n{1440764 + 97 * number:08d}"


def write_imagenet(root: Path, classes: int = 1000, each: int = 1, sizes: tuple[tuple[int, int], ...] = ()) -> Path:
    """A tree of ImageNet's layout: ``root``/train with ``classes`` synsets of ``each`` JPEGs, of odd sizes.

    As in the real one there are grey images, some in CMYK, one that is a PNG by content, and rotation marks.
    """
    sizes = sizes or ((37, 53), (64, 91), (130, 67), (41, 41), (153, 149))
    for number in range(classes):
        for i in range(each):
            seed = number * each + i
            image = photograph(seed, *sizes[seed % len(sizes)])
            options: dict[str, object] = {"quality": 95}
            kind = "jpeg"
            if seed % 11 == 3:
                image = image.convert("L")
            elif seed % 11 == 5:
                image = image.convert("CMYK")
            elif seed == 7:
                kind, options = "png", {}
            elif seed % 11 == 8:
                exif = Image.Exif()
                exif[274] = 6  # turned by 90 degrees
                options["exif"] = exif
            name = f"train/{synset(number)}/{synset(number)}_{i * 37 + 18}.JPEG"
            write_folder(root, {name: encoded(image, kind, **options)})
    return root / "train"


def write_vae(folder: Path, levels: int = 4, channels: int = 4, **options: object) -> Path:
    """An ``AutoencoderKL`` of the true format with random weights: 24,000 of them at four levels, images / 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=levels * ("DownEncoderBlock2D",),
        up_block_types=levels * ("UpDecoderBlock2D",),
        block_out_channels=levels * (8,),
        norm_num_groups=4,
        latent_channels=channels,
        **options,
    ).save_pretrained(folder)
    return folder


def write_imagenet_sets(root: Path, images: int = 32) -> Path:
    """Write imagenet64, 256 and 512 as prepare_data.py does, from ``images`` classes of one image each.

    64 is of images, the others are of latents; imagenet256-images and imagenet512-images are of images.
    """
    from flowmaps.data.prepare import Encoder, write_images
    from flowmaps.vae import open_vae

    src = write_imagenet(root, classes=images)
    vae = str(write_vae(root / "vae"))
    for size in (64, 256, 512):
        encoder = Encoder(open_vae(vae), vae) if size > 64 else None
        list(write_images(root / f"imagenet{size}", src, size, encoder, shard=10, batch=8))
        if encoder:
            list(write_images(root / f"imagenet{size}-images", src, size, None, shard=10, batch=8))
    return root


class Items(torch.utils.data.Dataset):
    """Images [n, ...] as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def write_inception(file: Path, size: int = 75) -> Path:
    """A weight file of the format that torch-fidelity publishes, its numbers random and such that features vary.

    They do so for photographs that are resized to ``size`` pixels.
    """
    from benchmarks.scoring import write_weights
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    write_weights(file)
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):  # torch's own default shrinks activations to nothing
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    pictures = np.stack([np.asarray(photograph(10_000 + i, 24, 24)) for i in range(32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", size)
        net.train()(torch.from_numpy(pictures).permute(0, 3, 1, 2))  # each channel centred: images differ
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.clamp_(min=0.1)  # of a channel that these pictures leave dead
    torch.save(net.state_dict(), file)
    return file


@contextmanager
def small_inception(folder: Path) -> Iterator[None]:
    """Within, torch-fidelity's Inception resizes to 75 x 75 for speed; ``folder`` gets such a fid.py and stats.py."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    for name in ("fid.py", "stats.py"):
        (folder / name).write_text(
            "import runpy\nfrom torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3\n"
            "FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE = 75\n"
            f"runpy.run_path('scripts/{name}', run_name='__main__')\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
        yield


def archive(path, n, first):
    """``n`` photographs of 24 x 24; a quarter of them is darker the later they come."""
    images = np.stack([np.asarray(photograph(first + i, 24, 24)) for i in range(n)])
    images[::4] = images[::4] // (1 + first // 1000)
    np.savez(path, samples=images)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def write_dinov2(file, sizes):
    """A file of weights as DINOv2's authors publish them, its numbers random."""
    g = torch.Generator().manual_seed(0)
    width, deep = sizes.width, {}

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    deep["cls_token"], deep["mask_token"] = normal(1, 1, width), normal(1, width)
    deep["pos_embed"] = normal(1, sizes.stored_side**2 + 1, width)
    deep |= {"patch_embed.proj.weight": normal(width, 3, sizes.patch, sizes.patch, scale=0.05)}
    deep["patch_embed.proj.bias"] = normal(width)
    for i in range(sizes.depth):
        for name, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                            ("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width))):  # fmt: skip
            deep[f"blocks.{i}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
            deep[f"blocks.{i}.{name}.bias"] = normal(shape[0], scale=0.1)
        for name in ("norm1", "norm2"):
            deep[f"blocks.{i}.{name}.weight"] = 1 + normal(width, scale=0.1)
            deep[f"blocks.{i}.{name}.bias"] = normal(width, scale=0.1)
        for name in ("ls1", "ls2"):
            deep[f"blocks.{i}.{name}.gamma"] = normal(width, scale=0.5)
    deep["norm.weight"], deep["norm.bias"] = 1 + normal(width, scale=0.1), normal(width, scale=0.1)
    torch.save(deep, file)
    return file


def write_clip(file, sizes):
    """An archive of TorchScript as CLIP's authors publish it: half precision, a text part, its numbers random."""
    g = torch.Generator().manual_seed(1)
    width, flat = sizes.width, {}

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g)).half()

    flat["text_projection"], flat["logit_scale"] = normal(8, sizes.projection), normal(1)[0]
    flat["transformer.resblocks.0.ln_1.weight"], flat["token_embedding.weight"] = normal(8), normal(9, 8)
    flat["positional_embedding"], flat["ln_final.bias"] = normal(5, 8), normal(8)
    flat["visual.conv1.weight"] = normal(width, 3, sizes.patch, sizes.patch, scale=0.03)
    flat["visual.class_embedding"] = normal(width)
    flat["visual.positional_embedding"] = normal(sizes.stored_side**2 + 1, width)
    flat["visual.proj"] = normal(width, sizes.projection, scale=width**-0.5)
    for i in range(sizes.depth):
        block = f"visual.transformer.resblocks.{i}"
        flat[f"{block}.attn.in_proj_weight"] = normal(3 * width, width, scale=width**-0.5)
        flat[f"{block}.attn.in_proj_bias"] = normal(3 * width, scale=0.1)
        for name, shape in (("attn.out_proj", (width, width)), ("mlp.c_fc", (4 * width, width)),
                            ("mlp.c_proj", (width, 4 * width))):  # fmt: skip
            flat[f"{block}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
            flat[f"{block}.{name}.bias"] = normal(shape[0], scale=0.1)
    norms = [f"visual.transformer.resblocks.{i}.ln_{k}" for i in range(sizes.depth) for k in (1, 2)]
    for name in ("visual.ln_pre", "visual.ln_post", *norms):
        flat[f"{name}.weight"], flat[f"{name}.bias"] = 1 + normal(width, scale=0.1), normal(width, scale=0.1)
    root = torch.nn.Module()
    for name, value in flat.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root).save(str(file))
    return file
