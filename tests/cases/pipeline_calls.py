"""Calls that users of diffusers make, on assets/digits."""

import numpy as np
import torch
from common import CLONE, TMP, case, raised
from diffusers import DiffusionPipeline
from diffusers.utils import logging as dl

from flowmaps import FlowMap, FlowMapInfo, UserError
from flowmaps.networks import UNet
from flowmaps.pipeline import FlowMapPipeline

dl.set_verbosity_error()
dl.disable_progress_bar()
D = str(CLONE / "assets/digits")


def pipe(**k):
    p = FlowMapPipeline.from_pretrained(D, **k)
    p.set_progress_bar_config(disable=True)
    return p


p, noise = pipe(), FlowMap.from_pretrained(D).noise(8, seed=0)
for n in (0, -1):
    e, r = raised(lambda: p(latents=noise.clone(), num_inference_steps=n, output_type="pt").images)
    case(
        f"num_inference_steps={n} is refused",
        e is not None,
        "" if e else f"returned the noise itself: {torch.equal(r, noise)}",
    )
g = [torch.Generator().manual_seed(i) for i in range(5)]
for n, k in ((3, 2), (2, 5)):
    e, r = raised(lambda: p(n, generator=g[:k]))
    case(f"{k} generators for {n} images: ValueError", isinstance(e, ValueError), repr(e)[:80])
e, r = raised(lambda: p(class_labels=[2, 3, 4], num_inference_steps=2).images)
case(
    "class_labels=[2,3,4] gives 3 images (or a plain error)",
    isinstance(e, ValueError) or (r and len(r) == 3),
    repr(e)[:100],
)
net = UNet(8, 1, 16, (1, 2), 1, (4,), num_classes=10)
drift = FlowMapPipeline.from_flow_map(
    FlowMap(net, "linear", 0.5, FlowMapInfo(shape=(1, 8, 8), num_classes=10, kind="drift", label_dropout=0.1))
)
drift.set_progress_bar_config(disable=True)
e, r = raised(lambda: drift(2, num_inference_steps=4, guidance_scale=4.0))
case("guidance_scale=4 on a drift trained with label dropout", e is None, repr(e)[:120])
x = p(64, num_inference_steps=4, output_type="pt").images
case(
    "output_type='pt' lies in [0, 1] as in diffusers", x.min() >= 0 and x.max() <= 1, f"{x.min():.2f} .. {x.max():.2f}"
)
calls = []


def stop(pipe, k, t, kw):
    calls.append(k)
    pipe._interrupt = True
    return kw


p(1, num_inference_steps=8, callback_on_step_end=stop)
case("pipe._interrupt = True in a callback stops", len(calls) == 1, f"{len(calls)} steps were made")
e, r = raised(lambda: p(1, callback_on_step_end=lambda *a: a[3], callback_on_step_end_tensor_inputs=["latents"]))
case("callback_on_step_end_tensor_inputs", e is None, repr(e)[:100])
e, r = raised(lambda: DiffusionPipeline.from_pretrained(D))
case("DiffusionPipeline.from_pretrained(directory)", e is None, repr(e)[:100])
e, r = raised(lambda: FlowMapPipeline.from_pipe(p)(1))
case("FlowMapPipeline.from_pipe(pipe)", e is None, repr(e)[:100])
e, r = raised(lambda: FlowMapPipeline(**p.components)(1))
case("FlowMapPipeline(**pipe.components): works or a plain error", e is None or isinstance(e, UserError), repr(e)[:100])
v = TMP / "fp16"
pipe(torch_dtype=torch.float16).save_pretrained(v, variant="fp16")
e, r = raised(lambda: FlowMap.from_pretrained(v))
case(
    "save_pretrained(variant='fp16') is read by FlowMap.from_pretrained, or the error names the variant",
    e is None or "fp16" in str(e).split("network/")[-1],
    str(e)[-90:],
)
a = np.asarray(
    p(latents=torch.full((1, 1, 8, 8), float("nan"))).images[0]
    if raised(lambda: p(latents=torch.full((1, 1, 8, 8), float("nan"))))[0] is None
    else np.ones(1)
)
case("NaN samples are not handed out as black pictures", a.any())
fm = FlowMap.from_pretrained(D)
e, r = raised(lambda: fm(noise, torch.zeros(8), torch.ones(8)))
case("label=None on a model never trained without labels is refused or warned of", e is not None)
f = fm.fingerprint()
fm.network = torch.compile(fm.network)
case("fingerprint of a compiled network is that of the network", fm.fingerprint() == f)
