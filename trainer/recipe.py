# SPDX-License-Identifier: Apache-2.0
"""Recipes: what trains, on which data and how, as one YAML file, which `agevlm train` and [`train`] run.

    model: outputs/age-vlm-1b/2_adapt_vision     # folder or Hub id of an AGE-VLM with its processor
    model_args:                                  # may be left out
      dtype: bfloat16                            # see `ModelArgs`
      attn_implementation: sdpa
    data:                                        # the mixture: all of these, shuffled together
      - path: my_grounded_rows                   # see `DataPart`
        weight: 1                                # may be left out in all parts; else its share of the batches
      - path: lmms-lab/LLaVA-NeXT-Data
        format: llava
        split: train
        rows: 100000
        streaming: true                          # read while it trains, see `agevlm.data.streaming`; requires max_steps
        weight: 9
    eval_data: []                                # of the same form; may be left out
    features: my_features                        # of `agevlm features`, where the tower is frozen; may be left out
    training:                                    # arguments of AgeVlmTrainingArguments
      output_dir: outputs/age-vlm-1b/3_guide
      stage: guide
      max_steps: 10000
      learning_rate: 1e-4

A recipe may have several stages, which run in order. Their settings replace the settings above:

    stages:
      - name: align                              # folder output_dir/1_align
        training: {stage: align, max_steps: 500}
      - name: guide
        training: {stage: guide, max_steps: 2000, learning_rate: 1e-4}
        data: [{path: my_grounded_rows}]

Each stage starts from the folder of the stage before. `share` in place of `max_steps` divides `training.max_steps` among the
stages. Paths are relative to the folder that the command is run in. Numbers and booleans are read as YAML 1.2 does: `1e-4` is
a number, and `no` a string.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.mixture import DataPart, read_mixture
from ..files import update_folder
from ..hub import MODEL_TYPE, load_processor, loading
from ..parts import unnamed_parts
from ..plots import CURVES, draw_training
from ..provenance import describe
from ..terminal import console, say
from .parser import apply_override, check_fields, parse, read_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

    from ..data.features import FeatureStore
    from .arguments import AgeVlmTrainingArguments

DDP_TIMEOUT = 24 * 3600
"""Seconds that a process waits for another, where a recipe does not set `ddp_timeout`: the first may convert data for hours. A
process that ends is noticed at once by what has launched it; one that hangs is noticed after this time."""


@dataclass
class ModelArgs:
    """How the model is loaded, as by `from_pretrained`.

    Args:
        dtype: of what is frozen; what trains is float32. `auto` is the checkpoint's own, `fastest` is bfloat16 on accelerators
            and on CPUs with instructions for it, and float32 on other CPUs. `training.bf16` is true by default where the
            model is loaded in bfloat16.
        attn_implementation: `eager` is fastest for short texts on CPUs; by default `sdpa`.
        text_model: where a delta's text model is, if the delta does not name it; as for [`~agevlm.from_parts`].
        vision_model: the same of its vision model.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    attn_implementation: str | None = None
    text_model: str | None = None
    vision_model: str | None = None


@dataclass
class Stage:
    """A stage of a recipe that has several.

    Args:
        name: of its folder.
        training: arguments that replace the recipe's `training` arguments.
        share: its part of the recipe's `training.max_steps`, in place of `max_steps`.
        data: replaces the recipe's.
        eval_data: replaces the recipe's.
        features: replaces the recipe's.
    """

    name: str
    training: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    data: list[DataPart] | None = None
    eval_data: list[DataPart] | None = None
    features: str | None = None


@dataclass
class Recipe:
    """What [`train`] does; see the module's docstring."""

    model: str
    data: list[DataPart]
    training: dict[str, Any]
    model_args: ModelArgs = field(default_factory=ModelArgs)
    eval_data: list[DataPart] = field(default_factory=list)
    features: str | None = None
    stages: list[Stage] = field(default_factory=list)

    def parts(self) -> dict[str, list[DataPart]]:
        """The parts of the data, by the trainer's name of them."""
        return {"train_dataset": self.data, "eval_dataset": self.eval_data}

    def split(self) -> list[Recipe]:
        """The recipes of the single stages, in order: the recipe itself where it names none.

        Raises:
            ValueError: if a stage lacks or has something that it must or must not have.
        """
        if not self.stages:
            return [_check_stage(self, "training")]
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("Two stages have the same name.")
        recipes = []
        for number, stage in enumerate(self.stages, 1):
            where = f"stages.{number - 1}.training"
            if os.path.basename(stage.name) != stage.name or not stage.name:
                raise ValueError(
                    f"stages.{number - 1}.name is part of a folder's name, so it must not be empty or have a '/', got "
                    f"'{stage.name}'."
                )
            if "output_dir" in stage.training:
                raise ValueError(f"{where}: a stage's folder is output_dir/{number}_NAME: leave output_dir out.")
            training = {**self.training, **stage.training}
            if stage.share is not None:
                total = self.training.get("max_steps")
                if "max_steps" in stage.training or not isinstance(total, int) or total < 1 or stage.share <= 0:
                    raise ValueError(
                        f"stages.{number - 1}.share is a part of training.max_steps, in place of the stage's own max_steps; got "
                        f"share {stage.share} and training.max_steps {total}."
                    )
                training["max_steps"] = max(1, round(stage.share * total))
            if training.get("output_dir") is not None:
                training["output_dir"] = os.path.join(training["output_dir"], f"{number}_{stage.name}")
            # Other batches of the same data in each stage.
            seed = training.get("data_seed", training.get("seed", 42))
            training["data_seed"] = 10 * seed + number if isinstance(seed, int) else seed
            replaced = {name: getattr(stage, name) for name in ("data", "eval_data", "features")}
            replaced = {name: value for name, value in replaced.items() if value is not None}
            recipes.append(_check_stage(replace(self, training=training, stages=[], **replaced), where))
        return recipes


def _check_stage(recipe: Recipe, where: str) -> Recipe:
    for name in ("output_dir", "stage"):
        if recipe.training.get(name) is None:
            raise ValueError(f"The recipe has no {'training' if name == 'output_dir' else where}.{name}.")
    if not recipe.data:
        raise ValueError("The recipe has no data: `data` is a list with at least one entry.")
    streamed = [part.path for part in (*recipe.data, *recipe.eval_data) if part.streaming]
    if recipe.features is not None and streamed:
        raise ValueError(
            f"`features` are computed for all images before training, and {', '.join(streamed)} is read on the way (`streaming: "
            "true`): leave one of the two out."
        )
    for name, folder in (("training.output_dir", recipe.training["output_dir"]), ("features", recipe.features)):
        for path in (Path(folder), *Path(folder).parents) if folder is not None else ():
            if path.exists() and not path.is_dir():
                raise ValueError(f"{name} must be a folder, but {path} is a file.")
    return recipe


def load_recipe(recipe: str | os.PathLike | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: a YAML file, or a recipe to override.
        overrides: `key=value`, where a dotted key leads to the place (`data.0.path`, `stages.guide.training.max_steps`) and the
            value is YAML.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not YAML or no recipe, or an override does not fit it: an unknown name, or a value of the
            wrong type.
    """
    if isinstance(recipe, Recipe):
        values = dataclasses.asdict(recipe)
    elif Path(recipe).is_file():
        values = read_mapping(recipe, "model, data and training")
    else:
        raise FileNotFoundError(f"There is no recipe {recipe}: name a YAML file, such as one of examples/recipes.")
    for override in overrides:
        apply_override(values, override)
    loaded = parse(Recipe, values)
    loaded.split()
    return loaded


def training_arguments(recipe: Recipe) -> AgeVlmTrainingArguments:
    """The arguments of a single stage's training, on the CPU where there is no accelerator.

    Raises:
        ValueError: for a name or a value that they do not know.
    """
    import torch
    from accelerate import PartialState
    from transformers import get_scheduler

    from .arguments import AgeVlmTrainingArguments

    check_fields(recipe.training, [AgeVlmTrainingArguments], "training")
    settings = {
        # Asked for by name, because Transformers takes bf16 without a GPU for a mistake otherwise.
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": recipe.model_args.dtype == "bfloat16" and not recipe.training.get("fp16"),
        "ddp_timeout": DDP_TIMEOUT,
        **recipe.training,
    }
    try:
        if settings["use_cpu"]:  # where Transformers leaves the timeout out
            timeout = timedelta(seconds=settings["ddp_timeout"])
            PartialState(cpu=True, backend=settings.get("ddp_backend"), timeout=timeout)
        args = AgeVlmTrainingArguments(**settings)
        args.get_process_log_level()
        get_scheduler(
            args.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), num_warmup_steps=0,
            num_training_steps=1000, scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )  # fmt: skip
    except (TypeError, KeyError, ArithmeticError) as error:  # unknown names in mappings, names that no list has
        raise ValueError(f"training: {error}. Correct its arguments.") from error
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
        with loading(model) as place:
            config, _ = PreTrainedConfig.get_config_dict(place)
    except OSError as error:
        raise OSError(f"{error} {build}; the later stages start from the former's output.") from error
    if (found := config.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"{model} has the model_type '{found}', but '{MODEL_TYPE}' is what trains here. {build}.")


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    """The model that a recipe starts from, as its `model_args` say, and its processor.

    Raises:
        ValueError: if it is of another architecture.
        OSError: if there is none.
    """

    from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration

    check_model(recipe.model)
    recipe = replace(recipe, model_args=resolve_model_args(recipe))
    return _load(AgeVlmForConditionalGeneration, recipe.model, recipe), load_processor(recipe.model)


def _load(model_class: type[PreTrainedModel], source: str | os.PathLike, recipe: Recipe) -> PreTrainedModel:
    from ..deltas import load_checkpoint

    given = {name: value for name, value in dataclasses.asdict(recipe.model_args).items() if value is not None}
    return load_checkpoint(model_class, source, **given)


def resolve_model_args(recipe: Recipe, model: PreTrainedModel | None = None) -> ModelArgs:
    """The same for all stages: a given model's own type and attention, and what `auto` and `fastest` stand for."""
    from transformers import PreTrainedConfig

    from .optimizer import fastest_dtype

    given = recipe.model_args
    if model is not None:
        dtype: Any = str(model.dtype)
        given = replace(given, attn_implementation=model.config._attn_implementation)
    elif given.dtype == "auto":
        with loading(recipe.model) as place:
            dtype = PreTrainedConfig.get_config_dict(place)[0].get("dtype") or "auto"
    else:
        dtype = str(fastest_dtype()) if given.dtype == "fastest" else given.dtype
    return replace(given, dtype=dtype.removeprefix("torch."))


def check_output(folders: Iterable[str | os.PathLike], resume: bool) -> None:
    """Looks for the output of a former run.

    Args:
        folders: of the stages.
        resume: whether there must be any; otherwise there must be none.

    Raises:
        FileNotFoundError: if there is nothing to resume.
        FileExistsError: if a fresh start would meet a former run's checkpoints or model, or there is one stage, which
            is finished and has no checkpoint.
    """
    from .checkpoints import has_model, last_checkpoint

    paths = [Path(folder) for folder in folders]
    for folder in paths:
        last, trained = last_checkpoint(folder), has_model(folder)
        if trained and not last and len(paths) == 1:
            raise FileExistsError(
                f"{folder} has the model of a finished run, and no checkpoint to resume from: delete the folder, or choose "
                "another training.output_dir."
            )
        if resume and (last or trained):
            return
        if last or trained:
            found = Path(last).name if last else "a model"
            raise FileExistsError(
                f"{folder} has {found} of a former run: resume it with --resume, or choose another training.output_dir."
            )
    if resume:
        raise FileNotFoundError(
            f"There is no checkpoint in {paths[0]} to resume from: leave --resume out for a fresh start."
        )


def train(
    recipe: str | os.PathLike | Recipe,
    overrides: Iterable[str] = (),
    *,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    trainer_class: type[Trainer] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
) -> Trainer:
    """Trains as a recipe says, stage by stage.

    Each stage writes its model with the processor, `training.json`, `training.png` and checkpoints into its folder:
    `output_dir`, or `output_dir/1_NAME`, `output_dir/2_NAME`, … of a recipe with several stages, which has
    `training.json` and `training.png` of all stages beside them.

    Args:
        recipe: a YAML file, or a recipe.
        overrides: as for [`load_recipe`].
        model: what the first stage trains, in place of the recipe's `model`. Later stages load it by its class's
            `from_pretrained`.
        processor: of the model; by default that of the recipe's `model`.
        trainer_class: called with `model`, `args`, `train_dataset`, `eval_dataset`, `processing_class` and, where the recipe has
            them, `features`. By default [`~agevlm.AgeVlmTrainer`].
        resume: continue where a former run of the same recipe stopped: after the last finished stage, from the last
            checkpoint of the next. The result is that of a run that was never stopped, to the last bit.
        accept_changes: resume with other settings than those that the checkpoint was trained with, as far as they can take
            effect. Without it only what does not change the result may differ: logging, saving, the number of
            workers, the number of devices where as many rows make a step, the place of `output_dir`, and stages not begun.

    Returns:
        The last stage's trainer, when it has trained.

    Raises:
        ValueError: if the model is no AGE-VLM, something of the recipe does not fit it, the data have no rows, training has
            diverged, or a checkpoint is damaged; see [`~agevlm.trainer.guards.GuardsMixin`].
        OSError: if the model or data are missing, there is nothing to resume, the recipe or the data have changed since, a
            fresh start would meet a former run's output, or nothing can be written there.
        ImportError: if a library of the extra `train` is not installed.
    """
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ImportError("Training needs accelerate and datasets: pip install 'agevlm[train]'.")

    from ..data.features import FeatureStore
    from ..data.streaming import RowStream
    from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig
    from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
    from .bad_rows import say_left_out, skip_in_stage, write_skipped
    from .cards import CardsMixin
    from .changes import KeepRecipe, check_begun, check_finished, stage_settings
    from .checkpoints import has_model, last_checkpoint, restore_float32, save_model
    from .guards import GuardsMixin
    from .sampling import SamplingMixin, check_stream
    from .stages import base_model
    from .trainer import AgeVlmTrainer

    # Every check runs before weights are loaded or anything is written.
    if accept_changes and not resume:
        raise ValueError("--accept-changes is for a run that resumes: give --resume as well (in Python resume=True).")
    recipe = load_recipe(recipe, overrides)
    if model is None:
        check_model(recipe.model)
    recipe = replace(recipe, model_args=resolve_model_args(recipe, model))
    stages = recipe.split()
    every_args = [training_arguments(stage) for stage in stages]
    folders = [Path(args.output_dir) for args in every_args]
    check_output(folders, resume)
    if model is None:
        with loading(recipe.model) as place:
            config = AgeVlmConfig.from_pretrained(place)
    else:
        config = base_model(model).config
    if len(stages) > 1 and any(args.save_trained_only for args in every_args):
        _check_parts_are_found(recipe.model_args, config)
    stores: dict[str, FeatureStore] = {}
    for stage, args in zip(stages, every_args, strict=True):
        check_fit(stage, args, config)
        if stage.features is not None and stage.features not in stores:
            stores[stage.features] = FeatureStore(stage.features)
    processor = processor or load_processor(recipe.model)
    with every_args[0].main_process_first(desc="reading data"):  # the others find its conversions in the cache
        if every_args[0].process_index == 0:
            _say_what_is_missing([part for stage in stages for parts in stage.parts().values() for part in parts])
        mixtures = [_read_data(stage, args.seed) for stage, args in zip(stages, every_args, strict=True)]
    streams = [data["train_dataset"] if isinstance(data["train_dataset"], RowStream) else None for data in mixtures]
    for stream, args in zip(streams, every_args, strict=True):
        if stream is not None:
            check_stream(args, stream.rows)
    skipped = [
        skip_in_stage(stage.parts(), data, processor, args, resume)
        for stage, data, args in zip(stages, mixtures, every_args, strict=True)
    ]

    model_class = AgeVlmForConditionalGeneration if model is None else type(model)
    finished = [len(stages) > 1 and has_model(folder) for folder in folders]
    first = min([number for number, done in enumerate(finished) if not done] or [len(stages) - 1])
    settings = [
        stage_settings(dataclasses.asdict(stage), args, data, processor, first=number == 0)
        for number, (stage, args, data) in enumerate(zip(stages, every_args, mixtures, strict=True))
    ]
    for number in range(first + 1):
        if finished[number]:
            check_finished(folders[number], settings[number])
    checkpoint = last_checkpoint(folders[first]) if resume and not finished[first] else None
    trainer_class, changes = trainer_class or AgeVlmTrainer, []
    if any(streams) and not issubclass(trainer_class, SamplingMixin):
        raise ValueError(
            f"{trainer_class.__name__} cannot read a stream (`streaming: true`): it has no SamplingMixin."
        )
    if checkpoint is not None:
        changes = check_begun(checkpoint, settings[first], every_args[first], accept_changes)
        if changes and not issubclass(trainer_class, GuardsMixin):
            raise ValueError(f"{trainer_class.__name__} would keep the checkpoint's settings: it has no GuardsMixin.")
    with made_folders([Path(recipe.training["output_dir"]), *folders[first:]]):
        for number in range(first, len(stages)):
            stage, dataset = stages[number], mixtures[number]
            source = recipe.model if number == 0 else folders[number - (not finished[number])]
            given = number == 0 and model is not None
            if not given:
                model = _load(model_class, source, recipe)
            trainer = trainer_class(
                model=model,
                args=training_arguments(stage),  # again, because accelerate keeps the state of the last arguments
                processing_class=processor,
                **dataset,
                **({} if stage.features is None else {"features": stores[stage.features]}),
            )
            if not given:
                restore_float32(trainer.model, source)
            if not finished[number]:
                if isinstance(trainer, CardsMixin):
                    trainer.stage_name = recipe.stages[number].name if recipe.stages else None
                    trainer.data_sources = _describe_data(stage) if trainer.is_world_process_zero() else []
                counts = {}
                if (bad := skipped[number]) is not None and trainer.is_world_process_zero():
                    counts["skipped_rows"] = write_skipped(bad, folders[number])
                keep = KeepRecipe(settings[number], changes if number == first else [])
                trainer.add_callback(keep)
                result = trainer.train(resume_from_checkpoint=checkpoint if number == first else None)
                left_out = None if streams[number] is None else trainer.left_out()
                if trainer.is_world_process_zero():
                    name = recipe.stages[number].name if recipe.stages else stage.training["stage"]
                    kept = keep.kept
                    if left_out is not None:
                        counts["skipped_rows"] = counts.get("skipped_rows", 0) + say_left_out(left_out)
                        kept = {**kept, "left_out": left_out}
                    _report(trainer, stage, kept, f"Stage {name}", {**result.metrics, **counts})
                    if recipe.stages:
                        _report_all(recipe, folders[: number + 1])
                save_model(trainer)  # at the end, because a stage with a model is finished
                if isinstance(trainer, CardsMixin):
                    trainer.create_model_card()
            if number + 1 < len(stages):
                model = trainer = None  # type: ignore[assignment]
                gc.collect()  # model, trainer and optimizer refer to each other
    return trainer


def cache_features(
    recipe: str | os.PathLike | Recipe, overrides: Iterable[str] = (), *, batch_size: int = 16
) -> dict[str, FeatureStore]:
    """Computes the vision tower's features of all images of a recipe's stages that name a folder of `features`.

    A second call resumes where the first stopped.

    Args:
        recipe: a YAML file, or a recipe.
        overrides: as for [`load_recipe`].
        batch_size: images that go through the tower together.

    Returns:
        By folder, the features; see [`~agevlm.data.features.compute_features`].

    Raises:
        ValueError: if the recipe names no `features`, or its model is no AGE-VLM.
        OSError: if the model or data are missing, or a folder has features of another tower or image processor.
    """
    import torch

    from ..data.features import compute_features
    from .bad_rows import skip_in_stage

    recipe = load_recipe(recipe, overrides)
    stages_of_folder: dict[str, list[Recipe]] = {}
    for stage in recipe.split():
        if stage.features is not None:
            stages_of_folder.setdefault(stage.features, []).append(stage)
    if not stages_of_folder:
        raise ValueError("The recipe has no `features`: name the folder to write, as features=outputs/features.")
    model, processor = load_model(recipe)
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        model.to(accelerator)
    found = {}
    for folder, stages in stages_of_folder.items():
        data = [_read_data(stage, stage.training.get("seed", 42)) for stage in stages]
        for stage, parts in zip(stages, data, strict=True):
            skip_in_stage(stage.parts(), parts, processor, training_arguments(stage))
        datasets = [dataset for parts in data for dataset in parts.values() if dataset is not None]
        found[folder] = compute_features(
            model, processor, datasets, folder, batch_size=batch_size,
            allow_urls=any(stage.training.get("allow_urls", False) for stage in stages),
        )  # fmt: skip
    return found


def _say_what_is_missing(parts: Sequence[DataPart]) -> None:
    """Says which parts are about to be downloaded and converted."""
    from ..data.readers import missing_work

    prepared = [part for part in parts if not part.streaming]
    work = [missing_work(part.path, part.format, part.images, part.split, part.name) for part in prepared]
    lines = list(dict.fromkeys(line for line in work if line is not None))
    for line in lines:
        say(line)
    if lines:
        say("All processes wait for that. `agevlm data prepare RECIPE` does it before training, in several processes.")


def _describe_data(stage: Recipe) -> list[dict[str, Any]]:
    """What cards say of the data that a stage trains on."""
    told = ("name", "split", "rows", "weight")
    known = [{field: getattr(part, field) for field in told} for part in stage.data]
    known = [{"configuration" if field == "name" else field: value for field, value in part.items()} for part in known]
    return [
        {**describe(part.path, "data set"), **{field: value for field, value in of.items() if value is not None}}
        for part, of in zip(stage.data, known, strict=True)
    ]


def _read_data(stage: Recipe, seed: int) -> dict[str, Any]:
    """
    Raises:
        ValueError: if the data, or those of an evaluation, have no rows.
    """
    from ..data.streaming import RowStream

    found: dict[str, Any] = {"train_dataset": None, "eval_dataset": None}
    for name, parts in stage.parts().items():
        if not parts:
            continue
        allow_urls = stage.training.get("allow_urls", False)
        found[name] = read_mixture(parts, seed, allow_urls=allow_urls, in_memory=name == "eval_dataset")
        if not isinstance(found[name], RowStream) and not len(found[name]):
            raise ValueError(f"The data have no rows: {', '.join(part.path for part in parts)}.")
    return found


def check_fit(stage: Recipe, args: AgeVlmTrainingArguments, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if the model lacks one of the guided layers, or a tower with features trains.
    """
    from .guidance import guided_blocks
    from .stages import resolve_groups

    if config.model_type == MODEL_TYPE:  # a `trainer_class` may train other models
        guided_blocks(config, args.guided_layers)
    if stage.features is not None and any(group.startswith("vision") for group in resolve_groups(args.stage or ())):
        raise ValueError(
            f"The vision tower trains in the stage {args.stage}, so the features in {stage.features} are wrong after the "
            "first step: leave out `features`, or choose a stage that freezes the tower."
        )


def _check_parts_are_found(model_args: ModelArgs, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if a stage's delta would not know where to load a part from.
    """
    for name in unnamed_parts(getattr(config, "parts", None) or {}):
        if getattr(model_args, name) is None:
            raise ValueError(
                f"training.save_trained_only: the next stage cannot load the {name.replace('_', ' ')}, which was in a local folder or "
                f"file. Name it as model_args.{name}, or leave save_trained_only out."
            )


@contextlib.contextmanager
def made_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Makes the folders of a run and its stages, and removes those that a failure leaves empty.

    Raises:
        OSError: if nothing can be written there.
    """
    made = []
    try:
        for folder in folders:
            if not folder.exists():
                made.append(folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise OSError(
                    f"Cannot write in {folder}: {error.strerror}. Choose another training.output_dir."
                ) from error
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # of folders that are not empty
                folder.rmdir()
        raise


def _report(trainer: Trainer, stage: Recipe, kept: dict[str, Any], title: str, metrics: dict[str, float]) -> None:
    """Writes `training.json` and `training.png` of a stage, and prints a summary."""
    from rich.table import Table

    from ..data.streaming import RowStream

    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    _write(folder, {"recipe": dataclasses.asdict(stage), **kept}, metrics, history)
    summary = Table(title=title, title_justify="left", show_header=False)
    summary.add_row("steps", f"{trainer.state.global_step}")
    if isinstance(trainer.train_dataset, RowStream):
        step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
        summary.add_row("rows", f"{trainer.state.global_step * step}")
    else:
        summary.add_row("epochs", f"{trainer.state.epoch:.2f}")
    summary.add_row("time", f"{metrics['train_runtime'] / 60:.1f} min")
    for name in (*CURVES, *(f"eval_{name}" for name in CURVES)):
        if values := [entry[name] for entry in history if name in entry]:
            summary.add_row(name, f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}")
    summary.add_row("saved in", str(folder))
    console().print(summary)


def _report_all(recipe: Recipe, folders: Iterable[Path]) -> None:
    """Writes `training.json` and `training.png` of the stages that are finished, with steps counted through."""
    metrics, history, ends, changes = {}, [], [], {}
    done = 0
    for stage, folder in zip(recipe.stages, folders, strict=False):
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        metrics[stage.name], changes[stage.name] = record["metrics"], record["changes"]
        history += [{**entry, "step": done + entry["step"], "stage": stage.name} for entry in record["log_history"]]
        done = history[-1]["step"]
        ends.append(done)
    kept = {"recipe": dataclasses.asdict(recipe), "changes": changes}
    _write(Path(recipe.training["output_dir"]), kept, metrics, history, ends[:-1])


def _write(folder: Path, kept: dict, metrics: dict, history: list[dict], stage_ends: Iterable[int] = ()) -> None:
    record = {**kept, "metrics": metrics, "log_history": history}
    with update_folder(folder) as partial:
        (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            draw_training(history, partial / "training.png", stage_ends=list(stage_ends))
        except ImportError:
            say("No training.png, which needs matplotlib: pip install 'agevlm[eval]'.")
