# SPDX-License-Identifier: Apache-2.0
"""Masks for a whole grounding data set: a teacher's answers, saved as they come, resumable, shared among processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..files import check_new_folder, new_folder
from ..processing.rows import mask_to_rle, message_text, quiet_datasets, row_features

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset, DatasetDict
from .teachers import MaskTeacher, Prompt, process_state


@dataclass
class _Asked:
    """An image and, for each prompt about it, where its answer goes: entries, their rows' outcomes, and their indices."""

    image: Image.Image
    prompts: dict[Prompt, list[tuple[dict[str, Any], list[str], int]]] = field(default_factory=dict)


def _decode_image(value: dict[str, Any], where: str) -> Image.Image:
    from datasets import Image as ImageFeature

    try:
        return ImageFeature().decode_example(value).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: its image cannot be read ({error}); repair the image or drop the row") from error


def _read_prompt(messages: Sequence[dict[str, Any]], entry: dict[str, Any], where: str) -> Prompt:
    """The phrase and the box of a grounding entry, checked as far as that goes without the image."""
    if not 0 <= entry["message"] < len(messages):
        raise ValueError(
            f"{where} is about message {entry['message']} of a row with {len(messages)} messages; mend it"
        )
    text = message_text(messages[entry["message"]])
    start, end, box = entry["start"], entry["end"], entry.get("box")
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise ValueError(f"{where}: characters {start} to {end} of its message are no phrase; mend the row")
    if box is not None and not (
        len(box) == 4 and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]
    ):
        raise ValueError(f"{where}: its box is {box}, but must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return Prompt(text[start:end].strip(), None if box is None else tuple(box))


def _mask_rows(
    texts: Dataset,
    images: Dataset,
    indices: range,
    teacher: MaskTeacher,
    batch_size: int,
    min_score: float,
    overwrite: bool,
    split: str,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `indices`, some at a time: `grounding` with masks, and the outcome of each entry.

    `texts` has the columns but for the images; `images` has these, in the format "arrow", so that none is decoded in vain.
    """
    rows: list[dict[str, Any]] = []
    asked: dict[bytes | str, _Asked] = {}  # by content: an image that many rows share is encoded once in a batch
    for index in indices:
        row = texts[index]
        messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
        grounding = row["grounding"] or []
        stored = None
        outcomes = ["kept"] * len(grounding)
        rows.append({"grounding": grounding, "outcomes": outcomes})
        for i, entry in enumerate(grounding):
            entry.setdefault("mask", None)
            entry.setdefault("score", None)
            if entry["mask"] is not None and not overwrite:
                continue
            where = f"row {index}{split and f' of {split}'}, grounding entry {i}"
            prompt = _read_prompt(messages, entry, where)
            if not teacher.takes(prompt):
                outcomes[i] = "not asked"
                continue
            if stored is None:
                stored = images[index]["images"][0].as_py() or []
            if not 0 <= entry["image"] < len(stored):
                raise ValueError(
                    f"{where} is about image {entry['image']} of a row with {len(stored)} images; mend it"
                )
            value = stored[entry["image"]]
            key = value["bytes"] or value["path"]
            if key not in asked:
                asked[key] = _Asked(_decode_image(value, where))
            width, height = asked[key].image.size
            if prompt.box and (
                prompt.box[2] <= 0 or prompt.box[3] <= 0 or prompt.box[0] >= width or prompt.box[1] >= height
            ):
                raise ValueError(f"{where}: its box {list(prompt.box)} lies outside its image of {width} x {height}")
            asked[key].prompts.setdefault(prompt, []).append((entry, outcomes, i))
        if len(asked) >= batch_size:
            _answer(asked, teacher, min_score)
            yield rows
            rows, asked = [], {}
    _answer(asked, teacher, min_score)
    yield rows


def _answer(asked: dict[bytes | str, _Asked], teacher: MaskTeacher, min_score: float) -> None:
    if not asked:
        return
    answers = teacher.masks([a.image for a in asked.values()], [list(a.prompts) for a in asked.values()])
    for one, image_answers in zip(asked.values(), answers, strict=True):
        for targets, (mask, score) in zip(one.prompts.values(), image_answers, strict=True):
            score = min(max(0.0, score), 1.0)  # a predicted IoU may lie a little outside; in this order NaN gives 0
            rle = mask_to_rle(mask) if mask is not None and mask.any() and score >= min_score else None
            for entry, outcomes, i in targets:
                entry["mask"], entry["score"] = rle, score
                outcomes[i] = "masked" if rle else "refused"


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
    progress: bool = True,
) -> tuple[Dataset | DatasetDict, Counter[str]]:
    """Add masks to a grounding data set, and write it as a new one: the same rows in the same order.

    Each entry of `grounding` that has no mask gets `mask` and `score`. Where the teacher finds nothing, or its score is
    below `min_score`, the mask stays None and the score says so; entries that the teacher cannot take (SAM: without a
    box) stay as they are.

    Work is saved in the folder `{output_dir}.partial`. If it stops, for whatever reason, the same call goes on where it
    stopped. Under `accelerate launch` each process does its share of the work, and the first one puts it together.

    Args:
        dataset: with the columns of `agevlm.processing.rows`; others are kept.
        teacher: see `load_teacher`.
        output_dir: folder to write, for `datasets.load_from_disk`; it appears only when complete.
        batch_size: images that are encoded together.
        min_score: the least score of a mask.
        overwrite: ask for masks that are there already, too.
        save_every: rows after which work is saved.
        attribution: text for the data set's `ATTRIBUTION.md`.
        progress: show a progress bar.

    Returns:
        the data set as read back from `output_dir`, and the number of entries by outcome: `masked`, `refused` (nothing
        found, or below `min_score`), `kept` (had a mask already) and `not asked` (no box).

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder, or its partial folder holds work that was
            begun with another data set or other settings.
        ValueError: if a column is missing, a number is out of range, a row's image cannot be read, its phrase or its
            box is wrong, or the teacher can take no entry at all.
        ImportError: if `accelerate`, `datasets` or `pycocotools` is not installed.
    """
    try:
        import datasets
        import pycocotools.mask  # noqa: F401
        from datasets.arrow_writer import ArrowWriter
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(f"{error}; to add masks: pip install accelerate datasets pycocotools") from error

    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score is {min_score}, but must be in [0, 1]")
    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    splits = {split: part.with_format(None) for split, part in splits.items()}
    for split, part in splits.items():
        texts = {"messages"} if "messages" in part.column_names else {"prompt", "chosen"}
        if missing := {"images", "grounding", *texts} - set(part.column_names):
            raise ValueError(f"the data set{split and f' ({split})'} lacks the column(s) {', '.join(sorted(missing))}")
        if not isinstance(getattr(part.features["grounding"], "feature", None), dict):
            raise ValueError(f"grounding must be a list of entries, but is {part.features['grounding']}")
    state = process_state()
    output_dir = Path(output_dir).absolute()
    check_new_folder(output_dir)

    # All that decides the result, but for the batch size: who runs out of memory may go on with a smaller one.
    settings = {
        **teacher.settings,
        "dataset": {split: [part._fingerprint, len(part)] for split, part in splits.items()},
        "min_score": min_score,
        "overwrite": overwrite,
        "save_every": save_every,
    }
    work = output_dir.with_name(f"{output_dir.name}.partial")
    _begin(work, settings, state)
    shards = {
        (split, start): work / split / f"{start:09}.arrow"
        for split, part in splits.items()
        for start in range(0, len(part), save_every)
    }
    todo = [shard for shard, path in shards.items() if not path.is_file()]
    state.wait_for_everyone()  # all look before any writes, so that all deal the work alike

    own = row_features()["grounding"].feature
    features = {
        split: datasets.Features(
            grounding=datasets.List(
                {**part.features["grounding"].feature, "mask": own["mask"], "score": own["score"]}
            ),
            outcomes=datasets.List(datasets.Value("string")),
        )
        for split, part in splits.items()
    }
    with Progress(disable=not (progress and state.is_main_process)) as bar:
        share = todo[state.process_index :: state.num_processes]
        ranges = [range(start, min(start + save_every, len(splits[split]))) for split, start in share]
        task = bar.add_task("masks", total=sum(map(len, ranges)))
        for (split, start), indices in zip(share, ranges, strict=True):
            path = shards[split, start]
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            columns = [
                name for name in ("messages", "prompt", "chosen", "grounding") if name in splits[split].column_names
            ]
            texts = splits[split].select_columns(columns)
            images = splits[split].with_format("arrow").select_columns("images")
            with ArrowWriter(path=str(unfinished), features=features[split]) as writer:
                for rows in _mask_rows(texts, images, indices, teacher, batch_size, min_score, overwrite, split):
                    for row in rows:
                        writer.write(row)
                    bar.advance(task, len(rows))
                writer.finalize()
            unfinished.replace(path)
    state.wait_for_everyone()

    results = {
        split: [datasets.Dataset.from_file(str(path)) for (owner, _), path in shards.items() if owner == split]
        for split in splits
    }
    outcomes = Counter(
        outcome for parts in results.values() for part in parts for row in part["outcomes"] for outcome in row
    )
    state.wait_for_everyone()  # all have read before the work is deleted
    if outcomes["not asked"] and not outcomes["masked"] + outcomes["refused"]:
        if state.is_main_process:
            shutil.rmtree(work)
        raise ValueError(
            f"none of the {outcomes['not asked']} phrases without a mask has a box, and boxes are what this teacher"
            " starts from; use grounded-sam or sam3, which start from phrases"
        )
    if state.is_main_process:
        with new_folder(output_dir) as partial, quiet_datasets(datasets):
            masked = datasets.DatasetDict()
            for split, part in splits.items():
                # The fingerprint that `datasets` would make up holds paths and times; this one depends on the rows.
                digest = hashlib.sha256(json.dumps([split, settings], sort_keys=True).encode()).hexdigest()[:16]
                masked[split] = _replace_grounding(part, results[split], digest)
            (masked if isinstance(dataset, datasets.DatasetDict) else masked[""]).save_to_disk(partial)
            if attribution:
                (partial / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        shutil.rmtree(work)
    state.wait_for_everyone()
    return datasets.load_from_disk(output_dir), outcomes


def _replace_grounding(part: Dataset, results: Sequence[Dataset], fingerprint: str) -> Dataset:
    """A split with the grounding that is in `results`; nothing is read into memory, no image is encoded anew."""
    import datasets

    if not results:  # an empty split
        return part
    grounding = datasets.concatenate_datasets(results).select_columns("grounding")
    whole = datasets.concatenate_datasets([part.remove_columns("grounding"), grounding], axis=1)
    whole = whole.select_columns(part.column_names)
    return datasets.Dataset(whole.data, whole.info, part.split, whole._indices, fingerprint)


def _begin(work: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Make the folder for unfinished work, or find it as the same settings left it."""
    file = work / "settings.json"
    if state.is_main_process and not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        unfinished.replace(file)
    state.wait_for_everyone()
    begun = json.loads(file.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(settings))
    if others := [key for key in sorted(begun.keys() | ours.keys()) if begun.get(key) != ours.get(key)]:
        changes = "; ".join(f"{key} was {begun.get(key)} and is {ours.get(key)}" for key in others)
        raise FileExistsError(
            f"{work} holds work that was begun otherwise ({changes}); go on with what it was begun with, or delete"
            " the folder to begin anew"
        )
