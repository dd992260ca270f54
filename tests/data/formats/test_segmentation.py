# SPDX-License-Identifier: Apache-2.0
"""COCO's segmentations against a rasterization of the test's own; damaged ones are bad entries and never end the interpreter."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agevlm.data.formats.segmentation import join_rle, rle_area, rle_box, segmentation_to_rle
from agevlm.data.formats.source import BadEntryError
from agevlm.processing.rows import mask_from_rle, mask_to_rle


def inside(polygon, height, width):
    """Which pixels' centers lie in a polygon (even-odd), and their distances to its outline, both `(height, width)`."""
    corners = np.reshape(polygon, (-1, 2))
    y, x = np.mgrid[:height, :width] + 0.5
    odd, distance = np.zeros((height, width), dtype=bool), np.full((height, width), np.inf)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:
            odd ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = along.clip(0, 1)
        distance = np.minimum(distance, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return odd, distance


def runs(mask):
    """Lengths of the runs down the columns, counted pixel by pixel."""
    lengths, color = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != color:
            lengths.append(0)
            color = pixel
        lengths[-1] += 1
    return lengths


@pytest.mark.parametrize("seed", range(20))
def test_polygons_cover_the_pixels_whose_centers_they_contain(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 90, 2))
    polygons = []
    for _ in range(int(rng.integers(1, 4))):  # stars, partly outside of the image
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(5, 12))))
        radii = rng.uniform(8, 40, len(angles))
        center = rng.uniform(0, (width, height))
        polygons.append((center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)).ravel().tolist())
    mask = mask_from_rle(segmentation_to_rle(polygons, height, width), (height, width))
    drawn = [inside(polygon, height, width) for polygon in polygons]
    clear = (
        np.min([distance for _, distance in drawn], axis=0) > 0.75
    )  # COCO's outlines are rounded to fifths of a pixel
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(mask[clear], np.any([odd for odd, _ in drawn], axis=0)[clear])


def test_a_rectangle_of_whole_pixels_is_exact():
    rle = segmentation_to_rle([[3, 4, 9, 4, 9, 12, 3, 12], [1, 1, 2, 2]], 20, 30)  # two points have no pixels
    expected = np.zeros((20, 30), dtype=bool)
    expected[4:12, 3:9] = True
    np.testing.assert_array_equal(mask_from_rle(rle), expected)
    assert rle_area(rle) == 6 * 8
    assert rle_box(rle) == [3, 4, 9, 12]
    assert rle_area(segmentation_to_rle([[5, 5, 5, 5]], 20, 30)) == 0
    assert rle_area(segmentation_to_rle([[100, 100, 120, 100, 120, 120]], 20, 30)) == 0  # outside of the image


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_runs_as_numbers_and_as_text_are_the_mask(height, width, seed, density):
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, height, width)) < density
    numbers = segmentation_to_rle({"size": [height, width], "counts": runs(first)}, height, width)
    text = segmentation_to_rle(mask_to_rle(second), height, width)
    np.testing.assert_array_equal(mask_from_rle(numbers), first)
    np.testing.assert_array_equal(mask_from_rle(text), second)
    joined = join_rle([numbers, text])
    np.testing.assert_array_equal(mask_from_rle(joined), first | second)
    assert rle_area(joined) == (first | second).sum()
    if (first | second).any():
        rows, columns = np.nonzero(first | second)
        assert rle_box(joined) == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_runs_of_length_zero_do_not_end_a_union():
    """pycocotools stops where two masks have such runs at the same place."""
    gap = segmentation_to_rle({"size": [4, 5], "counts": [2, 0, 0, 3, 15]}, 4, 5)
    expected = np.zeros(20, dtype=bool)
    expected[2:5] = True
    np.testing.assert_array_equal(mask_from_rle(join_rle([gap, gap])).T.ravel(), expected)
    text = {
        "size": [4, 5],
        "counts": "2003?",
    }  # the same runs; the fourth and the fifth as differences to the second and the third
    assert segmentation_to_rle(text, 4, 5) == gap


DAMAGED = {
    "nothing": None,
    "no polygon": [],
    "a number": 7,
    "one flat polygon": [1.0, 2.0, 5.0, 2.0, 5.0, 6.0],
    "half a point": [[1, 2, 5, 2, 5, 6, 7]],
    "text": [["a", "b", "c", "d", "e", "f"]],
    "nested": [[[1, 2], [3, 4, 5], [6, 7]]],
    "not a number": [[1, 2, 5, float("nan"), 5, 6]],
    "infinite": [[1, 2, 5, float("inf"), 5, 6]],
    "far away": [[1, 2, 1e9, 2, 5, 6]],
    "beyond integers": [[1, 2, 10**400, 2, 5, 6]],
    "runs too short": {"size": [12, 9], "counts": [50, 8]},
    "runs too long": {"size": [12, 9], "counts": [50, 2**40]},
    "negative runs": {"size": [12, 9], "counts": [200, -92]},
    "runs of halves": {"size": [12, 9], "counts": [50.5, 57.5]},
    "no runs": {"size": [12, 9]},
    "another size": {"size": [9, 12], "counts": [108]},
    "text of another size": {"size": [9, 12], "counts": "\\3"},
    "damaged text": {"size": [12, 9], "counts": "zzzz"},
    "empty text": {"size": [12, 9], "counts": ""},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_segmentations_are_bad_entries(name):
    with pytest.raises(
        BadEntryError, match=r"segmentation that cannot be read .*; correct it or remove the entry"
    ) as caught:
        segmentation_to_rle(DAMAGED[name], 12, 9)
    assert caught.value.kind == "damaged segmentation"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda value: (
        st.lists(value, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts"]), value, max_size=2)
    ),
    max_leaves=20,
)
POLYGONS = st.lists(st.lists(st.floats(-1e4, 1e4) | st.integers(-99, 99), max_size=10), max_size=4)
TEXTS = st.builds(
    lambda text: {"size": [12, 9], "counts": text}, st.text(st.characters(min_codepoint=48, max_codepoint=111))
)
NUMBERS = st.builds(lambda lengths: {"size": [12, 9], "counts": lengths}, st.lists(st.integers(-9, 2**33), max_size=9))


@given(JSON | POLYGONS | TEXTS | NUMBERS)
def test_whatever_json_holds_is_a_mask_or_a_bad_entry(segmentation):
    try:
        rle = segmentation_to_rle(segmentation, 12, 9)
    except BadEntryError:
        return
    mask = mask_from_rle(rle, (12, 9))  # whose own check is that the runs fit
    assert rle_area(join_rle([rle, rle])) == mask.sum()
    assert json.loads(json.dumps(rle)) == rle
