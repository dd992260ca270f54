# SPDX-License-Identifier: Apache-2.0
"""The row format: images in messages, and masks as COCO RLE."""

import contextlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_any_mask_is_read_as_pycocotools_reads_it(height, width, seed, run):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, -(-width // run))).repeat(run, axis=1)[:, :width] < rng.random()
    rle = mask_to_rle(mask)
    np.testing.assert_array_equal(mask_from_rle(rle), mask)
    np.testing.assert_array_equal(mask_from_rle(rle), coco.decode(rle))


def read_runs(counts):
    """The runs of COCO's code as its definition says, one number after another; None if it is cut off."""
    runs, value, shift = [], 0, 0
    for code in (ord(character) - 48 for character in counts):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else None


CODES = st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30)


@given(st.integers(-2, 12), st.integers(-2, 12), st.text(max_size=30) | CODES)
def test_any_text_is_a_mask_or_a_value_error(height, width, counts):
    try:
        mask = mask_from_rle({"size": [height, width], "counts": counts})
    except ValueError:
        codes = [ord(character) - 48 for character in counts]
        runs = read_runs(counts) if codes and all(0 <= code < 64 for code in codes) else None
        assert runs is None or min(*runs, height, width, 0) < 0 or sum(runs) != height * width
        return
    assert mask.shape == (height, width)
    assert mask.sum() == sum(read_runs(counts)[1::2])


@given(CODES.filter(bool), st.integers(1, 20_000))
def test_long_texts_are_quick(counts, times):
    start = time.process_time()
    for size in ([8, 8], [9000, 9000], [10**5, 10**5], [2**62, 2**62]):
        with contextlib.suppress(ValueError):
            mask_from_rle({"size": size, "counts": counts * times})
    assert time.process_time() - start < 3


def test_a_mask_is_bounded_before_it_takes_memory():
    whole = {"size": [100_000, 100_000], "counts": "PPigPZ9"}
    assert read_runs(whole["counts"]) == [10**10]
    with pytest.raises(ValueError, match="claims 100000 x 100000 pixels, but a mask has at most 89478485"):
        mask_from_rle(whole)
    with pytest.raises(ValueError, match=r"has 100000x100000 pixels .* but its image has 30x40"):
        mask_from_rle(whole, (30, 40))
