# SPDX-License-Identifier: Apache-2.0
"""The row format of all training data, grounded or not: columns, spans of phrases, and masks as COCO RLE.

A row is a conversation about images in TRL's vision format. `grounding` lists the phrases that name something in an image:

    images     list of images
    messages   list of {"role": str, "content": list of {"type": "text" | "image", "text": str | None}}
    grounding  list of {"message": int, "start": int, "end": int, "image": int,
                        "box": [x0, y0, x1, y1] | None, "mask": COCO RLE | None, "score": float | None}

- `message`: the index of the message that contains the phrase.
- `start`, `end`: the phrase's characters in that message's text (see `message_text`); `end` is one past the last character.
- `image`: the index of the image that shows what the phrase names.
- `box`: in pixels of that image. Mask teachers start from boxes.
- `mask`: the pixels of what the phrase names, COCO RLE of the image's size. Guidance uses phrases that have a mask.
- `score`: the mask teacher's own estimate of the mask's quality, from 0 to 1.

Training joins the entries of the same phrase and image: the union of their masks. An empty mask without a score means that
the image shows nothing that the phrase names; guidance uses such phrases if the model has an attention sink. An empty mask
with a score means that the teacher was not sure; guidance drops such phrases.

Preference data has `prompt`, `chosen` and `rejected` (lists of messages, TRL's format) in place of `messages`. The prompt
shows all images, and `message` counts through the prompt and the chosen answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from datasets import Features


ROLES = ("system", "user", "assistant", "tool")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")

ORIGIN_COLUMN = "row_origin"
"""Column that [`~agevlm.data.readers.read_dataset`] adds: the `file` and `row` that a row comes from, the `problem` that keeps it
from being a row of the format, or None, and whether training may `skip` it where it is bad."""


def import_datasets() -> ModuleType:
    """The library `datasets`, imported when it is needed.

    Raises:
        ImportError: if it is not installed; names the command that installs it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{error}; for grounding data: pip install datasets") from error
    return datasets


@contextlib.contextmanager
def quiet_datasets(datasets) -> Iterator[None]:
    """Hides the progress bars of `datasets`, which would interrupt the caller's own."""
    if datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def row_features() -> Features:
    """The columns of a data set of rows, for `datasets`."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "images": List(Image()),
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "grounding": List(
                {
                    "message": Value("int32"),
                    "start": Value("int32"),
                    "end": Value("int32"),
                    "image": Value("int32"),
                    "box": List(Value("float32")),
                    "mask": {"size": List(Value("int32")), "counts": Value("string")},
                    "score": Value("float32"),
                }
            ),
        }
    )


def is_unicode(text: str) -> bool:
    """Whether a text has whole characters only. JSON and shells can hand over halves of surrogate pairs, which no tokenizer reads and
    no file of UTF-8 has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message: its string content, or its text parts joined without a separator. Image parts have no text."""
    content = message.get("content") or ""  # a message that only calls tools may have no content
    if isinstance(content, str):
        return content
    return "".join(part["text"] or "" for part in content if part["type"] == "text")


def place_images(messages: Sequence[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, with an image part for each image.

    A string content becomes one text part. If no message has an image part, all images go to the beginning of the first
    user message, as in TRL. Spans of phrases stay valid. The given messages are not changed.

    Raises:
        ValueError: if the messages have another number of image parts, or have none and there is no user message, or one
            of them is no message.
    """
    placed = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {i} is not {{"role": str, "content": …}}, but {message!r:.80}')
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts if isinstance(parts, Sequence) else [parts]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f"the content of message {i} is neither a text nor a list of parts, "
                    f'{{"type": "text", "text": str}} or {{"type": "image"}}, but has {part!r:.80}'
                )
        placed.append({**message, "content": list(parts)})
    shown = sum(part["type"] == "image" for message in placed for part in message["content"])
    first = next((message for message in placed if message["role"] == "user"), None)
    if not shown and first is not None:
        first["content"] = [{"type": "image", "text": None}] * num_images + first["content"]
    elif shown != num_images:
        raise ValueError(
            f"the messages show {shown} images, but the row has {num_images}; write one "
            '{"type": "image"} part for each image, in their order'
        )
    return placed


def row_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row: `messages`, or `prompt` followed by `completion` or `chosen`.

    Raises:
        ValueError: if the row has none of them, or they are not lists of messages, or the reader could not read the row.
    """
    if problem := (row.get(ORIGIN_COLUMN) or {}).get("problem"):
        raise ValueError(problem)
    # Rows of a mixed data set have None in the columns of other kinds of rows.
    answer = next((row[name] for name in ("completion", "chosen") if row.get(name) is not None), None)
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and answer is not None:
        messages = row["prompt"] + answer if isinstance(row["prompt"], list) and isinstance(answer, list) else None
    else:
        given = sorted(name for name, value in row.items() if value is not None)
        raise ValueError(f"A row needs `messages`, or `prompt` and `completion`; this one has {given}.")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            "A row's conversation must be a list of messages, each with a `role` and a `content`; the row format is "
            "described in `agevlm.processing.rows`."
        )
    return list(messages)


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, bool `(height, width)`, as COCO RLE: `{"size": [height, width], "counts": str}`."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_from_rle(rle: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode COCO RLE, `{"size": [height, width], "counts": str}`, to a mask, bool `(height, width)`.

    Args:
        rle: the mask.
        image_size: height and width that it must have, if known.

    Raises:
        ValueError: if `rle` is not of this form, its runs do not add up to `height * width`, or it has another size than the
            image or more pixels than any image may have (`PIL.Image.MAX_IMAGE_PIXELS`). The sizes are compared before any
            memory is taken.
    """
    # Not with pycocotools, which reads and writes out of bounds if the runs do not fit the size.
    try:
        height, width = (int(side) for side in rle["size"])
        codes = np.frombuffer(rle["counts"].encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError('not a COCO RLE mask: expected {"size": [height, width], "counts": str}') from error
    if image_size is not None and (height, width) != image_size:
        raise ValueError(
            f"the COCO RLE mask has {height}x{width} pixels (height x width), but its image has "
            f"{image_size[0]}x{image_size[1]}"
        )
    limit = PIL.Image.MAX_IMAGE_PIXELS or 2**40
    if min(height, width) < 0 or height * width > limit:
        raise ValueError(f"the COCO RLE mask claims {height} x {width} pixels, but a mask has at most {limit}")
    runs = _decode_runs(codes, height * width)
    if runs is None:
        raise ValueError(f"damaged COCO RLE mask: its runs do not make up {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decode_runs(codes: np.ndarray, pixels: int) -> np.ndarray | None:
    """The runs that `codes` (int64, of 6 bits each) write, or None if they do not make up `pixels`.

    A character has five bits of a number, from the lowest on, and a bit that says whether more follow.
    """
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        return None
    ends = np.flatnonzero(codes & 0x20 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if digits.max() > 11:  # beyond 60 bits; no image has such a run
        return None
    values = np.add.reduceat((codes & 0x1F) << (5 * digits), starts)
    values -= (codes[ends] & 0x10 != 0) * (
        1 << (5 * (digits[ends] + 1))
    )  # the last character's highest bit is the sign
    if np.abs(values).max() > pixels:  # then the sums below do not overflow
        return None
    # From the fourth on, a run is written as its difference to the last run of the same color.
    runs = values.copy()
    runs[1::2], runs[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return runs if runs.min() >= 0 and runs.sum() == pixels else None
