# SPDX-License-Identifier: Apache-2.0
"""Checks every row of data against the format of [`agevlm.processing.rows`], and whether a model can train on it."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
from PIL import Image

from ..processing.image_processing_agevlm import decode_image, load_image
from ..processing.rows import (
    ORIGIN_COLUMN,
    PREFERENCE_COLUMNS,
    ROLES,
    is_unicode,
    mask_from_rle,
    message_text,
    place_images,
)
from .download import local
from .formats.source import NOT_DOWNLOADED, BadEntry
from .mixture import DataPart, open_part
from .prepared import read_pieces
from .readers import find_source, read_dataset, read_json_rows, read_rows, stored_images

if TYPE_CHECKING:
    from datasets import Dataset

    from ..processing.collator import AgeVlmDataCollator


@dataclass(frozen=True)
class Problem:
    """A mistake in a row and its fix (severity "error"), or a fact worth knowing ("note").

    `where` is the place in the row, such as `grounding[3].box`; `row` is the row's number in the data set, if known.
    """

    where: str
    message: str
    severity: Literal["error", "note"] = "error"
    row: int | None = None

    def __str__(self) -> str:
        return f"{'' if self.row is None else f'row {self.row}, '}{self.where}: {self.message}"


@dataclass
class Report:
    """The result of `check_dataset`. A phrase is an entry of `grounding`; a bad row has at least one error."""

    rows: int = 0
    rows_with_grounding: int = 0
    phrases: int = 0
    phrases_with_mask: int = 0
    phrases_with_box: int = 0
    phrases_absent: int = 0  # with an empty mask and no score: the image shows nothing that they name
    phrases_dropped: int = 0  # with an empty mask and a score: training drops them
    bad_rows: int = 0
    problems: list[Problem] = field(default_factory=list)


def check_row(
    row: dict[str, Any],
    *,
    image_sizes: Sequence[tuple[int, int] | None] | None = None,
    allow_urls: bool = False,
) -> list[Problem]:
    """Every problem of a row, in the order of its columns.

    The spans of phrases are checked only if the messages are valid. Boxes, masks and scores are always checked.

    Args:
        row: a row of the format, or of preference data. Its images are PIL images, paths, or dictionaries as `datasets`
            stores them, `{"bytes": ..., "path": ...}`. They are decoded completely, to find damaged ones.
        image_sizes: `(width, height)` in pixels of each image, None if unknown. If given, `row["images"]` is ignored.
        allow_urls: fetch images that are URLs, from public addresses only.
    """
    if reason := (row.get(ORIGIN_COLUMN) or {}).get("problem"):
        return [Problem("row", reason)]
    problems: list[Problem] = []
    if image_sizes is None:
        images = row.get("images") if row.get("image") is None else [row["image"]]
        image_sizes, problems = _read_sizes(images, allow_urls)

    columns: tuple[str, ...] = ("messages",)
    if row.get("messages") is None and any(column in row for column in PREFERENCE_COLUMNS):
        columns = PREFERENCE_COLUMNS
    message_problems = [problem for column in columns for problem in _check_messages(row.get(column), column)]
    problems += message_problems
    messages: list[dict] | None = None
    image_places: list[tuple[int, int]] = []
    if not message_problems:
        messages = [message for column in columns[:2] for message in row[column]]
        try:
            image_places = _image_places(place_images(row[columns[0]], len(image_sizes)))
        except ValueError as error:
            problems.append(Problem(columns[0], f"{error}"))

    grounding = row.get("grounding")
    if not isinstance(grounding, list | None):
        problems.append(Problem("grounding", "is not a list; write one entry for each phrase, or an empty list"))
    for i, entry in enumerate(grounding if isinstance(grounding, list) else ()):
        if isinstance(entry, dict):
            if messages is not None:
                problems += _check_span(entry, f"grounding[{i}]", messages, image_places)
            problems += _check_region(entry, f"grounding[{i}]", image_sizes)
        else:
            problems.append(Problem(f"grounding[{i}]", 'is not an entry; write {"message": 0, "start": 0, …}'))
    return problems


def check_dataset(
    dataset: Dataset | Sequence[dict[str, Any]],
    *,
    collator: AgeVlmDataCollator | None = None,
    allow_urls: bool = False,
    progress: bool = True,
) -> Report:
    """Check every row of a data set, or of a list of rows, with `check_row`. All images are decoded.

    Args:
        dataset: of rows.
        collator: also collates each row as training does. A row is then bad if and only if this fails, which is its
            first problem; mistakes in the format that training does not meet, such as a wrong box, are notes.
        allow_urls: fetch images that are URLs, from public addresses only.
        progress: show a progress bar.

    Raises:
        ValueError: if the data set has no messages at all.
        ImportError: if `datasets` is not installed.
    """
    return _check(_numbered(dataset, dataset), len(dataset), collator, allow_urls, progress)


def check_part(
    part: DataPart,
    *,
    collator: AgeVlmDataCollator | None = None,
    allow_urls: bool = False,
    progress: bool = True,
) -> Report:
    """Check data of any format that a recipe reads, as `check_dataset` does. Rows are numbered as in the file or data set.

    Of a published data set, which is read in a stream, bad entries and phrases are problems as well.

    Args:
        part: which data, in which format; all of their rows are checked.
        collator, allow_urls, progress: as for `check_dataset`.

    Raises:
        OSError: if there are no such data.
        ValueError: if no rows can be read at all.
        ImportError: if `datasets` is not installed.
    """
    if (source := find_source(part.path, part.format, part.images, part.split, part.name)) is not None:
        with tempfile.TemporaryDirectory() as work:
            found = read_pieces(source, source.pieces(Path(work)), Path(work))
            rows = ((entry if isinstance(entry, BadEntry) else entry["row"], entry, entry) for entry in found)
            return _check(rows, None, collator, allow_urls, progress)
    if part.streaming:
        pieces = open_part(part, allow_urls=allow_urls)
        streamed = itertools.chain.from_iterable(map(pieces.read, range(pieces.count)))
        numbered = ((number, row, row) for number, row in enumerate(streamed))
        return _check(numbered, pieces.rows, collator, allow_urls, progress)
    options: Any = {"keep_bad": True, "allow_urls": allow_urls, "name": part.name, "split": part.split}
    if part.format != "rows" or part.name is not None:
        dataset = read_dataset(part.path, part.format, **options)
        return _check(_numbered(dataset, dataset), len(dataset), collator, allow_urls, progress)
    # As they are written, with mistakes that no data set could hold; also preference data.
    path = local(part.path)
    is_json = Path(path).suffix in (".json", ".jsonl") and part.split in (None, "train")
    # With all URLs, which `check_row` names row by row; nothing is fetched here.
    written = read_json_rows(path) if is_json else read_rows(path, part.split, allow_urls=True)
    trained, columns = written, {key for row in written for key in row} if is_json else written.column_names
    if collator is not None and "messages" in columns:
        trained = read_dataset(path, **options)
    return _check(_numbered(written, trained), len(written), collator, allow_urls, progress)


def _numbered(
    written: Dataset | Sequence[dict[str, Any]], trained: Dataset | Sequence[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """
    Args:
        written: the rows whose format is checked.
        trained: the same rows as training reads them.
    """
    numbers = itertools.count()
    return zip(numbers, _raw_rows(written), iter(stored_images(trained)), strict=False)


def _check(
    rows: Iterable[tuple[int | BadEntry, Any, Any]],
    total: int | None,
    collator: AgeVlmDataCollator | None,
    allow_urls: bool,
    progress: bool,
) -> Report:
    """
    Args:
        rows: the number of each row, the row as it is written, and as training reads it; or a bad entry.
        total: the number of rows, if it is known.
    """
    from rich.progress import track

    report = Report()
    last_bad: tuple[str, int] | None = None
    for number, row, trained_row in track(rows, "Checking", total=total, disable=not progress, transient=True):
        if isinstance(number, BadEntry):
            bad, severe = number, number.kind != NOT_DOWNLOADED
            report.rows += not bad.phrase
            report.bad_rows += severe and (bad.file, bad.row) != last_bad
            last_bad = (bad.file, bad.row) if severe else last_bad
            where = f"{bad.file}, {'phrase' if bad.phrase else 'entry'} ({bad.kind}):"
            report.problems.append(Problem(where, bad.reason, "error" if severe else "note", bad.row))
            continue
        problems = [replace(problem, row=number) for problem in check_row(row, allow_urls=allow_urls)]
        if collator is not None:
            reason = collator.find_problem(trained_row)
            problems = [replace(problem, severity="note") for problem in problems]
            if reason is not None:
                problems.insert(0, Problem("training", f"stops: {reason}", row=number))
        grounding = row.get("grounding")
        entries = [entry for entry in grounding if isinstance(entry, dict)] if isinstance(grounding, list) else []
        report.rows += 1
        report.rows_with_grounding += bool(entries)
        report.phrases += len(entries)
        report.phrases_with_mask += sum(entry.get("mask") is not None for entry in entries)
        report.phrases_with_box += sum(entry.get("box") is not None for entry in entries)
        dropped = sum(p.message.startswith(_DROPPED) for p in problems)
        report.phrases_dropped += dropped
        report.phrases_absent += sum(_is_empty(entry.get("mask")) for entry in entries) - dropped
        report.bad_rows += any(problem.severity == "error" for problem in problems)
        report.problems += problems
    return report


def _raw_rows(dataset: Dataset | Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows with their images as they are stored: `datasets` would decode them, and raise at a damaged one."""
    if isinstance(dataset, Sequence):
        yield from dataset
        return
    names = ("messages", *PREFERENCE_COLUMNS, "grounding", "images", "image", ORIGIN_COLUMN)
    columns = [name for name in names if name in dataset.column_names]
    if not {"messages", *PREFERENCE_COLUMNS} & set(columns):
        raise ValueError(
            "the data set has neither messages nor prompt, chosen and rejected, only the columns "
            f"{', '.join(dataset.column_names)}; rename or convert them"
        )
    yield from stored_images(dataset.with_format(None).select_columns(columns))


def _read_sizes(images: Any, allow_urls: bool) -> tuple[list[tuple[int, int] | None], list[Problem]]:
    """Decode images: the `(width, height)` of each upright image, and a problem for each unreadable one."""
    if not isinstance(images, list | None):
        return [], [Problem("images", "is not a list; write a list of images, empty if there is none")]
    sizes: list[tuple[int, int] | None] = []
    problems = []
    for i, image in enumerate(images or ()):
        path = image.get("path") if isinstance(image, dict) else None
        source: Any = (image.get("bytes") or path) if isinstance(image, dict) else image
        try:
            if isinstance(source, Image.Image):
                sizes.append(decode_image(source).size)
            else:
                sizes.append(load_image(source, urls="public" if allow_urls else "none").size)
        except Exception as error:  # decoders of damaged files raise errors of many types
            file = f" ({path})" if path and str(path) not in str(error) else ""
            problems.append(Problem(f"images[{i}]", f"is not readable{file}: {error}; replace it or remove the row"))
            sizes.append(None)
    return sizes, problems


def _check_messages(messages: Any, column: str) -> Iterator[Problem]:
    """Problems of a column of messages."""
    if not isinstance(messages, list):
        yield Problem(column, 'is missing or not a list; write a list of {"role": …, "content": …}')
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
    if isinstance(content, str):
        yield from _check_text(content, f"{where}.content")
        return
    if content is None and message.get("tool_calls"):
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
        elif kind == "text":
            yield from _check_text(part["text"], place)
        elif kind == "image" and (role == "tool" or column in ("chosen", "rejected")):
            # TRL gives images to the prompt's messages only, and skips those of tools.
            yield Problem(place, "shows an image in a tool's message or an answer; move it to a user's message")


def _check_text(text: str, where: str) -> Iterator[Problem]:
    if not is_unicode(text):
        yield Problem(where, f"has half of a surrogate pair, {text!a:.80}; write the whole character")


def _image_places(messages: list[dict]) -> list[tuple[int, int]]:
    """The place of each image part: the message's index, and the number of characters of its text before the part."""
    places = []
    for i, message in enumerate(messages):
        before = 0
        for part in message["content"]:
            if part["type"] == "image":
                places.append((i, before))
            else:
                before += len(part["text"])
    return places


def _check_span(
    entry: dict, where: str, messages: list[dict], image_places: list[tuple[int, int]]
) -> Iterator[Problem]:
    """Problems of a phrase's place in the messages."""
    message, start, end, image = (entry.get(key) for key in ("message", "start", "end", "image"))
    if not _is_index(message, len(messages)):
        yield Problem(f"{where}.message", f"is {message!r}, but there are {len(messages)} messages, from 0 on")
        return
    text = message_text(messages[message])
    if not (_is_index(start, len(text) + 1) and _is_index(end, len(text) + 1)):
        limit = f"the text of message {message} has {len(text)} characters, from 0 on"
        yield Problem(where, f"has the span {start!r} to {end!r}, but {limit}")
        return
    if start >= end:
        yield Problem(where, f"has an empty or reversed span, {start} to {end}; `end` is one past the last character")
        return
    phrase = text[start:end]
    if phrase != phrase.strip():
        yield Problem(where, f"has a span that begins or ends with white space, {phrase!r}; exclude it")
    if _is_index(image, len(image_places)) and image_places[image] > (message, start):
        yield Problem(
            where,
            f"names something in image {image} before the image is shown, so {phrase!r} cannot attend to it; move "
            "the image part to an earlier place or remove the entry",
        )


def _check_region(entry: dict, where: str, image_sizes: Sequence[tuple[int, int] | None]) -> Iterator[Problem]:
    """Problems of a phrase's image, box, mask and score."""
    image, box, mask, score = (entry.get(key) for key in ("image", "box", "mask", "score"))
    size = None
    if not _is_index(image, len(image_sizes)):
        yield Problem(f"{where}.image", f"is {image!r}, but the row has {len(image_sizes)} images, from 0 on")
    else:
        size = image_sizes[image]
    if box is None and mask is None:
        yield Problem(
            where, "has neither box nor mask; a mask teacher that starts from phrases can add a mask", "note"
        )
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
        yield Problem(where, f"reaches outside {image}, {box}; write pixels of the upright image at its own size")


def _is_empty(mask: Any) -> bool:
    try:
        return mask is not None and not mask_from_rle(mask).any()
    except ValueError:
        return False


_DROPPED = "is empty and has a score"


def _check_mask(mask: Any, where: str, size: tuple[int, int] | None, score: Any) -> Iterator[Problem]:
    # The size is checked first: to decode a mask of a wrong size could take any amount of memory.
    mask_size = mask.get("size") if isinstance(mask, dict) else None
    if size is not None and isinstance(mask_size, list | tuple) and tuple(mask_size) != size[::-1]:
        yield Problem(
            where,
            f"has the size {list(mask_size)}, but its image is {size[1]} high and {size[0]} wide; make them the same",
        )
        return
    try:
        empty = not mask_from_rle(mask).any()
    except ValueError as error:
        yield Problem(where, f"{error}; encode it with agevlm.processing.rows.mask_to_rle")
        return
    if empty and score is not None:
        yield Problem(where, f"{_DROPPED}: its teacher was not sure, so training drops the phrase", "note")


def _is_index(value: Any, length: int) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(0 <= value < length)


def _is_number(value: Any) -> TypeGuard[float]:
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return numeric and bool(-math.inf < value < math.inf)
