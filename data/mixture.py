# SPDX-License-Identifier: Apache-2.0
"""The mixture of data that a recipe trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset


# The column that a format keeps its conversations in.
_CONVERSATIONS = {"rows": "messages", "llava": "conversations", "cauldron": "texts"}


@dataclass
class DataPart:
    """A part of a mixture.

    Args:
        path: a folder that `save_to_disk` wrote, a `.json`, `.jsonl` or `.parquet` file, or the id of a data set on the Hub.
        name: configuration of a data set on the Hub, where it has several.
        split: may be left out where there is only one.
        format: `rows` are those of [`agevlm.processing.rows`], TRL's vision format: `messages` and `images`. `llava`
            has `conversations` and `image`, `grit` is a file of captions with boxes, `cauldron` has `texts` and `images`.
        images: the folder that the images of a `llava` or `grit` file are in.
        rows: how many rows to take at most, drawn with `training.seed`; all by default.
    """

    path: str
    name: str | None = None
    split: str | None = None
    format: Literal["rows", "llava", "grit", "cauldron"] = "rows"
    images: str | None = None
    rows: int | None = None


def read_mixture(parts: Sequence[DataPart], seed: int = 0) -> Dataset:
    """The parts, one after another, with the columns `messages`, `grounding` and `images` or `image`.

    Only conversations are ever converted; images stay as they are stored, and are decoded when a batch needs them.

    Raises:
        OSError: if a part is missing.
        ValueError: if a part is not of the format it should be of.
        ImportError: if `datasets` is not installed.
    """
    from ..processing.rows import import_datasets

    return import_datasets().concatenate_datasets([_read_part(part, seed) for part in parts])


def _read_part(part: DataPart, seed: int) -> Dataset:
    from ..processing.rows import import_datasets
    from .readers import read_grit, read_llava, read_rows

    if part.rows is not None and part.rows < 1:
        raise ValueError(f"{part.path}: rows must be at least 1, got {part.rows}.")
    is_file = part.format in ("llava", "grit") and Path(part.path).suffix in (".json", ".jsonl")
    if is_file != (part.images is not None) or (part.format == "grit" and not is_file):
        raise ValueError(
            f"{part.path}: `images` names the folder of images of a .json or .jsonl file of format llava or grit, and "
            f"only of those; got format {part.format} and images {part.images}."
        )
    if part.images is not None:
        dataset = (read_llava if part.format == "llava" else read_grit)(part.path, part.images)
    else:
        if part.name is None:
            dataset = read_rows(part.path, part.split)
        elif part.split is not None:
            dataset = import_datasets().load_dataset(part.path, part.name, split=part.split)
        else:
            raise ValueError(f"{part.path}: with `name` goes `split`.")
    dataset = _as_rows(dataset, part if part.images is None else DataPart(part.path))
    if part.rows is not None and part.rows < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(part.rows))
    return dataset


def _as_rows(dataset: Dataset, part: DataPart) -> Dataset:
    """A data set of another form as rows. Columns are put side by side, so that images are not copied."""
    from datasets import Features, Image, concatenate_datasets

    from ..processing.rows import place_images, row_features

    source = _CONVERSATIONS[part.format]
    if source not in dataset.column_names:
        raise ValueError(
            f"{part.path} has no column '{source}', which the format {part.format} has, but {', '.join(dataset.column_names)}. "
            f"The formats' columns: {', '.join(f'{name} {column}' for name, column in _CONVERSATIONS.items())}."
        )
    wanted = row_features()
    image = next((name for name in ("images", "image") if name in dataset.column_names), None)
    if image and not isinstance(getattr(dataset.features[image], "feature", dataset.features[image]), Image):
        raise ValueError(
            f"{part.path}: its column {image} does not hold images, but {dataset.features[image]}. Where these are the names of "
            "files, download the data set, and name its .json file as `path` and the folder of its images as `images`."
        )
    columns = [dataset.select_columns(image)] if image else []
    messages = dataset.select_columns(source)
    if part.format != "rows" or messages.features["messages"] != wanted["messages"]:
        counts = _count_images(dataset, image)

        def convert(conversation: Any, number: int) -> dict[str, Any]:
            try:
                placed = place_images(_messages(conversation, part.format), counts[number])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{part.path}, row {number}: no conversation of the format {part.format}: {error}"
                ) from error
            contents = [[{"type": p["type"], "text": p.get("text")} for p in m["content"]] for m in placed]
            return {"messages": [{"role": m["role"], "content": c} for m, c in zip(placed, contents, strict=True)]}

        messages = messages.map(
            convert,
            with_indices=True,
            input_columns=[source],
            remove_columns=[source],
            features=Features(messages=wanted["messages"]),
            desc=f"Conversations of {part.path}",
        )
    columns.append(messages)
    if "grounding" in dataset.column_names:
        grounding = dataset.select_columns("grounding")
        same = grounding.features["grounding"] == wanted["grounding"]
        columns.append(grounding if same else grounding.cast(Features(grounding=wanted["grounding"])))
    return concatenate_datasets(columns, axis=1)


def _messages(conversation: Any, format: str) -> list[dict[str, Any]]:
    """Messages of one conversation."""
    from .readers import llava_messages

    if format == "llava":
        return llava_messages(conversation)
    if format == "cauldron":
        return [{"role": role, "content": turn[role]} for turn in conversation for role in ("user", "assistant")]
    return conversation


def _count_images(dataset: Dataset, column: str | None) -> list[int]:
    """How many images each row has, without decoding any."""
    import pyarrow.compute as pc

    if column is None:
        return [0] * len(dataset)
    stored = dataset.select_columns(column).with_format("arrow")[:][column]
    counts = pc.list_value_length(stored) if column == "images" else pc.is_valid(stored).cast("int32")
    return pc.fill_null(counts, 0).to_pylist()
