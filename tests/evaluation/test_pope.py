# SPDX-License-Identifier: Apache-2.0
"""POPE: its rules, metrics worked by hand, its data, and the command from end to end."""

import random

import datasets
import pytest
import torch
from command_line import run
from evaluation_cases import (
    as_parquet_folder,
    cells,
    changed_line,
    content,
    cv_rows,
    entries,
    give_answers,
    picture,
    pope_rows,
    pope_table,
    results,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryPrecision, BinaryRecall

from agevlm.evaluation import CvBench, Pope, Question
from agevlm.evaluation.pope import parse_yes_no, read_yes_no, yes_no_scores

# --- rules and metrics ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("Yes, there is a dog in the image.", "yes"),
        ("No, there is no dog in the image.", "no"),
        ("There is not a dog, but a cat.", "no"),
        ("No.", "no"),
        ("Yes. There is no cat, though.", "yes"),  # only the first sentence counts
        ("The image shows a dog. No cat.", "yes"),
        (",no,", "no"),  # commas are removed, not spaces
        ("yes,no", "yes"),  # "yesno" is neither word
        ("Nothing is there", "yes"),  # words, not parts of words
        ("NO", "yes"),  # the official list has No, no and not
        ("No!", "yes"),  # nor are other marks removed
        ("", "yes"),
        ("Yes\nno", "yes"),  # words are parted by spaces alone
        (".No", "yes"),  # the first sentence is empty
    ],
)
def test_yes_or_no(text, expected):
    assert parse_yes_no(text) == expected


READ_LENIENTLY = {
    "yes": "Yes|YES|Yes!|(yes)|**Yes**|yeah|Sure, yes.|The answer is: yes|<answer>Yes</answer>|It is.|There is a dog.|"
    "I can see a dog|Of course.|Let me look.\nYes, it is there.|Yes, there is a dog, but no cat.|Yes. I cannot tell its breed.|"
    "There is one, yes!",
    "no": "NO|No!|(no)|no|**No**|Answer: NO|<answer>no</answer>|Nope.|there is no dog|There is none|It isn't.|It isn’t.|"
    "I don't see a dog|I do not see one.|Nothing is there|Not at all|Let me look. No.|No, I'm not sure there is one.|"
    "There are none!|The answer is no",
    None: "|...|yes and no|Yes or no?|yes/no|no, yes|I'm not sure.|Maybe.|I cannot tell|It is unclear whether it is a dog|"
    "I don't know.|A dog|Yesterday|Nobel|The image shows a dog. No cat.|犬",
}


@pytest.mark.parametrize(
    ("text", "expected"), [(text, verdict) for verdict, texts in READ_LENIENTLY.items() for text in texts.split("|")]
)
def test_yes_or_no_by_the_lenient_rule(text, expected):
    assert read_yes_no(text) == expected


def test_what_is_neither_is_what_the_parsers_own_words_do_not_read():
    """Each of these counts as yes, because none of POPE's words is in it; all but the last are no to a reader."""
    answers = ["NO", "No!", "(no)", "no?", "NOT", "Hm"]
    scores = yes_no_scores(answers, ["no"] * len(answers))
    assert (scores["yes_ratio"], scores["neither"]) == (1, 6)
    assert (scores["accuracy"], scores["lenient_accuracy"]) == (0, 5 / 6)
    assert (scores["lenient_only"], scores["lenient_unanswered"]) == (5, 1)


YES_NO_PARTS = ["yes", "Yes", "YES", "no", "No", "NO", "not", "n't", "and", "or", "sure", "there is", "I see", "a dog", "maybe",
                "answer:", " ", "  ", ".", ",", "!", "/", "\n", "(", "**", "’"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(YES_NO_PARTS), max_size=9).map(" ".join)))
def test_any_text_has_a_verdict_that_contradicts_no_plain_one(text):
    lenient = read_yes_no(text)
    assert lenient in ("yes", "no", None)
    words = text.split(".")[0].replace(",", "").split(" ")
    says, denies = any(word in ("yes", "Yes") for word in words), any(word in ("no", "No", "not") for word in words)
    if says != denies:  # POPE's words say one thing
        assert lenient in (parse_yes_no(text), None)
        assert yes_no_scores([text], ["yes"])["neither"] == 0
    for label in ("yes", "no"):
        scores = yes_no_scores([text], [label])
        assert scores["neither"] == (not says and not denies)
        assert scores["lenient_unanswered"] == (lenient is None)
        assert scores["lenient_accuracy"] == (lenient == label)


def test_yes_no_scores_worked_by_hand():
    # TP 3, FN 1, FP 2, TN 4: precision 3/5, recall 3/4, F1 2 * 0.6 * 0.75 / 1.35 = 2/3
    answers = ["Yes", "yes", "Yes, a dog.", "No", "It is.", "Yes", "No", "no", "There is not.", "No, none."]
    labels = ["yes"] * 4 + ["no"] * 6
    assert yes_no_scores(answers, labels) == pytest.approx(
        {
            "questions": 10,
            "accuracy": 0.7,
            "precision": 0.6,
            "recall": 0.75,
            "f1": 2 / 3,
            "yes_ratio": 0.5,
            "neither": 1,  # "It is.", which is yes by the lenient rule too
            "lenient_accuracy": 0.7,
            "lenient_unanswered": 0,
            "lenient_only": 1,
        }
    )


@pytest.mark.parametrize(
    ("answers", "labels", "precision", "recall"),
    [
        (["no", "no"], ["yes", "no"], 0, 0),  # nothing was said to be there
        (["yes", "no"], ["no", "no"], 0, 0),  # nothing is there
        (["no", "no"], ["no", "no"], 0, 0),
        (["yes", "yes"], ["yes", "yes"], 1, 1),
    ],
)
def test_yes_no_scores_without_a_denominator(answers, labels, precision, recall):
    scores = yes_no_scores(answers, labels)
    assert (scores["precision"], scores["recall"]) == (precision, recall)
    assert scores["f1"] == (precision + recall) / 2


def test_yes_no_scores_are_those_of_torchmetrics():
    rng = random.Random(0)
    cases = [[("yes", "no"), ("no", "no")]]
    for _ in range(50):
        share, skill = rng.random(), rng.random()
        labels = ["yes" if rng.random() < share else "no" for _ in range(rng.randint(1, 40))]
        cases.append([(label if rng.random() < skill else rng.choice(["yes", "no"]), label) for label in labels])
    metrics = {
        "accuracy": BinaryAccuracy(),
        "precision": BinaryPrecision(),
        "recall": BinaryRecall(),
        "f1": BinaryF1Score(),
    }
    for case in cases:
        answers, labels = zip(*case, strict=True)
        scores = yes_no_scores(answers, labels)
        said, there = (torch.tensor([value == "yes" for value in values]).int() for values in (answers, labels))
        for name, metric in metrics.items():
            assert scores[name] == pytest.approx(float(metric(said, there))), name
        assert scores["yes_ratio"] == pytest.approx(float(said.float().mean()))


def test_pope_scores_are_means_of_the_categories():
    """Each category counts as much, however many questions it has."""
    plan = {"random": [("yes", "Yes"), ("no", "No"), ("no", "No"), ("yes", "Maybe")], "popular": [("no", "Yes")]}
    questions, answers = [], {}
    for category, pairs in plan.items():
        for number, (label, text) in enumerate(pairs):
            questions.append(Question(f"{category}/{number}", lambda: picture(0), "?", label, category))
            answers[f"{category}/{number}"] = {"answer": text}
    scores = Pope().score(questions, answers)
    random = yes_no_scores(["Yes", "No", "No", "Maybe"], ["yes", "no", "no", "yes"])
    assert scores["random"] == {**random, "chance": 0.5}
    assert scores["mean"] == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.75, "questions": 5, "neither": 1,
        "lenient_accuracy": 0.375, "lenient_unanswered": 1, "lenient_only": 0, "chance": 0.75,
    }  # fmt: skip


def test_yes_no_scores_refuse_nonsense():
    for answers, labels in ([], []), (["yes"], ["yes", "no"]):
        with pytest.raises(ValueError, match="one label for each"):
            yes_no_scores(answers, labels)
    with pytest.raises(ValueError, match="yes or no, got 'maybe'"):
        yes_no_scores(["yes"], ["maybe"])


# --- data ---


def test_pope_is_read_alike_from_all_forms(pope_files, tmp_path):
    files, images = pope_files
    theirs = Pope(files, images).questions()
    assert [q.key for q in theirs] == [
        f"{category}/{row}" for category in ("adversarial", "popular", "random") for row in (1, 2, 3, 4)
    ]
    assert [q.text for q in theirs[:4]] == [row["text"] for row in pope_rows("adversarial")]
    assert [q.expected for q in theirs] == ["yes", "no"] * 6
    second = Image.open(images / "COCO_val2014_000000000001.jpg")
    assert theirs[2].load_image() == second.convert("RGB")

    table = pope_table(images)
    table.save_to_disk(tmp_path / "saved")
    places = [tmp_path / "saved", as_parquet_folder(table, tmp_path / "clone")]
    places.append(places[-1] / "test-00000-of-00001.parquet")
    for place in places:
        assert content(Pope(place).questions()) == content(theirs)
        assert [q.kind for q in Pope(place).questions()] == [q.kind for q in theirs]
    assert content(Pope(files / "coco_pope_random.json", images).questions()) == content(theirs[8:])


def test_pope_on_the_hub(pope_files, monkeypatch):
    _, images = pope_files
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"test": pope_table(images)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(Pope().questions()) == 12
    assert asked == ["lmms-lab/POPE"]


def test_parts_of_pope(pope_files):
    questions = Pope(*pope_files, categories=["popular", "random"]).questions(3)
    assert [q.key for q in questions] == [f"{name}/{row}" for name in ("popular", "random") for row in (1, 2, 3)]


def test_mistakes_in_pope(pope_files, tmp_path):
    folder, images = pope_files
    file = folder / "coco_pope_random.json"
    with pytest.raises(ValueError, match="names images without holding them"):
        Pope(folder).questions()
    with pytest.raises(ValueError, match="no category 'rare' in the data; there are: adversarial, popular, random"):
        Pope(folder, images, categories=["rare"]).questions()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Pope(folder, images).questions(0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Pope(folder / "nowhere.json", images).questions()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Pope(tmp_path / "no where", None).questions()
    write_lines(folder / "gqa_pope_random.json", pope_rows("random"))
    with pytest.raises(ValueError, match="two files of the category random"):
        Pope(folder, images).questions()

    (images / "COCO_val2014_000000000001.jpg").rename(images / "kept.jpg")
    with pytest.raises(FileNotFoundError, match=r"random\.json, row 3: no such image file: .*0001\.jpg; .*--images"):
        Pope(file, images).questions()
    (images / "COCO_val2014_000000000001.jpg").write_bytes((images / "kept.jpg").read_bytes()[:400])
    question = Pope(file, images).questions()[3]  # a damaged image shows when it is loaded
    with pytest.raises(ValueError, match=r"(?i)random\.json, row 4: cannot read image '.*0001\.jpg'.*truncated"):
        question.load_image()

    for name, kept in (("image", "COCO_val2014_000000000000.jpg"), ("text", "Is there a dog?"), ("label", "no")):
        changed_line(file, 1, **{name: 3})
        with pytest.raises(ValueError, match=rf"random\.json, row 2: its {name} must be a text, got 3"):
            Pope(file, images).questions()
        changed_line(file, 1, **{name: kept})
    changed_line(file, 1, label="maybe")
    with pytest.raises(ValueError, match=r"random\.json, row 2: its label must be yes or no, got 'maybe'"):
        Pope(file, images).questions()
    changed_line(file, 1, label=...)
    with pytest.raises(ValueError, match=r"line 2: lacks label; it has question_id, image, text"):
        Pope(file, images).questions()
    file.write_text("[{}]")
    with pytest.raises(ValueError, match="line 1: is not an object"):
        Pope(file, images).questions()
    file.write_text('{"question_id": 1,\n')
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        Pope(file, images).questions()
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no lines"):
        Pope(file, images).questions()


def test_mistakes_in_tables(pope_files, cv_files, tmp_path):
    _, images = pope_files
    table = pope_table(images)
    table.rename_column("question", "text").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet lacks the columns question; it has id, .*text"):
        Pope(tmp_path / "a.parquet").questions()
    table.remove_columns("image").add_column("image", [3] * 12).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="its column image does not hold images"):
        Pope(tmp_path / "b.parquet").questions()
    broken = [{**row, "image": {"bytes": b"no image"}} for row in cv_rows()]
    datasets.Dataset.from_list(broken).cast_column("image", datasets.Image()).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: its image cannot be read"):
        CvBench(tmp_path / "c.parquet").questions()[1].load_image()
    with pytest.raises(ValueError, match="holds its images"):
        CvBench(tmp_path / "c.parquet", images).questions()
    with pytest.raises(ValueError, match="holds its images"):
        Pope(tmp_path / "a.parquet", images).questions()
    with pytest.raises(ValueError, match="lacks the columns task, source, prompt, choices"):
        CvBench(tmp_path / "a.parquet").questions()


# --- the command ---


@pytest.mark.parametrize("model", ["age_vlm", "llava"])
def test_pope_command(monkeypatch, capsys, tmp_path, folders, pope_files, model):
    files, images = pope_files
    command = ["pope", "--model", folders / model, "--data", files, "--images", images, "--out", tmp_path / "out"]
    command += ["--max-new-tokens", 5, "--batch-size", 5, "--device", "cpu"]
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    given = entries(tmp_path / "out")
    # Questions are put as they are, and what is scored is what the model said.
    questions = Pope(files, images).questions()
    assert [(entry["key"], entry["question"]) for entry in given] == [(q.key, q.text) for q in questions]
    assert len({entry["answer"] for entry in given}) > 2
    expected = Pope().score(questions, {entry["key"]: entry for entry in given})
    assert results(tmp_path / "out")["scores"] == expected

    # Of random, TP 1, FN 1, FP 0, TN 2; of popular, everything yes; of adversarial, everything no.
    given = dict(zip([f"random/{row}" for row in (1, 2, 3, 4)], ["Yes", "No", "No, none.", "no"], strict=True))
    given |= {f"popular/{row}": "Yes." for row in (1, 2, 3, 4)}
    given |= {f"adversarial/{row}": "No." for row in (1, 2, 3, 4)}
    give_answers(tmp_path / "out", given)
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    expected = {
        "random": ["4", "0.7500", "1.0000", "0.5000", "0.6667", "0.2500", "0"],
        "popular": ["4", "0.5000", "0.5000", "1.0000", "0.6667", "1.0000", "0"],
        "adversarial": ["4", "0.5000", "0.0000", "0.0000", "0.0000", "0.0000", "0"],
        "mean": ["12", "0.5833", "0.5000", "0.5000", "0.4444", "0.4167", "0"],
    }
    assert cells(printed, "│") == expected
    report = (tmp_path / "out" / "report.md").read_text()
    assert cells(report, "|") == expected
    # The same answers but one, which only the lenient rule reads as no.
    give_answers(tmp_path / "out", given | {"adversarial/2": "NO!"})
    code, printed = run(monkeypatch, capsys, "eval", *command)
    assert code == 0, printed
    for text in (printed.replace("│", "|"), (tmp_path / "out" / "report.md").read_text()):
        lenient = {
            row[0]: row[1:]
            for line in text.splitlines()
            if len(row := [c.strip() for c in line.split("|")[1:-1]]) == 5
        }
        assert lenient["adversarial"] == ["0.2500", "0.5000", "0", "1 of 1"]
        assert lenient["mean"] == ["0.5000", "0.5833", "0", "1 of 1"]
    give_answers(tmp_path / "out", given)
    assert run(monkeypatch, capsys, "eval", *command)[0] == 0
    assert f"- model: {folders / model}" in report
    written = results(tmp_path / "out")
    assert written["scores"]["mean"]["f1"] == pytest.approx((2 / 3 + 2 / 3) / 3)
    assert written["settings"] == {
        "benchmark": "POPE",
        "data": str(files),
        "images": str(images),
        "categories": None,
        "limit": None,
        "model": str(folders / model),
        "dtype": "float32",
        "prompt_suffix": "",
        "max_new_tokens": 5,
    }
    assert set(written["versions"]) == {"agevlm", "transformers", "torch"}
