"""The web page: its engine against PyTorch, the shipped page, what it refuses, and the page in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, run_script
from helpers.node import needs_node, parts, run_engine
from helpers.small_networks import IMAGES, small

from flowmaps import FlowMap, UserError
from flowmaps.deployment import page as module
from flowmaps.deployment.page import HERE, check_page, page, write_page
from flowmaps.deployment.translate import write_program
from flowmaps.networks.conditioning import soft_label

DDPM = {"UNet ddpm", "DiT diffusers"}  # noise levels looked up in a table, which no page needs
QUICK = {"DiT rms"}
CHROMIUM = shutil.which("chromium")
DEMO = ROOT / "assets" / "demo.html"


def given(fm, seed, s, t):
    label, classes = {}, fm.info.num_classes
    if classes:
        augmentation = torch.zeros(1, fm.network.config.get("augment_dim", 0))
        label = {"label": soft_label(torch.tensor([seed % classes]), augmentation, classes)}
    return {"x": fm.noise(1, seed), "s": torch.tensor([s]), "t": torch.tensor([t]), **label}


@needs_node
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IMAGES]
)
def test_engine_computes_what_pytorch_does(name):
    """At another point, label and pair of times than the program was traced with."""
    fm = small(name).eval()
    if name in DDPM:
        with pytest.raises(UserError, match="does not know index: use --onnx and onnxruntime-web"):
            write_program(fm.network, given(fm, 0, 0.0, 1.0))
        return
    program, weights = write_program(fm.network, given(fm, 0, 0.0, 1.0)).packed(half=False)
    for seed, s, t in ((1, 0.2, 0.7), (2, 0.5, 0.5)):
        inputs = given(fm, seed, s, t)
        with torch.no_grad():
            expected = fm.network(**inputs).flatten()
        found, _ = run_engine(program, weights, inputs)
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@needs_node
def test_shipped_page_computes_the_shipped_model():
    """Its weights are float16, which costs a thousandth."""
    model, weights = parts(DEMO.read_text())
    fm = FlowMap.from_pretrained(ROOT / "assets" / "fashion_mnist")
    assert model["weights"] == fm.fingerprint() and tuple(model["classes"]) == fm.info.class_names
    for seed, s, t in ((0, 0.0, 1.0), (3, 0.25, 0.5), (9, 0.5, 0.5)):
        inputs = given(fm, seed, s, t)
        with torch.no_grad():
            expected = fm.network(**inputs).flatten()
        found, ms = run_engine(model["program"], weights, inputs)
        assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()
    print(f"one image in one step: {ms:.1f} ms")


def test_shipped_page_is_what_the_command_in_deployment_md_writes_now():
    """But for the numbers, whose last digits depend on the machine."""
    text, fm = DEMO.read_text(), FlowMap.from_pretrained(ROOT / "assets" / "fashion_mnist")
    for part in ("model", "weights"):
        text = re.sub(rf'(id="{part}">).*?(</script>)', rf"\1{{{part}}}\2", text, flags=re.DOTALL)
    now = (HERE / "page.html").read_text().replace("{engine}", (HERE / "engine.js").read_text().strip())
    now = now.replace("{title}", "Fashion-MNIST").replace("{facts}", module.facts(fm))
    assert text == now
    assert "--web=assets/demo.html" in (ROOT / "docs/deployment.md").read_text()


def test_page_allows_no_request_and_names_no_address():
    text = DEMO.read_text()
    assert "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'\"" in text
    assert "http:" not in text.split('id="weights"')[0] and "https:" not in text and "/tmp" not in text


def test_page_refuses_what_it_cannot_show(monkeypatch):
    fm = small("UNet").eval()
    for info in (
        {"kind": "drift"},
        {"kind": "consistency"},
        {"shape": (2,)},
        {"num_classes": 0, "condition": (3,)},
        {"latent_scale": (1.0,), "latent_shift": (0.0,)},
    ):
        fm.info = replace(small("UNet").info, **info)
        with pytest.raises(UserError, match="a page shows a map of images"):
            check_page(fm)
    fm.info = small("UNet").info
    monkeypatch.setattr(module, "MOST_WEIGHTS", 1000)
    with pytest.raises(UserError, match="million weights, a page at most 10 million: use --onnx and onnxruntime-web"):
        check_page(fm)


def test_text_of_a_checkpoint_cannot_become_part_of_the_page():
    fm = small("DiT", depth=1).eval()
    names = ("</script><script>alert(1)</script>", "<!--", "b", "c")
    fm.info = replace(fm.info, class_names=names, data="<script>alert(2)</script>")
    text = page(fm)
    assert "<script>alert" not in text and "&lt;script&gt;alert(2)" in text
    assert tuple(parts(text)[0]["classes"]) == names


def test_rows_of_labels_have_the_columns_of_guidance(tmp_path):
    """A network conditioned on guidance gets the weight 1 at all times, unless its authors recommend another."""
    fm = small("UNet adm").eval()
    guided = replace(fm.info, guidance_max=8.0, guidance_interval=True)
    for recommended, rest in (((), [1, 0, 1]), ((4.0, 0.3, 0.9), [4.0, 0.3, 0.9])):
        fm.info = replace(guided, recommended_guidance=recommended)
        assert module.rest_of_label(fm) == rest


def test_a_page_replaces_only_pages_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    monkeypatch.setattr(module, "page", lambda fm, title: (HERE / "page.html").read_text())
    assert write_page(None, path) == write_page(None, path) == path.stat().st_size
    path.write_text("<html>mine</html>")
    with pytest.raises(UserError, match="flowmaps did not write it"):
        write_page(None, path)


def test_command_refuses_in_one_line_before_it_writes_anything(tmp_path):
    web, out = tmp_path / "points.html", tmp_path / "model"
    done = run_script("scripts/export.py", "--checkpoint=assets/checkerboard", f"--web={web}", f"--out={out}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--web=" in done.stderr and "a page shows a map of images" in done.stderr
    assert not web.exists() and not out.exists()


DRIVER = """<script>
addEventListener("load", async () => {
  const wait = async (test) => { while (!test()) await new Promise((done) => setTimeout(done, 20)); };
  const ink = (id) => Array.from($(id).getContext("2d").getImageData(0, 0, width, height).data);
  const apart = (a, b) => ink(a).reduce((sum, value, i) => sum + Math.abs(value - ink(b)[i]), 0);
  await wait(() => document.body.dataset.done);
  const seen = { map: $("map-text").textContent, euler: apart("map", "euler"), agree: apart("map-1", "map-16") };
  const before = ink("map");
  $("classes").children[1].click();
  $("steps").value = 2;
  $("steps").oninput();
  await wait(() => +document.body.dataset.done === round);
  seen.count = $("count").textContent;
  seen.moved = ink("map").some((value, i) => value !== before[i]);
  const noise = ink("noise");
  $("walk").value = 90;
  $("walk").oninput();
  await wait(() => +document.body.dataset.done === round);
  seen.walked = ink("noise").some((value, i) => value !== noise[i]);
  seen.probe = $("probe").textContent;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.title = JSON.stringify(seen);
});
</script></html>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_page_in_a_browser(tmp_path):
    """Opened from a file: pictures, buttons and sliders work, and nothing is requested."""
    copy = tmp_path / "page.html"
    copy.write_text(DEMO.read_text().replace("</html>", DRIVER))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [CHROMIUM, *options, "--virtual-time-budget=600000", "--dump-dom", f"file://{copy}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert re.fullmatch(r"1 step, [\d.]+ ms", seen["map"]) and seen["count"] == "4 steps"
    assert seen["agree"] < seen["euler"] and seen["moved"] and seen["walked"]
    assert seen["probe"].startswith("Compared with PyTorch: 64 numbers differ by at most 0.000")
    assert seen["requests"] == []
