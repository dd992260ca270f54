# SPDX-License-Identifier: Apache-2.0
"""The mixture of data that a recipe trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .readers import Format, read_dataset

if TYPE_CHECKING:
    from datasets import Dataset


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
    format: Format = "rows"
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
    if part.rows is not None and part.rows < 1:
        raise ValueError(f"{part.path}: rows must be at least 1, got {part.rows}.")
    dataset = read_dataset(part.path, part.format, name=part.name, split=part.split, images=part.images)
    if part.rows is not None and part.rows < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(part.rows))
    return dataset
