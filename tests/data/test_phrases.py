# SPDX-License-Identifier: Apache-2.0
"""Phrases of texts: how many are right, what has none, which texts of a data set get them, and the way to masks."""

import json
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import run
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from grounded_rows import filled, make_dataset, make_row, photograph, png
from hypothesis import given
from hypothesis import strategies as st
from phrase_sentences import DEVELOPMENT, HELD_OUT, read_labels
from PIL import Image
from row_cases import good_row, preference_row, to_dataset, turns

from agevlm.data import add_masks, build_scenes, check_row
from agevlm.data.phrases import SpacyChunker, add_phrases, find_phrases, preview_phrases
from agevlm.processing.rows import mask_from_rle, message_text, row_features
from research.assets.debian import STAMPS
from research.assets.openmoji import OPENMOJI

pytestmark = pytest.mark.slow


def phrases(text, find=find_phrases):
    return [text[start:end] for start, end in find(text)]


# --- how many are right ---


def measure(pairs):
    """Precision and recall of pairs of found and true spans, and the number of true ones."""
    pairs = [(set(found), set(true)) for found, true in pairs]
    right = sum(len(found & true) for found, true in pairs)
    found, true = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    return right / found, right / true, true


@pytest.mark.parametrize("sentences", [DEVELOPMENT, HELD_OUT], ids=["development", "held_out"])
def test_sentences_labeled_by_hand(sentences):
    """The figures of docs/data.md, rounded down to whole percents."""
    precision, recall, number = measure((find_phrases(text), true) for text, true in map(read_labels, sentences))
    assert len(sentences) == 40
    assert number >= 90
    assert precision >= 0.98
    assert recall >= 0.98


def test_scenes(tmp_path):
    """Every phrase of a scene has its span. Its class names are nouns of one to three words, of which the lists know few."""
    for folder in ("cutouts", "backgrounds"):
        (tmp_path / folder).mkdir()
    for name in STAMPS | OPENMOJI:
        image = Image.new("RGBA", (12, 12))
        image.paste("red", (1, 1, 11, 11))
        image.save(tmp_path / f"cutouts/{name}.png")
    for number in range(3):
        Image.new("RGB", (70, 70), (60 * number,) * 3).save(tmp_path / f"backgrounds/{number}.png")
    scenes = build_scenes(
        tmp_path / "cutouts", tmp_path / "backgrounds", tmp_path / "scenes", num_train=300, num_validation=1, num_test=1,
        image_size=64, progress=False,
    )["train"]  # fmt: skip
    pairs = []
    for row in scenes.select_columns(["messages", "grounding"]):
        for number, message in enumerate(row["messages"]):
            true = {(e["start"], e["end"]) for e in row["grounding"] if e["message"] == number}
            pairs.append((find_phrases(message_text(message)), true))
    precision, recall, number = measure(pairs)
    assert number > 3000
    assert precision >= 0.99
    assert recall >= 0.99


# --- what has none ---

NONE = """
Yes|No.|top left|center|42|3:45 PM|red|B|(c)|The answer is B.|What is 2 + 2?
Answer the question using a single word or phrase.
Answer with the option's letter from the given choices directly.
Provide a one-sentence caption for the provided image.
Write a detailed description of the given image.
When the provided information is insufficient, respond with 'Unanswerable'.
Reference OCR token: STOP, DOG, BUS
The bounding box of the dog is [0.1, 0.2, 0.3, 0.4].
See https://host/a/dog.html for the dog|mail dog@host.org about the dog|the file dog.jpg
for dog in dogs: print(f"{dog}")|dog_1 = cats[0]|def dog(cat) -> bus:|\\frac{dog}{cat}|<b>the dog</b>|$dog = $cat
<image> the dog|[INST] the dog [/INST]|<|im_start|>user the dog
Ein Hund mit einem Ball auf der Straße|Ein Hund und eine Katze|Un perro corre en la playa con una pelota|Un chien est sur une table
Il cane mangia nel giardino|Een hond met een bal op het gras|狗在草地上|собака|el perro|le chien
Two 🐶 dogs|A dog\u200b on the grass|A ｄｏｇ on the grass|the d\u0301og
She was happy in Paris with John Smith.|They are playing tennis.|It is overcast.
The atmosphere is calm, and the lighting suggests an early time of day.
""".strip()


@pytest.mark.parametrize("text", [text for line in NONE.splitlines() for text in re.split(r"\|(?!im|>)", line)])
def test_texts_without_phrases(text):
    assert phrases(text) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Look:\n```python\nthe_dog = 'a dog'\nprint(a cat)\n```\nThe bus is red.", ["bus"]),
        ("Look: ```\na dog\n", []),  # code without an end
        ("| dog | cat |\n|---|---|\nA bus.", ["bus"]),
        ("A. dog\nB. cat", ["dog", "cat"]),
        ("1. A dog\n2) the cats\n- **Red bus**: a large bus\n# The title", ["dog", "cats", "Red bus", "large bus"]),
        ("The “red” dog’s collar — a gift… for cats", ["dog", "collar", "gift", "cats"]),
        ("The 🐶 dog. A cat!", ["cat"]),
        ("A MAN WITH A DOG", ["MAN", "DOG"]),
        ("dog, bell pepper, rose, garbage can", ["dog", "bell pepper", "rose", "garbage can"]),
        ("a group of people and a group of the people", ["group of people", "group", "people"]),
        ("A lot of dogs, a couple of cats, three kinds of birds", ["dogs", "cats", "birds"]),
        ("A parked car and a broken window near a watch", ["parked car", "broken window", "watch"]),
        ("Birds fly above the sea.", ["Birds", "sea"]),
        ("A man watches birds. The man's watches. Watch the cat.", ["man", "birds", "man", "watches", "cat"]),
    ],
)
def test_special_texts(text, wanted):
    assert phrases(text) == wanted


WORDS = st.sampled_from(
    re.findall(
        r"\S+",
        "a the of and two dog dogs bus rides holding parked red , . is group people image 's to ``` <x> é 🐶 ( - un",
    )
    + ["\n"]
)


@given(st.text(max_size=60) | st.lists(WORDS, max_size=20).map(" ".join))
def test_spans_of_any_text(text):
    spans = find_phrases(text)
    ends = [0, *(place for span in spans for place in span)]
    assert ends == sorted(ends)
    for start, end in spans:
        assert start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        assert text[start].isalpha()
        assert text[end - 1].isalpha()
        assert "\n" not in text[start:end]
    assert find_phrases(text) == spans


@pytest.mark.parametrize("piece", ["a", "a-", ".", "(", "5,", "x.y"])
def test_long_words_take_no_long_time(piece):
    """Base64, rows of dots in tables: quadratic time would be minutes."""
    start = time.process_time()
    assert phrases(piece * (200_000 // len(piece)) + "\nA dog.")[-1] == "dog"
    assert time.process_time() - start < 5


@given(*[st.lists(WORDS.filter(lambda word: word != "```"), max_size=12).map(" ".join)] * 2)
def test_lines_do_not_depend_on_each_other(first, second):
    moved = [(start + len(first) + 1, end + len(first) + 1) for start, end in find_phrases(second)]
    assert find_phrases(f"{first}\n{second}") == find_phrases(first) + moved


# --- spaCy ---


class StandIn:
    """A model of spaCy whose noun chunks are "the" or "a" with all words until a comma."""

    def __call__(self, text):
        found = re.finditer(r"\b(?:the|a) [^,]+", text)
        chunks = [SimpleNamespace(start_char=m.start(), end_char=m.end()) for m in found]
        return SimpleNamespace(noun_chunks=chunks)

    def pipe(self, texts):
        return map(self, texts)


@pytest.fixture
def spacy(monkeypatch):
    module = SimpleNamespace(load=lambda model, exclude: StandIn(), Language=StandIn)
    monkeypatch.setitem(sys.modules, "spacy", module)
    return module


def test_noun_chunks_are_treated_as_those_of_the_rules(spacy):
    chunker = SpacyChunker()
    text = "Here: a black and white cat, the man's two hats, the picture, a dog and bus, a bowl of soup. `the dog`\nthe end, the roses"
    wanted = ["black and white cat", "man", "hats", "dog", "bus", "bowl of soup", "roses"]
    assert phrases(text, chunker) == wanted
    for text in ("Ein Hund auf der Straße, the dog", "", " \n.", "The 🐶, the dog"):
        assert phrases(text, chunker) == []


@pytest.fixture
def same_environment(monkeypatch):
    """`datasets` replaces `os.environ` by a copy where it starts processes, and others keep the old one."""
    monkeypatch.setattr(os, "environ", os.environ)


def test_spacy_in_processes(spacy, same_environment, tmp_path):
    dataset = make_dataset([make_row(photograph(i, (20, 20)), text=f"See the dog{'s' * i}, then") for i in range(4)])
    output, counts = add_phrases(dataset, SpacyChunker(), tmp_path / "out", num_proc=2, progress=False)
    assert counts["phrases"] == 4
    assert [row["grounding"][0]["end"] for row in output] == [11, 12, 13, 14]


def test_what_spacy_lacks_is_named(spacy, monkeypatch, tmp_path, capsys):
    make_dataset([make_row(photograph(0, (20, 20)))]).save_to_disk(tmp_path / "rows")
    words = [
        "data",
        "phrases",
        tmp_path / "rows",
        "--out",
        tmp_path / "out",
        "--chunker",
        "spacy",
        "--spacy-model",
        "my_model",
    ]

    def refuse(model, exclude):
        raise OSError("[E050] Can't find model")

    class NoParser(StandIn):
        def __call__(self, text):
            raise ValueError("[E029] noun_chunks requires the dependency parse")

    for module, message in (
        (
            SimpleNamespace(load=lambda model, exclude: NoParser()),
            "my_model has no noun chunks; name one with a parser",
        ),
        (SimpleNamespace(load=refuse, Language=StandIn), "python -m spacy download my_model"),
        (None, "pip install spacy"),
    ):
        monkeypatch.setitem(sys.modules, "spacy", module)
        code, printed = run(monkeypatch, capsys, *words)
        assert code == 2
        assert message in " ".join(printed.split())
        assert [path.name for path in tmp_path.iterdir()] == ["rows"]


# --- data sets ---


def marked(row):
    """The phrases of a row, each with its message's number."""
    messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
    return [(e["message"], message_text(messages[e["message"]])[e["start"] : e["end"]]) for e in row["grounding"]]


def text_part(text):
    return {"type": "text", "text": text}


IMAGE = {"type": "image", "text": None}
STORED = {"bytes": png(photograph(0, (40, 30))), "path": None}


def conversation():
    return {
        "images": [STORED],
        "messages": [
            {"role": "system", "content": [text_part("You see the bus.")]},
            {"role": "user", "content": [text_part("A cat? "), IMAGE, text_part("The dog "), text_part("house?")]},
            {"role": "assistant", "content": [text_part("A red bird and a dog.")]},
            {"role": "user", "content": [text_part("And the bird?")]},
        ],
        "grounding": [
            {"message": 2, "start": 6, "end": 10, "image": 0, "box": [1, 2, 11, 12], "mask": None, "score": None}
        ],
    }


def test_which_texts_get_phrases(tmp_path):
    """None of the system, none before the image, none beside a known one, none without an image or with several."""
    row = conversation()
    text_only = row | {"images": [], "messages": row["messages"][2:], "grounding": []}
    wrong = row | {"messages": row["messages"][2:3]}
    dataset = to_dataset([row, text_only, good_row(), wrong])
    output, counts = add_phrases(dataset, find_phrases, tmp_path / "all", progress=False)
    assert [marked(output[i]) for i in range(3)] == [
        [(2, "bird"), (1, "dog house"), (2, "dog"), (3, "bird")],
        [],
        [(1, "the dog"), (3, "The cat")],
    ]
    assert output[3]["grounding"] == row["grounding"]
    assert output[0]["grounding"][0] == row["grounding"][0]
    assert {"image": 0, "box": None, "mask": None, "score": None}.items() <= output[0]["grounding"][1].items()
    assert counts == {
        "phrases": 3,
        "kept": 4,
        "labeled": 1,
        "rows": 4,
        "text_only": 1,
        "several_images": 1,
        "invalid": 1,
    }
    assert not [problem for problem in check_row(output.with_format(None)[0] | {"images": [photograph(0, (40, 30))]})
                if problem.severity == "error"]  # fmt: skip
    for options, wanted in (
        ({"roles": ["assistant"]}, [(2, "dog")]),
        ({"roles": ["user"], "max_phrases": 1}, [(1, "dog house")]),
    ):
        name = str(len(options))
        output, _ = add_phrases(dataset, find_phrases, tmp_path / name, **options, progress=False)
        assert marked(output[0]) == [(2, "bird"), *wanted]


def test_columns_of_all_kinds(tmp_path):
    """Preference data, messages that are strings, no column of phrases, further columns, splits, formats and selections."""
    features = row_features()
    features |= dict.fromkeys(("prompt", "chosen", "rejected"), features.pop("messages"))
    row = preference_row() | {"images": [STORED], "grounding": []}
    row["prompt"] = conversation()["messages"][:2]
    output, _ = add_phrases(
        Dataset.from_list([row], features=features), find_phrases, tmp_path / "dpo", progress=False
    )
    assert marked(output[0]) == [(1, "dog house"), (2, "gray cat")]

    rows = [
        {"images": [STORED], "id": i, "messages": [{"role": "user", "content": f"A {color} dog."}]}
        for i, color in enumerate(["red", "brown", "gray", "tan"])
    ]
    plain = Dataset.from_list(rows).cast_column("images", row_features()["images"])
    splits = DatasetDict(train=plain.select([3, 1, 2]).with_format("numpy"), test=plain.select([0]))
    output, counts = add_phrases(splits, find_phrases, tmp_path / "out", attribution="by", progress=False)
    assert counts["phrases"] == counts["rows"] == 4
    assert output["train"].column_names == ["images", "id", "messages", "grounding"]
    assert output["train"].features["grounding"] == row_features()["grounding"]
    assert output["train"]["id"][:] == [3, 1, 2]
    assert [marked(row) for row in output["train"]] == [[(0, "tan dog")], [(0, "brown dog")], [(0, "gray dog")]]
    assert (tmp_path / "out" / "ATTRIBUTION.md").read_text() == "by"

    entry = {"message": 0, "start": 0, "end": 1, "image": 0, "kind": "letter"}  # of the user's own
    own = Dataset.from_list([row | {"grounding": [entry]} for row in rows])
    own = own.cast_column("images", row_features()["images"])
    output, _ = add_phrases(own, find_phrases, tmp_path / "own", progress=False)
    assert output[1]["grounding"] == [entry, entry | {"start": 2, "end": 11, "kind": None}]


def test_two_processes_do_as_one(same_environment, tmp_path):
    texts = [
        f"A {color} {thing} beside the bus." for color in ("red", "tan") for thing in ("dog", "cat", "car", "toy")
    ]
    dataset = make_dataset([make_row(photograph(i, (20, 20)), text=text) for i, text in enumerate(texts * 40)])
    results = [
        add_phrases(dataset, find_phrases, tmp_path / str(n), num_proc=n, progress=False)
        for n in (1, 2)
    ]  # fmt: skip
    assert results[0][1] == results[1][1]
    assert results[0][0]._fingerprint == results[1][0]._fingerprint
    files = [sorted(path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob("*.arrow")) for n in "12"]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_nothing_partial_is_left(tmp_path):
    def interrupt(text):
        if "3" in text:
            raise KeyboardInterrupt
        return []

    dataset = make_dataset([make_row(photograph(i, (20, 20)), text=f"Row {i}.") for i in range(5)])
    with pytest.raises(KeyboardInterrupt):
        add_phrases(dataset, interrupt, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError):
        add_phrases(dataset, find_phrases, tmp_path / "out", progress=False)


def test_refused(tmp_path):
    good = to_dataset([conversation()])
    url = to_dataset([conversation() | {"images": [{"bytes": None, "path": "https://host/a.png"}]}])
    text = good.remove_columns("grounding").add_column("grounding", ["dog"])
    for dataset, options, message in (
        (good, {"roles": ["system"]}, "roles is system, but must be of user, assistant"),
        (good, {"roles": []}, "roles is empty"),
        (good, {"max_phrases": 0}, "max_phrases is 0"),
        (good, {"num_proc": 0}, "num_proc is 0"),
        (good.remove_columns("images"), {}, r"lacks the column\(s\) images"),
        (good.remove_columns("messages"), {}, r"lacks the column\(s\) chosen, prompt"),
        (text, {}, "grounding must be a list of entries"),
        (DatasetDict(a=good, b=text), {}, "grounding of b must be a list of entries"),
        (url, {}, "is a URL"),
    ):
        with pytest.raises(ValueError, match=message):
            add_phrases(dataset, find_phrases, tmp_path / "out", **options, progress=False)
        assert list(tmp_path.iterdir()) == []


# --- the way to masks ---


class PhraseTeacher:
    """The mask of a phrase is a box as long as the phrase."""

    settings = {"teacher": "phrase"}

    def accepts(self, prompt):
        return prompt.box is None

    def masks(self, images, prompts):
        return [
            [(filled(image, (0, 0, len(prompt.phrase), 1)), 0.9) for prompt in some]
            for image, some in zip(images, prompts, strict=True)
        ]


def test_from_a_llava_file_to_masks(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    photograph(0, (40, 30)).save(tmp_path / "images" / "a.png")
    entries = [
        {
            "image": "a.png",
            "conversations": turns("<image>\nWhat is the man holding?", "He holds a [red] kite.\nA kite."),
        },
        {"conversations": turns("What is a dog?", "An animal.")},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    converted, phrased = tmp_path / "converted", tmp_path / "phrased"
    words = ["data", "convert", tmp_path / "llava.json", "--format", "llava", "--images", tmp_path / "images"]
    assert run(monkeypatch, capsys, *words, "--out", converted)[0] == 0
    with pytest.raises(ValueError, match="no phrase that a mask could be made of; `agevlm data phrases` adds"):
        add_masks(load_from_disk(converted), PhraseTeacher(), tmp_path / "masks", progress=False)
    code, printed = run(monkeypatch, capsys, "data", "phrases", converted, "--out", phrased, "--preview", 3)
    assert code == 0, printed
    assert "What is the [man] holding?\n" in printed
    assert (
        "2 new phrases in 1 of 2 rows, 0 were there. Without new ones: 1 rows without an image, 0 with several"
        in printed
    )
    assert run(monkeypatch, capsys, "data", "check", phrased)[0] == 0
    masked, outcomes = add_masks(load_from_disk(phrased), PhraseTeacher(), tmp_path / "masks", progress=False)
    assert outcomes == {"masked": 2}
    assert [mask_from_rle(entry["mask"]).sum() for entry in masked[0]["grounding"]] == [len("man"), len("kite")]


def test_masks_of_no_phrases_name_the_command(tmp_path):
    row = conversation() | {"grounding": []}
    with_none = Dataset.from_list([row, row | {"grounding": None}], features=row_features())
    for dataset in (with_none, with_none.remove_columns("grounding"), DatasetDict(a=with_none, b=with_none)):
        with pytest.raises(ValueError, match="`agevlm data phrases` adds phrases"):
            add_masks(dataset, PhraseTeacher(), tmp_path / "out", progress=False)
        assert list(tmp_path.iterdir()) == []
    one_of_two = DatasetDict(a=with_none, b=to_dataset([conversation()]))
    teacher = PhraseTeacher()
    teacher.accepts = lambda prompt: True
    assert add_masks(one_of_two, teacher, tmp_path / "out", progress=False)[1] == {"masked": 1}


def test_preview(tmp_path):
    rows = [make_row(photograph(i, (20, 20)), text=f"A dog and {'no ' * i}[cat]?\n\nYes.") for i in range(9)]
    rows[4]["grounding"] = []
    for row in rows[5:]:
        row["grounding"] = [{"message": 0, "start": 2, "end": 5, "image": 0, "box": None, "mask": None, "score": None}]
    dataset = make_dataset(rows)
    assert list(preview_phrases(dataset, 2)) == [f"A [dog] and {'no ' * n}[cat]? Yes." for n in (5, 8)]
    assert len(list(preview_phrases(dataset, 99))) == 4
    assert list(preview_phrases(dataset.select([0]), 3)) == []
    assert list(preview_phrases(dataset, 0)) == []
    assert Features(dataset.features)["grounding"].feature["start"] == Value("int32")
    assert np.shape(dataset[0]["images"][0]) == (20, 20, 3)
