# SPDX-License-Identifier: Apache-2.0
"""What may change when a run is resumed: the settings that are kept with each checkpoint, and how others are compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..data.mixture import WEIGHT_COLUMN
from ..data.streaming import RowStream
from ..processing.rows import ORIGIN_COLUMN
from ..resume import FIX, changed, describe, digest
from .arguments import AgeVlmTrainingArguments
from .guards import check_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset

_KEY = "recipe"  # in a checkpoint's `trainer_state.json`, among the states of callbacks

# Training arguments, or their beginnings, that do not change the result.
_FREE = (
    *("output_dir", "save_", "logging_", "report_to", "run_name", "disable_tqdm", "push_to_hub", "hub_", "ddp_"),
    *(f"dataloader_{name}" for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")),
)
# Compared as what they make together.
_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Changes that could not take effect, and why.
_OF_THE_OPTIMIZER = "the state of the checkpoint's optimizer is of the former"
_REFUSED = {
    "training.stage": _OF_THE_OPTIMIZER,
    "training.optim": _OF_THE_OPTIMIZER,
    "training.optim_args": _OF_THE_OPTIMIZER,
    "training.initial_gate": "it acts when a stage begins",
}
_RATES = tuple(
    f"training.{name}" for name in ("learning_rate", "group_learning_rates", "lr_", "warmup", "weight_", "adam_")
)
_OWN_STATE = ("reduce_lr_on_plateau", "greedy")  # schedulers that keep the learning rate themselves

_SAMPLED_ROWS = 100


def stage_settings(
    recipe: dict[str, Any], args: AgeVlmTrainingArguments, datasets: dict[str, Any], processor: Any, *, first: bool
) -> dict[str, Any]:
    """All that the result of a single stage depends on, resolved, as values for JSON.

    Args:
        recipe: of one stage, as a mapping.
        args: made from its `training`.
        datasets: `train_dataset` and, where it evaluates, `eval_dataset`.
        processor: of the model.
        first: whether it starts from the recipe's `model`, and not from the stage before.
    """
    settings = {name: value for name, value in recipe.items() if name != "stages" and (first or name != "model")}
    where = ("text_model", "vision_model")  # compared by their digests, wherever they are
    settings["model_args"] = {name: value for name, value in recipe["model_args"].items() if name not in where}
    given = {"bf16": args.bf16, **recipe["training"]}
    training = {name: value for name, value in given.items() if not name.startswith(_FREE) and name not in _STEP}
    settings["training"] = {**training, **_step(args, datasets["train_dataset"])}
    settings["processor"] = _processor_settings(processor)
    for name, dataset in datasets.items():
        if dataset is not None:
            rows = dataset.rows if isinstance(dataset, RowStream) else len(dataset)
            settings[name] = {"rows": rows, "sample": sample_digest(dataset)}
    return json.loads(json.dumps(settings, default=str))


def _processor_settings(processor: Any) -> dict[str, Any]:
    """How images become pixels, by any of the image processor's backends, and conversations texts."""
    images = getattr(processor, "image_processor", None)
    settings = {} if images is None else images.to_dict()
    for name in ("auto_map", "image_processor_type"):
        settings.pop(name, None)
    return {**settings, "chat_template": digest([getattr(processor, "chat_template", None)])}


def _step(args: AgeVlmTrainingArguments, dataset: Dataset | RowStream) -> dict[str, int]:
    """What decides which rows train together in a step, however the devices share them. They read a stream in shares."""
    size, batches, devices = _STEP[0], _STEP[1], "devices"
    values = {size: args.train_batch_size, batches: args.gradient_accumulation_steps, devices: args.world_size}

    if isinstance(dataset, RowStream):
        return values | {"dataloader_num_workers": args.dataloader_num_workers}

    def times(*names: str) -> dict[str, int]:
        product = 1
        for name in names:
            product *= values[name]
        return {" x ".join(names): product}

    if args.tokens_per_batch is not None:
        return times(batches, devices)
    if WEIGHT_COLUMN in dataset.column_names:  # a batch has rows of one group
        return times(size) | times(batches, devices)
    if args.train_sampling_strategy not in ("random", "sequential"):
        return values
    return times(size, batches, devices)


def sample_digest(dataset: Dataset | RowStream) -> str:
    """A digest of up to a hundred rows, evenly spread, with the contents of their images, wherever they lie. Of a stream it is
    the first rows of some pieces."""
    if isinstance(dataset, RowStream):
        rows = [row for part in dataset.parts for row in part.sample()]
    else:
        number = min(len(dataset), _SAMPLED_ROWS)
        chosen = [i * (len(dataset) - 1) // max(1, number - 1) for i in range(number)]
        rows = dataset.with_format("arrow").select(chosen)[:].to_pylist()
    return digest(_content({**row, ORIGIN_COLUMN: None}) for row in rows)


def _content(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # an image
        stored, path = value["bytes"], value["path"]
        if stored is None and path is not None:
            stored = Path(path).read_bytes() if Path(path).is_file() else path.encode()
        return None if stored is None else hashlib.sha256(stored).hexdigest()
    if isinstance(value, dict):
        return {str(key): _content(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_content(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


class KeepRecipe(TrainerCallback):
    """Keeps a stage's settings and what was changed since it began with each of its checkpoints."""

    def __init__(self, settings: dict[str, Any], changes: list[dict[str, Any]]):
        self.kept = {"settings": settings, "changes": changes}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[_KEY] = self.kept


def check_finished(folder: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        FileExistsError: if the finished stage in a folder trained with other settings.
        ValueError: if its `training.json` is damaged.
        OSError: if it has none.
    """
    file = folder / "training.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); {FIX.format(place=folder)}") from error
    if changes := _changed(kept, settings):
        raise FileExistsError(
            f"{folder} is a finished stage of other settings ({describe(changes)}), which it would not train with again; "
            f"{FIX.format(place=folder)}"
        )


def check_begun(
    checkpoint: str, settings: dict[str, Any], args: AgeVlmTrainingArguments, accept: bool
) -> list[dict[str, Any]]:
    """Compares a stage's settings with those of the checkpoint that it would resume from.

    Args:
        checkpoint: its folder.
        settings: of [`stage_settings`].
        args: of the stage.
        accept: whether other settings are accepted, as far as they can take effect.

    Returns:
        All changes since the stage began: for each resumption that changed something, its step and what was changed.

    Raises:
        FileExistsError: if settings have changed; names each one.
        ValueError: if the checkpoint is damaged.
        OSError: if it lacks a file.
    """
    state = check_checkpoint(checkpoint)
    kept = (state.stateful_callbacks or {}).get(_KEY)
    if kept is None:
        if accept:
            return [{"step": state.global_step, "changes": "the checkpoint had no recipe"}]
        raise FileExistsError(
            f"{checkpoint} has no recipe to compare with: `agevlm train` has not saved it. Accept that with "
            "--accept-changes (in Python accept_changes=True), or choose another output folder."
        )
    changes = _changed(kept["settings"], settings)
    if not changes:
        return kept["changes"]
    found = f"{checkpoint} is of other settings ({describe(changes)})"
    if not accept:
        raise FileExistsError(
            f"{found}; accept them with --accept-changes (in Python accept_changes=True), or {FIX.format(place=checkpoint)}"
        )
    schedulers = [side.get("training", {}).get("lr_scheduler_type") for side in (kept["settings"], settings)]
    for name, (old, new) in changes.items():
        reason = _REFUSED.get(name)
        if name.startswith("training.group_learning_rates") and None in (old, new):
            reason = _OF_THE_OPTIMIZER
        elif name.startswith(_RATES) and any(scheduler in _OWN_STATE for scheduler in schedulers):
            reason = "the scheduler keeps the learning rate in the checkpoint"
        elif name.startswith(_RATES) and args.deepspeed_plugin is not None:
            reason = "DeepSpeed keeps the optimizer's settings in the checkpoint"
        if reason is not None:
            raise FileExistsError(
                f"{found}, of which {name} cannot be changed: {reason}. Otherwise {FIX.format(place=checkpoint)}"
            )
    return [*kept["changes"], {"step": state.global_step, "changes": describe(changes)}]


def _changed(kept: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """As [`~agevlm.resume.changed`], where a training argument that one side leaves out has its default there."""
    defaults = {field.name: field.default for field in dataclasses.fields(AgeVlmTrainingArguments)}
    names = kept["training"].keys() | wanted["training"].keys()
    left_out = {name: defaults.get(name) for name in names}
    return changed(*({**side, "training": {**left_out, **side["training"]}} for side in (kept, wanted)))
