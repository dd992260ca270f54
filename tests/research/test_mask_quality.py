# SPDX-License-Identifier: Apache-2.0
"""The quality of a teacher's masks: boxes from exact masks, the measure, and the command."""

import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import DatasetDict, load_from_disk
from grounded_rows import exact_rows

from agevlm.data.masks import add_masks
from agevlm.data.teachers import GrabCutTeacher
from agevlm.processing.rows import mask_from_rle
from research.mask_quality import boxes_from_masks, mask_quality

pytestmark = pytest.mark.slow


def test_boxes_without_jitter_are_bounding_boxes():
    rows, mask = exact_rows()
    boxed = boxes_from_masks(rows, jitter=0.0, progress=False)
    (entry,) = boxed[0]["grounding"]
    ys, xs = np.nonzero(mask)
    assert entry["mask"] is None
    assert entry["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_jitter_is_bounded_and_repeatable():
    rows, _ = exact_rows()
    exact = np.array(boxes_from_masks(rows, jitter=0.0, progress=False)[0]["grounding"][0]["box"])
    boxes = [
        boxes_from_masks(rows, jitter=0.2, seed=seed, progress=False)[0]["grounding"][0]["box"]
        for seed in (0, 0, 1, 2)
    ]
    assert boxes[0] == boxes[1] != boxes[2] != boxes[3]
    assert np.abs(np.array(boxes) - exact).max() <= 0.2 * 41 + 1e-3  # the disc is 41 pixels wide
    with pytest.raises(ValueError, match=r"jitter is 0\.5"):
        boxes_from_masks(rows, jitter=0.5)


def test_masks_of_a_teacher_are_compared_with_exact_masks(tmp_path):
    rows, _ = exact_rows()
    masked, outcomes = add_masks(
        boxes_from_masks(rows, progress=False), GrabCutTeacher(), tmp_path / "out", progress=False
    )
    assert outcomes["masked"] == 1
    quality = mask_quality(masked, rows, progress=False)
    found, exact = (mask_from_rle(split[0]["grounding"][0]["mask"]) for split in (masked, rows))
    assert quality.mean_iou == pytest.approx((found & exact).sum() / (found | exact).sum())
    assert (quality.phrases, quality.without_mask, quality.below_half) == (1, 0, 0)
    same = mask_quality(rows, rows, progress=False)
    assert same.mean_iou == same.median_iou == 1


def run_command(*arguments):
    command = [sys.executable, "-m", "research.mask_quality", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})


def test_command_prints_the_quality_of_each_split(tmp_path):
    rows, mask = exact_rows()
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "exact")
    done = run_command(tmp_path / "exact", "--teacher", "grabcut", "--out", tmp_path / "out", "--box-jitter", "0")
    assert done.returncode == 0, done.stderr
    found = mask_from_rle(load_from_disk(tmp_path / "out")["test"][0]["grounding"][0]["mask"])
    iou = f"{(found & mask).sum() / (found | mask).sum():.3f}"
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    for split in ("train", "test"):
        assert [split, "1", "0", iou, iou, "0.0%"] in lines
    done = run_command(tmp_path / "exact", "--teacher", "sam", "--out", tmp_path / "new")
    assert done.returncode == 2
    assert "sam needs a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
