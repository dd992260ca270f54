# SPDX-License-Identifier: Apache-2.0
"""Where image tokens lie, against each processor's arithmetic written out, and against what the tokens of models react to."""

import math

import numpy as np
import pytest
import torch
from tiny_processors import tiny_processor
from tiny_vlms import CONFIGURATIONS

from agevlm.attention import count_image_tokens, token_boxes, token_coverage

KINDS = list(CONFIGURATIONS)
SIDE, PATCH = 224, 14
# Height and width: landscape, portrait, square, extreme, smaller than a tile, and large.
SIZES = [(480, 640), (640, 427), (300, 300), (150, 1000), (1000, 300), (40, 60), (90, 45), (900, 1200)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def grid_of(kind: str, side: int = SIDE, patch: int = PATCH) -> tuple[int, int] | None:
    return (side // patch, side // patch) if kind == "mllama" else None


def view(left: float, top: float, right: float, bottom: float, rows: int, columns: int) -> np.ndarray:
    """The boxes of equal tokens, row by row."""
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    return np.array([[x[j], y[i], x[j + 1], y[i + 1]] for i in range(rows) for j in range(columns)])


def tiled(size: tuple[int, int], rows: int, columns: int, side: int, token: int) -> list[np.ndarray]:
    """The boxes of the tiles of an image that is stretched to rows x columns of them."""
    (height, width), n = size, side // token
    y, x = height / rows, width / columns
    return [view(j * x, i * y, (j + 1) * x, (i + 1) * y, n, n) for i in range(rows) for j in range(columns)]


def expected_boxes(
    kind: str, size: tuple[int, int], side: int = SIDE, patch: int = PATCH, tiles: int = 4
) -> np.ndarray:
    """By each processor's own arithmetic. Boxes of tokens that show only padding are zeros."""
    height, width = size
    whole = view(0, 0, width, height, side // patch, side // patch)
    merged = view(0, 0, width, height, side // patch // 2, side // patch // 2)
    if kind == "llava":  # the shortest edge becomes `side`, and the middle is kept
        short = min(size)
        resized = [side if edge == short else int(side * edge / short) for edge in size]
        top, left = ((edge - side) // 2 for edge in resized)
        y, x = height / resized[0], width / resized[1]
        n = side // patch
        return view(left * x, top * y, (left + side) * x, (top + side) * y, n, n)
    if kind in ("smolvlm", "idefics3"):
        long = round(tiles**0.5) * side
        if width >= height:
            columns = math.ceil(long / side)
            narrow = int(long / (width / height))
            rows = math.ceil((narrow + narrow % 2) / side)
            ratio = long / (narrow + narrow % 2)
            rows = math.ceil(int(columns * side / ratio) / side)
        else:
            rows = math.ceil(long / side)
            narrow = int(long * (width / height))
            ratio = (narrow + narrow % 2) / long
            columns = math.ceil(int(rows * side * ratio) / side)
        return np.concatenate([*tiled(size, rows, columns, side, 2 * patch), merged])
    if kind.startswith("qwen"):
        factor, least, most = 2 * patch, side**2, tiles * side**2
        rows, columns = round(height / factor), round(width / factor)
        if rows * columns * factor**2 > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (max(1, math.floor(edge / shrink / factor)) for edge in size)
        elif rows * columns * factor**2 < least:
            grow = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(edge * grow / factor) for edge in size)
        return view(0, 0, width, height, rows, columns)
    if kind == "gemma3":
        return merged
    if kind == "paligemma":
        return whole
    if (
        kind == "internvl"
    ):  # the grid with the nearest proportions; a larger one of the same if it is not twice the image
        grids = [(r, c) for r in range(1, tiles + 1) for c in range(1, tiles + 1) if r * c <= tiles]
        best = min(abs(width / height - c / r) for r, c in grids)
        near = sorted((r * c, r, c) for r, c in grids if abs(width / height - c / r) == best)
        rows, columns = near[0][1:]
        for count, r, c in near[1:]:
            if height * width > 0.5 * side**2 * count:
                rows, columns = r, c
        views = tiled(size, rows, columns, side, 2 * patch)
        return np.concatenate([*views, merged] if len(views) > 1 else views)
    # mllama: of the canvases of one or two tiles the one that the image fits best, filled from its top left
    canvases = [(1, 1), (1, 2), (2, 1)]
    scales = [min(r * side / height, c * side / width) for r, c in canvases]
    enlarging = [s for s in scales if s >= 1]
    scale = min(enlarging) if enlarging else max(scales)
    rows, columns = min((r * c, r, c) for (r, c), s in zip(canvases, scales, strict=True) if s == scale)[1:]
    target = min(max(height, side), rows * side), min(max(width, side), columns * side)
    y, x = target[0] / height, target[1] / width
    if x < y:
        resized = min(math.floor(height * x) or 1, target[0]), target[1]
    else:
        resized = target[0], min(math.floor(width * y) or 1, target[1])
    y, x, n = height / resized[0], width / resized[1], side // patch
    boxes = np.concatenate(
        [
            view(j * side * x, i * side * y, (j + 1) * side * x, (i + 1) * side * y, n, n)
            for i in range(rows)
            for j in range(columns)
        ]
    )
    padding = (boxes[:, 0] > width - 1e-6) | (boxes[:, 1] > height - 1e-6)
    return np.where(padding[:, None], 0, boxes)


def covered(mask: np.ndarray, boxes: np.ndarray, points: int = 40) -> np.ndarray:
    """The share of points, spread evenly in each box, at which the mask is true."""
    height, width = mask.shape
    at = (np.arange(points) + 0.5) / points
    left, top, right, bottom = (edge[:, None] for edge in boxes.T)
    x, y = np.floor(left + at * (right - left)).astype(int), np.floor(top + at * (bottom - top)).astype(int)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    found = mask[y.clip(0, height - 1)[:, :, None], x.clip(0, width - 1)[:, None]] & inside
    return found.mean((1, 2)) * (right > left)[:, 0]


def disk(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def shapes(size: tuple[int, int]) -> np.ndarray:
    """A disk, a rectangle, a slope and scattered dots."""
    height, width = size
    rng = np.random.default_rng(0)
    rectangle = np.zeros(size, bool)
    rectangle[height // 3 : height // 2, width // 5 : width // 2] = True
    slope = np.add.outer(np.arange(height) / height, np.arange(width) / width) < 0.8
    dots = np.any([disk(size, *rng.uniform(0, (width, height)), min(size) / 10) for _ in range(8)], axis=0)
    return np.stack([disk(size, width * 0.6, height * 0.4, min(size) / 4), rectangle, slope, dots])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_and_coverage_are_those_of_the_arithmetic_of_each_processor(kind, size):
    processor, grid = tiny_processor(kind, SIDE, PATCH), grid_of(kind)
    wanted = expected_boxes(kind, size)
    boxes = token_boxes(processor, size, grid=grid)
    assert boxes.dtype == torch.float32
    assert boxes.shape == wanted.shape
    assert count_image_tokens(processor, [size], grid=grid) == [len(wanted)]
    token = np.abs(wanted[:, 2:] - wanted[:, :2]).max(0)
    assert np.abs(boxes.numpy() - wanted).max() < 0.03 * token.max()
    assert (np.abs(boxes.numpy() - wanted) <= 0.1 * np.tile(token, 2)).all()

    masks = shapes(size)
    coverage = token_coverage(processor, masks, grid=grid)
    assert coverage.dtype == torch.float32
    assert coverage.shape == (len(masks), len(wanted))
    assert coverage.min() >= 0
    assert coverage.max() <= 1
    for mask, found in zip(masks, coverage.numpy(), strict=True):
        independent = covered(mask, wanted)
        assert independent.std() == 0 or np.corrcoef(independent, found)[0, 1] >= 0.999
        assert np.abs(independent - found).max() < 0.05
