# SPDX-License-Identifier: Apache-2.0
"""Masks for a whole grounding data set: a teacher's masks, saved in pieces, resumable, shared among processes."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import new_folder, unfinished_path
from ..hub_cards.dataset import tell_step
from ..processing.image_processing_agevlm import load_image, to_rgb
from ..processing.rows import mask_to_rle, message_text, quiet_datasets, row_features
from ..resume import digest, resume_or_refuse
from .pieces import unfinished_work, write_piece
from .readers import check_images
from .teachers import MaskTeacher, Prompt, process_state

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from PIL import Image
    from rich.progress import Progress, TaskID


def add_masks(
    dataset: Dataset | DatasetDict,
    teacher: MaskTeacher,
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 8,
    min_score: float = 0.0,
    overwrite: bool = False,
    save_every: int = 100,
    attribution: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Dataset | DatasetDict, Counter[str]]:
    """Add masks to a grounding data set, and write it as a new one: the same rows in the same order.

    Each entry of `grounding` without a mask gets `mask` and `score`. If the teacher finds nothing, or its score is below
    `min_score`, the mask stays None and `score` is set. Entries that the teacher does not accept (SAM: without a box) are
    not changed.

    Finished work is kept in a hidden folder, `.unfinished` in an empty `output_dir` and `.NAME.unfinished` beside one that does
    not exist. After an interruption the same call resumes it. Under
    `accelerate launch` each process does its share of the work, and the first process joins the results.

    Args:
        dataset: with the columns of `agevlm.processing.rows`; others are kept.
        teacher: see `load_teacher`.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        batch_size: images that are encoded together.
        min_score: the least score of a mask.
        overwrite: also replace existing masks.
        save_every: number of rows after which work is saved.
        attribution: text for the data set's `ATTRIBUTION.md`.
        provenance: of the data set, which the new one carries on (`agevlm.provenance`).
        progress: show a progress bar.

    Returns:
        the data set, read from `output_dir`, and the number of entries by outcome: `masked`, `rejected` (nothing found, or
        below `min_score`), `kept` (had a mask already) and `skipped` (not accepted by the teacher).

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder, or its unfinished work is of another data set or
            other settings, or another process is at it.
        ValueError: if a column is missing, no row has a phrase, a number is out of range, a row's image is a URL or cannot be read, a phrase or a box is
            invalid, or the teacher accepts no entry at all.
        ImportError: if `accelerate`, `datasets` or `pycocotools` is not installed.
    """
    try:
        import datasets
        import pycocotools.mask  # noqa: F401
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(f"{error}; to add masks: pip install accelerate datasets pycocotools") from error

    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score is {min_score}, but must be in [0, 1]")
    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    splits = {split: check_images(part.with_format(None), split or "the data set") for split, part in splits.items()}
    features = {split: _result_features(part, split) for split, part in splits.items()}
    if not any(map(_has_phrases, splits.values())):
        raise ValueError(f"the data set has no phrase that a mask could be made of; {_NO_PHRASES}")
    state = process_state()
    output_dir = Path(output_dir).absolute()
    # All that the result depends on. The batch size is not part of it, so a run out of memory can resume with a smaller one.
    settings = {
        **teacher.settings,
        "dataset": {split: [part._fingerprint, len(part)] for split, part in splits.items()},
        "min_score": min_score,
        "overwrite": overwrite,
        "save_every": save_every,
    }
    work = unfinished_path(output_dir)
    pieces = {
        (split, start): work / split / f"{start:09}.arrow"
        for split, part in splits.items()
        for start in range(0, len(part), save_every)
    }
    with unfinished_work(output_dir, settings) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        resume_or_refuse(work / "settings.json", settings)
        missing = [piece for piece, path in pieces.items() if not path.is_file()]
        state.wait_for_everyone()  # all processes look before any of them writes, so that all share the work alike

        with Progress(disable=not (progress and state.is_main_process)) as bar:
            share = missing[state.process_index :: state.num_processes]
            ranges = [range(start, min(start + save_every, len(splits[split]))) for split, start in share]
            task = bar.add_task("masks", total=sum(map(len, ranges)))
            for (split, start), indices in zip(share, ranges, strict=True):
                batches = _mask_rows(splits[split], indices, teacher, batch_size, min_score, overwrite, split)
                write_piece(pieces[split, start], features[split], _advancing(batches, bar, task))
        state.wait_for_everyone()

        results = {
            split: [datasets.Dataset.from_file(str(path)) for (owner, _), path in pieces.items() if owner == split]
            for split in splits
        }
        outcomes = Counter(
            outcome for parts in results.values() for part in parts for row in part["outcomes"] for outcome in row
        )
        state.wait_for_everyone()  # all processes have read the results before they are deleted
        if outcomes["skipped"] and not outcomes["masked"] + outcomes["rejected"]:
            if state.is_main_process:
                shutil.rmtree(work)
            raise ValueError(
                f"none of the {outcomes['skipped']} phrases without a mask has a box, but this teacher starts from boxes;"
                " use grounded-sam or sam3, which start from phrases"
            )
        if state.is_main_process:
            with new_folder(output_dir) as partial, quiet_datasets(datasets):
                masked = datasets.DatasetDict()
                for split, part in splits.items():
                    # `datasets` would derive a fingerprint from paths and times; this one depends on the rows.
                    masked[split] = replace_grounding(part, results[split], digest([split, settings]))
                (masked if isinstance(dataset, datasets.DatasetDict) else masked[""]).save_to_disk(partial)
                if attribution:
                    (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
                told = {
                    **teacher.settings,
                    "least score": min_score,
                    "existing masks": "replaced" if overwrite else "kept",
                }
                tell_step(partial, provenance, "agevlm masks", {**told, "phrases": dict(outcomes)})
            shutil.rmtree(work)
    state.wait_for_everyone()
    return datasets.load_from_disk(output_dir), outcomes


_NO_PHRASES = "`agevlm data phrases` adds phrases to captions and conversations"


def _has_phrases(part: Dataset) -> bool:
    import pyarrow.compute as pc

    stored = part.with_format("arrow").select_columns("grounding").iter(10_000)
    return any(pc.sum(pc.list_value_length(batch["grounding"])).as_py() for batch in stored)


def _advancing(batches: Iterator[list[dict[str, Any]]], bar: Progress, task: TaskID) -> Iterator[dict[str, Any]]:
    """The rows of batches, which advance a progress bar."""
    for rows in batches:
        yield from rows
        bar.advance(task, len(rows))


def replace_grounding(part: Dataset, results: Sequence[Dataset], fingerprint: str) -> Dataset:
    """Replaces or adds the column `grounding` of a data set by that of others. Nothing is read into memory.

    Args:
        part: the data set.
        results: data sets with the column `grounding`. Together they have as many rows as `part`, or there are none of them
            if `part` is empty.
        fingerprint: of the new data set.
    """
    import datasets

    if not results:
        return part
    grounding = datasets.concatenate_datasets(results).select_columns("grounding")
    others = part.select_columns([name for name in part.column_names if name != "grounding"])
    whole = datasets.concatenate_datasets([others, grounding], axis=1)
    whole = whole.select_columns(list(dict.fromkeys([*part.column_names, "grounding"])))
    return datasets.Dataset(whole.data, whole.info, part.split, whole._indices, fingerprint)


def _result_features(part: Dataset, split: str) -> Features:
    """The columns of saved work: `grounding` with masks and scores, and the `outcomes` of its entries.

    Raises:
        ValueError: if the split lacks a column, or its `grounding` is not a list of entries.
    """
    import datasets

    texts = {"messages"} if "messages" in part.column_names else {"prompt", "chosen"}
    if missing := {"images", "grounding", *texts} - set(part.column_names):
        fix = f"; {_NO_PHRASES}" if missing == {"grounding"} else ""
        raise ValueError(
            f"the data set{split and f' ({split})'} lacks the column(s) {', '.join(sorted(missing))}{fix}"
        )
    entry = getattr(part.features["grounding"], "feature", None)
    if not isinstance(entry, dict):
        raise ValueError(f"grounding must be a list of entries, but is {part.features['grounding']}")
    own = row_features()["grounding"].feature
    grounding = datasets.List({**entry, "mask": own["mask"], "score": own["score"]})
    return datasets.Features(grounding=grounding, outcomes=datasets.List(datasets.Value("string")))


# --- rows of one piece of work ---

# The key of an entry's outcome until its row is saved.
_OUTCOME = "_outcome"


@dataclass
class _ImagePrompts:
    """An image, and for each prompt about it the entries of `grounding` that get its mask."""

    image: Image.Image
    entries: dict[Prompt, list[dict[str, Any]]] = field(default_factory=dict)


def _mask_rows(
    part: Dataset,
    indices: range,
    teacher: MaskTeacher,
    batch_size: int,
    min_score: float,
    overwrite: bool,
    split: str,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `indices` in batches of `batch_size` images: `grounding` with masks, and the outcome of each entry."""
    columns = [name for name in ("messages", "prompt", "chosen", "grounding") if name in part.column_names]
    texts = part.select_columns(columns)
    images = part.with_format("arrow").select_columns("images")  # decoded only if a prompt needs them
    rows: list[list[dict[str, Any]]] = []
    pending: dict[bytes | str, _ImagePrompts] = {}  # by content: an image of many rows is encoded once in a batch
    for index in indices:
        row = texts[index]
        messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
        grounding = row["grounding"] or []
        rows.append(grounding)
        stored: list[dict[str, Any]] | None = None
        for i, entry in enumerate(grounding):
            entry.setdefault("mask", None)
            entry.setdefault("score", None)
            entry[_OUTCOME] = "kept"
            if entry["mask"] is not None and not overwrite:
                continue
            where = f"row {index}{split and f' of {split}'}, grounding entry {i}"
            prompt = _read_prompt(messages, entry, where)
            if not teacher.accepts(prompt):
                entry[_OUTCOME] = "skipped"
                continue
            if stored is None:
                stored = images[index]["images"][0].as_py() or []
            if not 0 <= entry["image"] < len(stored):
                raise ValueError(
                    f"{where} names image {entry['image']} of a row with {len(stored)} images; correct it"
                )
            source = stored[entry["image"]]["bytes"] or stored[entry["image"]]["path"]
            if source not in pending:
                pending[source] = _ImagePrompts(_load_rgb(source, where))
            _check_inside(prompt, pending[source].image, where)
            pending[source].entries.setdefault(prompt, []).append(entry)
        if len(pending) >= batch_size:
            _run_teacher(teacher, list(pending.values()), min_score)
            yield _with_outcomes(rows)
            rows, pending = [], {}
    _run_teacher(teacher, list(pending.values()), min_score)
    yield _with_outcomes(rows)


def _with_outcomes(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"outcomes": [entry.pop(_OUTCOME) for entry in grounding], "grounding": grounding} for grounding in rows]


def _read_prompt(messages: Sequence[dict[str, Any]], entry: dict[str, Any], where: str) -> Prompt:
    """The phrase and the box of an entry of `grounding`, checked as far as is possible without the image."""
    if not 0 <= entry["message"] < len(messages):
        raise ValueError(
            f"{where} names message {entry['message']} of a row with {len(messages)} messages; correct it"
        )
    text = message_text(messages[entry["message"]])
    start, end, box = entry["start"], entry["end"], entry.get("box")
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise ValueError(f"{where}: characters {start} to {end} of its message are not a phrase; correct the span")
    if box is not None and not (
        len(box) == 4 and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]
    ):
        raise ValueError(f"{where}: its box is {box}, but must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return Prompt(text[start:end].strip(), None if box is None else tuple(box))


def _load_rgb(source: bytes | str, where: str) -> Image.Image:
    try:
        return to_rgb(load_image(source, urls="none"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: its image cannot be read ({error}); replace it or remove the row") from error


def _check_inside(prompt: Prompt, image: Image.Image, where: str) -> None:
    """Raises a ValueError if a prompt's box lies outside its image."""
    x0, y0, x1, y1 = prompt.box or (0, 0, 1, 1)
    if x1 <= 0 or y1 <= 0 or x0 >= image.width or y0 >= image.height:
        raise ValueError(
            f"{where}: its box {[x0, y0, x1, y1]} lies outside its image of {image.width} x {image.height}"
        )


def _run_teacher(teacher: MaskTeacher, pending: Sequence[_ImagePrompts], min_score: float) -> None:
    """Ask the teacher for the masks of a batch of images, and store them."""
    if not pending:
        return
    answers = teacher.masks([item.image for item in pending], [list(item.entries) for item in pending])
    for item, image_answers in zip(pending, answers, strict=True):
        for entries, (mask, score) in zip(item.entries.values(), image_answers, strict=True):
            score = min(max(0.0, score), 1.0)  # a predicted IoU can exceed the range; in this order NaN becomes 0
            rle = mask_to_rle(mask) if mask is not None and mask.any() and score >= min_score else None
            for entry in entries:
                entry.update({"mask": rle, "score": score, _OUTCOME: "masked" if rle else "rejected"})
