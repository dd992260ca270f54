# SPDX-License-Identifier: Apache-2.0
"""Regions of Visual Genome: lines and boxes against a reading of the test's own; each kind of bad entry is named and leaves the rest."""

import functools
import json
import tracemalloc

import pytest
from PIL import Image
from published_visual_genome import write_visual_genome

from agevlm.data.check import check_row
from agevlm.data.formats import entries, open_source, visual_genome
from agevlm.data.formats.source import BadEntry, cut
from agevlm.data.prepared import prepare_source
from agevlm.processing.rows import message_text

REGIONS = "region_descriptions.json"


@pytest.fixture
def folders(tmp_path):
    return write_visual_genome(tmp_path)


def read(folders, work):
    source = open_source("visual_genome", *folders)
    return [found for piece in source.pieces(work) for found in source.read(piece, work)]


def change(file, function):
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def described(region):
    """What two regions have in common that are one line."""
    return " ".join(region["phrase"].split()).removesuffix(".").lower()


def corners(region):
    x, y, width, height = (region[side] for side in ("x", "y", "width", "height"))
    return [x, y, x + width, y + height]


def test_each_region_is_a_line_that_is_grounded_in_its_box(folders, tmp_path):
    path, images = folders
    rows = read(folders, tmp_path)
    for entry in json.loads((path / REGIONS).read_text()):
        of_image = [row for row in rows if row["id"].partition("#")[0] == str(entry["id"])]
        assert len(of_image) == 2  # 20 different phrases, at most 16 in a row
        grounded, texts = [], []
        for row in of_image:
            (file,) = images.glob(f"VG_100K*/{entry['id']}.jpg")
            assert row["images"] == [{"path": str(file), "bytes": None}]
            question, answer = (message_text(message) for message in row["messages"])
            assert question == "Describe the regions of this image, each on a line of its own."
            lines = answer.split("\n")
            assert len(lines) == 10
            assert {answer[g["start"] : g["end"]] for g in row["grounding"]} == set(lines)
            grounded += [(answer[g["start"] : g["end"]].removesuffix(".").lower(), g["box"]) for g in row["grounding"]]
            texts += lines
            assert all(
                (g["message"], g["image"], g["mask"], g["score"]) == (1, 0, None, None) for g in row["grounding"]
            )
            assert [problem for problem in check_row(row) if problem.severity == "error"] == []
        assert sorted(grounded) == sorted((described(region), corners(region)) for region in entry["regions"])
        given = {" ".join(region["phrase"].split()) for region in entry["regions"]}
        assert set(texts) < given
        assert len(texts) == len(given) - 1  # one of the two ways to write a phrase
    assert [(row["file"], row["row"]) for row in rows] == [(REGIONS, number) for number in range(5) for _ in range(2)]


def test_each_row_goes_from_the_largest_region_to_the_smallest(folders, tmp_path):
    for row in read(folders, tmp_path):
        largest = {}
        for entry in row["grounding"]:
            x0, y0, x1, y1 = entry["box"]
            largest[entry["start"]] = max(largest.get(entry["start"], 0), (x1 - x0) * (y1 - y0))
        areas = [largest[start] for start in sorted(largest)]
        assert areas == sorted(areas, reverse=True)


def test_regions_of_one_phrase_and_one_box_are_one(folders, tmp_path):
    path, _ = folders
    before = read(folders, tmp_path / "before")
    change(path / REGIONS, lambda regions: regions[0]["regions"].extend(regions[0]["regions"][:3]))
    assert read(folders, tmp_path / "after") == before


def test_images_may_lie_in_one_folder_beside_the_regions(folders, tmp_path):
    path, images = folders
    rows = read(folders, tmp_path / "in archives")
    for file in list(images.glob("*/*.jpg")):
        file.rename(path / file.name)
    beside = read((path / REGIONS,), tmp_path / "beside")
    assert [row["images"][0]["path"] for row in beside] == [
        str(path / row["images"][0]["path"].rpartition("/")[2]) for row in rows
    ]
    assert [row["grounding"] for row in beside] == [row["grounding"] for row in rows]


def test_pieces_read_in_any_order_make_the_same_rows(folders, tmp_path, monkeypatch):
    whole = read(folders, tmp_path / "whole")
    monkeypatch.setattr(visual_genome, "cut", functools.partial(cut, size=2))
    pieces = open_source("visual_genome", *folders).pieces(tmp_path / "cut")
    assert len(pieces) == 3
    found = {
        piece.name: list(open_source("visual_genome", *folders).read(piece, tmp_path / "cut"))
        for piece in reversed(pieces)
    }
    assert [row for name in sorted(found) for row in found[name]] == whole


def set_region(**values):
    return lambda regions: regions[1]["regions"][4].update(values)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (set_region(phrase="  "), "not a text"),
        (set_region(phrase=None), "not a text"),
        (set_region(phrase="half \ud800"), "not a text"),
        (set_region(x=None), "not a box"),
        (set_region(width=float("nan")), "not a box"),
        (set_region(height=0), "empty box"),
        (set_region(x=5000), "empty box"),
        (set_region(y=-500), "empty box"),
        (set_region(image_id=1), "region of another image"),
        (lambda regions: regions[1]["regions"].__setitem__(4, "a clock"), "not a region"),
    ],
)
def test_a_bad_region_is_left_out_and_named(folders, tmp_path, function, kind):
    before = [row for row in read(folders, tmp_path / "before") if row["row"] == 1]
    left_out = json.loads((folders[0] / REGIONS).read_text())[1]["regions"][4]
    change(folders[0] / REGIONS, function)
    (bad, *rows) = (
        found for found in read(folders, tmp_path / "after") if not isinstance(found, dict) or found["row"] == 1
    )
    assert (bad.kind, bad.phrase, bad.file, bad.row) == (kind, True, REGIONS, 1)
    assert "region 4" in bad.reason
    lines = [
        {line for row in some for line in message_text(row["messages"][1]).split("\n")} for some in (before, rows)
    ]
    assert lines[0] - lines[1] == {left_out["phrase"].strip()}
    assert lines[1] < lines[0]


def test_a_box_that_sticks_out_is_cut_off_at_the_edge(folders, tmp_path):
    change(folders[0] / REGIONS, set_region(x=-3, y=1, width=13, height=10_000, phrase="it sticks out"))
    height = json.loads((folders[0] / "image_data.json").read_text())[1]["height"]
    boxes = [
        entry["box"]
        for row in read(folders, tmp_path)
        for entry in row["grounding"]
        if message_text(row["messages"][1])[entry["start"] : entry["end"]] == "it sticks out"
    ]
    assert boxes == [[0, 1, 10, height]]


def without_image(path, images):
    (images / "VG_100K" / "2.jpg").unlink()


def damaged_image(path, images):
    file = images / "VG_100K" / "2.jpg"
    file.write_bytes(file.read_bytes()[:20])


def smaller_image(path, images):
    Image.new("RGB", (20, 20)).save(images / "VG_100K" / "2.jpg")


def image_outside(path, images):
    file = images / "VG_100K" / "2.jpg"
    file.rename(path.parent / "2.jpg")
    file.symlink_to(path.parent / "2.jpg")


def changed(function, name=REGIONS):
    return lambda path, images: change(path / name, function)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (without_image, "missing image"),
        (damaged_image, "broken image"),
        (smaller_image, "image of another size"),
        (image_outside, "image outside its folder"),
        (changed(lambda regions: regions[1].pop("id")), "no image"),
        (changed(lambda regions: regions[1].update(id="2")), "no image"),
        (changed(lambda regions: regions.__setitem__(1, [])), "no image"),
        (changed(lambda regions: regions[1].update(id=2**80)), "no image data"),
        (changed(lambda data: data.pop(1), "image_data.json"), "no image data"),
        (changed(lambda data: data[1].pop("width"), "image_data.json"), "image of another size"),
        (changed(lambda regions: regions[1].pop("regions")), "no regions"),
        (changed(lambda regions: regions[1].update(regions=[])), "no regions"),
        (changed(lambda regions: regions[1].update(regions=[None])), "not a region"),
    ],
)
def test_a_bad_entry_is_left_out_and_named(folders, tmp_path, damage, kind):
    before = read(folders, tmp_path / "before")
    damage(*folders)
    after = read(folders, tmp_path / "after")
    (bad,) = (found for found in after if isinstance(found, BadEntry))
    assert (bad.kind, bad.phrase, bad.file, bad.row) == (kind, False, REGIONS, 1)
    assert [found for found in after if found is not bad] == [row for row in before if row["row"] != 1]


@pytest.mark.usefixtures("own_cache")
def test_bad_entries_are_errors_unless_they_are_skipped(folders):
    change(folders[0] / REGIONS, set_region(x=5000))
    without_image(*folders)
    (folders[1] / "VG_100K_2" / "3.jpg").unlink()
    change(folders[0] / REGIONS, lambda regions: regions[4]["regions"][0].update(phrase=""))
    source = open_source("visual_genome", *folders)
    with pytest.raises(ValueError, match=r"region_descriptions\.json, entry 1: image 2: there is no image .*2\.jpg"):
        prepare_source(source, on_bad_row="error", progress=False)
    prepared = prepare_source(source, on_bad_row="skip", progress=False)
    assert prepared.bad == {("missing image", False): 2, ("not a text", True): 1}
    assert prepared.dataset["id"][:] == [f"{image}#{row}" for image in (1, 4, 5) for row in (0, 1)]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (REGIONS, FileNotFoundError, "region_descriptions.json.zip"),
        ("image_data.json", FileNotFoundError, "image_data.json.zip"),
        ("images", FileNotFoundError, "images2.zip"),
    ],
)
def test_what_is_missing_is_named_with_its_address(folders, name, error, words):
    (folders[0] / name).rename(folders[0] / "elsewhere")
    with pytest.raises(error, match=words):
        open_source("visual_genome", *folders)
    with pytest.raises(ValueError, match="no splits"):
        open_source("visual_genome", folders[0] / "elsewhere", split="train")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_CHUNK", 1 << 12)
    peaks = []
    for images in (10, 200):
        change(
            folders[0] / REGIONS, lambda regions, images=images: regions.extend(regions * (images // len(regions) - 1))
        )
        work = tmp_path / str(images)
        source = open_source("visual_genome", *folders)
        tracemalloc.start()
        for piece in source.pieces(work):
            assert sum(1 for _ in source.read(piece, work)) == 2 * images
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < (folders[0] / REGIONS).stat().st_size / 10
