# SPDX-License-Identifier: Apache-2.0
"""The quality of a mask teacher: it gets boxes around exact masks, and its masks are compared with the exact ones.

    python -m research.mask_quality scenes --teacher grabcut --out masked

reads a data set with exact masks, such as `agevlm scenes` writes, writes the data set with the teacher's masks, and prints
their IoU with the exact masks. Stopped, the same command resumes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agevlm.data.masks import add_masks, replace_grounding
from agevlm.data.teachers import TEACHERS, import_cv2, load_teacher
from agevlm.processing.rows import import_datasets, mask_from_rle, row_features
from agevlm.resume import digest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Parts of a mask below this share of its largest part get no box: they are remains behind other objects.
_LEAST_PART = 0.05


def boxes_from_masks(
    dataset: Dataset | DatasetDict, jitter: float = 0.1, seed: int = 0, *, progress: bool = True
) -> Dataset | DatasetDict:
    """Grounding data with boxes in place of exact masks, as a detector would draw them: the input of a mask teacher.

    A phrase may name several objects, but a box contains one. So the entry of a mask becomes one entry for each connected part
    of the mask, with the part's bounding box. Parts below a twentieth of the largest one are dropped. Guidance joins the masks
    that a teacher makes from these boxes, because they belong to the same phrase and image. Objects of a class that touch are
    one part; an object that another one divides is two parts. Entries without a mask, or with an empty one, do not change.

    Each side of a box moves in or out by a uniformly random distance of up to `jitter` times the box's extent across the side,
    but not out of the image. The distance depends on the seed and the mask only, so an object has the same box in all rows.

    Args:
        dataset: with the column `grounding`. Other columns, images included, do not change.
        jitter: from 0, exact boxes, to below 0.5.
        seed: a non-negative number.
        progress: show a progress bar.

    Raises:
        ValueError: if a number is out of range, there is no `grounding`, no phrase has a mask, or a mask is damaged.
        ImportError: if `datasets` or `opencv-python-headless` is not installed.
    """
    from rich.progress import track

    datasets = import_datasets()
    cv2 = import_cv2()
    if not 0 <= jitter < 0.5:
        raise ValueError(f"jitter is {jitter}, but must be from 0 to below 0.5, where a box could vanish")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be at least 0")

    @functools.lru_cache(maxsize=1024)  # all rows of a scene have the same masks
    def boxes(counts: str, height: int, width: int) -> list[list[float]]:
        mask = mask_from_rle({"size": [height, width], "counts": counts})
        parts = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:]
        if not len(parts):
            return []
        parts = parts[parts[:, cv2.CC_STAT_AREA] >= _LEAST_PART * parts[:, cv2.CC_STAT_AREA].max()]
        corners, sides = parts[:, :2], parts[:, 2:4]  # each x, y
        exact = np.concatenate([corners, corners + sides], axis=1)
        mask_hash = hashlib.sha256(f"{height} {width} {counts}".encode()).digest()
        offsets = np.random.default_rng([seed, int.from_bytes(mask_hash)]).uniform(-jitter, jitter, exact.shape)
        return np.clip(exact + offsets * np.tile(sides, 2), 0, [width, height] * 2).tolist()

    def replaced(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            rle = entry.get("mask")
            if rle is None:
                yield entry
                continue
            mask_boxes = boxes(rle["counts"], *rle["size"])
            if not mask_boxes:  # an empty mask: the image shows nothing that the phrase names
                yield entry
            for box in mask_boxes:
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
        # `add_masks` resumes work on the same fingerprint; `datasets` would give a random one.
        fingerprint = digest([part._fingerprint, jitter, seed])
        boxed[split] = replace_grounding(part, [column] if len(part) else [], fingerprint)
    if not boxes.cache_info().misses:
        raise ValueError("no phrase of the data set has a mask to draw boxes around")
    return boxed if isinstance(dataset, datasets.DatasetDict) else boxed[""]


@dataclass(frozen=True)
class MaskQuality:
    """The result of `mask_quality`. IoUs are of phrases with a teacher's mask; NaN if there are none."""

    phrases: int  # with an exact mask
    without_mask: int  # phrases without a teacher's mask, which guidance ignores
    mean_iou: float
    median_iou: float
    below_half: float  # share of the phrases with a teacher's mask whose IoU is below 0.5


def mask_quality(masked: Dataset, exact: Dataset, *, progress: bool = True) -> MaskQuality:
    """Compare a teacher's masks with exact ones: the IoU of each phrase, whose entries are joined as for guidance.

    Args:
        masked: the result of `add_masks` for `boxes_from_masks(exact)`.
        exact: the same rows with exact masks. Phrases without a mask, or with an empty one, do not count.
        progress: show a progress bar.

    Raises:
        ValueError: if the rows differ, no phrase has an exact mask, or a mask is damaged.
    """
    from rich.progress import track

    if len(masked) != len(exact):
        raise ValueError(
            f"the data set with masks has {len(masked)} rows, the exact one {len(exact)}; give the same rows"
        )
    columns = (part.with_format(None)["grounding"] for part in (masked, exact))
    ious: list[float] = []
    without = 0
    rows = track(zip(*columns, strict=True), "comparing", len(exact), disable=not progress, transient=True)
    for index, (masked_entries, exact_entries) in enumerate(rows):
        masks = _join_masks(masked_entries)
        for phrase, exact_mask in _join_masks(exact_entries).items():
            if exact_mask is None or not exact_mask.any():
                continue
            mask = masks.get(phrase)
            if phrase not in masks or (mask is not None and mask.shape != exact_mask.shape):
                raise ValueError(f"row {index}: phrases or images of the two data sets differ; give the same rows")
            if mask is None:
                without += 1
            else:
                ious.append(float((mask & exact_mask).sum() / (mask | exact_mask).sum()))
    if not ious and not without:
        raise ValueError("no phrase has an exact mask to compare with")
    values = np.array(ious or [math.nan])
    below = float((values < 0.5).mean()) if ious else math.nan
    return MaskQuality(len(ious) + without, without, float(values.mean()), float(np.median(values)), below)


def _join_masks(entries: list[dict[str, Any]] | None) -> dict[tuple[int, ...], np.ndarray | None]:
    """The union of the entries' masks by phrase and image, None if there is none."""
    joined: dict[tuple[int, ...], np.ndarray | None] = {}
    for entry in entries or ():
        phrase = tuple(entry[key] for key in ("message", "start", "end", "image"))
        joined.setdefault(phrase, None)
        if entry["mask"] is not None:
            mask, before = mask_from_rle(entry["mask"]), joined[phrase]
            joined[phrase] = mask if before is None else before | mask
    return joined


def main() -> None:
    """The command line; see the module's docstring."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Measure the quality of a mask teacher on data with exact masks.")
    parser.add_argument("dataset", type=Path, help="data set with exact masks: a folder that `save_to_disk` wrote")
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set with the teacher's masks")
    parser.add_argument("--checkpoint", help="SAM's .pth file; for sam3 a folder or Hub id; none for grabcut")
    parser.add_argument("--detector", help="folder or Hub id of grounded-sam's detector")
    parser.add_argument("--box-jitter", type=float, default=0.1, help="relative to the box, from 0 to below 0.5")
    parser.add_argument("--min-score", type=float, default=0.0, help="least score of a mask")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    try:
        datasets = import_datasets()
        exact = datasets.load_from_disk(args.dataset)
        boxed = boxes_from_masks(exact, args.box_jitter, args.seed)
        teacher = load_teacher(args.teacher, args.checkpoint, detector=args.detector, device=args.device)
        masked, _ = add_masks(boxed, teacher, args.out, min_score=args.min_score)
        table = Table("split", "phrases", "without a mask", "mean IoU", "median IoU", "IoU below 0.5")
        if not isinstance(exact, datasets.DatasetDict):
            exact, masked = {"": exact}, {"": masked}
        for split, part in exact.items():
            quality = mask_quality(masked[split], part)
            counts = split, f"{quality.phrases}", f"{quality.without_mask}"
            table.add_row(*counts, f"{quality.mean_iou:.3f}", f"{quality.median_iou:.3f}", f"{quality.below_half:.1%}")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    Console().print(table)


if __name__ == "__main__":
    main()
