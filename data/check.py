# SPDX-License-Identifier: Apache-2.0
"""The check of grounding data: every row held against the format of [`agevlm.processing.rows`]."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
from ..processing.rows import PREFERENCE_COLUMNS, ROLES, import_datasets, mask_from_rle, message_text, place_images


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row and how to mend it (severity "error"), or only worth knowing ("note").

    `where` is the place in the row, as `grounding[3].box`; `row` the row's number in the data set, where known.
    """

    where: str
    message: str
    severity: Literal["error", "note"] = "error"
    row: int | None = None

    def __str__(self) -> str:
        return f"{'' if self.row is None else f'row {self.row}, '}{self.where}: {self.message}"


@dataclass
class Report:
    """What `check_dataset` found. A phrase is an entry of `grounding`; a bad row has at least one error."""

    rows: int = 0
    rows_with_grounding: int = 0
    phrases: int = 0
    phrases_with_mask: int = 0
    phrases_with_box: int = 0
    phrases_absent: int = 0  # their mask is empty, without a score: they name nothing in the image
    phrases_dropped: int = 0  # at training: their mask is empty, with a score
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)


def check_row(row: dict[str, Any], *, image_sizes: Sequence[tuple[int, int] | None] | None = None) -> list[Problem]:
    """Every problem of a row, in the order of its columns.

    Phrases are held against the text once the messages are in order: while those are not, only boxes, masks and scores
    of `grounding` are checked.

    Args:
        row: a row of the format above, or of preference data. Its images are PIL images, paths, or what `datasets`
            stores of them, `{"bytes": ..., "path": ...}`; they are decoded to the last pixel, to find damaged ones.
        image_sizes: `(width, height)` in pixels of each image, None where unknown. Where given, `row["images"]` is not
            looked at.
    """
    problems: list[Problem] = []
    if image_sizes is None:
        image_sizes, problems = _read_sizes(row.get("images"))

    columns: tuple[str, ...] = ("messages",)
    if row.get("messages") is None and any(column in row for column in PREFERENCE_COLUMNS):
        columns = PREFERENCE_COLUMNS
    found = [problem for column in columns for problem in _check_messages(row.get(column), column)]
    problems += found
    messages: list[dict] | None = None
    shown: list[tuple[int, int]] = []
    if not found:
        messages = [message for column in columns[:2] for message in row[column]]
        try:
            shown = _places_of_images(place_images(row[columns[0]], len(image_sizes)))
        except ValueError as error:
            problems.append(Problem(columns[0], f"{error}"))

    grounding = row.get("grounding")
    if not isinstance(grounding, list | None):
        problems.append(Problem("grounding", "is not a list; write one entry for each phrase, or an empty list"))
    for i, entry in enumerate(grounding if isinstance(grounding, list) else ()):
        if isinstance(entry, dict):
            if messages is not None:
                problems += _check_span(entry, f"grounding[{i}]", messages, shown)
            problems += _check_region(entry, f"grounding[{i}]", image_sizes)
        else:
            problems.append(Problem(f"grounding[{i}]", 'is not an entry; write {"message": 0, "start": 0, …}'))
    return problems


def check_dataset(dataset: Dataset | Sequence[dict[str, Any]], *, progress: bool = True) -> Report:
    """Check every row of a data set, or of a list of rows, with `check_row`. All images are decoded.

    Raises:
        ValueError: if the data set has no messages at all.
        ImportError: if `datasets` is not installed.
    """
    from rich.progress import track

    report = Report()
    for number, row in enumerate(
        track(_raw_rows(dataset), "Checking", total=len(dataset), disable=not progress, transient=True)
    ):
        problems = [replace(problem, row=number) for problem in check_row(row)]
        grounding = row.get("grounding")
        entries = [entry for entry in grounding if isinstance(entry, dict)] if isinstance(grounding, list) else []
        report.rows += 1
        report.rows_with_grounding += bool(entries)
        report.phrases += len(entries)
        report.phrases_with_mask += sum(entry.get("mask") is not None for entry in entries)
        report.phrases_with_box += sum(entry.get("box") is not None for entry in entries)
        doubts = sum(p.severity == "note" and p.where.endswith(".mask") for p in problems)
        report.phrases_dropped += doubts
        report.phrases_absent += sum(_is_empty(entry.get("mask")) for entry in entries) - doubts
        report.bad_rows += any(problem.severity == "error" for problem in problems)
        report.problems += problems
    return report


def _raw_rows(dataset: Dataset | Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows with their images as stored: those of `datasets` come decoded otherwise, and a damaged one raises."""
    if isinstance(dataset, Sequence):
        yield from dataset
        return
    columns = [name for name in ("messages", *PREFERENCE_COLUMNS, "grounding") if name in dataset.column_names]
    if not {"messages", *PREFERENCE_COLUMNS} & set(columns):
        raise ValueError(
            "the data set has neither messages nor prompt, chosen and rejected, only the columns "
            f"{', '.join(dataset.column_names)}; rename or convert them"
        )
    rows = dataset.with_format(None).select_columns(columns)
    if "images" not in dataset.column_names:
        yield from rows
        return
    # As Arrow, nothing is decoded; casting to `Image(decode=False)` would write a copy of the data set.
    stored = dataset.with_format("arrow").select_columns("images")
    for row, table in zip(rows, stored, strict=True):
        yield row | {"images": table["images"][0].as_py()}


def _read_sizes(images: Any) -> tuple[list[tuple[int, int] | None], list[Problem]]:
    """Decode images, as `datasets` does (upright): their `(width, height)`, and a problem for each unreadable one."""
    decode = import_datasets().Image().decode_example
    if not isinstance(images, list | None):
        return [], [Problem("images", "is not a list; write a list of images, empty where there is none")]
    sizes: list[tuple[int, int] | None] = []
    problems = []
    for i, image in enumerate(images or ()):
        is_path = isinstance(image, str | os.PathLike)
        stored = {"path": None, "bytes": None} | (
            {"path": str(image)} if is_path else image if isinstance(image, dict) else {}
        )
        try:
            decoded = image if hasattr(image, "load") else decode(stored)
            decoded.load()
            sizes.append(decoded.size)
        except Exception as error:  # decoders of damaged files raise almost anything
            name = f" ({stored['path']})" if stored["path"] else ""
            text = f"is no readable image{name}, {type(error).__name__}; replace it or remove the row"
            problems.append(Problem(f"images[{i}]", text))
            sizes.append(None)
    return sizes, problems


def _check_messages(messages: Any, column: str) -> Iterator[Problem]:
    """Problems of the form of a list of messages."""
    if not isinstance(messages, list):
        yield Problem(column, 'is missing or no list; write a list of {"role": …, "content": …}')
    elif not messages:
        yield Problem(column, "is empty; write at least one message, or remove the row")
    else:
        for i, message in enumerate(messages):
            yield from _check_message(message, column, f"{column}[{i}]")


def _check_message(message: Any, column: str, where: str) -> Iterator[Problem]:
    if not isinstance(message, dict):
        yield Problem(where, 'is not a message; write {"role": …, "content": …}')
        return
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        yield Problem(f"{where}.role", f"is {role!r}; write one of {', '.join(ROLES)}")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, list):
        yield Problem(f"{where}.content", "is neither a string nor a list of content parts")
        return
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        place = f"{where}.content[{j}]"
        if kind not in ("text", "image"):
            yield Problem(place, f"has the type {kind!r}; write a part of the type text or image")
        elif kind == "text" and not isinstance(part.get("text"), str):
            yield Problem(place, 'is a text part without text; write {"type": "text", "text": …}')
        elif kind == "image" and (role == "tool" or column in ("chosen", "rejected")):
            # TRL hands out images to the prompt's messages, and passes over those of tools.
            yield Problem(place, "shows an image in a tool's message or an answer; move it to a user's message")


def _places_of_images(messages: list[dict]) -> list[tuple[int, int]]:
    """Where each image is shown: the message's index, and how many characters of its text come before."""
    places = []
    for i, message in enumerate(messages):
        before = 0
        for part in message["content"]:
            if part["type"] == "image":
                places.append((i, before))
            else:
                before += len(part["text"])
    return places


def _check_span(entry: dict, where: str, messages: list[dict], shown: list[tuple[int, int]]) -> Iterator[Problem]:
    """Problems of where a phrase stands."""
    message, start, end, image = (entry.get(key) for key in ("message", "start", "end", "image"))
    if not _is_index(message, len(messages)):
        yield Problem(f"{where}.message", f"is {message!r}, but there are {len(messages)} messages, from 0 on")
        return
    text = message_text(messages[message])
    if not (_is_index(start, len(text) + 1) and _is_index(end, len(text) + 1)):
        rule = f"the text of message {message} has {len(text)} characters, from 0 on"
        yield Problem(where, f"has the span {start!r} to {end!r}, but {rule}")
        return
    if start >= end:
        yield Problem(where, f"has an empty or reversed span, {start} to {end}; `end` is one past the last character")
        return
    phrase = text[start:end]
    if phrase != phrase.strip():
        yield Problem(where, f"has a span that begins or ends with white space, {phrase!r}; leave that out")
    if _is_index(image, len(shown)) and shown[image] > (message, start):
        yield Problem(
            where,
            f"names something in image {image} before the image is shown, where {phrase!r} cannot look at it; move "
            "the image part to an earlier place or leave the entry out",
        )


def _check_region(entry: dict, where: str, image_sizes: Sequence[tuple[int, int] | None]) -> Iterator[Problem]:
    """Problems of what a phrase names in an image."""
    image, box, mask, score = (entry.get(key) for key in ("image", "box", "mask", "score"))
    size = None
    if not _is_index(image, len(image_sizes)):
        yield Problem(f"{where}.image", f"is {image!r}, but the row has {len(image_sizes)} images, from 0 on")
    else:
        size = image_sizes[image]
    if box is None and mask is None:
        yield Problem(where, "has neither box nor mask; a mask teacher that takes phrases can add one", "note")
    if box is not None:
        yield from _check_box(box, f"{where}.box", size)
    if mask is not None:
        yield from _check_mask(mask, f"{where}.mask", size, score)
    if score is not None and not (_is_number(score) and 0 <= score <= 1):
        yield Problem(f"{where}.score", f"is {score!r}, but must be from 0 to 1, or None")


def _check_box(box: Any, where: str, size: tuple[int, int] | None) -> Iterator[Problem]:
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(_is_number(value) for value in box)):
        yield Problem(where, f"is {box!r}; write four numbers, [x0, y0, x1, y1] in pixels")
        return
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        yield Problem(where, f"is empty or reversed, {box}; write [left, top, right, bottom] in pixels")
    if min(box) < 0 or (size is not None and (max(x0, x1) > size[0] or max(y0, y1) > size[1])):
        image = "the image" if size is None else f"the image of {size[0]} x {size[1]} pixels"
        yield Problem(where, f"reaches outside {image}, {box}; write pixels of the image as it is, upright")


def _is_empty(mask: Any) -> bool:
    try:
        return mask is not None and not mask_from_rle(mask).any()
    except ValueError:
        return False


def _check_mask(mask: Any, where: str, size: tuple[int, int] | None, score: Any) -> Iterator[Problem]:
    # The size comes first: decoding one that a mask only claims to have could take any amount of memory.
    claimed = mask.get("size") if isinstance(mask, dict) else None
    if size is not None and isinstance(claimed, list | tuple) and tuple(claimed) != size[::-1]:
        yield Problem(
            where,
            f"has the size {list(claimed)}, but its image is {size[1]} high and {size[0]} wide; make them the same",
        )
        return
    try:
        empty = not mask_from_rle(mask).any()
    except ValueError as error:
        yield Problem(where, f"{error}; encode it with agevlm.processing.rows.mask_to_rle")
        return
    if empty and score is not None:
        yield Problem(where, "is empty and has a score: its teacher was not sure, and the phrase is dropped", "note")


def _is_index(value: Any, length: int) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(0 <= value < length)


def _is_number(value: Any) -> TypeGuard[float]:
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return numeric and bool(-math.inf < value < math.inf)
