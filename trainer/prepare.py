# SPDX-License-Identifier: Apache-2.0
"""All that a recipe needs before training: its data are downloaded, converted, checked and counted, and what training will cost is estimated.

No weights are loaded and no GPU is used, except to compute `features`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.download import local
from ..data.formats.source import NOT_DOWNLOADED
from ..data.mixture import GROUP_COLUMN, WEIGHT_COLUMN, DataPart, open_part, read_mixture
from ..data.prepared import BAD_FILE, Prepared, prepare_source
from ..data.readers import find_source
from ..data.verdicts import Verdicts, look_at_rows
from ..files import new_file
from ..hub import load_processor, loading
from ..processing.rows import ORIGIN_COLUMN
from ..terminal import say
from .bad_rows import PartRows, read_part, row_collator
from .estimate import GPU_TFLOPS, UTILIZATION, BatchShape, estimate_step
from .prepare_report import PartReport, PrepareReport, StageReport
from .recipe import (
    Recipe,
    cache_features,
    check_fit,
    check_model,
    load_recipe,
    made_folders,
    resolve_model_args,
    training_arguments,
)
from .sampling import GroupedBatches, check_stream, count_tokens

if TYPE_CHECKING:
    from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig
    from .arguments import AgeVlmTrainingArguments

REPORT = "prepared.json"
"""File of the report in `training.output_dir`; `prepared.md` beside it says the same for people."""

# Rows of a part with `streaming` that are looked at.
_SAMPLE = 1000


def prepare_recipe(
    recipe: str | os.PathLike | Recipe,
    overrides: Iterable[str] = (),
    *,
    model: str | None = None,
    num_proc: int | None = None,
    report: str | os.PathLike | None = None,
    gpus: int = 1,
    gpu_tflops: float = GPU_TFLOPS,
    utilization: float = UTILIZATION,
    progress: bool = True,
) -> PrepareReport:
    """Downloads, converts and checks all data of a recipe, computes its features, and says what training takes.

    What is made is kept in the cache of `datasets`, and [`~agevlm.train`] uses it. A call that was stopped goes on where it was.

    Args:
        recipe: a YAML file, or a recipe.
        overrides: as for [`~agevlm.trainer.recipe.load_recipe`].
        model: whose processor and configuration to prepare with, by default the recipe's. A later stage's `model` need not exist
            yet: the model that the first stage starts from has the same.
        num_proc: processes; by default one for each processor.
        report: JSON file to write, with a readable `.md` beside it; by default [`REPORT`] in `training.output_dir`.
        gpus: devices that will train.
        gpu_tflops: peak of one of them.
        utilization: share of the peak that training reaches.
        progress: show progress bars.

    Raises:
        ValueError: if something of the recipe does not fit, or a part has no rows.
        OSError: if the model or data are missing, or nothing can be written.
        ImportError: if a library of the extra `train` is not installed.
    """
    for name, value in (("--gpus", gpus), ("--gpu-tflops", gpu_tflops), ("--utilization", utilization)):
        if not 0 < value < float("inf") or (name == "--utilization" and value > 1):
            raise ValueError(f"{name} is {value}, but must be a number above 0{' and up to 1' * (name[2] == 'u')}.")
    recipe = load_recipe(recipe, overrides)
    later = model is not None
    _check_model_is_there(model or recipe.model, later)
    recipe = dataclasses.replace(recipe, model=model or recipe.model)
    recipe = dataclasses.replace(recipe, model_args=resolve_model_args(recipe))
    stages = recipe.split()
    every_args = [_cpu_arguments(stage) for stage in stages]
    with loading(recipe.model) as place:
        from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig

        config = AgeVlmConfig.from_pretrained(place)
    for stage, args in zip(stages, every_args, strict=True):
        check_fit(stage, args, config)
    file = Path(report if report is not None else os.path.join(recipe.training["output_dir"], REPORT))
    if file.is_dir():
        raise ValueError(f"--report {file} is a folder: name a file in it.")
    with made_folders([file.parent]):
        work = _Work(load_processor(recipe.model), num_proc or _processors(), progress)
        names = [stage.name for stage in recipe.stages] or [f"{stages[0].training['stage']}"]
        found = [
            _prepare_stage(name, stage, args, config, work, gpus)
            for name, stage, args in zip(names, stages, every_args, strict=True)
        ]
        result = PrepareReport(found, gpus, gpu_tflops, utilization, file)
        if any(stage.features for stage in stages) and not result.bad_rows:
            if later:
                say("No features were computed: they need the weights. Run `agevlm features` when the model is there.")
            else:
                cache_features(recipe)
        for stage, stage_report in zip(stages, found, strict=True):
            if stage.features is not None:
                stage_report.features = _size(Path(stage.features))
            stage_report.gpu_hours = stage_report.flops / (gpu_tflops * 1e12 * utilization) / 3600
        with new_file(file) as partial:
            text = json.dumps(result.to_json(), indent=1, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")
        with new_file(file.with_suffix(".md")) as partial:
            partial.write_text(result.to_markdown(), encoding="utf-8")
    return result


def _check_model_is_there(model: str, given: bool) -> None:
    try:
        check_model(model)
    except OSError as error:
        if given or os.path.exists(model):
            raise
        raise FileNotFoundError(
            f"There is no model {model} yet. If it is what a former stage will write, prepare with the model that the first stage "
            f"starts from: it has the same processor and configuration (--model FOLDER, in Python model=FOLDER). ({error})"
        ) from error


def _cpu_arguments(stage: Recipe) -> AgeVlmTrainingArguments:
    """The stage's arguments, made without a look at any GPU."""
    training = {name: value for name, value in stage.training.items() if name != "tf32"}
    return training_arguments(dataclasses.replace(stage, training={**training, "use_cpu": True}))


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- data ---


@dataclass
class _Part:
    """A part of a stage that is prepared."""

    report: PartReport
    rows: PartRows
    verdicts: Verdicts
    kept: np.ndarray  # places of the rows that train


class _Work:
    """What was prepared for one stage serves the next ones."""

    def __init__(self, processor: Any, num_proc: int, progress: bool):
        self.processor, self.num_proc, self.progress = processor, num_proc, progress
        self._sources: dict[str, Prepared | None] = {}

    def prepare(self, part: DataPart, use: str, args: AgeVlmTrainingArguments) -> _Part:
        report = PartReport(part.path, part.format, use)
        report.downloads = sum(_size(Path(local(a))) for a in (part.path, part.images) if a is not None and "://" in a)
        source = None if part.streaming else self._convert(part)
        rows = self._sample(part, use, args) if part.streaming else self._read(part, args)
        collator = row_collator(self.processor, args)
        verdicts = look_at_rows(
            rows.dataset, rows.data, rows.numbers, collator, num_proc=self.num_proc, progress=self.progress, name=part.path
        )  # fmt: skip
        problems = verdicts.problems(collator.grid is not None)
        kept = np.array([place for place, problem in enumerate(problems) if problem is None], dtype=np.int64)
        dropped: Counter[str] = Counter()
        skips = part.on_bad_row == "skip"
        if skips and problems and not len(kept):
            raise ValueError(f"{part.path}: all of its {len(problems)} rows are bad; the first: {problems[0]}")
        if source is not None:
            for (kind, phrase), number in source.bad.items():
                if skips or kind == NOT_DOWNLOADED:
                    dropped[f"{kind} ({'phrases' if phrase else 'entries'})"] += number
            if not skips:
                report.bad += _bad_entries(source)
        origins = rows.dataset.select_columns(ORIGIN_COLUMN)
        for place, problem in enumerate(problems):
            if problem is not None:
                if skips:
                    dropped[_kind(problem)] += 1
                else:
                    origin = origins[place][ORIGIN_COLUMN]
                    report.bad.append({"file": origin["file"], "row": origin["row"], "reason": problem})
        report.dropped, scale = dict(dropped), 1.0
        if part.streaming:
            report.sampled = len(problems)
            totals = (part.rows, open_part(part, allow_urls=args.allow_urls).rows)
            total = min((number for number in totals if number is not None), default=len(problems))
            scale = total / max(1, len(problems))
        report.rows = round(scale * len(kept))
        sums = {
            name: scale * float(verdicts.numbers(name)[kept].sum())
            for name in ("num_images", "phrases", "masks", "tokens")
        }
        report.images, report.phrases, report.masks, report.text_tokens = map(round, sums.values())
        report.disk = sum(os.path.getsize(file["filename"]) for file in rows.dataset.cache_files)
        return _Part(report, rows, verdicts, kept)

    def _convert(self, part: DataPart) -> Prepared | None:
        """The rows of a published data set; None of a data set of rows."""
        key = repr((part.path, part.format, part.images, part.split, part.name))
        if key not in self._sources:
            source = find_source(part.path, part.format, part.images, part.split, part.name)
            self._sources[key] = (
                None
                if source is None
                else prepare_source(source, on_bad_row="skip", num_proc=self.num_proc, progress=self.progress)
            )
        return self._sources[key]

    def _sample(self, part: DataPart, use: str, args: AgeVlmTrainingArguments) -> PartRows:
        """The first rows of a part that is streamed while it trains, with those that cannot be read; all rows of an evaluation."""
        number = part.rows if use == "eval_data" else min(part.rows or _SAMPLE, _SAMPLE)
        some = dataclasses.replace(part, rows=number, weight=None, on_bad_row="error")
        rows = read_mixture([some], args.seed, allow_urls=args.allow_urls, in_memory=True)
        return PartRows(rows, rows._fingerprint, np.arange(len(rows)))

    def _read(self, part: DataPart, args: AgeVlmTrainingArguments) -> PartRows:
        try:
            return read_part(part, args)
        except ValueError:
            if part.on_bad_row == "skip":
                raise
            return read_part(dataclasses.replace(part, on_bad_row="skip"), args)


def _bad_entries(source: Prepared) -> list[dict[str, Any]]:
    """Entries of a published data set that are errors."""
    with open(source.folder / BAD_FILE, encoding="utf-8") as lines:
        entries = map(json.loads, lines)
        return [
            {name: entry[name] for name in ("file", "row", "reason")}
            for entry in entries
            if entry["kind"] != NOT_DOWNLOADED
        ]


def _kind(problem: str) -> str:
    """What problems that differ in names and numbers have in common."""
    text = re.sub(r" \(images?: .*\)$", "", problem)
    text = re.sub(r"(['\"]).*?\1|\S*/\S*", "…", text)
    text = re.split(r"[.;] ", text)[0]  # the fix is not part of it
    return re.sub(r"\d+", "N", text)[:120]


def _size(place: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


# --- stages ---


def _prepare_stage(
    name: str, stage: Recipe, args: AgeVlmTrainingArguments, config: AgeVlmConfig, work: _Work, gpus: int
) -> StageReport:
    import torch

    parts = [work.prepare(part, "data", args) for part in stage.data]
    others = [work.prepare(part, "eval_data", args) for part in stage.eval_data]
    report = StageReport(
        name, [part.report for part in (*parts, *others)], accumulation=args.gradient_accumulation_steps
    )
    shapes = _batches(stage, parts, args, work.processor, gpus)
    if not shapes:
        return report
    report.batches = -(-len(shapes) // gpus)
    report.padded_tokens = sum(shape.rows * shape.tokens for shape in shapes)
    if any(part.streaming for part in stage.data):
        rows = sum(part.report.rows for part in parts)
        check_stream(args, rows)
        scale = rows / max(1, sum(len(part.kept) for part in parts))
        report.batches, report.padded_tokens = round(scale * report.batches), round(scale * report.padded_tokens)
    steps = max(1, -(-report.batches // args.gradient_accumulation_steps))
    report.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    report.epochs = report.steps / steps
    report.batch = BatchShape(
        *(
            -(-sum(getattr(shape, name) for shape in shapes) // len(shapes))
            for name in ("rows", "tokens", "learned", "images")
        )
    )
    report.longest = max(shapes, key=lambda shape: (shape.rows * shape.tokens, shape.learned, shape.images))
    size, dtype = work.processor.image_processor.size, stage.model_args.dtype
    options: Any = {
        "image_size": (size["height"], size["width"]),
        "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype),
        "stored_features": stage.features is not None,
        "devices": gpus,
    }
    report.cost = estimate_step(config, args, report.batch, **options)
    report.memory = estimate_step(config, args, report.longest, **options).memory
    report.visual_tokens = report.cost.visual_tokens * sum(part.report.images for part in parts)
    report.flops = report.cost.flops * report.accumulation * report.steps * gpus
    saved = sum(report.cost.weights.values())
    report.checkpoints = saved + _num_checkpoints(args, report) * (saved + report.cost.optimizer)
    return report


def _batches(
    stage: Recipe, parts: Sequence[_Part], args: AgeVlmTrainingArguments, processor: Any, gpus: int
) -> list[BatchShape]:
    """The batches of one epoch of all devices. They have the sizes of those that train, and with weights or `tokens_per_batch`
    their rows too."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([part.verdicts.numbers(name)[part.kept] for part in parts])

    tokens, first, images = column("tokens"), column("first_learned"), column("num_images")
    rows = args.per_device_train_batch_size
    seed = args.seed if args.data_seed is None else args.data_seed
    batches: Iterable[Sequence[int]]
    streamed = any(part.streaming for part in stage.data)
    if streamed or (args.tokens_per_batch is None and not any(part.weight or part.weight_by for part in stage.data)):
        order = list(range(len(tokens)))
        random.Random(seed).shuffle(order)
        batches = [order[start : start + rows] for start in range(0, len(order), rows)]
        if args.dataloader_drop_last:
            batches = batches[: len(order) // rows // gpus * gpus]
    else:
        batches = _grouped(stage, parts, args, processor, gpus)
    return [
        BatchShape(
            len(batch),
            int(tokens[batch].max()),
            max(1, int(tokens[batch].max() - first[batch].min())),
            int(images[batch].sum()),
        )
        for batch in map(np.array, batches)
    ]


def _grouped(
    stage: Recipe, parts: Sequence[_Part], args: AgeVlmTrainingArguments, processor: Any, gpus: int
) -> Iterator[list[int]]:
    """The batches of [`~agevlm.trainer.sampling.SamplingMixin`]."""
    read = [dataclasses.replace(part, on_bad_row="skip") for part in stage.data]
    mixture = read_mixture(read, args.seed, allow_urls=args.allow_urls)
    starts = np.cumsum([0, *(len(part.rows.numbers) for part in parts)])
    mixture = mixture.select(np.concatenate([start + part.kept for start, part in zip(starts, parts, strict=False)]))
    lengths = count_tokens(mixture, processor.tokenizer)
    if args.max_length:
        lengths = [min(length, args.max_length) for length in lengths]
    groups = mixture[GROUP_COLUMN][:] if GROUP_COLUMN in mixture.column_names else None
    batches = GroupedBatches(
        lengths,
        tokens=args.tokens_per_batch,
        rows=args.per_device_train_batch_size if args.tokens_per_batch is None else None,
        groups=groups,
        weights=None if groups is None else dict(sorted(zip(groups, mixture[WEIGHT_COLUMN][:], strict=True))),
        seed=args.seed if args.data_seed is None else args.data_seed,
        processes=gpus,
    )
    return iter(batches._batches())


def _num_checkpoints(args: AgeVlmTrainingArguments, report: StageReport) -> int:
    """Checkpoints that are on disk at the end."""
    if args.save_strategy == "no":
        return 0
    every = args.save_steps if args.save_steps >= 1 else max(1, report.steps * args.save_steps)
    number = int(report.epochs) if args.save_strategy == "epoch" else int(report.steps // every)
    return min(number + 1, args.save_total_limit or number + 1)
