# SPDX-License-Identifier: Apache-2.0
"""Recipes: a training stage (what trains, on which data, how) as one YAML file, which `agevlm train` runs.

    model: outputs/age-vlm-1b/2_adapt_vision     # folder or Hub id of an AGE-VLM with its processor
    model_args:                                  # may be left out
      dtype: bfloat16                            # auto, float32, bfloat16 or float16
      attn_implementation: sdpa
    data:                                        # the mixture: all of these, shuffled together
      - path: my_grounded_rows                   # see `DataPart`
      - path: lmms-lab/LLaVA-NeXT-Data
        format: llava
        split: train
        rows: 100000
    eval_data: []                                # of the same form; may be left out
    training:                                    # arguments of AgeVlmTrainingArguments
      output_dir: outputs/age-vlm-1b/3_guide
      stage: guide
      learning_rate: 1e-4

Paths are relative to the folder that the command is run in. Numbers and booleans are read as YAML 1.2 does: `1e-4` is a number, and
`no` a string.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import shutil
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from .arguments import AgeVlmTrainingArguments
    from .trainer import AgeVlmTrainer
from ..data.mixture import DataPart, read_mixture
from ..plots import CURVES, draw_training

MODEL_TYPE = "agevlm"


@dataclass
class ModelArgs:
    """How the model is loaded, as by `from_pretrained`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None


@dataclass
class Recipe:
    """A stage of training; see the module's docstring."""

    model: str
    data: list[DataPart]
    training: dict[str, Any]
    model_args: ModelArgs = field(default_factory=ModelArgs)
    eval_data: list[DataPart] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: PyYAML reads 1.1, where `1e-4` is a string and `no` is False."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value`, where a dotted key leads to the place (`data.0.path`) and the value is YAML.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not YAML or no recipe, or an override does not fit it: an unknown name, or a value of the
            wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}: name a YAML file, such as one of examples/recipes.")
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not UTF-8 ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping with model, data and training, got {_shown(values)}.")
    for override in overrides:
        _override(values, override)
    recipe = _parse(Recipe, values, "")
    for name in ("output_dir", "stage"):
        if recipe.training.get(name) is None:
            raise ValueError(f"The recipe has no training.{name}.")
    if not recipe.data:
        raise ValueError("The recipe has no data: `data` is a list with at least one entry.")
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    """Puts a `key=value` in its place; names are checked with the rest of the recipe."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"'{override}' is no override: write key=value, as training.learning_rate=1e-4.")
    *parents, last = key.split(".")
    place: Any = values
    walked: list[str] = []
    for name in (*parents, last):
        where = ".".join(walked)
        if isinstance(place, list):
            if not name.isdecimal() or int(name) >= len(place):
                raise ValueError(f"{override}: {where} has the entries 0 to {len(place) - 1}, no '{name}'.")
        elif not isinstance(place, dict):
            raise ValueError(f"{override}: {where} is {_shown(place)}, in which there is no '{name}'.")
        step: Any = int(name) if isinstance(place, list) else name
        if len(walked) == len(parents):
            place[step] = _read_yaml(text, override)
        else:
            if isinstance(place, dict) and place.get(step) is None:
                place[step] = {}
            place = place[step]
            walked.append(name)


def _parse(hint: Any, value: Any, where: str) -> Any:
    """`value` as a `hint`, whose dataclasses are mappings in YAML."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {_shown(value)}.")
        hints = typing.get_type_hints(hint)
        _check_names(value, hints, where)
        needed = [f.name for f in dataclasses.fields(hint) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"{where or 'The recipe'} has no {' and no '.join(missing)}.")
        return hint(**{name: _parse(hints[name], item, _join(where, name)) for name, item in value.items()})
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {_shown(value)}.")
        return [_parse(typing.get_args(hint)[0], item, _join(where, str(i))) for i, item in enumerate(value)]
    _check_type(hint, value, where)
    return value


def _check_names(names: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            meant = f": did you mean '{close[0]}'?" if close else "."
            raise ValueError(f"There is no '{_join(where, str(name))}'{meant} Known are {', '.join(known)}.")


def _check_type(hint: Any, value: Any, where: str) -> None:
    if not _fits(hint, value):
        raise ValueError(f"{where} must be {_described(hint)}, got {_shown(value)}.")


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, args)))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is list:
        return f"a list of {_described(args[0])}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint) or ("a mapping" if dict in (hint, origin) else hint.__name__)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def training_arguments(recipe: Recipe) -> AgeVlmTrainingArguments:
    """The arguments of a recipe's training, on the CPU where there is no accelerator.

    Raises:
        ValueError: for a name or a value that they do not know.
    """
    import torch

    from .arguments import AgeVlmTrainingArguments

    hints = typing.get_type_hints(AgeVlmTrainingArguments)
    known = {f.name: hints[f.name] for f in dataclasses.fields(AgeVlmTrainingArguments) if f.init}
    _check_names(recipe.training, known, "training")
    for name, value in recipe.training.items():
        _check_type(known[name], value, f"training.{name}")
    # Asked for by name, because Transformers takes bf16 without a GPU for a mistake otherwise.
    args = AgeVlmTrainingArguments(**{"use_cpu": not torch.accelerator.is_available(), **recipe.training})
    if recipe.eval_data and args.eval_strategy == "no":
        raise ValueError("There is eval_data, but it is never used: set training.eval_strategy to steps or epoch.")
    return args


def check_model(model: str) -> None:
    """Looks at a checkpoint's configuration only.

    Raises:
        ValueError: if it is of another architecture.
        OSError: if there is none.
    """
    from transformers import PreTrainedConfig

    build = (
        "`agevlm build --text LLAMA --vision BACKBONE --out FOLDER` assembles one from a Llama and a vision backbone"
    )
    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except OSError as error:
        raise OSError(
            f"There is no model {model}. {build}; the later stages start from the former's output. ({error})"
        ) from error
    if (found := config.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"{model} has the model_type '{found}', but '{MODEL_TYPE}' is what trains here. {build}.")


def find_checkpoint(output_dir: str | os.PathLike, resume: bool) -> str | None:
    """The checkpoint to resume from: the last of a folder, or None for a fresh start.

    Raises:
        FileNotFoundError: if there is none to resume from.
        FileExistsError: if a fresh start would meet a former run's checkpoints or model.
    """
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(output_dir)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    if resume and last is None:
        raise FileNotFoundError(
            f"There is no checkpoint in {folder} to resume from: leave --resume out for a fresh start."
        )
    if not resume and (last is not None or (folder / "config.json").exists()):
        mend = "go on with --resume" if last is not None else "delete it"
        raise FileExistsError(
            f"{folder} has {Path(last).name if last else 'a model'} of a former run: {mend}, or choose another training.output_dir."
        )
    return last


def train(recipe: Recipe, resume: bool = False) -> AgeVlmTrainer:
    """Trains as a recipe says, and saves the model with its processor, `training.json` and `training.png` in its
    `output_dir`.

    Args:
        recipe: of [`load_recipe`].
        resume: go on from the last checkpoint in `output_dir`.

    Returns:
        The trainer, when it has trained.

    Raises:
        ValueError: if the model is no AGE-VLM, or something of the recipe does not fit it.
        OSError: if the model or data are missing, there is no checkpoint to resume from, or a fresh start would meet a
            former run's output.
        ImportError: if a library of the extra `train` is not installed.
    """
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ImportError("Training needs accelerate and datasets: pip install 'agevlm[train]'.")
    from transformers import AutoProcessor

    from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
    from .trainer import AgeVlmTrainer

    # All that may be wrong is looked at before weights are loaded or anything is written.
    args = training_arguments(recipe)
    checkpoint = find_checkpoint(args.output_dir, resume)
    check_model(recipe.model)
    processor = AutoProcessor.from_pretrained(recipe.model)
    with args.main_process_first(desc="reading data"):  # the others find its conversions in the cache
        dataset = read_mixture(recipe.data, args.seed)
        eval_dataset = read_mixture(recipe.eval_data, args.seed) if recipe.eval_data else None
    model_args = {name: value for name, value in dataclasses.asdict(recipe.model_args).items() if value is not None}
    trainer = AgeVlmTrainer(
        model=AgeVlmForConditionalGeneration.from_pretrained(recipe.model, **model_args),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    _save_model(trainer)
    if trainer.is_world_process_zero():
        _report(trainer, recipe, result.metrics)
    return trainer


def _save_model(trainer: AgeVlmTrainer) -> None:
    """Saves the model aside and moves its files to their place when they are whole, `config.json` last."""
    from .trainer import UNFINISHED

    folder = Path(trainer.args.output_dir)
    partial = folder / UNFINISHED
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        partial.rmdir()


def _report(trainer: AgeVlmTrainer, recipe: Recipe, metrics: dict[str, float]) -> None:
    """Writes `training.json` and `training.png`, and prints a summary."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    record = {"recipe": dataclasses.asdict(recipe), "metrics": metrics, "log_history": history}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    summary = Table(title=f"Stage {recipe.training['stage']}", title_justify="left", show_header=False)
    summary.add_row("steps", f"{trainer.state.global_step}")
    summary.add_row("epochs", f"{trainer.state.epoch:.2f}")
    summary.add_row("time", f"{metrics['train_runtime'] / 60:.1f} min")
    for name in (*CURVES, *(f"eval_{name}" for name in CURVES)):
        if values := [entry[name] for entry in history if name in entry]:
            summary.add_row(name, f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}")
    summary.add_row("saved in", str(folder))
    console.print(summary)
    try:
        draw_training(history, folder / "training.png")
    except ImportError:
        console.print("No training.png, which needs matplotlib: pip install 'agevlm\\[eval]'.")
