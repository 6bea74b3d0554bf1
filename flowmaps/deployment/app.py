"""An app in the browser, on gradio: samples of a checkpoint by the map and by Euler's method, side by side."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from flowmaps.errors import UserError
from flowmaps.evaluation import evaluate
from flowmaps.evaluation.references import Reference
from flowmaps.evaluation.settings import sampling_settings
from flowmaps.flow_map import FlowMap
from flowmaps.generate import generate
from flowmaps.images import sample_grid, to_pil
from flowmaps.markdown import counted

ALL = "each in turn"  # in the list of classes
COLUMNS, MOST, MOST_STEPS = 8, 64, 128  # images in a row of a grid, images, steps
SCORED = 500  # samples for a distance: seconds on a small model
POINTS = 4000  # points in a picture


def check_installed() -> None:
    """Refuse to go on without the packages of the extra ``app``."""
    if find_spec("gradio") is None:
        raise UserError("the app needs gradio: pip install gradio")


def check_model(fm: FlowMap) -> None:
    """Refuse a model that needs more than the app can ask for."""
    if fm.info.condition:
        raise UserError("the app has no control for a condition: use sample.py --condition")


@dataclass(frozen=True)
class Sampling:
    """The computations of the app, for a model and the reference of its distances, if there is one."""

    fm: FlowMap
    reference: Reference | None = None

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers shown side by side: that of the model, and of a map Euler's method."""
        return ("map", "euler") if self.fm.info.sampler == "map" else (self.fm.info.sampler,)

    @property
    def guided(self) -> bool:
        """True if the model takes a guidance weight."""
        info = self.fm.info
        return info.guidance_max is not None or (info.kind == "drift" and info.label_dropout > 0)

    def options(self, steps: float, label: str | None, guidance: float | None, schedule: str) -> dict[str, Any]:
        """Return arguments of ``sampling_settings``, from the values of the app's controls."""
        if steps is None or steps != int(steps) or not 1 <= steps <= MOST_STEPS:
            raise UserError(f"must be a whole number from 1 to {MOST_STEPS}", field="steps", value=steps)
        return {
            "steps": [int(steps)],
            "samplers": self.samplers,
            "schedules": [schedule],
            "label": None if label in (None, "", ALL) else label,
            "guidance": guidance if self.guided else None,
        }

    def draw(
        self,
        steps: float,
        label: str | None = None,
        guidance: float | None = None,
        schedule: str = "stored",
        seed: float = 0,
        num: float = 16,
    ) -> list[Image.Image]:
        """Return a picture of ``num`` samples for each of ``samplers``, from the same noise.

        Raises:
            UserError: A value is out of range, or the model does not allow it.
        """
        for name, value, most in (("seed", seed, 2**63 - 1), ("num", num, MOST)):
            if value is None or value != int(value) or not (name == "num") <= value <= most:
                raise UserError(f"must be a whole number up to {most:,}", field=name, value=value)
        options = self.options(steps, label, guidance, schedule)
        given = {name: options[name] for name in ("label", "guidance")}
        pictures = []
        for setting in sampling_settings(self.fm, **options):
            points = len(self.fm.info.shape) == 1
            n = POINTS if points else int(num)
            batches = generate(self.fm, setting.times, n, int(seed), sampler=setting.sampler, batch=n, **given)
            x = self.fm.decode(torch.cat([x for x, _ in batches]))
            pictures.append(to_pil(sample_grid([x] if points else list(torch.split(x, COLUMNS)), COLUMNS)))
        return pictures

    def distances(
        self, steps: float, label: str | None = None, guidance: float | None = None, schedule: str = "stored"
    ) -> str:
        """Return the distance of ``SCORED`` samples to the reference in words, for each of ``samplers``."""
        if self.reference is None:
            raise UserError("start the app with a reference to see distances", field="reference")
        options = self.options(steps, label, guidance, schedule)
        given = {name: options[name] for name in ("label", "guidance")}
        record = evaluate(
            self.fm,
            self.reference,
            steps=options["steps"],
            num=SCORED,
            sampler=list(self.samplers),
            schedule=schedule,
            **given,
        )
        metric, found = record["metric"], record["results"]
        scores = ", ".join(f"{row['sampler']} {row[metric]:.3g}" for row in found)
        return f"{metric} of {SCORED} samples in {counted(int(steps), 'step')}: {scores} (lower is better)"


def build(fm: FlowMap, reference: Reference | None = None) -> Any:
    """Return the app as ``gradio.Blocks``, to be launched.

    Args:
        fm: The model, on the device to sample on.
        reference: What samples are compared with, of ``flowmaps.evaluation.open_reference``.

    Raises:
        UserError: gradio is not installed, or the model takes a condition that the app cannot ask for.

    Example:
        >>> build(FlowMap.from_pretrained("digits")).launch()
    """
    check_installed()
    check_model(fm)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it asks no other host
    import gradio

    app, info = Sampling(fm, reference), fm.info
    classes = [ALL, *(info.class_names or map(str, range(info.num_classes)))]

    def saying(function: Any) -> Any:
        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except UserError as error:
                raise gradio.Error(str(error), print_exception=False) from None

        return call

    with gradio.Blocks(title=f"{info.data or 'flow map'}: a flow map", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {info.data or 'Samples'}\nThe same noise on both sides, in the same number of steps.")
        with gradio.Row():
            steps = gradio.Slider(1, MOST_STEPS, value=1 if info.kind != "drift" else 32, step=1, label="Steps")
            label = gradio.Dropdown(classes, value=ALL, label="Class", visible=info.num_classes > 0)
            most = info.guidance_max or 8
            guidance = gradio.Slider(1, most, value=1, step=0.1, label="Guidance", visible=app.guided)
            schedule = gradio.Radio(["stored", "uniform"], value="stored", label="Step sizes")
            seed = gradio.Number(0, precision=0, label="Seed")
            num = gradio.Slider(1, MOST, value=16, step=1, label="Images")
        button = gradio.Button("Sample", variant="primary")
        with gradio.Row():
            pictures = [gradio.Image(label=name, type="pil", format="png") for name in app.samplers]
        chosen = [steps, label, guidance, schedule]

        def draw(*values: Any) -> Any:
            found = app.draw(*values)
            return found if len(found) > 1 else found[0]

        button.click(saying(draw), [*chosen, seed, num], pictures, api_name="sample")
        if reference is not None:
            told = gradio.Textbox(label="Distances", interactive=False)
            gradio.Button("Measure").click(saying(app.distances), chosen, told, api_name="distances")
    return blocks
