# SPDX-License-Identifier: Apache-2.0
"""The row format: images in messages, and masks as COCO RLE."""

import contextlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from agevlm.processing.rows import mask_from_rle, mask_to_rle, message_text, place_images

# --- images in messages ---


def test_messages_must_show_each_image_once():
    assistant = [{"role": "assistant", "content": "Hello."}]
    shown = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hello."}]}
    with pytest.raises(ValueError, match="show 0 images, but the row has 1"):
        place_images(assistant, 1)
    with pytest.raises(ValueError, match="show 1 images, but the row has 2"):
        place_images([shown], 2)
    assert place_images([shown], 1) == [shown]
    assert place_images(assistant, 0)[0]["content"] == [{"type": "text", "text": "Hello."}]


def test_placing_agrees_with_trl():
    from trl.data_utils import prepare_multimodal_messages

    messages = [
        {"role": r, "content": t} for r, t in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    ]
    structured = place_images(messages, 2)
    pictures = [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]
    ours = prepare_multimodal_messages(structured, images=pictures)
    theirs = prepare_multimodal_messages(messages, images=pictures)
    assert [m["role"] for m in ours] == [m["role"] for m in theirs]
    for our, their in zip(ours, theirs, strict=True):
        # TRL's text parts have no key for an image, ours may have `text: None`
        assert [(p["type"], p.get("image"), p.get("text")) for p in our["content"]] == [
            (p["type"], p.get("image"), p.get("text")) for p in their["content"]
        ]
    assert messages[1]["content"] == "u"
    assert [message_text(m) for m in structured] == [m["content"] for m in messages]


# --- masks ---


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_rle_round_trip(density):
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 7), (64, 3), (40, 60)):
        mask = rng.random((height, width)) < density
        rle = mask_to_rle(mask)
        assert rle["size"] == [height, width]
        assert isinstance(rle["counts"], str)
        decoded = mask_from_rle(rle)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(decoded, coco.decode(rle))


@pytest.mark.parametrize(
    "rle",
    [
        None,
        {},
        {"size": [5, 7]},
        {"size": [5], "counts": "S1"},
        {"size": "ab", "counts": "S1"},
        {"size": [5, 7], "counts": None},
        {"size": [5, 7], "counts": [35]},
        {"size": [5, 7], "counts": "é"},
        {"size": [5, 7], "counts": ""},
        {"size": [5, 7], "counts": "zz"},
        {"size": [5, 7], "counts": "a" * 50},
        {"size": [5, 7], "counts": "  !"},
        {"size": [5, 8], "counts": "S1"},
        {"size": [-5, -7], "counts": "S1"},
    ],
)
def test_rle_that_does_not_decode(rle):
    assert mask_from_rle({"size": [5, 7], "counts": "S1"}).shape == (5, 7)  # the intact mask of the cases
    with pytest.raises(ValueError, match="COCO RLE"):
        mask_from_rle(rle)


def test_damaged_rle_raises_or_decodes():
    rng = np.random.default_rng(0)
    rle = mask_to_rle(rng.random((12, 9)) < 0.3)
    for _ in range(2000):
        counts = list(rle["counts"])
        counts[rng.integers(len(counts))] = chr(rng.integers(32, 127))
        with contextlib.suppress(ValueError):
            assert mask_from_rle(rle | {"counts": "".join(counts)}).shape == (12, 9)
