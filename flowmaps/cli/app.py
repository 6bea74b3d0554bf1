"""Open a web app that samples from a checkpoint: by the map and by Euler's method, side by side.

python scripts/app.py --checkpoint=assets/fashion_mnist
python scripts/app.py --checkpoint=runs/digits --reference=digits:heldout --port=7861

It needs gradio, the extra `app`, and answers this computer alone. scripts/export.py --space=DIR writes it as a Hugging
Face Space; for a small model scripts/export.py --web=FILE.html is a page that needs neither gradio nor a server.
"""

from absl import flags

from flowmaps.cli.run import required
from flowmaps.errors import UserError, blame

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Exported or run directory, digits (shipped), or hub id")
REFERENCE = flags.DEFINE_string("reference", None, "Show distances of samples to this, as in fid.py")
ROOT = flags.DEFINE_string("root", "data", "Folder of data set files")
VAE = flags.DEFINE_string("vae", None, "VAE that decodes latents: directory or hub id [that of the checkpoint]")
PORT = flags.DEFINE_integer("port", 7860, "Port on which the app answers", 1, 65_535)
READS = (CHECKPOINT, REFERENCE, VAE)


def main() -> None:
    checkpoint = required(CHECKPOINT, "runs/digits")

    from flowmaps.deployment.app import build, check_installed
    from flowmaps.distributed import pick_device
    from flowmaps.evaluation import open_reference
    from flowmaps.evaluation.references import model_size
    from flowmaps.flow_map import FlowMap
    from flowmaps.vae import Decoder

    check_installed()
    fm = FlowMap.from_pretrained(checkpoint)
    if VAE.value is not None:
        if not fm.info.latent_scale:
            raise UserError("this model does not make latents, leave it out", field="vae", value=VAE.value)
        fm.decoder = Decoder(VAE.value, fm.info)
    if fm.info.latent_scale:
        fm.open_decoder()
    reference = None
    if REFERENCE.value is not None:
        with blame("reference", REFERENCE.value):
            reference = open_reference(REFERENCE.value, root=ROOT.value, size=model_size(fm))
    app = build(fm.to(pick_device()), reference)
    try:
        app.launch(server_port=PORT.value, share=False)
    except OSError as error:
        raise UserError(f"is taken ({error}): choose another", field="port", value=PORT.value) from None
