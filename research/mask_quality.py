# SPDX-License-Identifier: Apache-2.0
"""How good a mask teacher is: boxes from exact masks, and the teacher's masks held against them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agevlm.processing.rows import import_datasets, mask_from_rle, row_features

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
from agevlm.data.masks import _replace_grounding
from agevlm.data.teachers import _import_cv2

# Parts of a mask that are smaller than this part of its largest get no box: crumbs that the things in front of it left over.
_LEAST_PART = 0.05


def boxes_from_masks(
    dataset: Dataset | DatasetDict, jitter: float = 0.1, seed: int = 0, *, progress: bool = True
) -> Dataset | DatasetDict:
    """Grounding data with boxes in place of its exact masks: what a mask teacher would get, had a detector drawn the boxes.

    A phrase may name several things, and a box has one: the entry of a mask becomes one entry for each of its connected parts,
    with the part's bounding box; parts below a twentieth of the largest have none. Guidance joins the masks that a teacher
    makes of them, since entries of the same phrase and image are one. Things of a class that touch are one part, and one that
    another thing cuts in two is two parts. Entries without a mask, or with an empty one, stay as they are.

    Each side of a box is moved, in or out, by up to `jitter` times the box's extent across it (drawn evenly), though not out of
    the image. What is drawn depends on the seed and the mask alone: the same thing has the same box in all of its rows.

    Args:
        dataset: with the column `grounding`; the others, images included, are kept as they are.
        jitter: from 0, exact boxes, to below 0.5.
        seed: a non-negative number.
        progress: show a progress bar.

    Raises:
        ValueError: if a number is out of range, there is no `grounding`, no phrase has a mask, or a mask is damaged.
        ImportError: if `datasets` or `opencv-python-headless` is not installed.
    """
    from rich.progress import track

    datasets = import_datasets()
    cv2 = _import_cv2()
    if not 0 <= jitter < 0.5:
        raise ValueError(f"jitter is {jitter}, but must be from 0 to below 0.5, where a box could vanish")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be at least 0")

    @functools.lru_cache(maxsize=1024)  # a scene's masks come again in each of its rows
    def boxes(counts: str, height: int, width: int) -> list[list[float]]:
        mask = mask_from_rle({"size": [height, width], "counts": counts})
        parts = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:]
        if not len(parts):
            return []
        parts = parts[parts[:, cv2.CC_STAT_AREA] >= _LEAST_PART * parts[:, cv2.CC_STAT_AREA].max()]
        corners, sides = parts[:, :2], parts[:, 2:4]  # each x, y
        exact = np.concatenate([corners, corners + sides], axis=1)
        digest = hashlib.sha256(f"{height} {width} {counts}".encode()).digest()
        offsets = np.random.default_rng([seed, int.from_bytes(digest)]).uniform(-jitter, jitter, exact.shape)
        return np.clip(exact + offsets * np.tile(sides, 2), 0, [width, height] * 2).tolist()

    def replaced(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            rle = entry.get("mask")
            if rle is None:
                yield entry
                continue
            drawn = boxes(rle["counts"], *rle["size"])
            if not drawn:  # it says that the phrase names nothing here
                yield entry
            for box in drawn:
                yield {**entry, "box": box, "mask": None, "score": None}

    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    own = row_features()["grounding"].feature
    boxed = datasets.DatasetDict()
    for split, part in splits.items():
        if "grounding" not in part.column_names:
            raise ValueError(f"the data set{split and f' ({split})'} has no column grounding, and so no masks")
        part = part.with_format(None)
        rows = track(part["grounding"], f"boxes {split}", len(part), disable=not progress, transient=True)
        grounding = [list(replaced(entries or [])) for entries in rows]
        feature = {**part.features["grounding"].feature, **{key: own[key] for key in ("box", "mask", "score")}}
        column = datasets.Dataset.from_dict(
            {"grounding": grounding}, datasets.Features(grounding=datasets.List(feature))
        )
        # So that `add_masks` knows its unfinished work: the fingerprint that `datasets` would make up is another each time.
        digest = hashlib.sha256(json.dumps([part._fingerprint, jitter, seed]).encode()).hexdigest()[:16]
        boxed[split] = _replace_grounding(part, [column] if len(part) else [], digest)
    if not boxes.cache_info().misses:
        raise ValueError("no phrase of the data set has a mask to draw boxes around")
    return boxed if isinstance(dataset, datasets.DatasetDict) else boxed[""]


@dataclass(frozen=True)
class MaskQuality:
    """How good a teacher's masks are, by `mask_quality`. IoUs are of phrases that got a mask; NaN if none did."""

    phrases: int  # with an exact mask
    without_mask: int  # phrases that got no mask: guidance passes over them
    mean_iou: float
    median_iou: float
    below_half: float  # the part of the phrases with a mask whose IoU is below 0.5


def mask_quality(masked: Dataset, exact: Dataset, *, progress: bool = True) -> MaskQuality:
    """Hold a teacher's masks against exact ones: the IoU of each phrase, its entries joined as for guidance.

    Args:
        masked: what `add_masks` made of `boxes_from_masks(exact)`.
        exact: the same rows with exact masks; phrases that have none, or an empty one, do not count.
        progress: show a progress bar.

    Raises:
        ValueError: if the two are not of the same rows, no phrase has an exact mask, or a mask is damaged.
    """
    from rich.progress import track

    if len(masked) != len(exact):
        raise ValueError(
            f"the data set with masks has {len(masked)} rows, the exact one {len(exact)}; name the same rows"
        )
    columns = (part.with_format(None)["grounding"] for part in (masked, exact))
    ious: list[float] = []
    without = 0
    rows = track(zip(*columns, strict=True), "comparing", len(exact), disable=not progress, transient=True)
    for index, (ours, theirs) in enumerate(rows):
        found = _joined(ours)
        for phrase, wanted in _joined(theirs).items():
            if wanted is None or not wanted.any():
                continue
            mask = found.get(phrase)
            if phrase not in found or (mask is not None and mask.shape != wanted.shape):
                raise ValueError(
                    f"row {index}: the data set with masks has another phrase or image than the exact one"
                )
            if mask is None:
                without += 1
            else:
                ious.append(float((mask & wanted).sum() / (mask | wanted).sum()))
    if not ious and not without:
        raise ValueError("no phrase has an exact mask to compare with")
    values = np.array(ious or [math.nan])
    below = float((values < 0.5).mean()) if ious else math.nan
    return MaskQuality(len(ious) + without, without, float(values.mean()), float(np.median(values)), below)


def _joined(entries: list[dict[str, Any]] | None) -> dict[tuple[int, ...], np.ndarray | None]:
    """By phrase and image the union of the entries' masks, None where there is none."""
    joined: dict[tuple[int, ...], np.ndarray | None] = {}
    for entry in entries or ():
        phrase = tuple(entry[key] for key in ("message", "start", "end", "image"))
        joined.setdefault(phrase, None)
        if entry["mask"] is not None:
            mask, before = mask_from_rle(entry["mask"]), joined[phrase]
            joined[phrase] = mask if before is None else before | mask
    return joined
