"""A folder for a Hugging Face Space: the app of this package, with a model inside."""

from pathlib import Path

from flowmaps.deployment.app import check_model
from flowmaps.export import MODEL
from flowmaps.files import WRITER, WRITTEN_BY, Layout, new_directory
from flowmaps.flow_map import FlowMap
from flowmaps.model_card import SOURCE, card

APP = """# {mark}: the app of a Hugging Face Space; python app.py runs it here.
from pathlib import Path

from flowmaps import FlowMap
from flowmaps.deployment.app import build

build(FlowMap.from_pretrained(Path(__file__).parent / "model")).launch()
"""
REQUIREMENTS = f"flowmaps[app] @ git+{SOURCE}\n"
README = """---
title: {name}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
{license}tags:
- flow-map
---

Samples of {name} by [flowmaps]({source}); the model and its card are in `model/`.
"""
GRADIO = "6.31.0"  # that the app was tested with
SPACES = Layout(
    "app.py",
    f"{WRITTEN_BY}: {WRITER}".encode(),
    ("app.py", "requirements.txt", "README.md", *(f"model/{name}" for name in MODEL.names)),
)


def write_space(fm: FlowMap, directory: Path, name: str, license: str = "") -> None:
    """Write the folder of a Space, complete or not at all; one that flowmaps wrote is replaced.

    Args:
        fm: The model, which is stored in the folder with its card.
        directory: The folder to write.
        name: The title of the Space.
        license: Of the weights, by its name on the hub.
    """
    check_model(fm)
    with new_directory(directory, SPACES) as folder:
        fm.save_pretrained(folder / "model", card(fm, "model", license))
        (folder / "app.py").write_text(APP.format(mark=f"{WRITTEN_BY}: {WRITER}"))
        (folder / "requirements.txt").write_text(REQUIREMENTS)
        shown = f"license: {license}\n" if license else ""
        (folder / "README.md").write_text(README.format(name=name, gradio=GRADIO, license=shown, source=SOURCE))
