# SPDX-License-Identifier: Apache-2.0
"""Segmentations as COCO publishes them: polygons, and runs as numbers or as text; all as the masks of the row format.

The layout is that of "COCO object detection format" (https://cocodataset.org/#format-data). pycocotools reads and writes out of bounds
where a segmentation is damaged, so everything is checked before it gets there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from ...processing.rows import mask_from_rle, mask_to_rle
from .source import BadEntryError


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO `segmentation` as COCO RLE of an image, `{"size": [height, width], "counts": str}`, for `mask_from_rle`.

    Args:
        segmentation: a list of polygons `[x0, y0, x1, y1, …]` in pixels (the mask is their union; what lies outside the image is cut off,
            and a polygon of fewer than three points has no pixels); or `{"size": [height, width], "counts": …}` with the lengths of runs
            down the columns as a list, or as COCO's text. The mask may have no pixels: see [`rle_area`].
        height, width: of the image.

    Raises:
        BadEntryError: if it is none of these, or runs that do not fit the image. Its kind is `damaged segmentation`.
    """
    try:
        if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
            # Read and written again: the union of masks whose text has runs of length zero is wrong in pycocotools.
            return mask_to_rle(mask_from_rle(segmentation, (height, width)))
        if isinstance(segmentation, dict):
            return mask_to_rle(_mask_from_runs(segmentation, height, width))
        return _polygons_to_rle(segmentation, height, width)
    except ValueError as error:
        raise BadEntryError(
            "damaged segmentation", f"has a segmentation that cannot be read ({error}); correct it or remove the entry"
        ) from error


def join_rle(masks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The union of one or more masks of an image, each as [`segmentation_to_rle`] gives it."""
    from pycocotools import mask as coco

    joined = coco.merge([{**mask, "counts": mask["counts"].encode("ascii")} for mask in masks])
    return {"size": [int(side) for side in joined["size"]], "counts": joined["counts"].decode("ascii")}


def rle_area(mask: dict[str, Any]) -> int:
    """The number of pixels of a mask, as [`segmentation_to_rle`] gives it."""
    from pycocotools import mask as coco

    return int(coco.area({**mask, "counts": mask["counts"].encode("ascii")}))


def rle_box(mask: dict[str, Any]) -> list[float]:
    """The smallest box `[x0, y0, x1, y1]` in pixels around a mask that has pixels, as [`segmentation_to_rle`] gives it."""
    from pycocotools import mask as coco

    x, y, width, height = coco.toBbox({**mask, "counts": mask["counts"].encode("ascii")}).tolist()
    return [x, y, x + width, y + height]


def _mask_from_runs(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The mask of uncompressed RLE, bool `(height, width)`. Its runs begin with pixels that are not in it.

    Raises:
        ValueError: if the runs do not fill the image.
    """
    runs, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise ValueError(f"its size is {size!r:.100}, but the image has {[height, width]} (height, width)")
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError('expected {"size": [height, width], "counts": text or list of lengths}')
    if sum(runs) != height * width:
        raise ValueError(f"its runs make up {sum(runs)} pixels, but the image has {height * width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _polygons_to_rle(polygons: Any, height: int, width: int) -> dict[str, Any]:
    """The union of polygons.

    Raises:
        ValueError: if they are not polygons, or the image has more pixels than any may have.
    """
    from pycocotools import mask as coco

    if height * width > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"its image would have {height} x {width} pixels")
    if not isinstance(polygons, list) or not polygons:
        raise ValueError(f"expected a list of polygons, got {polygons!r:.100}")
    drawn = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"expected a polygon [x0, y0, x1, y1, …], got {polygon!r:.100}") from None
        # pycocotools takes memory for each step along the outline. No outline is longer than all edges of all pixels, but for a part
        # that runs outside of a small image.
        length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
        if not length <= 4 * (height + 100) * (width + 100) or not np.isfinite(points).all():
            raise ValueError("a polygon has numbers that are far outside of its image, or none")
        if len(points) >= 3:
            drawn.append(points.ravel().tolist())
    if not drawn:
        return mask_to_rle(np.zeros((height, width), dtype=bool))
    joined = coco.merge(coco.frPyObjects(drawn, height, width))
    return {"size": [height, width], "counts": joined["counts"].decode("ascii")}
