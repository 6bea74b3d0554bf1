"""Folders of diffusers: a model's config and weights, and the scheduler that says how it was trained."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from flowmaps.errors import UserError
from flowmaps.importers.build import Options
from flowmaps.importers.inert import REMEDY, Unsupported, same, shown
from flowmaps.importers.torch_files import Weights, network_weights, read_tensors
from flowmaps.parametrisations import SCHEDULES, parametrisation
from flowmaps.reading import parse, read_json

Config = TypeVar("Config")
WEIGHTS = "diffusion_pytorch_model"
# What makes the noise levels, by the schedulers' defaults.
LEVELS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "predict_epsilon": True,
}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}
# Schedulers that make their noise levels as DDPMScheduler does, with its defaults. The others differ in the steps that
# they take from there, and have keys for that alone.
SAMPLING = {
    *("variance_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"),
    *("sample_max_value", "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps"),
}
SOLVING = {
    *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "lambda_min_clipped"),
    *("predict_x0", "disable_corrector", "solver_p", "interpolation_type", "timestep_type", "sigma_min", "sigma_max"),
}
SCHEDULERS = {
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"), SAMPLING),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), SAMPLING | SOLVING),
    **dict.fromkeys(("UniPCMultistepScheduler", "DEISMultistepScheduler"), SAMPLING | SOLVING),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"), SAMPLING | SOLVING),
    **dict.fromkeys(("HeunDiscreteScheduler", "LMSDiscreteScheduler"), SAMPLING | SOLVING),
}


def find_folder(path: Path, name: str) -> Path:
    """Return the folder of the model ``name`` of a pipeline in ``path``, or ``path`` itself."""
    if not path.is_dir():
        raise UserError("is a file: give the folder with config.json, or that of the pipeline")
    return path / name if (path / name).is_dir() else path


def read_config(file: Path, classes: tuple[str, ...], schema: type[Config]) -> Config:
    """Return the arguments of a model of one of ``classes``. The class that a file does not name is the first."""
    values = read_json(file, REMEDY)
    name = values.get("_class_name", classes[0]) if isinstance(values, dict) else None
    if name not in classes:
        raise UserError(f"{file} does not describe a {classes[0]}, but {shown(name)}: {REMEDY}")
    return parse(schema, {key: value for key, value in values.items() if key[:1] != "_"}, str(file))


def check_defaults(config: Any, names: tuple[str, ...]) -> None:
    """Refuse arguments of which only the class's default has a network here."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if not same(found := getattr(config, name), defaults[name]):
            raise Unsupported(f"its {name} is {shown(found)}, and only {shown(defaults[name])} has a network here")


def read_convention(path: Path, folder: Path, options: Options) -> str:
    """Return the convention of a model in ``folder`` by its scheduler, which lies there or in a pipeline around it."""
    places = [path, path / "scheduler", folder, *([path.parent / "scheduler"] if path == folder else [])]
    files = [file for place in dict.fromkeys(places) if (file := place / "scheduler_config.json").exists()]
    found = {_convention(file) for file in files}
    if len(found) > 1:
        raise Unsupported("its scheduler_config.json, of which it has more than one, differ")
    predicted, rest = found.pop() if found else (None, "")
    predicted = options.settle("prediction", predicted, "noise")
    if predicted not in PREDICTIONS.values():
        raise Unsupported(f"its prediction is {predicted}, and only {', '.join(PREDICTIONS.values())} can be converted")
    usual = "linear:1000:0.0001:0.02"
    convention = f"ddpm:{predicted}:{rest or usual}"
    return "ddpm" if convention == f"ddpm:noise:{usual}" else convention


def _convention(file: Path) -> tuple[str, str]:
    """Return what a model predicts, and its schedule as a convention has it."""
    values = read_json(file, REMEDY)
    if not isinstance(values, dict):
        raise UserError(f"{file} does not describe a scheduler: {REMEDY}")
    if not isinstance(name := values.get("_class_name", "DDPMScheduler"), str) or name not in SCHEDULERS:
        raise Unsupported(f"its scheduler is a {shown(name)}, and only {', '.join(SCHEDULERS)} are known")
    for key in values:
        if key[:1] != "_" and key not in LEVELS and key not in SCHEDULERS[name]:
            raise Unsupported(f"its scheduler's {shown(key)[1:-1]} is {shown(values[key])}, which is unknown here")
    given = LEVELS | {key: value for key, value in values.items() if key in LEVELS}
    for key, known in (
        ("prediction_type", tuple(PREDICTIONS)),
        ("beta_schedule", SCHEDULES),
        ("rescale_betas_zero_snr", (True, False)),
        ("predict_epsilon", (True, False)),
    ):
        if not any(same(given[key], value) for value in known):
            raise Unsupported(
                f"its scheduler's {key} is {shown(given[key])}, and only {', '.join(map(str, known))} are known"
            )
    steps, betas, schedule = given["num_train_timesteps"], given["trained_betas"], given["beta_schedule"]
    if not given["predict_epsilon"] and "prediction_type" not in values:  # its former name
        given["prediction_type"] = "sample"
    if betas is not None:
        numbers = betas if isinstance(betas, list) else [betas]
        parts = ["betas", *(repr(beta) if isinstance(beta, float) else shown(beta) for beta in numbers)]
    elif schedule == "squaredcos_cap_v2":
        parts = [schedule, shown(steps)]
    else:
        parts = [schedule, *(shown(given[key]) for key in ("num_train_timesteps", "beta_start", "beta_end"))]
    rest = ":".join([*parts, *(["zero_snr"] if given["rescale_betas_zero_snr"] else [])])
    try:
        parametrisation(f"ddpm:noise:{rest}")
    except ValueError:
        names = "trained_betas" if betas is not None else "num_train_timesteps, beta_start or beta_end"
        raise Unsupported(f"its scheduler's {names} is out of range: {shown(rest)}") from None
    return PREDICTIONS[given["prediction_type"]], rest


def read_weights(folder: Path, first: str) -> tuple[Weights, tuple[Path, ...]]:
    """Return the weights of a model, one of them called ``first``, and their files.

    There may be one file or several; weights of half precision are read if there are no others.
    """
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    whole = folder / f"{WEIGHTS}.safetensors"
    variants = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
    if not whole.exists() and index.exists():
        files = _shards(index)
    elif not whole.exists() and len(variants) == 1:
        files = (variants[0],)
    else:
        files = (whole if whole.exists() else folder / f"{WEIGHTS}.bin",)
    found: Weights = {}
    for file in files:
        part = read_tensors(file)
        if not isinstance(part, dict) or found.keys() & part.keys():
            raise UserError(f"{file} has weights that another file has too: {REMEDY}")
        found |= part
    return network_weights(found, first)[0], files


def _shards(index: Path) -> tuple[Path, ...]:
    listed = read_json(index, REMEDY)
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    names = set(places.values()) if isinstance(places, dict) and all(map(_plain, places.values())) else set()
    if not names:
        raise UserError(f"{index} does not list files of this folder: {REMEDY}")
    return tuple(index.parent / name for name in sorted(names))


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
