# SPDX-License-Identifier: Apache-2.0
"""Masks for whole data sets: rows and outcomes, mistakes, resumed work and the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import segment_anything
from command_line import run
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from grounded_rows import BoxTeacher, filled, make_dataset, make_row, photograph, png
from PIL import Image
from tiny_sam import build_tiny_sam

from agevlm.data.masks import add_masks
from agevlm.data.teachers import load_teacher
from agevlm.processing.rows import mask_from_rle, mask_to_rle, row_features
from agevlm.provenance import describe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_sam_type")]


def bytes_of(folder):
    """The content of all files but the card, which has the folder's name."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_teachers_see_transparent_images_on_white(tmp_path):
    image, seen = Image.new("RGBA", (20, 10), (200, 0, 0, 0)), []
    image.paste((0, 0, 200, 255), (0, 0, 10, 10))

    class Teacher(BoxTeacher):
        def mask(self, image, prompt):
            seen.append([image.getpixel((x, 5)) for x in (5, 15)])
            return super().mask(image, prompt)

    add_masks(
        make_dataset([make_row(image, ("0.9", [1, 2, 11, 8], None))]), Teacher(), tmp_path / "out", progress=False
    )
    assert seen == [[(0, 0, 200), (255, 255, 255)]]


def test_missing_masks_are_added_and_rows_do_not_change(tmp_path):
    first, second = photograph(0, (40, 30)), photograph(1, (20, 50))
    kept = mask_to_rle(filled(first, (0, 0, 5, 5)))
    rows = [
        make_row(first, ("0.9", [1, 2, 11, 12], None), ("has one", [1, 1, 2, 2], kept), ("0.9", [1, 2, 11, 12], None)),
        make_row(first, ("0.3", [1, 2, 11, 12], None), ("1.5", [-3, 2, 11, 12], None)),
        make_row(second, ("no box", None, None), ("nothing", [1, 2, 11, 12], None), ("empty", [1, 2, 9, 9], None)),
        make_row(second),
    ]
    dataset = make_dataset(rows, source=["a", "b", "c", "d"])
    teacher = BoxTeacher()
    output, outcomes = add_masks(dataset, teacher, tmp_path / "out", min_score=0.5, attribution="by", progress=False)
    assert outcomes == {"masked": 2 + 1, "kept": 1, "rejected": 3, "skipped": 1}
    # one batch: an image of two rows is encoded once, and a repeated prompt is asked once
    assert teacher.calls == [[["0.9", "0.3", "1.5"], ["nothing", "empty"]]]

    assert output.column_names == dataset.column_names
    assert output["source"] == dataset["source"]
    assert output["messages"] == dataset["messages"]
    assert (tmp_path / "out" / "ATTRIBUTION.md").read_text() == "by"
    for before, after in zip(dataset, output, strict=True):
        assert np.array_equal(before["images"][0], after["images"][0])
        for entry, wanted in zip(after["grounding"], before["grounding"], strict=True):
            assert {**entry, "mask": None, "score": None} == {**wanted, "mask": None, "score": None}
    grounding = output["grounding"]
    np.testing.assert_array_equal(mask_from_rle(grounding[0][0]["mask"]), filled(first, (1, 2, 11, 12)))
    assert grounding[0][0] | {"start": 0, "end": 0} == grounding[0][2] | {"start": 0, "end": 0}
    assert grounding[0][1]["mask"] == kept
    scores = [[entry["score"] for entry in entries] for entries in grounding]
    assert scores == [
        [pytest.approx(0.9), None, pytest.approx(0.9)],
        [pytest.approx(0.3), 1.0],
        [None, 0.0, pytest.approx(0.9)],
        [],
    ]
    found = [[entry["mask"] is not None for entry in entries] for entries in grounding]
    assert found == [[True, True, True], [False, True], [False, False, False], []]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    again, outcomes = add_masks(output, BoxTeacher(), tmp_path / "again", progress=False)
    assert outcomes == {"kept": 4, "masked": 1, "rejected": 2, "skipped": 1}
    assert again["grounding"][1][0]["mask"] is not None  # the teacher is asked again for a rejected mask


def test_overwrite(tmp_path):
    image = photograph(0, (40, 30))
    old = mask_to_rle(filled(image, (0, 0, 5, 5)))
    dataset = make_dataset([make_row(image, ("0.9", [1, 2, 11, 12], old), ("no box", None, old))])
    output, outcomes = add_masks(dataset, BoxTeacher(), tmp_path / "out", overwrite=True, progress=False)
    assert outcomes == {"masked": 1, "skipped": 1}
    new, other = output["grounding"][0]
    np.testing.assert_array_equal(mask_from_rle(new["mask"]), filled(image, (1, 2, 11, 12)))
    assert other["mask"] == old


def test_splits_selections_and_rows_without_the_new_columns(tmp_path):
    """Data set dictionaries, shuffled and formatted data sets, and grounding without columns for masks."""
    rows = [make_row(photograph(i, (30 + i, 20)), ("0.5", [0, 0, 10 + i, 10], None)) for i in range(7)]
    for row in rows:
        for entry in row["grounding"]:
            del entry["mask"], entry["score"]
    for part in rows:
        part["images"] = [{"bytes": png(part["images"][0]), "path": None}]
    plain = Dataset.from_list(rows).cast_column("images", row_features()["images"])
    parts = DatasetDict(train=plain.shuffle(seed=0).with_format("numpy"), test=plain.select([4, 2]))
    output, outcomes = add_masks(parts, BoxTeacher(), tmp_path / "out", save_every=2, batch_size=1, progress=False)
    assert outcomes == {"masked": 9}
    assert {split: len(part) for split, part in output.items()} == {"train": 7, "test": 2}
    for split, part in output.items():
        for before, after in zip(parts[split].with_format(None), part, strict=True):
            assert np.array_equal(before["images"][0], after["images"][0])
            box = before["grounding"][0]["box"]
            mask = mask_from_rle(after["grounding"][0]["mask"])
            np.testing.assert_array_equal(mask, filled(after["images"][0], box))
    concatenated = concatenate_datasets([output["test"], output["test"]])
    assert add_masks(concatenated, BoxTeacher(), tmp_path / "next", progress=False)[1] == {"kept": 4}


def test_preference_data(tmp_path):
    row = make_row(photograph(0, (40, 30)), ("0.5", [0, 0, 10, 10], None))
    chosen = [{"role": "assistant", "content": [{"type": "text", "text": "It is 0.7."}]}]
    entry = row["grounding"][0] | {"message": 1, "start": 6, "end": 9}
    row = {"images": row["images"], "prompt": row["messages"], "chosen": chosen, "rejected": chosen}
    features = row_features()
    features |= dict.fromkeys(("prompt", "chosen", "rejected"), features["messages"])
    del features["messages"]
    dataset = Dataset.from_list([row | {"grounding": [entry]}], features=features)
    output, _ = add_masks(dataset, BoxTeacher(), tmp_path / "out", progress=False)
    assert output["grounding"][0][0]["score"] == pytest.approx(0.7)


def test_invalid_rows(tmp_path):
    good = photograph(0, (40, 30))
    broken = {"bytes": png(good)[:200], "path": None}
    box = [0, 0, 9, 9]
    folders = (tmp_path / str(i) / "out" for i in range(100))
    for row, message in (
        (make_row(broken, ("0.5", box, None)), "row 1, grounding entry 0: its image cannot be read"),
        (make_row(good, ("0.5", box, None), ("0.5", [5, 5, 5, 9], None)), r"row 1, grounding entry 1: its box is \[5"),
        (make_row(good, ("0.5", [0, 0, float("nan"), 9], None)), "its box is"),
        (make_row(good, ("0.5", [0, 0, 9], None)), "its box is"),
        (make_row(good, ("0.5", [50, 0, 60, 9], None)), "lies outside its image of 40 x 30"),
        (make_row(good, ("  ", box, None)), "are not a phrase"),
    ):
        dataset = make_dataset([make_row(good, ("0.5", box, None)), row])
        with pytest.raises(ValueError, match=message):
            add_masks(dataset, BoxTeacher(), next(folders), progress=False)
    for change, message in (
        ({"end": 99}, "are not a phrase"),
        ({"message": 3}, "names message 3 of a row with 1 messages"),
        ({"image": 1}, "names image 1 of a row with 1 images"),
    ):
        row = make_row(good, ("0.5", box, None))
        row["grounding"][0] |= change
        with pytest.raises(ValueError, match=message):
            add_masks(make_dataset([row]), BoxTeacher(), next(folders), progress=False)


def test_invalid_calls(tmp_path):
    dataset = make_dataset([make_row(photograph(0, (40, 30)), ("0.5", None, None))])
    with pytest.raises(ValueError, match=r"none of the 1 phrases without a mask has a box.*grounded-sam or sam3"):
        add_masks(dataset, BoxTeacher(), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []  # nor unfinished work, which would block another teacher
    with pytest.raises(ValueError, match="lacks the column"):
        add_masks(dataset.remove_columns("grounding"), BoxTeacher(), tmp_path / "out")
    for wrong in ({"batch_size": 0}, {"save_every": 0}, {"min_score": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* but must be"):
            add_masks(dataset, BoxTeacher(), tmp_path / "out", **wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        add_masks(dataset, BoxTeacher(), tmp_path / "out")


def test_work_of_other_settings_is_not_resumed(tmp_path):
    rows = [make_row(photograph(i, (40, 30)), ("0.5", [0, 0, 10, 10], None)) for i in range(4)]
    dataset = make_dataset(rows)

    class Stops(BoxTeacher):
        def masks(self, images, prompts):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().masks(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        add_masks(dataset, Stops(), tmp_path / "out", save_every=1, progress=False)
    assert len(list((tmp_path / ".out.unfinished").glob("0*.arrow"))) == 2
    other = BoxTeacher()
    other.settings = {"teacher": "box", "weights": "other"}
    changed = make_dataset([*rows[:3], make_row(photograph(9, (40, 30)), ("0.5", [0, 0, 10, 10], None))])
    for data, teacher, options, named in (
        (dataset, other, {"save_every": 1}, "weights was None and is 'other'"),
        (dataset, BoxTeacher(), {"save_every": 1, "min_score": 0.2}, "min_score was 0.0 and is 0.2"),
        (dataset, BoxTeacher(), {"save_every": 2}, "save_every was 1 and is 2"),
        (changed, BoxTeacher(), {"save_every": 1}, "dataset was"),
    ):
        with pytest.raises(FileExistsError, match=f"holds work of other settings .*{named}.*delete"):
            add_masks(data, teacher, tmp_path / "out", progress=False, **options)
    teacher = BoxTeacher()
    add_masks(dataset, teacher, tmp_path / "out", save_every=1, batch_size=3, progress=False)
    assert len(teacher.calls) == 2  # the two that were missing


# --- the command: killed, resumed, and on two processes ---

COMMAND = """
import os, sys, time
sys.path.insert(0, {tests!r})
import segment_anything
from tiny_sam import build_tiny_sam
from agevlm.data.teachers import SamTeacher

segment_anything.sam_model_registry["tiny"] = build_tiny_sam
masks = SamTeacher.masks

def logged(self, images, prompts):
    time.sleep(float(os.environ.get("DELAY", 0)))
    with open({log!r}, "a") as log:
        log.write(f"{{os.environ.get('RANK', 0)}} {{len(images)}}\\n")
    return masks(self, images, prompts)

SamTeacher.masks = logged
from agevlm.cli import main

main()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved data set of 13 rows with boxes, in two splits."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    rows = [make_row(photograph(i, (30 + i, 40)), ("a dog", [2, 3, 20 + i, 30], None)) for i in range(13)]
    DatasetDict(train=make_dataset(rows[:9]), test=make_dataset(rows[9:])).save_to_disk(folder)
    (folder / "ATTRIBUTION.md").write_text("waves")
    return folder


@pytest.fixture
def command(saved, checkpoint, tmp_path):
    """The command line, with the tiny SAM among the types and a log of the teacher's calls."""
    script, log = tmp_path / "command.py", tmp_path / "log"
    script.write_text(COMMAND.format(tests=str(Path(__file__).parents[1] / "fixtures"), log=str(log)))
    log.touch()
    options = ["--teacher", "sam", "--checkpoint", checkpoint, "--save-every", "2", "--batch-size", "1"]
    return [str(part) for part in (script, "masks", saved, *options, "--device", "cpu", "--out")], log


@pytest.fixture(scope="module")
def uninterrupted(saved, checkpoint, tmp_path_factory):
    """The files that one process writes without an interruption."""
    segment_anything.sam_model_registry["tiny"] = build_tiny_sam
    folder = tmp_path_factory.mktemp("whole") / "out"
    text = (saved / "ATTRIBUTION.md").read_text()
    teacher = load_teacher("sam", checkpoint, device="cpu")
    told = {"attribution": text, "provenance": {"sources": [{"role": "rows", **describe(saved, "data set")}]}}
    add_masks(load_from_disk(saved), teacher, folder, save_every=2, batch_size=1, progress=False, **told)
    del segment_anything.sam_model_registry["tiny"]
    return bytes_of(folder)


def test_a_killed_run_is_resumed(command, uninterrupted, tmp_path):
    arguments, log = command
    out, work = tmp_path / "out", tmp_path / ".out.unfinished"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments, str(out)], env=environment | {"DELAY": "0.4"}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(done := list(work.glob("*/0*.arrow"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(work.glob("*/0*.arrow"))
    assert 3 <= len(done) < 7
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in done}
    (work / "train" / ".000000008.arrow.1").write_bytes(b"half a file")
    log.write_text("")

    result = subprocess.run(
        [sys.executable, *arguments, str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Rows of finished files are not computed again: each file has two rows, but for the last of `train`.
    rows = {path: 1 if path.parts[-2:] == ("train", "000000008.arrow") else 2 for path in before}
    assert len(log.read_text().splitlines()) == 13 - sum(rows.values())
    assert bytes_of(out) == uninterrupted
    assert not work.exists()
    printed = " ".join(result.stdout.split())
    assert "of 13 phrases 13 have a new mask, 0 have none" in printed


def test_two_processes_give_the_result_of_one(command, uninterrupted, tmp_path):
    arguments, log = command
    out = tmp_path / "out"
    # `accelerate launch` starts processes through torchrun, but on CPUs only one: so here torchrun itself.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    preview = ["--preview", str(tmp_path / "preview.png")]
    result = subprocess.run(
        [*launch, *arguments, str(out), *preview],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ranks = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert len(ranks) == 13
    assert {ranks.count(0), ranks.count(1)} == {6, 7}
    assert bytes_of(out) == uninterrupted
    assert result.stdout.count("Saved") == 1
    assert Image.open(tmp_path / "preview.png").width > 800


def test_command_mistakes(saved, tmp_path, monkeypatch, capsys):
    common = ["--teacher", "sam", "--checkpoint", "none.pth", "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([saved, *common], "no SAM checkpoint none.pth"),
        ([tmp_path, *common], f"Directory {tmp_path} is neither"),
        ([saved, *common, "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ([saved, *common, "--preview", tmp_path / "no" / "p.png"], f"there is no folder {tmp_path / 'no'}; create it"),
        (
            [saved, *common, "--preview", tmp_path / "x.txt"],
            "x.txt: the name of a figure must end with .png, .jpg, .pdf",
        ),
        ([saved, *common[2:], "--teacher", "dino"], "no mask teacher 'dino'"),
    ):
        code, printed = run(monkeypatch, capsys, "masks", *arguments)
        assert code == 2
        assert message in printed
        assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())
