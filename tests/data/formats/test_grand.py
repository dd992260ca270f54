# SPDX-License-Identifier: Apache-2.0
"""GranD and GranD-f: captions, boxes and masks against what the files were made of; each kind of bad entry is named and leaves the rest."""

import functools
import json
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from grounded_rows import photograph
from hypothesis import given
from hypothesis import strategies as st
from published_grand import DENSE, SHORT, image_size, object_box, object_mask, rle, write_grand, write_grand_f

from agevlm.data.check import check_row
from agevlm.data.formats import grand, grand_f, open_source
from agevlm.data.formats.grand import phrase_span
from agevlm.data.formats.source import BadEntry, BadEntryError, cut
from agevlm.data.prepared import prepare_source
from agevlm.processing.rows import mask_from_rle, message_text

FILES = ["part_1/sa_2.json", "part_1/sa_4.json", "part_2/sa_1.json", "part_2/sa_3.json", "part_2/sa_5.json"]


@pytest.fixture
def folders(tmp_path):
    return write_grand(tmp_path)


def read(folders, work, split=None, format="grand"):
    source = open_source(format, *folders, split)
    return [found for piece in source.pieces(work) for found in source.read(piece, work)]


def check_grounding(row, size, expected):
    """Compares phrases with the objects that the files were made of, object 4 without a mask."""
    question, answer = (message_text(message) for message in row["messages"])
    assert question == "Describe this image."
    found = [(entry["start"], answer[entry["start"] : entry["end"]], entry["box"]) for entry in row["grounding"]]
    wanted = [(answer.index(phrase), phrase, object_box(number)) for phrase, number in expected]
    assert found == wanted
    for entry, (_, number) in zip(row["grounding"], expected, strict=True):
        assert (entry["message"], entry["image"], entry["score"]) == (1, 0, None)
        if number == 4:
            assert entry["mask"] is None
        else:
            assert np.array_equal(mask_from_rle(entry["mask"], (size[1], size[0])), object_mask(number, size))
    assert [problem for problem in check_row(row) if problem.severity == "error"] == []


def test_dense_captions(folders, tmp_path):
    images = folders[1]
    rows = read(folders, tmp_path)
    assert [row["file"] for row in rows] == FILES
    for row in rows:
        number = int(row["id"].partition("#")[0].removeprefix("sa_"))
        assert row["id"] == f"sa_{number}#0"
        assert row["file"].endswith(f"/sa_{number}.json")
        assert message_text(row["messages"][1]) == DENSE
        with tarfile.open(images / f"sa_{number % 2:06d}.tar") as archive:
            data = archive.extractfile(f"./sa_{number}.jpg").read()
        assert row["images"] == [{"path": f"sa_{number}.jpg", "bytes": data}]
        phrases = ["a brown dog", "two balls", "two balls", "The dog", "a rug", "a rug"]
        check_grounding(row, image_size(number), list(zip(phrases, [0, 2, 3, 0, 4, 1], strict=True)))


def test_short_captions(folders, tmp_path):
    rows = read(folders, tmp_path, "short_captions")
    assert [(row["file"], row["row"]) for row in rows] == [(file, number) for file in FILES for number in (0, 1)]
    assert [message_text(row["messages"][1]) for row in rows] == SHORT * 5
    for row in rows:
        number = int(row["id"].partition("#")[0].removeprefix("sa_"))
        check_grounding(row, image_size(number), [("a dog", 0), ("a rug", 1)])


def test_photographs_may_be_unpacked(folders, tmp_path):
    images = folders[1]
    packed = read(folders, tmp_path / "packed")
    for archive in list(images.glob("*.tar")):
        shutil.unpack_archive(archive, images / archive.stem, filter="data")
        archive.unlink()
    unpacked = read(folders, tmp_path / "unpacked")
    assert [row | {"images": None} for row in unpacked] == [row | {"images": None} for row in packed]
    for row, other in zip(unpacked, packed, strict=True):
        file = images / f"sa_{int(other['images'][0]['path'][3]) % 2:06d}" / other["images"][0]["path"]
        assert row["images"] == [{"path": str(file), "bytes": None}]
        assert file.read_bytes() == other["images"][0]["bytes"]


@pytest.mark.parametrize(("format", "write"), [("grand", write_grand), ("grand_f", write_grand_f)])
def test_pieces_read_in_any_order_make_the_same_rows(tmp_path, monkeypatch, format, write):
    folders = write(tmp_path / "data")
    whole = read(folders, tmp_path / "whole", format=format)
    assert len(whole) == 5
    for module in (grand, grand_f):
        monkeypatch.setattr(module, "cut", functools.partial(cut, size=2))
    pieces = open_source(format, *folders).pieces(tmp_path / "cut")
    assert len(pieces) == 3
    found = {
        piece.name: list(open_source(format, *folders).read(piece, tmp_path / "cut")) for piece in reversed(pieces)
    }
    assert [row for name in sorted(found) for row in found[name]] == whole


def change(file, function):
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def change_dense(**values):
    return lambda content: content["dense_caption"]["details"][1].update(values)


def change_object(**values):
    return lambda content: content["objects"][3].update(values)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (change_dense(phrase="two cats"), "phrase not in the text"),
        (change_dense(phrase="two ball"), "phrase not in the text"),
        (change_dense(phrase=" "), "not a phrase"),
        (change_dense(phrase=None), "not a phrase"),
        (lambda content: content["dense_caption"]["details"].__setitem__(1, "two balls"), "not a phrase"),
        (change_dense(ids=[2, 99]), "no object"),
        (change_dense(ids=[2, "3"]), "no object"),
        (change_dense(ids=[]), "no object"),
        (change_dense(ids=None), "no object"),
        (lambda content: content["dense_caption"]["details"][1].pop("ids"), "no object"),
        (lambda content: content["objects"].pop(3), "no object"),
        (lambda content: content["objects"].__setitem__(3, 3), "no object"),
        (change_object(bbox=None), "not a box"),
        (change_object(bbox=[1, 2, 3]), "not a box"),
        (change_object(bbox=[5, 5, 5, 9]), "empty box"),
        (change_object(bbox=[500, 5, 600, 9]), "empty box"),
        (change_object(segmentation={"size": [20, 20], "counts": "`<"}), "mask of another size"),
        (change_object(segmentation={"counts": "`<"}), "mask of another size"),
        (change_object(segmentation={"size": [54, 46], "counts": "damaged"}), "damaged segmentation"),
        (change_object(segmentation={"size": [54, 46], "counts": None}), "damaged segmentation"),
        (change_object(segmentation="mask"), "damaged segmentation"),
        (change_object(segmentation=rle(np.zeros((54, 46)))), "empty mask"),
        (change_object(segmentation=rle(object_mask(0, (46, 54)))), "mask outside its box"),
    ],
)
def test_a_bad_phrase_is_left_out_and_named(folders, tmp_path, function, kind):
    before = read(folders, tmp_path / "before")
    change(folders[0] / FILES[0], lambda content: function(content["sa_2.jpg"]))
    bad, *after = read(folders, tmp_path / "after")
    assert (bad.kind, bad.phrase, bad.file, bad.row) == (kind, True, FILES[0], 0)
    assert "dense_caption, caption 0: the phrase" in bad.reason
    left = [entry for entry in before[0]["grounding"] if entry["start"] != DENSE.index("two balls")]
    assert after == [before[0] | {"grounding": left}, *before[1:]]


def written(text):
    return lambda path, images: (path / FILES[0]).write_text(text)


def changed(function):
    return lambda path, images: change(path / FILES[0], lambda content: function(content["sa_2.jpg"]))


def other_image(path, images):
    change(path / FILES[0], lambda content: content.update({"sa_99.jpg": content.pop("sa_2.jpg")}))


def damaged_image(path, images):
    data = (images / "sa_000000.tar").read_bytes()
    start = data.index(b"\xff\xd8")
    (images / "sa_000000.tar").write_bytes(data[:start] + b"\0" * 100 + data[start + 100 :])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (written('{"sa_2.jpg": {'), "not JSON"),
        (written("[" * 100_000), "not JSON"),
        (written("\udcff".encode("utf-8", "surrogateescape").decode("latin-1")), "not JSON"),
        (written("[]"), "not of this layout"),
        (written("{}"), "not of this layout"),
        (written('{"sa_2.jpg": []}'), "not of this layout"),
        (other_image, "missing image"),
        (damaged_image, "broken image"),
        (changed(lambda content: content.pop("dense_caption")), "no caption"),
        (changed(lambda content: content.update(dense_caption="a dog")), "no caption"),
        (changed(lambda content: content["dense_caption"].update(caption=" ")), "not a text"),
        (changed(lambda content: content["dense_caption"].update(caption="half \ud800")), "not a text"),
        (changed(lambda content: content["dense_caption"].pop("caption")), "not a text"),
        (changed(lambda content: content["dense_caption"].pop("details")), "no details"),
    ],
)
def test_a_bad_entry_is_left_out_and_named(folders, tmp_path, damage, kind):
    before = read(folders, tmp_path / "before")
    damage(*folders)
    bad, *after = read(folders, tmp_path / "after")
    assert (bad.kind, bad.phrase, bad.file, bad.row) == (kind, False, FILES[0], 0)
    assert after == before[1:]


@pytest.mark.usefixtures("own_cache")
def test_bad_entries_are_errors_unless_they_are_skipped(folders):
    other_image(*folders)
    change(folders[0] / FILES[1], lambda content: change_dense(phrase="two cats")(content["sa_4.jpg"]))
    source = open_source("grand", *folders)
    with pytest.raises(ValueError, match=r"sa_2\.json, entry 0: there is no image 'sa_99\.jpg'"):
        prepare_source(source, on_bad_row="error", progress=False)
    prepared = prepare_source(source, on_bad_row="skip", progress=False)
    assert prepared.bad == {("missing image", False): 1, ("phrase not in the text", True): 1}
    assert prepared.dataset["id"][:] == [f"sa_{number}#0" for number in (4, 1, 3, 5)]
    assert [image.size for (image,) in prepared.dataset["images"]] == [image_size(number) for number in (4, 1, 3, 5)]


def test_a_bad_short_caption_leaves_the_others(folders, tmp_path):
    before = read(folders, tmp_path / "before", "short_captions")
    change(folders[0] / FILES[0], lambda content: content["sa_2.jpg"]["short_captions"].__setitem__(0, None))
    bad, *after = read(folders, tmp_path / "after", "short_captions")
    assert (bad.kind, bad.phrase, bad.row) == ("not a text", False, 0)
    assert after == before[1:]


def test_captions_need_no_phrases_or_objects(folders, tmp_path):
    def change_all(content):
        del content["sa_2.jpg"]["objects"], content["sa_2.jpg"]["floating_objects"]
        content["sa_2.jpg"]["dense_caption"]["details"] = []

    change(folders[0] / FILES[0], change_all)
    row = read(folders, tmp_path)[0]
    assert row["grounding"] == []
    assert message_text(row["messages"][1]) == DENSE


def test_an_archive_that_breaks_off_is_named(folders, tmp_path):
    archive = folders[1] / "sa_000001.tar"
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"sa_000001\.tar is not a whole tar file"):
        read(folders, tmp_path)


def test_the_files_are_the_folders_and_the_archives(folders):
    path, images = folders
    assert set(open_source("grand", *folders).files()) == {
        path,
        path / "part_1",
        path / "part_2",
        images / "sa_000000.tar",
        images / "sa_000001.tar",
    }


def test_what_is_missing_is_named_with_its_address(folders, tmp_path):
    path, images = folders
    with pytest.raises(FileNotFoundError, match="hf download MBZUAI/GranD "):
        open_source("grand", path / "no", images)
    with pytest.raises(FileNotFoundError, match="segment-anything-downloads"):
        open_source("grand", path)
    with pytest.raises(ValueError, match="must be dense_caption or short_captions"):
        open_source("grand", path, images, "train")
    with pytest.raises(FileNotFoundError, match="hf download MBZUAI/GranD-f "):
        open_source("grand_f", path / "no.json", images)
    file, _ = write_grand_f(tmp_path)
    with pytest.raises(FileNotFoundError, match="GranDf_HA_images"):
        open_source("grand_f", file)
    with pytest.raises(ValueError, match="no splits"):
        open_source("grand_f", file, images, "train")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    photograph(1, (40, 40)).save(images / "sa_1.jpg")
    peaks = []
    for number, count in enumerate((200, 1200)):
        path = tmp_path / f"{count}"
        path.mkdir()
        for i in range(count):
            (path / f"sa_{i}.json").write_text('{"sa_1.jpg": {"dense_caption": {"caption": "A dog.", "details": []}}}')
        work = tmp_path / "work" / str(number)
        source = open_source("grand", path, images)
        tracemalloc.start()
        rows = sum(1 for piece in source.pieces(work) for _ in source.read(piece, work))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == count
    assert peaks[1] - peaks[0] < 1000 * 100  # bytes; the names of a piece, and no more


WORDS = st.sampled_from(["a", "dog", "Dog", "dogs", "two-tone", "man's", ",", "(x)", "é", "İ"])


@given(st.lists(WORDS, min_size=1, max_size=12), st.data())
def test_a_phrase_is_found_where_the_span_says(words, data):
    text = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    start, phrase = len(" ".join([*words[:first], ""])), " ".join(words[first : last + 1])
    assert phrase_span(text, phrase, [start, start + len(phrase)]) == (start, start + len(phrase))


@pytest.mark.parametrize(
    ("text", "phrase", "span", "expected"),
    [
        ("A woman and a man.", "man", [4, 7], "man"),  # not the end of "woman"
        (
            "A welllit street",
            "a well  lit street",
            None,
            "A welllit street",
        ),  # "a well - lit street" without punctuation
        ("A street,\nwet", "street, wet", [0, 5], "street,\nwet"),
        ("The dog (left).", "dog (left)", "none", "dog (left)"),
        ("Dogs and dogs", "dogs", [8, 12], "dogs"),
        ("Dogs and dogs", "dogs", {}, "Dogs"),
        ("Dogs and dogs", "dogs", [None, 3], "Dogs"),
    ],
)
def test_a_phrase_is_looked_for_as_whole_words(text, phrase, span, expected):
    start, end = phrase_span(text, phrase, span)
    assert text[start:end] == expected


def test_no_part_of_a_word_is_a_phrase():
    with pytest.raises(BadEntryError):
        phrase_span("A woman.", "man", [4, 7])


# --- GranD-f ---


@pytest.fixture
def files(tmp_path):
    return write_grand_f(tmp_path)


def test_grand_f(files, tmp_path):
    rows = read(files, tmp_path, format="grand_f")
    assert len(rows) == 5
    for number, row in enumerate(rows):
        assert message_text(row["messages"][1]) == DENSE
        assert row["images"] == [{"path": str(files[1] / f"sa_{number + 1}.jpg"), "bytes": None}]
        assert (row["file"], row["row"], row["id"]) == (files[0].name, number, f"sa_{number + 1}.jpg#{number}")
        expected = [("a brown dog", 0), ("two balls", 2), ("two balls", 3), ("a rug", 1)]
        check_grounding(row, image_size(number + 1), expected)


def set_grounding(**values):
    return lambda entry: entry["groundings"]["two balls"].update(values)


@pytest.mark.parametrize(
    ("function", "kind", "phrase"),
    [
        (
            lambda entry: entry["groundings"].update({"a cat": entry["groundings"].pop("two balls")}),
            "phrase not in the text",
            True,
        ),
        (lambda entry: entry["groundings"].update({"two balls": None}), "no mask", True),
        (set_grounding(rle_masks=[]), "no mask", True),
        (set_grounding(rle_masks=[{"size": [2, 2], "counts": "04"}]), "mask of another size", True),
        (set_grounding(rle_masks=[None]), "damaged segmentation", True),
        (set_grounding(rle_masks=[rle(np.zeros((54, 46)))]), "empty mask", True),
        (lambda entry: entry.pop("groundings"), "not of this layout", False),
        (lambda entry: entry.pop("caption"), "not a text", False),
        (lambda entry: entry.pop("file_name"), "missing image", False),
        (lambda entry: entry.update(file_name="sa_9.jpg"), "missing image", False),
        (lambda entry: entry.update(file_name="../train/sa_2.jpg"), None, False),
        (lambda entry: entry.update(file_name="../../GranDf_HA_GCG_train.json"), "image outside its folder", False),
        (lambda entry: entry.clear(), "not a text", False),
    ],
)
def test_bad_entries_of_grand_f_are_left_out_and_named(files, tmp_path, function, kind, phrase):
    before = read(files, tmp_path / "before", format="grand_f")
    change(files[0], lambda entries: function(entries[1]))
    after = read(files, tmp_path / "after", format="grand_f")
    bad = [found for found in after if isinstance(found, BadEntry)]
    assert [(found.kind, found.phrase, found.row) for found in bad] == [(kind, phrase, 1)][: kind is not None]
    rows = [found for found in after if found not in bad]
    assert len(rows) == 5 - (kind is not None and not phrase)
    assert [row for row in rows if row["row"] != 1] == [row for row in before if row["row"] != 1]
    if phrase:
        left = [entry for entry in before[1]["grounding"] if entry["start"] != DENSE.index("two balls")]
        assert rows[1]["grounding"] == left
