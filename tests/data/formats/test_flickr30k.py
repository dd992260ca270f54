# SPDX-License-Identifier: Apache-2.0
"""Flickr30k Entities: captions and boxes against a reading of the test's own; each kind of bad entry is named and leaves the rest."""

import itertools
import re
import shutil
import time
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from published_flickr30k import write_flickr30k

from agevlm.data.check import check_row
from agevlm.data.formats import flickr30k, open_source
from agevlm.data.formats.flickr30k import Flickr30k
from agevlm.data.formats.source import BadEntry
from agevlm.data.prepared import prepare_source
from agevlm.processing.rows import message_text


@pytest.fixture
def folders(tmp_path):
    return write_flickr30k(tmp_path)


def read(folders, work, split="train"):
    source = Flickr30k(*folders, split)
    return [found for piece in source.pieces(work) for found in source.read(piece, work)]


def words_and_phrases(sentence):
    """The words of a sentence and its phrases, `(chain, first word, words)`, token by token, as the data set's own code counts them."""
    words, phrases, inside = [], [], False
    for token in sentence.split():
        if token.startswith("[/EN#"):
            inside = True
            phrases.append((token.split("/")[1][3:], len(words), []))
            continue
        word = token.removesuffix("]") if inside else token
        words.append(word)
        if inside:
            phrases[-1][2].append(word)
            inside = not token.endswith("]")
    return words, phrases


def boxes_of(annotation):
    """The boxes of each chain, found in the text of an annotation."""
    boxes = {}
    for block in re.findall(r"<object>(.*?)</object>", annotation, re.DOTALL):
        sides = re.findall(r"<([xy]m..)>(\d+)<", block)
        for chain in re.findall(r"<name>(\d+)<", block):
            boxes.setdefault(chain, []).extend([{name: int(side) for name, side in sides}] if sides else [])
    return boxes


def test_rows_are_captions_whose_phrases_have_the_boxes_of_their_chains(folders, tmp_path):
    path, images = folders
    rows = iter(read(folders, tmp_path))
    phrases_with_boxes = 0
    for name in (path / "train.txt").read_text().split():
        boxes = boxes_of((path / "Annotations" / f"{name}.xml").read_text())
        for number, sentence in enumerate((path / "Sentences" / f"{name}.txt").read_text().splitlines()):
            row = next(rows)
            words, phrases = words_and_phrases(sentence)
            question, answer = (message_text(message) for message in row["messages"])
            assert question == "Describe this image."
            assert answer.replace(" ", "") == "".join(words)
            entries = iter(row["grounding"])
            for chain, first, phrase in phrases:
                for box in boxes.get(chain, []):
                    entry = next(entries)
                    assert answer[: entry["start"]].replace(" ", "") == "".join(words[:first])
                    assert answer[entry["start"] : entry["end"]].replace(" ", "") == "".join(phrase)
                    assert entry["box"] == [box["xmin"] - 1, box["ymin"] - 1, box["xmax"], box["ymax"]]
                    assert (entry["message"], entry["image"], entry["mask"], entry["score"]) == (1, 0, None, None)
                    phrases_with_boxes += 1
            assert next(entries, None) is None
            assert row["images"] == [{"path": str(images / f"{name}.jpg"), "bytes": None}]
            assert row["id"] == f"{name}#{number}"
            assert (row["file"], row["row"]) == (f"Sentences/{name}.txt", number)
            assert [problem for problem in check_row(row) if problem.severity == "error"] == []
    assert next(rows, None) is None
    assert phrases_with_boxes == 3 * (2 + 2 + 2 + 1 + 1 + 1 + 2 + 2)  # boxes of each phrase of the five sentences


def test_captions_are_written_as_people_write(folders, tmp_path):
    texts = [message_text(row["messages"][1]) for row in read(folders, tmp_path)[:5]]
    assert texts == [
        "Two young, White males are outside near many bushes.",
        "Two men in green shirts are standing in a yard.",
        "A man in a blue shirt waves, and it isn't raining.",
        'The man\'s friend (the other one) holds a sign with "Hello" on it.',
        "Two friends enjoy time spent together.",
    ]


TOKENS = st.sampled_from(["A", "man", "'s", "n't", ",", ".", "...", '"', "(", ")", "-", "'", "3", "é", "[", "]", "?!"])


@given(st.lists(st.tuples(st.booleans(), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=6))
def test_phrases_keep_their_words_whatever_spaces_go(parts):
    parts = [(marked, [t for t in tokens if not (marked and t in "[]")] or ["x"]) for marked, tokens in parts]
    sentence = " ".join(
        f"[/EN#{i}/other/people {' '.join(tokens)}]" if marked else " ".join(tokens)
        for i, (marked, tokens) in enumerate(parts)
    )
    text, phrases = flickr30k._read_sentence(sentence)
    assert text.replace(" ", "") == "".join(itertools.chain.from_iterable(tokens for _, tokens in parts))
    expected = [(str(i), "".join(tokens)) for i, (marked, tokens) in enumerate(parts) if marked]
    assert [(chain, text[start:end].replace(" ", "")) for chain, start, end in phrases] == expected
    assert all(text[start:end].strip() for _, start, end in phrases)


def test_pieces_read_in_any_order_make_the_same_rows(folders, tmp_path, monkeypatch):
    rows = read(folders, tmp_path)
    monkeypatch.setattr(flickr30k, "_IMAGES_A_PIECE", 1)
    pieces = Flickr30k(*folders, "train").pieces(tmp_path)
    assert len(pieces) == 3
    assert len({piece.name for piece in pieces}) == 3
    read_pieces = {piece.name: list(Flickr30k(*folders, "train").read(piece, tmp_path)) for piece in reversed(pieces)}
    assert [row for name in sorted(read_pieces) for row in read_pieces[name]] == rows


def test_splits_are_the_lists(folders, tmp_path):
    listed = {split: set((folders[0] / f"{split}.txt").read_text().split()) for split in ("train", "val", "test")}
    for split, names in listed.items():
        assert {row["id"].partition("#")[0] for row in read(folders, tmp_path, split)} == names
        files = {file.stem for file in Flickr30k(*folders, split).files()}
        assert files == names | {split, "UNRELATED_CAPTIONS"}


def test_the_archive_of_the_annotations_is_read_as_it_is(folders, tmp_path):
    path, images = folders
    rows = read(folders, tmp_path)
    shutil.make_archive(str(path / "annotations"), "zip", path, "Sentences")
    with zipfile.ZipFile(path / "annotations.zip", "a") as archive:
        for file in (path / "Annotations").iterdir():
            archive.write(file, f"Annotations/{file.name}")
    for name in ("Sentences", "Annotations"):
        shutil.rmtree(path / name)
    assert read(folders, tmp_path / "work") == rows
    assert path / "annotations.zip" in Flickr30k(path, images, "train").files()
    whole = (path / "annotations.zip").read_bytes()
    (path / "annotations.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"annotations\.zip cannot be unpacked"):
        Flickr30k(path, images, "train").pieces(tmp_path / "other work")
    assert not (tmp_path / "other work" / "annotations").exists()


def test_captions_about_something_else_are_left_out(folders, tmp_path):
    rows = read(folders, tmp_path)
    with open(folders[0] / "UNRELATED_CAPTIONS", "a") as unrelated:
        unrelated.write(f"{rows[0]['id'].partition('#')[0]} 2\n")
    assert read(folders, tmp_path) == rows[:1] + rows[2:]


def first(pattern, new):
    return lambda text: re.sub(pattern, new, text, count=1, flags=re.DOTALL)


LAUGHS = '<!DOCTYPE a [<!ENTITY l0 "ha">' + "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(12)) + "]>"

# By what is wrong with an image: the file, its change, the kind, and how many rows are lost. Where none is, phrases are.
ANNOTATION = "Annotations/{}.xml"
SENTENCES = "Sentences/{}.txt"
BAD = {
    "no sentences": (SENTENCES, None, "missing sentences", 5),
    "no annotation": (ANNOTATION, None, "missing annotation", 5),
    "latin-1": (SENTENCES, lambda text: "caf\xe9".encode("latin-1"), "unreadable sentences", 5),
    "not XML": (ANNOTATION, lambda text: text[:-20], "unreadable annotation", 5),
    "empty": (ANNOTATION, lambda text: "", "unreadable annotation", 5),
    "entities": (
        ANNOTATION,
        lambda text: LAUGHS + text.replace("</name>", "&l12;</name>"),
        "unreadable annotation",
        5,
    ),
    "other files": (
        ANNOTATION,
        lambda text: '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + text.replace("</name>", "&x;</name>"),
        "unreadable annotation",
        5,
    ),
    "UTF-16": (ANNOTATION, lambda text: (LAUGHS + text).encode("utf-16"), "unreadable annotation", 5),
    "no size": (ANNOTATION, first(r"<size>.*</size>", ""), "no size", 5),
    "an endless size": (ANNOTATION, first(r"<width>\d+<", f"<width>{'9' * 5000}<"), "no size", 5),
    "a word as size": (ANNOTATION, first(r"<width>\d+<", "<width>wide<"), "no size", 5),
    "another size": (ANNOTATION, first(r"<width>\d+<", "<width>640<"), "image of another size", 5),
    "no image": ("../flickr30k-images/{}.jpg", None, "missing image", 5),
    "a broken image": ("../flickr30k-images/{}.jpg", lambda text: b"no image", "broken image", 5),
    "an open bracket": (SENTENCES, first(r"White males\]", "White males"), "broken markup", 1),
    "no type": (SENTENCES, first(r"/people Two young", " Two young"), "broken markup", 1),
    "no words": (SENTENCES, first(r"Two young , White males\]", "]"), "broken markup", 1),
    "a box without a side": (ANNOTATION, first(r"<ymax>\d+</ymax>", ""), "not a box", 0),
    "a word as side": (ANNOTATION, first(r"<ymax>\d+<", "<ymax>low<"), "not a box", 0),
    "no number as side": (ANNOTATION, first(r"<ymax>\d+<", "<ymax>nan<"), "not a box", 0),
    "a box outside": (
        ANNOTATION,
        first(r"<xmin>\d+</xmin>(.*?)<xmax>\d+<", r"<xmin>900</xmin>\1<xmax>950<"),
        "empty box",
        0,
    ),
    "a reversed box": (ANNOTATION, first(r"<ymin>\d+<", "<ymin>4000<"), "empty box", 0),
}


@pytest.mark.parametrize("case", BAD)
def test_each_kind_of_bad_entry_is_named_and_costs_no_other_row(folders, tmp_path, case):
    place, change, kind, lost = BAD[case]
    rows = read(folders, tmp_path)
    name = rows[0]["id"].partition("#")[0]
    file = folders[0] / place.format(name)
    if change is None:
        file.unlink()
    else:
        changed = change(file.read_bytes().decode("utf-8", "replace"))
        file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    start = time.perf_counter()
    found = read(folders, tmp_path)
    assert time.perf_counter() - start < 1
    bad = [entry for entry in found if isinstance(entry, BadEntry)]
    kept = [entry for entry in found if not isinstance(entry, BadEntry)]
    assert {entry.kind for entry in bad} == {kind}
    assert all(name in f"{entry.file} {entry.reason}" for entry in bad)
    assert [row["id"] for row in kept] == [row["id"] for row in rows[lost:]]
    if lost:
        assert len(bad) == 1
        assert not bad[0].phrase
        assert bad[0].row == 0
        assert kept == rows[lost:]
    else:  # chain 0, which three sentences have, loses its phrases, and nothing else does
        assert [(entry.row, entry.phrase) for entry in bad] == [(0, True), (1, True), (3, True), (4, True)]
        lost_boxes = [len(old["grounding"]) - len(new["grounding"]) for old, new in zip(rows, kept, strict=True)]
        assert lost_boxes == [2, 2, 0, 2, 2] + [0] * 10
        assert [row["messages"] for row in kept] == [row["messages"] for row in rows]


def test_bad_phrases_and_entries_are_counted_or_an_error(folders, tmp_path, own_cache):
    names = (folders[0] / "train.txt").read_text().split()
    (folders[1] / f"{names[1]}.jpg").unlink()
    annotation = folders[0] / "Annotations" / f"{names[0]}.xml"
    annotation.write_text(first(r"<xmax>\d+<", "<xmax>wide<")(annotation.read_text()))
    source = open_source("flickr30k", *folders, "train")
    with pytest.raises(
        ValueError, match=r"Sentences/\d+\.txt, entry 0: the phrase 'Two young, White males' .*on_bad_row: skip"
    ):
        prepare_source(source, on_bad_row="error", progress=False)
    prepared = prepare_source(source, on_bad_row="skip", progress=False)
    assert prepared.bad == {("not a box", True): 4, ("missing image", False): 1}
    assert prepared.dataset["id"] == [f"{name}#{number}" for name in (names[0], names[2]) for number in range(5)]


def test_a_split_cannot_name_files_elsewhere(folders, tmp_path):
    (folders[0] / "more.txt").write_text("../Sentences/1\n\n.\n")
    bad = read(folders, tmp_path, "more")
    assert [(entry.kind, entry.row) for entry in bad] == [("not a name of an image", 0), ("not a name of an image", 2)]


def test_images_turned_by_their_camera_are_compared_upright(folders, tmp_path):
    row = read(folders, tmp_path)[0]
    file = row["images"][0]["path"]
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, so its file has other sides than what people see
    image.rotate(90, expand=True).save(file, exif=exif)
    assert read(folders, tmp_path)[0] == row


def test_what_is_missing_is_named_with_the_way_to_get_it(folders, tmp_path):
    path, images = folders
    with pytest.raises(FileNotFoundError, match=r"git clone https://github.com/BryanPlummer"):
        Flickr30k(tmp_path, images, "train")
    with pytest.raises(FileNotFoundError, match="folder of images None"):
        Flickr30k(path, None, "train")
    for split in (None, "dev"):
        with pytest.raises(ValueError, match=r"must name a list.*it has: test, train, val"):
            Flickr30k(path, images, split)
