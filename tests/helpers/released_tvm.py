"""Terminal Velocity Matching's file: modules of persistent classes, of torch and of timm, around weights of a Map."""

import enum

from torch import nn

from helpers.released import Persistent, dump
from helpers.released_maps import Map


class Format(enum.StrEnum):
    """timm's."""

    NCHW = "NCHW"


class PatchEmbed(nn.Module):
    """timm's."""


class Mlp(nn.Module):
    """timm's."""


Format.__module__, PatchEmbed.__module__, Mlp.__module__ = (
    "timm.layers.format",
    "timm.layers.patch_embed",
    "timm.layers.mlp",
)


class TVMWrapper(Persistent):
    """Theirs."""


class DiT_XL_2_18h(Persistent):
    """Theirs."""


class TimestepEmbedder(Persistent):
    """Theirs."""


class LabelEmbedder(Persistent):
    """Theirs."""


class DiTBlock(Persistent):
    """Theirs."""


class FinalLayer(Persistent):
    """Theirs."""


class Attention(Persistent):
    """Theirs."""


def filled(cls, **children):
    """Return a module of a class with these sub-modules."""
    module = cls()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def save(path, weights=None, scaled=True, protocol=4, change=lambda net: None, **sizes):
    """Write the file, its network changed by ``change``; returns the Map that it holds, with the weight 2."""
    theirs = weights or Map("tvm", scale=2.0, **sizes)
    width, heads, p = theirs.width, theirs.heads, theirs.patch

    def embedder():
        return filled(TimestepEmbedder, mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))

    def modulation(count):
        return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))

    def attention():
        names = {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        norms = {name: nn.RMSNorm(width // heads, eps=1e-6) for name in ("q_norm", "k_norm")}
        found = filled(Attention, **names, **norms, proj_drop=nn.Dropout(0.0))
        found.num_heads = heads
        return found

    def block():
        mlp = filled(Mlp, fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width))
        parts = {"norm1": nn.RMSNorm(width, eps=1e-6, elementwise_affine=False), "attn": attention(), "mlp": mlp}
        return filled(DiTBlock, **parts, adaLN_modulation=modulation(6))

    patches = filled(PatchEmbed, proj=nn.Conv2d(4, width, p, p), norm=nn.Identity())
    patches.output_fmt, patches.img_size = Format.NCHW, (theirs.size, theirs.size)
    labels = filled(LabelEmbedder, embedding_table=nn.Embedding(theirs.classes + 1, width))
    final = {"linear": nn.Linear(width, 4 * p * p), "adaLN_modulation": modulation(2)}
    model = filled(
        DiT_XL_2_18h,
        x_embedder=patches,
        t_embedder=embedder(),
        s_embedder=embedder(),
        guidance_embedder=embedder(),
        y_embedder=labels,
        blocks=nn.ModuleList(block() for _ in range(theirs.depth)),
        final_layer=filled(FinalLayer, **final),
    )
    model.pos_embed = nn.Parameter(theirs.w["pos_embed"].clone(), requires_grad=False)
    model.load_state_dict(theirs.w)
    net = filled(TVMWrapper, model=model)
    net._init_args, net._init_kwargs = (), {"do_scale_param": scaled} if scaled is not None else {}
    change(net)
    content = {"net": net.eval(), "dataset_kwargs": {"resolution": 256}}
    dump(content, path, protocol, more=(Format, PatchEmbed, Mlp))
    return theirs
