# SPDX-License-Identifier: Apache-2.0
"""COCO: captions with grounded categories, and POPE's questions, against the masks and a sampling of the test's own."""

import json
import os
import random
import re
from collections import Counter

import numpy as np
import pytest
from grounded_rows import photograph
from published_coco import CATEGORIES, rectangles, save_coco, uncompressed, write_coco

from agevlm.data.check import check_row
from agevlm.data.formats import open_source
from agevlm.data.formats.source import BadEntry
from agevlm.data.mixture import WEIGHT_COLUMN, DataPart, read_mixture
from agevlm.data.prepared import prepare_source
from agevlm.evaluation.pope import parse_yes_no, read_yes_no, yes_no_scores
from agevlm.processing.rows import mask_from_rle, message_text

NUMBERS = {name: number for number, name in CATEGORIES.items()}


def read(path, work, format="coco", images=None):
    """The rows and the bad entries of all pieces in their order."""
    source = open_source(format, path, images)
    found = [one for piece in source.pieces(work) for one in source.read(piece, work)]
    return [one for one in found if not isinstance(one, BadEntry)], [one for one in found if isinstance(one, BadEntry)]


def named(row):
    """The words of a row's phrases with their boxes and masks."""
    texts = [message_text(message) for message in row["messages"]]
    return [(texts[p["message"]][p["start"] : p["end"]], p["box"], mask_from_rle(p["mask"])) for p in row["grounding"]]


def box_around(mask):
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def one_image(folder, instances, captions, **image):
    """A data set of one image of 60 x 40 pixels; instances are category, boxes of whole pixels or a segmentation, whether a crowd."""
    (folder / "train2017").mkdir()
    photograph(1, (60, 40)).save(folder / "train2017" / "1.png")
    image = {"id": 1, "file_name": "1.png", "width": 60, "height": 40} | image
    written = [
        {"image_id": 1, "category_id": NUMBERS.get(category, category), "iscrowd": int(crowd), "segmentation": what}
        for category, what, crowd in instances
    ]
    return save_coco(folder, "train2017", [image], written, [{"image_id": 1, "caption": text} for text in captions])


# --- captions ---


def test_captions_are_grounded_in_the_instances(tmp_path):
    path, masks, texts = write_coco(tmp_path)
    rows, bad = read(path, tmp_path / "work")
    assert not bad
    assert len(rows) == 5 * len(masks)
    phrases = 0
    for row in rows:
        assert check_row(row) == []
        (image,) = row["images"]
        name = os.path.basename(image["path"])
        caption = message_text(row["messages"][1])
        assert message_text(row["messages"][0]) == "Describe this image."
        parts = next(parts for parts in texts[name] if "".join(words for words, _ in parts) == caption)
        expected = []
        for words, category in parts:
            if category is not None:
                here = masks[name][category]
                union = np.any([mask for mask, _ in here], axis=0)
                expected.append(
                    (words.split(" ", 1)[-1].removeprefix("herd of "), union)
                )  # the noun, without "a" or "some"
        found = named(row)
        assert [words for words, _, _ in found] == [words for words, _ in expected]
        for (_, box, mask), (_, union) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mask, union)
            assert box == box_around(union)
        phrases += len(found)
    assert phrases > 80
    # Each caption of the file is a row, with its number there.
    written = json.loads((tmp_path / "annotations/captions_train2017.json").read_text())["annotations"]
    assert sorted(row["row"] for row in rows) == list(range(len(written)))
    for row in rows:
        assert written[row["row"]]["caption"].strip() == message_text(row["messages"][1])
        assert (row["file"], row["id"]) == ("captions_train2017.json", str(written[row["row"]]["id"]))


BOXES = [(1, 1, 9, 9), (20, 5, 31, 12), (40, 20, 55, 39)]


@pytest.mark.parametrize(
    ("instances", "caption", "expected"),
    [
        # As many instances as the words say: all of them. Else it is not known which are meant.
        ([("dog", 0)], "A dog runs.", {"dog": [0]}),
        ([("dog", 0), ("dog", 1)], "A dog runs.", {}),
        ([("dog", 0), ("dog", 1)], "Two dogs run.", {"dogs": [0, 1]}),
        ([("dog", 0), ("dog", 1), ("dog", 2)], "Two dogs run.", {}),
        ([("dog", 0), ("dog", 1), ("dog", 2)], "Dogs run.", {"Dogs": [0, 1, 2]}),
        ([("dog", 0)], "Some dogs run.", {"dogs": [0]}),
        ([("sheep", 0), ("sheep", 1)], "A sheep eats.", {}),
        ([("sheep", 0), ("sheep", 1)], "A herd of sheep.", {"sheep": [0, 1]}),
        # A category without an instance is not grounded, and not absent.
        ([("dog", 0)], "A cat and a dog.", {"dog": [0]}),
        # Words for several categories are of the one that is there.
        ([("bicycle", 0)], "A bike.", {"bike": [0]}),
        ([("motorcycle", 0)], "A bike.", {"bike": [0]}),
        ([("motorcycle", 0), ("bicycle", 1)], "A bike.", {}),
        ([("teddy bear", 0)], "A bear on a bed.", {"bear": [0]}),
        # Words that name something else.
        ([("dog", 0), ("hot dog", 1)], "A hot dog.", {"hot dog": [1]}),
        ([("train", 0), ("car", 1)], "The train station, a train car and a car seat.", {"train car": [0]}),
        ([], "A dog runs.", {}),
    ],
)  # fmt: skip
def test_which_instances_words_mean(tmp_path, instances, caption, expected):
    path = one_image(tmp_path, [(name, rectangles(BOXES[i]), False) for name, i in instances], [caption])
    (row,), bad = read(path, tmp_path / "work")
    assert not bad
    drawn = {}
    for words, box, mask in named(row):
        drawn[words] = [i for i, (x0, y0, x1, y1) in enumerate(BOXES) if mask[y0:y1, x0:x1].all()]
        assert mask.sum() == sum((BOXES[i][2] - BOXES[i][0]) * (BOXES[i][3] - BOXES[i][1]) for i in drawn[words])
        assert box == box_around(mask)
    assert drawn == expected


def test_crowds_are_part_of_several_and_never_one(tmp_path):
    crowd = np.random.default_rng(0).random((40, 60)) < 0.3
    path = one_image(
        tmp_path,
        [
            ("person", rectangles(BOXES[0]), False),
            ("person", uncompressed(crowd), True),
            ("bus", uncompressed(crowd), True),
        ],
        ["People wait for a bus.", "A person waits.", "Two people wait."],
    )
    rows, bad = read(path, tmp_path / "work")
    assert not bad
    crowd[1:9, 1:9] = True
    ((words, _, mask),) = named(rows[0])
    assert words == "People"
    np.testing.assert_array_equal(mask, crowd)
    assert [row["grounding"] for row in rows[1:]] == [[], []]


def test_an_instance_without_pixels_is_no_mistake(tmp_path):
    """COCO has two, with such a segmentation."""
    flat = [[29.65, 38.33, 29.65, 38.33, 29.68, 38.33, 29.68, 38.33]]
    names = ["hot dog", "person", "car"]
    path = one_image(
        tmp_path,
        [("hot dog", flat, False), *((n, rectangles(BOXES[0]), False) for n in names[1:])],
        ["A hot dog and a man."],
    )
    (row,), bad = read(path, tmp_path / "work")
    assert not bad
    assert [words for words, _, _ in named(row)] == ["man"]
    rows, bad = read(path, tmp_path / "questions", "coco_questions")
    assert not bad
    about = [row for row in rows if "a hot dog in" in message_text(row["messages"][0])]
    assert len(about) == 3
    assert all(message_text(row["messages"][1]) == "Yes" and row["grounding"] == [] for row in about)


# --- questions ---


def many_images(folder, count, seed=0, categories=12):
    """Entries that share one image of 60 x 40 pixels, with boxes of random categories; some captions name a category that has no instance."""
    rng = random.Random(seed)
    (folder / "train2017").mkdir(parents=True)
    photograph(1, (60, 40)).save(folder / "train2017" / "1.png")
    names = list(CATEGORIES.values())[:categories]
    images, instances, captions, there, overlooked = [], [], [], {}, {}
    for number in range(1, count + 1):
        images.append({"id": number, "file_name": "1.png", "width": 60, "height": 40})
        weights = [1 / (k + 1) for k in range(categories)]
        here = set(rng.choices(names, weights, k=rng.randint(0, 8)))
        there[number] = [name for name in names if name in here]
        for name in here:
            for _ in range(rng.randint(1, 3)):
                instances.append(
                    {
                        "image_id": number,
                        "category_id": NUMBERS[name],
                        "segmentation": rectangles(BOXES[len(instances) % 3]),
                    }
                )
        overlooked[number] = {"airplane"} - here if number % 3 == 0 else set()
        captions.append({"image_id": number, "caption": "A jet." if number % 3 == 0 else "A picture."})
    rng.shuffle(instances)
    return save_coco(folder, "train2017", images, instances, captions), names, there, overlooked


def pope_ranks(there, names):
    """Frequencies and co-occurrences of the images that POPE asks about, by matrices."""
    presence = np.array([[name in here for name in names] for here in there.values() if len(here) >= 3], dtype=int)
    together = presence.T @ presence
    popular = np.argsort(-presence.sum(0), kind="stable")
    beside = {}
    for i, name in enumerate(names):
        order = np.argsort(-together[i], kind="stable")
        beside[name] = [names[j] for j in order if j != i and together[i, j]]
    return [names[i] for i in popular if presence[:, i].any()], beside


def asked_of(rows):
    """By kind and image, the questions in their order: object, answer."""
    found = {}
    for row in rows:
        question, answer = map(message_text, row["messages"])
        article, name = question.removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)
        assert article == ("an" if name[0] in "aeiou" else "a")
        found.setdefault((row["kind"], int(row["id"].split("-")[0])), []).append((name, answer))
    return found


def test_questions_are_sampled_as_pope_does(tmp_path):
    path, names, there, overlooked = many_images(tmp_path, 150)
    rows, bad = read(path, tmp_path / "work", "coco_questions")
    assert not bad
    popular, beside = pope_ranks(there, names)
    asked = asked_of(rows)
    assert {image for _, image in asked} == {image for image, here in there.items() if len(here) >= 3}
    shown, chosen = Counter(), Counter()
    for (kind, image), questions in asked.items():
        present = [name for name, answer in questions if answer == "Yes"]
        absent = [name for name, answer in questions if answer == "No"]
        assert len(set(present)) == 3
        assert set(present) <= set(there[image])
        assert present == [name for name, answer in asked["random", image] if answer == "Yes"]
        assert not set(absent) & ({*there[image]} | overlooked[image])
        left = [name for name in popular if name not in there[image] and name not in overlooked[image]]
        assert len(absent) == len(set(absent)) == min(3, len(left))
        if kind == "random":
            shown.update(left)
            chosen.update(absent)
        elif kind == "popular":
            assert absent == left[:3]
        else:
            history, expected = {*there[image], *overlooked[image]}, []
            for name in present:
                best = next((other for other in beside[name] if other not in history), None)
                if best is None:  # POPE takes any other then
                    break
                history.add(best)
                expected.append(best)
            assert absent[: len(expected)] == expected
            assert len(expected) == 3 or len(left) < 8
    # At random each object that an image lacks is as probable as any other.
    rates = [chosen[name] / shown[name] for name in names if shown[name] > 40]
    assert len(rates) >= 8
    assert min(rates) > 0.5 * np.mean(rates)
    assert max(rates) < 1.6 * np.mean(rates)


def test_questions_are_grounded_and_answered_as_pope_reads_them(tmp_path):
    path, masks, _ = write_coco(tmp_path)
    rows, bad = read(path, tmp_path / "work", "coco_questions")
    assert not bad
    assert len(rows) == 18 * len(masks)
    labels, answers = [], []
    for row in rows:
        assert check_row(row) == []
        question, answer = map(message_text, row["messages"])
        here = masks[os.path.basename(row["images"][0]["path"])]
        ((words, box, mask),) = named(row)
        assert question in (f"Is there a {words} in the image?", f"Is there an {words} in the image?")
        assert row["grounding"][0]["score"] is None
        if words in here:
            np.testing.assert_array_equal(mask, np.any([mask for mask, _ in here[words]], axis=0))
            assert box == box_around(mask)
        else:
            assert not mask.any()
            assert box is None
        labels.append("yes" if words in here else "no")
        answers.append(answer)
    assert Counter(labels) == {"yes": len(rows) / 2, "no": len(rows) / 2}
    assert [parse_yes_no(answer) for answer in answers] == [read_yes_no(answer) for answer in answers] == labels
    assert yes_no_scores(answers, labels)["accuracy"] == 1
    assert len({row["id"] for row in rows}) == len(rows)


def test_questions_do_not_depend_on_other_images_beyond_the_counts(tmp_path):
    """Those of an image are the same wherever it stands in the file."""
    path, *_ = many_images(tmp_path, 30)
    rows, _ = read(path, tmp_path / "work", "coco_questions")
    content = json.loads(path.read_text())
    random.Random(1).shuffle(content["images"])
    random.Random(2).shuffle(content["annotations"])
    path.write_text(json.dumps(content))
    again, _ = read(path, tmp_path / "again", "coco_questions")
    texts = [
        {row["id"]: [message_text(message) for message in row["messages"]] for row in some} for some in (rows, again)
    ]
    assert texts[0] == texts[1]


# --- pieces, bad entries, files ---


@pytest.mark.parametrize("format", ["coco", "coco_questions"])
def test_pieces_in_any_order_are_one_pass(tmp_path, format, monkeypatch):
    from agevlm.data.formats import coco

    monkeypatch.setattr(coco, "IMAGES", 2)
    path, *_ = write_coco(tmp_path)
    source = open_source(format, path)
    work = tmp_path / "work"
    pieces = source.pieces(work)
    assert len(pieces) >= 4
    whole = [found for piece in pieces for found in source.read(piece, work)]
    apart = {piece.name: list(open_source(format, path).read(piece, work)) for piece in reversed(pieces)}
    assert [found for piece in pieces for found in apart[piece.name]] == whole
    assert open_source(format, path).pieces(work) == pieces


def spoiled(folder, **change):
    """A data set of three images, whose first has what `change` says."""
    path, *_ = many_images(folder, 3)
    content = json.loads(path.read_text())
    content["annotations"] = [
        {"id": n, "image_id": 1 + n // 3, "category_id": 16 + n % 3, "iscrowd": 0, "segmentation": rectangles(BOXES[n % 3])} for n in range(9)
    ]  # fmt: skip
    captions = {"annotations": [{"id": n, "image_id": n, "caption": "A bird, a cat and a dog."} for n in (1, 2, 3)]}
    content["images"][0] |= change.get("image", {})
    content["annotations"][0] |= change.get("instance", {})
    captions["annotations"][0] |= change.get("caption", {})
    path.write_text(json.dumps(content))
    path.with_name("captions_train2017.json").write_text(json.dumps(captions))
    return path


SPOILED = {
    "missing": ({"image": {"file_name": "2.png"}}, "missing image", "no image .*2.png", False),
    "no name": ({"image": {"file_name": None}}, "missing image", "the image is None", False),
    "outside": ({"image": {"file_name": "../annotations/instances_train2017.json"}}, "image outside its folder", "leads out of", False),
    "size": ({"image": {"width": 61}}, "image of another size", "has 60 x 40 pixels, but was annotated with 61 x 40", False),
    "twice": ({"image": {"id": 2}}, "image without an id of its own", "has the id 2", False),
    "no id": ({"image": {"id": None}}, "image without an id of its own", "has the id None", False),
    "no caption": ({"caption": {"image_id": 2}}, "image without captions", "has no caption in .*captions_train2017.json", False),
    "unknown image": ({"caption": {"image_id": 7}}, "annotation of an unknown image", "of the image 7, which instances_train2017.json does not have", False),
    "unknown image of an instance": ({"instance": {"image_id": "x"}}, "annotation of an unknown image", "of the image 'x'", False),
    "unknown category": ({"instance": {"category_id": 12}}, "unknown category", "the category 12, which is none of the file's", True),
    "no category": ({"instance": {"category_id": [16]}}, "unknown category", r"the category \[16\]", True),
    "damaged": ({"instance": {"segmentation": [[1, 2, 3]]}}, "damaged segmentation", "the annotation has a segmentation that cannot be read", True),
    "crowd of another size": ({"instance": {"segmentation": {"size": [60, 40], "counts": [2400]}}}, "damaged segmentation", r"its size is \[60, 40\]", True),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_bad_entries_are_counted_by_kind(tmp_path, name):
    change, kind, reason, phrase = SPOILED[name]
    path = spoiled(tmp_path, **change)
    for format in ("coco", "coco_questions"):
        rows, bad = read(path, tmp_path / format, format)
        found = [one for one in bad if one.kind == kind]
        assert len(found) >= 1, bad
        assert all(one.phrase == phrase for one in found)
        assert any(re.search(reason, one.reason) for one in found), found
        assert {row["row"] for row in rows if row["row"] > 0} == ({2} if name == "twice" else {1, 2})
        if format == "coco" and phrase:
            first = next(row for row in rows if row["row"] == 0)
            assert [words for words, _, _ in named(first)] == ["cat", "dog"]
        with pytest.raises(ValueError, match="entry") as caught:
            prepare_source(open_source(format, path), on_bad_row="error", progress=False)
        assert f"{bad[0].file}, entry {bad[0].row}: {bad[0].reason}" in str(caught.value)


def test_a_caption_that_is_no_text(tmp_path):
    rows, bad = read(spoiled(tmp_path, caption={"caption": "  "}), tmp_path / "work")
    assert [(one.file, one.row, one.kind, one.phrase) for one in bad] == [
        ("captions_train2017.json", 0, "not a text", False)
    ]
    assert [row["row"] for row in rows] == [1, 2]


def test_images_lie_where_the_archives_unpack(tmp_path):
    path, masks, _ = write_coco(tmp_path / "coco")
    expected, _ = read(path, tmp_path / "work")
    for images in (tmp_path / "coco", tmp_path / "coco" / "train2017"):
        rows, _ = read(path, tmp_path / "work", images=images)
        assert rows == expected
    moved = tmp_path / "coco" / "annotations" / "train2017"
    (tmp_path / "coco" / "train2017").rename(moved)
    rows, _ = read(path, tmp_path / "work")
    assert {row["images"][0]["path"] for row in rows} == {str(moved / name) for name in masks}


def test_what_cannot_be_opened_says_what_is_needed(tmp_path):
    path, *_ = write_coco(tmp_path)
    captions = path.with_name("captions_train2017.json")
    with pytest.raises(ValueError, match=r"captions_train2017\.json: name the file instances_NAME\.json"):
        open_source("coco", captions)
    with pytest.raises(ValueError, match="has no split 'val'; name the file of that split"):
        open_source("coco", path, None, "val")
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere; unpack train2017"):
        open_source("coco_questions", path, tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"instances_val2017\.json; coco reads .* and captions_val2017\.json beside it"
    ):
        open_source("coco", path.with_name("instances_val2017.json"))
    path.write_text(path.read_text().replace('"name": "dog"', '"name": 5'))
    with pytest.raises(
        ValueError, match=r'instances_train2017\.json, categories\[16\] is not {"id": number, "name": text}'
    ):
        open_source("coco", path).pieces(tmp_path / "work")
    captions.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"captions_train2017\.json; coco_questions reads instances_train2017\.json and .* beside it",
    ):
        open_source("coco_questions", path)


def test_kinds_of_questions_are_weighted(tmp_path):
    path, masks, _ = write_coco(tmp_path)
    part = DataPart(str(path), format="coco_questions", weight_by={"kind": {"adversarial": 3, "random": 1}})
    mixture = read_mixture([part])  # the rows of two of the three kinds, six of each for an image, with their weights
    assert Counter(mixture[WEIGHT_COLUMN]) == {0.75: 6 * len(masks), 0.25: 6 * len(masks)}
