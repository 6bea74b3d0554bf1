"""Checkpoints that say more about themselves than the importer reads."""

import argparse
import pickle

import torch
from common import TMP, case, raised
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from helpers import released, released_edm2
from helpers.released_state_dicts import NCSNpp, Transformer

from flowmaps.importers import import_checkpoint


def unet(name, root, **options):
    d = TMP / name
    net = UNet2DModel(
        sample_size=16,
        block_out_channels=(128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    net.save_pretrained(d if root else d / "unet")
    DDPMScheduler(**options).save_pretrained(d if root else d / "scheduler")
    return d


def truth(net, scheduler, x, k, label):
    """The drift and its times at steps k of a scheduler, by what its prediction means."""
    a = scheduler.alphas_cumprod.double()[k][:, None, None, None]
    t = 1 / (1 + ((1 - a) / a).sqrt())
    z = x / t * a.sqrt()
    out, kind = net(z, k, label).sample[:, : x.shape[1]], scheduler.config.prediction_type
    x1 = a.sqrt() * z - (1 - a).sqrt() * out if kind == "v_prediction" else (z - (1 - a).sqrt() * out) / a.sqrt()
    return x1 - (z - a.sqrt() * x1) / (1 - a).sqrt(), t.flatten()


def near(form, d, net, scheduler, label=None):
    e, fm = raised(lambda: import_checkpoint(form, d).double())
    if e is not None:
        return False, str(e)
    x = torch.randn(3, *fm.info.shape).double()
    with torch.no_grad():
        theirs, t = truth(net.double().eval(), scheduler, x, torch.tensor([900, 300, 5]), label)
        off = float((fm.drift(x, t, label) - theirs).abs().max() / theirs.abs().max())
    return off < 1e-5, f"off by {off:.1g}"


for name, root, options in (
    ("cosine in scheduler/", 0, {"beta_schedule": "squaredcos_cap_v2"}),
    ("cosine next to the weights, as google/ddpm-* lay out their files", 1, {"beta_schedule": "squaredcos_cap_v2"}),
    ("v_prediction next to the weights", 1, {"prediction_type": "v_prediction"}),
):
    d = unet(name.replace("/", "_").replace("*", ""), root, **options)
    net = UNet2DModel.from_pretrained(d if root else d / "unet")
    case(f"diffusers_unet, {name}: converted", *near("diffusers_unet", d, net, DDPMScheduler(**options)))
d = TMP / "dit"
net, scheduler = DiTTransformer2DModel(2, 16, num_layers=1, sample_size=8, num_embeds_ada_norm=5), DDIMScheduler()
torch.nn.init.normal_(net.proj_out_2.weight)
net.save_pretrained(d / "transformer")
scheduler.save_pretrained(d / "scheduler")
case("DiT as the hub has it", *near("diffusers_dit", d, net, scheduler, torch.tensor([0, 3, 5])))
m = Transformer(classes=5)
table = "y_embedder.embedding_table.weight"
w = dict(m.w)
w[table] = torch.randn(10, 128)
torch.save({"ema": w, "args": argparse.Namespace(num_classes=10)}, TMP / "a.pt")
info = import_checkpoint("dit", TMP / "a.pt").info
case(
    "DiT trained with class_dropout_prob=0, its args say 10 classes",
    info.num_classes == 10 and not info.label_dropout,
    f"num_classes={info.num_classes}, label_dropout={info.label_dropout}",
)
w = dict(m.w)
w[table] = torch.randn(1, 128)
torch.save(w, TMP / "b.pt")
e, _ = raised(lambda: import_checkpoint("dit", TMP / "b.pt"))
case(
    "DiT with one row (unconditional): imported, or refused by its reason",
    e is None or "class" in str(e),
    str(e)[80:220],
)
torch.save({k: v.bfloat16() for k, v in m.w.items()}, TMP / "c.pt")
e, _ = raised(lambda: import_checkpoint("sit", TMP / "c.pt"))
case("SiT saved in bfloat16", e is None, str(e)[80:220])
torch.save({"ema": {"_orig_mod." + k: v for k, v in m.w.items()}}, TMP / "d.pt")
e, _ = raised(lambda: import_checkpoint("sit", TMP / "d.pt"))
case("SiT's ema of a compiled model (_orig_mod.)", e is None, str(e)[80:200])
torch.save({"ema": m.w | {"projectors.0.0.weight": torch.zeros(8, 128)}}, TMP / "r.pt")
e, _ = raised(lambda: import_checkpoint("sit", TMP / "r.pt"))
case("SiT trained by REPA (with projectors.*)", e is None, str(e)[80:220])
for said in ({"path_type": "VP"}, {"prediction": "noise"}, {"prediction": "score"}):
    torch.save({"ema": m.w, "args": argparse.Namespace(**said)}, TMP / "s.pt")
    e, _ = raised(lambda: import_checkpoint("sit", TMP / "s.pt"))
    case(f"SiT trained with {said}: refused by name", next(iter(said)).partition("_")[0] in str(e), str(e)[40:200])
torch.save({"ema": m.w, "args": argparse.Namespace(path_type="GVP")}, TMP / "s.pt")
e, fm = raised(lambda: import_checkpoint("sit", TMP / "s.pt"))
case("SiT trained on GVP: the trigonometric path", e is None and fm.interpolant_name == "trigonometric", str(e))
NCSNpp(size=64, attention=(32,)).save(TMP / "f.pth")
e, _ = raised(lambda: import_checkpoint("rectified_flow", TMP / "f.pth"))
case("rectified flow: the size is asked for", "image_size" in str(e), str(e))
e, fm = raised(lambda: import_checkpoint("rectified_flow", TMP / "f.pth", image_size=64))
case("rectified flow at 64 x 64", e is None and fm.info.shape == (3, 64, 64), str(e))
net = released_edm2.edm2(TMP / "g.pkl")
net.unet.label_balance = 0.7
released.dump({"ema": net}, TMP / "g.pkl")
e, _ = raised(lambda: import_checkpoint("edm2", TMP / "g.pkl"))
case("EDM2 with another label_balance: refused by name", "label_balance" in str(e), str(e)[40:200])


class Protocol5:
    def __getattr__(self, key):
        return getattr(pickle, key)

    def dumps(self, content, protocol=None):
        return pickle.dumps(content, 5)


released.pickle = Protocol5()
released_edm2.edm2(TMP / "e.pkl", True)
e, _ = raised(lambda: import_checkpoint("edm2", TMP / "e.pkl"))
case("EDM2 snapshot in pickle protocol 5 (Python 3.14's default)", e is None, str(e)[80:240])
