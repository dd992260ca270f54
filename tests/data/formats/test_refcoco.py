# SPDX-License-Identifier: Apache-2.0
"""RefCOCO: expressions, boxes and masks against a reading of the test's own; each kind of bad entry is named and leaves the rest."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_refcoco import NAME, SCHEMA, read_entries, write_entries, write_refcoco

from agevlm.data.check import check_row
from agevlm.data.formats import open_source, refcoco
from agevlm.data.formats.refcoco import RefCoco
from agevlm.data.formats.source import BadEntry
from agevlm.data.prepared import prepare_source
from agevlm.processing.rows import mask_from_rle, message_text


@pytest.fixture
def folders(tmp_path):
    return write_refcoco(tmp_path, objects=3)


@pytest.fixture
def train(folders):
    return folders[0] / "data" / NAME.format("train")


def read(folders, work, split="train"):
    source = RefCoco(*folders, split)
    pieces = source.pieces(work)
    return [found for piece in pieces for found in source.read(piece, work)]


def drawn(annotation, height, width):
    """The mask of a segmentation of boxes or runs, bool `(height, width)`, pixel by pixel."""
    mask = np.zeros((height, width), dtype=bool)
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        for polygon in segmentation:
            xs, ys = [int(x) for x in polygon[::2]], [int(y) for y in polygon[1::2]]
            mask[min(ys) : max(ys), min(xs) : max(xs)] = True
    else:
        pixels, color = [], False
        for run in segmentation["counts"]:
            pixels += [color] * run
            color = not color
        mask = np.array(pixels).reshape(width, height).T
    return mask


def by_image(entries):
    images = {}
    for entry in entries:
        images.setdefault(entry["image_id"], []).append(entry)
    return {image: images[image] for image in sorted(images)}


def test_rows_are_images_whose_lines_have_the_box_and_the_mask_of_their_object(folders, train, tmp_path):
    rows = read(folders, tmp_path / "work")
    entries = read_entries(train)
    images = by_image(entries)
    assert len(rows) == len(images) == 4
    for row, (image, objects) in zip(rows, images.items(), strict=True):
        info = json.loads(objects[0]["raw_image_info"])
        question, answer = (message_text(message) for message in row["messages"])
        assert question == refcoco.REFER
        expected = [(sentence["sent"], entry) for entry in objects for sentence in entry["sentences"]]
        assert answer.split("\n") == [line for line, _ in expected]
        assert len(row["grounding"]) == len(expected) == 9
        for phrase, (line, entry) in zip(row["grounding"], expected, strict=True):
            assert answer[phrase["start"] : phrase["end"]] == line
            assert phrase["box"] == entry["bbox"]  # the column is x0, y0, x1, y1; the reader takes x, y, width, height
            mask = mask_from_rle(phrase["mask"], (info["height"], info["width"]))
            np.testing.assert_array_equal(mask, drawn(json.loads(entry["raw_anns"]), info["height"], info["width"]))
            assert (phrase["message"], phrase["image"], phrase["score"]) == (1, 0, None)
        assert row["images"] == [{"path": str(folders[1] / info["file_name"]), "bytes": None}]
        assert row["id"] == f"{image}#0"
        assert (row["file"], row["row"]) == (train.name, entries.index(objects[0]))
        assert [problem for problem in check_row(row) if problem.severity == "error"] == []


def test_an_image_with_many_expressions_has_several_rows(tmp_path):
    folders = write_refcoco(tmp_path, train=1, objects=7)
    entries = read_entries(folders[0] / "data" / NAME.format("train"))
    rows = read(folders, tmp_path / "work")
    texts = [message_text(row["messages"][1]).split("\n") for row in rows]
    assert [len(lines) for lines in texts] == [16, 5]
    assert texts[0] + texts[1] == [sentence["sent"] for entry in entries for sentence in entry["sentences"]]
    assert len({row["id"] for row in rows}) == 2
    for row in rows:
        assert [problem for problem in check_row(row) if problem.severity == "error"] == []


def test_an_expression_stands_there_once_with_all_objects_that_have_it(folders, train, tmp_path):
    entries = read_entries(train)
    (one, two, three) = next(iter(by_image(entries).values()))
    for entry in (one, two):
        entry["sentences"] = [{"sent": text} for text in ("a dog", " the  big\ndog ", "a dog")]
    entries.append({**one, "sentences": [{"sent": "a dog"}, {"sent": "brown dog"}]})  # RefCOCOg has objects twice
    write_entries(train, entries)
    row = read(folders, tmp_path / "work")[0]
    answer = message_text(row["messages"][1])
    lines = [sentence["sent"] for sentence in three["sentences"]]
    assert sorted(answer.split("\n")) == sorted(["a dog", "the big dog", "brown dog", *lines])
    found = [(answer[phrase["start"] : phrase["end"]], tuple(phrase["box"])) for phrase in row["grounding"]]
    assert sorted(found) == sorted(
        [(line, tuple(entry["bbox"])) for entry in (one, two) for line in ("a dog", "the big dog")]
        + [(line, tuple(three["bbox"])) for line in lines]
        + [("brown dog", tuple(one["bbox"]))]
    )
    assert [problem for problem in check_row(row) if problem.severity == "error"] == []


def test_numbers_of_objects_do_not_matter(folders, train, tmp_path):
    rows = read(folders, tmp_path / "work")
    entries = read_entries(train)
    for entry in entries:
        annotated(id=[{}])(entry)
    write_entries(train, entries)
    assert read(folders, tmp_path / "again") == rows


def test_images_may_have_their_names_of_2017(folders, tmp_path):
    rows = read(folders, tmp_path / "work")
    for file in folders[1].iterdir():
        file.rename(file.with_name(file.name.removeprefix("COCO_train2014_")))
    renamed = read(folders, tmp_path / "work")
    assert [row["messages"] for row in renamed] == [row["messages"] for row in rows]
    for row, old in zip(renamed, rows, strict=True):
        assert row["images"][0]["path"] == old["images"][0]["path"].replace("COCO_train2014_", "")


def test_pieces_read_in_any_order_make_the_same_rows(folders, tmp_path, monkeypatch):
    rows = read(folders, tmp_path / "work")
    monkeypatch.setattr(refcoco, "_IMAGES_A_PIECE", 1)
    work = tmp_path / "again"
    pieces = RefCoco(*folders, "train").pieces(work)
    assert RefCoco(*folders, "train").pieces(work) == pieces
    assert len({piece.name for piece in pieces}) == len(pieces) == 4
    found = {piece.name: list(RefCoco(*folders, "train").read(piece, work)) for piece in reversed(pieces)}
    assert [row for name in sorted(found) for row in found[name]] == rows


def test_splits_are_the_files(folders, train, tmp_path):
    for split in ("train", "validation", "test", "testB"):
        file = folders[0] / "data" / NAME.format(split)
        assert RefCoco(*folders, split).files() == [file]
        rows = read(folders, tmp_path / split, split)
        assert {int(row["id"].partition("#")[0]) for row in rows} == {e["image_id"] for e in read_entries(file)}
    rows = read(folders, tmp_path / "train", "train")
    assert read((train, folders[1]), tmp_path / "file", None) == rows
    with pytest.raises(ValueError, match=r"split.*None, but must be one of test, testB, train, validation"):
        RefCoco(*folders)
    with pytest.raises(ValueError, match="one of test, testB, train, validation"):
        RefCoco(*folders, "val")
    with pytest.raises(ValueError, match="leave out `split`"):
        RefCoco(train, folders[1], "train")


def test_a_split_of_several_files_is_read_as_one(folders, train, tmp_path):
    rows = read(folders, tmp_path / "work")
    entries = read_entries(train)
    write_entries(train.with_name("train-00000-of-00002.parquet"), entries[:5])
    write_entries(train.with_name("train-00001-of-00002.parquet"), entries[5:])
    train.unlink()
    parts = read(folders, tmp_path / "parts")
    assert [row["messages"] for row in parts] == [row["messages"] for row in rows]
    assert {(row["file"], row["row"]) for row in parts} == {
        (f"train-0000{part}-of-00002.parquet", row)
        for part, row in {divmod(old["row"], 5) if old["row"] < 10 else (1, old["row"] - 5) for old in rows}
    }


def in_json(column, **values):
    return lambda entry: entry.update({column: json.dumps(json.loads(entry[column]) | values)})


def annotated(**values):
    return in_json("raw_anns", **values)


# By what is wrong with the first entry of an image: its change, the kind, and whether the image is lost; else the entry's lines are.
BAD = {
    "no image_id": (lambda entry: entry.update(image_id=None), "no image", None),
    "no image info": (lambda entry: entry.update(raw_image_info=None), "not JSON", True),
    "broken image info": (lambda entry: entry.update(raw_image_info="{"), "not JSON", True),
    "image info that is a list": (lambda entry: entry.update(raw_image_info="[]"), "not JSON", True),
    "endless image info": (lambda entry: entry.update(raw_image_info="[" * 100_000), "not JSON", True),
    "info of another image": (in_json("raw_image_info", id=7), "data of another image", True),
    "no file name": (in_json("raw_image_info", file_name=None), "missing image", True),
    "a missing image": (in_json("raw_image_info", file_name="COCO_train2014_000000000001.jpg"), "missing image", True),
    "an endless name": (in_json("raw_image_info", file_name="a" * 10_000), "missing image", True),
    "an image elsewhere": (in_json("raw_image_info", file_name="../elsewhere.jpg"), "image outside its folder", True),
    "a broken image": (in_json("raw_image_info", file_name="broken.jpg"), "broken image", True),
    "another size": (in_json("raw_image_info", width=640), "image of another size", True),
    "no size": (in_json("raw_image_info", height=None), "image of another size", True),
    "no annotation": (lambda entry: entry.update(raw_anns=None), "not JSON", False),
    "broken annotation": (lambda entry: entry.update(raw_anns="{'bbox': 1}"), "not JSON", False),
    "annotation of another image": (annotated(image_id=7), "data of another image", False),
    "no segmentation": (annotated(segmentation=None), "damaged segmentation", False),
    "an empty segmentation": (annotated(segmentation=[]), "damaged segmentation", False),
    "half a point": (annotated(segmentation=[[1, 2, 3]]), "damaged segmentation", False),
    "runs that do not fit": (annotated(segmentation={"size": [5, 5], "counts": [25]}), "damaged segmentation", False),
    "a mask of nothing": (annotated(segmentation=[[0, 0, 0, 0, 0, 0]]), "empty mask", False),
    "a mask outside": (annotated(segmentation=[[90, 90, 99, 90, 99, 99]]), "empty mask", False),
    "no box": (annotated(bbox=None), "not a box", False),
    "three numbers": (annotated(bbox=[1, 2, 3]), "not a box", False),
    "a word in the box": (annotated(bbox=[1, 2, 3, "4"]), "not a box", False),
    "a box without end": (annotated(bbox=[1, 2, 3, 10**400]), "not a box", False),
    "an empty box": (annotated(bbox=[1, 2, 0, 5]), "empty box", False),
    "a box outside": (annotated(bbox=[900, 900, 5, 5]), "empty box", False),
    "no expressions": (lambda entry: entry.update(sentences=[]), "not a text", False),
    "expressions that are null": (lambda entry: entry.update(sentences=None), "not a text", False),
    "a blank expression": (lambda entry: entry.update(sentences=[{"sent": " \n"}]), "not a text", False),
    "an expression that is null": (lambda entry: entry.update(sentences=[{"sent": None}]), "not a text", False),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_kind_of_bad_entry_is_named_and_costs_no_other_row(folders, train, tmp_path, case):
    change, kind, lost = BAD[case]
    (folders[1] / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "elsewhere.jpg").write_bytes(next(folders[1].glob("COCO*")).read_bytes())
    rows = read(folders, tmp_path / "work")
    entries = read_entries(train)
    number = rows[1]["row"]  # the first entry of the second image
    others = [e for e in entries if rows[1]["id"] == f"{e['image_id']}#0" and e is not entries[number]]
    change(entries[number])
    write_entries(train, entries)
    found = read(folders, tmp_path / "changed")
    (bad,) = [entry for entry in found if isinstance(entry, BadEntry)]
    kept = [entry for entry in found if not isinstance(entry, BadEntry)]
    assert (bad.kind, bad.file, bad.row, bad.phrase) == (kind, train.name, number, lost is False)
    if lost:
        assert kept == [rows[0], *rows[2:]]
        return
    assert [row for row in kept if row["id"] != rows[1]["id"]] == [rows[0], *rows[2:]]
    (row,) = [row for row in kept if row["id"] == rows[1]["id"]]
    lines = message_text(row["messages"][1]).split("\n")
    assert lines == [sentence["sent"] for entry in others for sentence in entry["sentences"]]
    assert [problem for problem in check_row(row) if problem.severity == "error"] == []


@pytest.mark.parametrize(
    ("column", "change", "kind"), [("image_id", float, "no image"), ("sentences", json.dumps, "not a text")]
)
def test_columns_of_another_type_are_bad_in_each_entry(folders, train, tmp_path, column, change, kind):
    entries = [entry | {column: change(entry[column])} for entry in read_entries(train)]
    pq.write_table(pa.Table.from_pylist(entries), train)
    bad = [found for found in read(folders, tmp_path / "work") if isinstance(found, BadEntry)]
    assert {entry.row for entry in bad if entry.kind == kind} == set(range(len(entries)))


def test_bad_phrases_and_entries_are_counted_or_an_error(folders, train, tmp_path, own_cache):
    rows = read(folders, tmp_path / "work")
    entries = read_entries(train)
    annotated(bbox=[1, 2, 0, 5])(entries[rows[1]["row"]])
    write_entries(train, entries)
    Path(rows[2]["images"][0]["path"]).write_bytes(b"no image")
    source = open_source("refcoco", *folders, "train")
    with pytest.raises(ValueError, match=rf"entry {rows[1]['row']}: its object has the box .*on_bad_row: skip"):
        prepare_source(source, on_bad_row="error", progress=False)
    prepared = prepare_source(source, on_bad_row="skip", progress=False)
    assert prepared.bad == {("empty box", True): 1, ("broken image", False): 1}
    assert prepared.dataset["id"] == [row["id"] for row in (rows[0], rows[1], rows[3])]


def test_an_image_of_which_no_line_is_left_is_a_bad_row(tmp_path):
    folders = write_refcoco(tmp_path, train=1, objects=2)
    file = folders[0] / "data" / NAME.format("train")
    entries = read_entries(file)
    for entry in entries:
        annotated(bbox=[0, 0, 0, 0])(entry)
    write_entries(file, entries)
    found = read(folders, tmp_path / "work")
    assert [(bad.kind, bad.row, bad.phrase) for bad in found] == [("empty box", 0, False), ("empty box", 1, False)]


def test_what_is_missing_is_named_with_the_way_to_get_it(folders, train, tmp_path):
    path, images = folders
    with pytest.raises(FileNotFoundError, match="hf download jxu124/refcoco"):
        RefCoco(tmp_path / "nowhere", images, "train")
    with pytest.raises(FileNotFoundError, match=r"folder of images None.*train2014\.zip"):
        RefCoco(path, None, "train")
    for name, content, problem in (
        ("text", b"{}", "is not a whole parquet file"),
        ("cut", train.read_bytes()[:-100], "is not a whole parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            RefCoco(tmp_path / name, images).pieces(tmp_path / f"{name} work")
    pq.write_table(pa.table({"image_id": [1], "sentences": [[]]}), tmp_path / "others")
    with pytest.raises(ValueError, match="has no column raw_anns, raw_image_info"):
        RefCoco(tmp_path / "others", images).pieces(tmp_path / "others work")


def test_memory_does_not_grow_with_the_entries(tmp_path):
    path, images = write_refcoco(tmp_path, train=1, other=0, objects=1)
    (entry,) = read_entries(path / "data" / NAME.format("train"))
    peaks = []
    for number in (1_000, 4_000):
        with pq.ParquetWriter(tmp_path / f"{number}", SCHEMA) as writer:
            for start in range(0, number, 1000):
                some = [{**entry, "image_id": image} for image in range(start, start + 1000)]
                writer.write_table(pa.Table.from_pylist(some, SCHEMA))
        tracemalloc.start()
        pieces = RefCoco(tmp_path / f"{number}", images).pieces(tmp_path / f"{number} work")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pieces) == number / 500
    assert peaks[1] < 1.2 * peaks[0]
