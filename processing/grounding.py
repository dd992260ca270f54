# SPDX-License-Identifier: Apache-2.0
"""Grounding data: the row format, masks, and a mask on the grid of visual tokens.

One row is a conversation about images in TRL's vision format, with the phrases that name something in an image:

    images     list of images
    messages   list of {"role": str, "content": list of {"type": "text" | "image", "text": str | None}}
    grounding  list of {"message": int, "start": int, "end": int, "image": int,
                        "box": [x0, y0, x1, y1] | None, "mask": COCO RLE | None, "score": float | None}

`message` is the index of a message, `start` and `end` the characters of the phrase in that message's text
(`message_text`), `image` the index of the image it names something in. `box` is in pixels of that image, `mask` is the
COCO RLE of what the phrase names, of the image's size, and `score` the mask teacher's own estimate of its quality.
Guidance uses phrases that have a mask; boxes are what mask teachers start from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Features


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
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] or "" for part in content if part["type"] == "text")


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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
