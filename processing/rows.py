# SPDX-License-Identifier: Apache-2.0
"""Grounding data: the row format, its check, and masks.

One row is a conversation about images in TRL's vision format, with the phrases that name something in an image:

    images     list of images
    messages   list of {"role": str, "content": list of {"type": "text" | "image", "text": str | None}}
    grounding  list of {"message": int, "start": int, "end": int, "image": int,
                        "box": [x0, y0, x1, y1] | None, "mask": COCO RLE | None, "score": float | None}

`message` is the index of a message, `start` and `end` the characters of the phrase in that message's text
(`message_text`), `image` the index of the image it names something in. `box` is in pixels of that image, `mask` is the
COCO RLE of what the phrase names, of the image's size, and `score` the mask teacher's own estimate of its quality.
Guidance uses phrases that have a mask; boxes are what mask teachers start from. Entries for the same phrase and image
are joined (union of their masks) at training. An empty mask without a score says that the phrase names nothing in the
image, which guidance uses where the model has an attention sink; an empty mask with a score is a teacher's doubt, and dropped.

Preference data has `prompt`, `chosen` and `rejected` (lists of messages, TRL's format) in place of `messages`; all images
are shown in the prompt, and `message` counts through prompt and chosen answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Features


ROLES = ("system", "user", "assistant", "tool")


PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")


def import_datasets() -> ModuleType:
    """The library `datasets`, which is imported only when needed.

    Raises:
        ImportError: if it is not installed, saying how to install it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{error}; for grounding data: pip install datasets") from error
    return datasets


@contextlib.contextmanager
def quiet_datasets(datasets) -> Iterator[None]:
    """Without the progress bars of `datasets`, which would cut through ours."""
    if datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def row_features() -> Features:
    """The columns of a grounding data set, for `datasets`."""
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


def message_text(message: dict[str, Any]) -> str:
    """The text of a message: its string content, or its text parts joined as they are (image parts count nothing)."""
    content = message.get("content") or ""  # a message that only calls tools may have none
    if isinstance(content, str):
        return content
    return "".join(part["text"] or "" for part in content if part["type"] == "text")


def place_images(messages: Sequence[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages whose contents are all lists of parts, with an image part for each image.

    String contents become one text part. Where no message has an image part, the images go in front of the first user
    message, as TRL puts them. Spans of phrases hold before and after.

    Raises:
        ValueError: if the messages show another number of images, or none and there is no user message.
    """
    placed = []
    for message in messages:
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        placed.append({**message, "content": parts})
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


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, bool `(height, width)`, as COCO RLE: `{"size": [height, width], "counts": str}`."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_from_rle(rle: dict[str, Any]) -> np.ndarray:
    """Decode COCO RLE, `{"size": [height, width], "counts": str}`, to a mask, bool `(height, width)`.

    Raises:
        ValueError: if `rle` is not of this form, or its runs do not add up to `height * width`.
    """
    # pycocotools is not used here: it reads and writes out of bounds where the runs do not fit the size.
    try:
        height, width = (int(side) for side in rle["size"])
        codes = [byte - 48 for byte in rle["counts"].encode("ascii")]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError('not a COCO RLE mask: expected {"size": [height, width], "counts": str}') from error
    runs: list[int] = []
    value, shift = 0, 0
    for code in codes:
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:  # the run's last character; its highest bit is the sign
            if code & 0x10:
                value -= 1 << shift
            # from the fourth on, a run is written as its difference to the last run of the same colour
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    legal = all(0 <= code < 64 for code in codes) and not shift and min(height, width, *runs, 0) == 0
    if not legal or sum(runs) != height * width:
        raise ValueError(f"damaged COCO RLE mask: its runs do not make up {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
