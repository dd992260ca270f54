# SPDX-License-Identifier: Apache-2.0
"""How the formats build rows: images, boxes and phrases, checked, each mistake with a kind to be counted by."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ...processing.rows import is_unicode
from .source import BadEntryError

DESCRIBE = "Describe this image."
"""The user's message of captions."""

LINES = 16
"""The most lines of one answer about objects or regions of an image. An image with more has several rows."""


def image_file(folder: Path, name: Any) -> dict[str, Any]:
    """An image file in a folder, as `datasets` stores it before it is read.

    The annotations may come from others, so no name may lead out of the folder: its image would become a part of the data set.

    Raises:
        BadEntryError: if there is none, or it lies outside.
    """
    if not isinstance(name, str) or not name:
        raise BadEntryError("missing image", f"the image is {name!r:.200}; write its path in the folder of images")
    file = folder.absolute() / name
    if not os.path.isfile(file):  # False also for names that no file can have
        raise BadEntryError(
            "missing image",
            f"there is no image {file!s:.500}; add it, correct the folder of images, or remove the entry",
        )
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BadEntryError(
            "image outside its folder",
            f"the image {name!r:.200} leads out of the folder of images, to {file.resolve()}; copy it into the folder and "
            "correct the entry, or remove it",
        )
    return {"path": str(file), "bytes": None}


def stored_size(image: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Width and height in pixels of an image as it is stored, and its EXIF orientation, 1 where it has none.

    Only its header is read: decoding all images would take hours.

    Raises:
        BadEntryError: if it is not an image.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            return opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # decoders of damaged files raise almost anything
        raise BadEntryError(
            "broken image",
            f"{image['path']} is not a readable image ({type(error).__name__}); replace it or remove the entry",
        ) from error


def upright_size(image: dict[str, Any]) -> tuple[int, int]:
    """Width and height in pixels of a stored image, turned upright, see [`stored_size`]."""
    (width, height), orientation = stored_size(image)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def upright_box(box: Sequence[float], size: tuple[int, int], orientation: int) -> list[float]:
    """A box in pixels of an image as it is stored, in pixels of the upright image.

    Detectors that boxes come from mostly see images as stored: neither OpenCV as img2dataset uses it nor `PIL.Image.open` turns them.

    Args:
        box: `[x0, y0, x1, y1]`.
        size: width and height of the stored image.
        orientation: its EXIF orientation. Others than 2 to 8 turn nothing.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    if orientation in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return [y0, x0, y1, x1] if orientation in (5, 6, 7, 8) else [x0, y0, x1, y1]


def check_size(image: dict[str, Any], width: Any, height: Any) -> tuple[int, int]:
    """The size of an image that was annotated at `width` x `height` pixels.

    Raises:
        BadEntryError: if it is not an image, or its upright size is another: boxes and masks would lie elsewhere.
    """
    size = upright_size(image)
    if size != (width, height):
        raise BadEntryError(
            "image of another size",
            f"{image['path']} has {size[0]} x {size[1]} pixels, but was annotated with {width} x {height}; use the original image",
        )
    return size


def pixel_box(box: Any, size: tuple[int, int]) -> list[float]:
    """A box `[x0, y0, x1, y1]` in pixels, cut off at the image's edges.

    Raises:
        BadEntryError: if it is not a box, or nothing of it lies in the image.
    """
    if not _are_four_numbers(box):
        raise BadEntryError("not a box", f"has the box {box!r:.200}; write four numbers, [x0, y0, x1, y1]")
    x0, x1 = (min(max(float(side), 0.0), size[0]) for side in (box[0], box[2]))
    y0, y1 = (min(max(float(side), 0.0), size[1]) for side in (box[1], box[3]))
    if x0 >= x1 or y0 >= y1:
        raise BadEntryError(
            "empty box", f"has the box {list(box)}, of which nothing lies in the image of {size[0]} x {size[1]} pixels"
        )
    return [x0, y0, x1, y1]


def xywh_box(box: Any, size: tuple[int, int]) -> list[float]:
    """A box `[x, y, width, height]` in pixels, COCO's, as `[x0, y0, x1, y1]`, cut off at the image's edges.

    Raises:
        BadEntryError: see [`pixel_box`].
    """
    if not _are_four_numbers(box):
        raise BadEntryError("not a box", f"has the box {box!r:.200}; write four numbers, [x, y, width, height]")
    x, y, width, height = box
    return pixel_box([x, y, x + width, y + height], size)


def _are_four_numbers(box: Any) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in box)  # no NaN is
    )


def phrase_entry(
    text: str,
    start: Any,
    end: Any,
    *,
    message: int,
    box: list[float] | None = None,
    mask: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of `grounding` for characters `start` to `end` of a message's text, without white space at its ends.

    Raises:
        BadEntryError: if the text has no such characters, or only white space there.
    """
    if not all(isinstance(n, int | float) and n == int(n) for n in (start, end)) or not 0 <= start < end <= len(text):
        raise BadEntryError(
            "wrong span", f"has the span {start} to {end}, but the text has {len(text)} characters; correct the span"
        )
    start, end = int(start), int(end)
    part = text[start:end]
    if not part.strip():
        raise BadEntryError("wrong span", f"has the span {start} to {end}, where the text is blank; correct the span")
    start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
    return {"message": message, "start": start, "end": end, "image": 0, "box": box, "mask": mask, "score": None}


def conversation(*texts: str) -> list[dict[str, Any]]:
    """The messages of a conversation about one image: the user's first text, behind the image, the assistant's, and so on."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return messages


def line_of(text: Any) -> str:
    """A text as one line of an answer, without white space at its ends.

    Raises:
        BadEntryError: if it is not a text, or blank.
    """
    line = " ".join(text.split()) if isinstance(text, str) else ""
    if not line or not is_unicode(line):
        raise BadEntryError("not a text", f"is {text!a:.200}, which has no text; write one, or remove it")
    return line


def answer_of_lines(
    request: str, lines: Iterable[tuple[str, Iterable[tuple[list[float] | None, dict[str, Any] | None]]]]
) -> dict[str, list[dict[str, Any]]]:
    """The `messages` and `grounding` of a row whose answer has lines: the text of each, and box and mask of each object that it names."""
    text, spans = "", []
    for line, objects in lines:
        start = len(text) + 1 if text else 0
        text = f"{text}\n{line}" if text else line
        spans += [(start, len(text), box, mask) for box, mask in objects]
    grounding = [phrase_entry(text, start, end, message=1, box=box, mask=mask) for start, end, box, mask in spans]
    return {"messages": conversation(request, text), "grounding": grounding}
