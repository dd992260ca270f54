# SPDX-License-Identifier: Apache-2.0
"""POPE: does a model report objects that the image does not show? (Li et al., 2023, arXiv 2305.10355)

Yes/no questions about the objects of COCO images, in three categories that differ in how the absent objects were
chosen: at random, among the most frequent ones, or among the classes that often appear with those present.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .answers import Question
from .benchmark_data import (
    check_chosen,
    check_texts,
    data_settings,
    first_of_each,
    image_file,
    lenient_table,
    read_lines,
    read_table,
)

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
COUNTS = ("questions", "neither", "lenient_unanswered", "lenient_only")


_NO_WORDS = {"No", "no", "not"}
_YES_WORDS = {"Yes", "yes"}


def _words(answer: str) -> set[str]:
    """The words of an answer that count, as POPE's `evaluate.py` finds them."""
    return set(answer.split(".")[0].replace(",", "").split(" "))


def parse_yes_no(answer: str) -> str:
    """`yes` or `no`, by the rules of POPE's `evaluate.py`.

    Only the words of the first sentence count, without its commas and split at spaces. With `No`, `no` or `not` among them
    the answer is `no`, and otherwise `yes`, whatever it says.
    """
    return "no" if _NO_WORDS & _words(answer) else "yes"


# Of sentences in lower case, with straight apostrophes.
_LEAD = r"(?:the |my |final )*answer(?: is|:)|i(?: would|'d) say|well|sure|hmm+"
_STARTS = re.compile(rf"\W*(?:(?:{_LEAD})\W+)*(?:(?P<yes>yes|yeah|yep|yup)|no|nope|nah)(?!\w|'\w)")
_ALONE = re.compile(rf"{_STARTS.pattern}\s*(?:,|$)")
_OR = r"\W*(?:\b(?:and|or)\b|[,/])\W*"
_BOTH = re.compile(rf"\b(?:yes{_OR}no|no{_OR}yes)\b")
_UNSURE = re.compile(
    r"\b(?:not (?:\w+ )?(?:sure|certain|clear|possible|able)|unsure|uncertain|unclear|maybe|perhaps|possibly"
    r"|impossible|(?:do not|don't) know|(?:cannot|can not|can't|could not|couldn't|hard to|difficult to|unable to) "
    r"(?:\w+ )?(?:tell|say|determine|know|judge|decide|answer))\b"
)
_DENIES = re.compile(r"\b(?:no|not|nope|none|nothing|nobody|neither|never|without|cannot|absent)\b|n't\b")
_AFFIRMS = re.compile(
    r"\W*(?:(?:there|it|they|he|she|that|this)(?:'s| is| are| was| were)|i (?:can |do |also )?see|it does"
    r"|they do|correct|true|indeed|absolutely|certainly|definitely|of course)\b"
)


def read_yes_no(answer: str) -> str | None:
    """`yes`, `no` or None, as a reader would take the answer: whatever its case and its marks, and in words.

    `NO`, `No!`, `(no)`, `There is none`, `I don't see a dog` are no, and `It is.` is yes. An answer that is unsure (`I
    cannot tell`), that says both (`yes and no`), or that says nothing about it, is None. Where POPE's own words read the
    first sentence, with `yes` or with `no` and `not` in it and not with both, this never reads the opposite.
    """
    sentences = [text for text in re.split(r"[.!?;\n]+", answer.lower().replace("’", "'")) if re.search(r"\w", text)]
    if not sentences:
        return None
    first, words, start = sentences[0], _words(answer), _STARTS.match(sentences[0])
    if _BOTH.search(first) or (_UNSURE.search(first) and not start):
        return None
    if bool(words & _YES_WORDS) != bool(words & _NO_WORDS):
        return parse_yes_no(answer)
    start = start or next(filter(None, map(_ALONE.match, sentences[1:])), None)
    denies, says_yes = _DENIES.search(first), re.search(r"\byes\b", first)
    if not _STARTS.match(first) and (denies or says_yes or _AFFIRMS.match(first)):
        return None if denies and says_yes else "no" if denies else "yes"
    return None if start is None else "yes" if start["yes"] else "no"


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Score answers to yes/no questions; `yes` is the positive class.

    Args:
        answers: as the model gave them ([`parse_yes_no`] reads them).
        labels: `yes` or `no`.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` and `yes_ratio` (how often the answer is yes), all from 0 to 1; the number
        of `questions`; `neither`, how many answers have none of the words yes, no and not among those that POPE's rules
        read, so that they count as yes. Precision is 0 where nothing was answered with yes, recall where no label is yes,
        and F1 where both are 0.

        By the lenient rule, [`read_yes_no`]: `lenient_accuracy`; `lenient_unanswered`, the answers that it does not read
        either, which are wrong; `lenient_only`, how many of the answers that are `neither` it reads.

    Raises:
        ValueError: if there are no answers, not as many as labels, or another label.
    """
    if not answers or len(answers) != len(labels):
        raise ValueError(f"expected one label for each of some answers, got {len(labels)} for {len(answers)}")
    if wrong := set(labels) - {"yes", "no"}:
        raise ValueError(f"labels must be yes or no, got {sorted(wrong)[0]!r}")
    said = [parse_yes_no(answer) == "yes" for answer in answers]
    there = [label == "yes" for label in labels]
    neither = [not _words(answer) & (_YES_WORDS | _NO_WORDS) for answer in answers]
    read = [read_yes_no(answer) for answer in answers]
    hits = sum(a and b for a, b in zip(said, there, strict=True))
    # Every yes that is wrong and every yes that is missing counts against F1 = 2 TP / (2 TP + FP + FN).
    return {
        "questions": len(answers),
        "accuracy": sum(a == b for a, b in zip(said, there, strict=True)) / len(answers),
        "precision": hits / max(1, sum(said)),
        "recall": hits / max(1, sum(there)),
        "f1": 2 * hits / max(1, sum(said) + sum(there)),
        "yes_ratio": sum(said) / len(answers),
        "neither": sum(neither),
        "lenient_accuracy": sum(a == b for a, b in zip(read, labels, strict=True)) / len(answers),
        "lenient_unanswered": read.count(None),
        "lenient_only": sum(a and b is not None for a, b in zip(neither, read, strict=True)),
    }


@dataclass(frozen=True)
class Pope:
    """POPE, a [`~agevlm.evaluation.benchmark.Benchmark`].

    Args:
        data: the authors' files (`coco_pope_random.json`, …, which are JSON lines), one of them or their folder; or a
            data set with the columns of `lmms-lab/POPE` and its images: a Hub id, a folder or a `.parquet` file.
        images: the folder of the images that the authors' files name, COCO's val2014.
        categories: `random`, `popular`, `adversarial`; all that the data has by default.
    """

    data: str | os.PathLike = "lmms-lab/POPE"
    images: str | os.PathLike | None = None
    categories: Sequence[str] | None = None

    title = "POPE"
    prompt_suffix = ""  # POPE asks the question alone
    max_new_tokens = 128
    inspect = None
    draw = None

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Which questions are asked."""
        return data_settings(self.data, self.images, categories=self.categories)

    def questions(self, limit: int | None = None) -> list[Question]:
        """The questions; their `kind` is the category, `expected` is `yes` or `no`.

        Args:
            limit: the first questions of each category; all by default.

        Raises:
            FileNotFoundError: if there is no such data or image.
            ValueError: if something in the data is invalid, names what and where; if there is no such category; if
                `images` is missing, or not needed.
        """
        place = Path(self.data)
        if place.is_dir():
            files = sorted(file for kind in ("json", "jsonl") for file in place.glob(f"*_pope_*.{kind}"))
        else:
            files = [place] if place.suffix in (".json", ".jsonl") else []
        if not files and self.images is not None:
            raise ValueError(f"--images {self.images} goes with POPE's own files; {self.data} holds its images")

        rows: list[dict[str, Any]] = []
        for file in files:
            # "random" of coco_pope_random.json
            category = file.stem.rpartition("_pope_")[2]
            if any(row["category"] == category for row in rows):
                raise ValueError(f"{self.data} has two files of the category {category}; name one of them")
            for number, row in enumerate(read_lines(file, ("image", "text", "label")), 1):
                rows.append({**row, "category": category, "row": number, "where": f"{file}, row {number}"})
        if files and self.images is None:
            raise ValueError(
                f"{self.data} names images without holding them: name their folder, COCO's val2014, with --images"
            )
        if not files:
            for number, row in enumerate(read_table(self.data, ("question", "answer", "category")), 1):
                named = {
                    "text": row["question"],
                    "label": row["answer"],
                    "row": number,
                    "where": f"{self.data}, row {number}",
                }
                rows.append({**row, **named})
        for row in rows:
            check_texts(row, ("text", "label", "category", *(["image"] if files else [])))
            if row["label"].strip().lower() not in ("yes", "no"):
                raise ValueError(f"{row['where']}: its label must be yes or no, got {row['label']!r}")

        check_chosen(self.categories, (row["category"] for row in rows), "category")
        chosen = [row for row in rows if self.categories is None or row["category"] in self.categories]
        return [
            Question(
                key=f"{row['category']}/{row['row']}",
                load_image=(
                    row["load_image"]
                    if self.images is None
                    else image_file(Path(self.images) / row["image"], row["where"])
                ),
                text=row["text"],
                expected=row["label"].strip().lower(),
                kind=row["category"],
            )
            for row in first_of_each(chosen, limit, lambda row: row["category"])
        ]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The [`yes_no_scores`] of each category and its `chance`, the accuracy of the more frequent answer; and under `mean` the
        plain mean of each metric over the categories."""
        scores = {}
        for category in dict.fromkeys(question.kind for question in questions):
            asked = [question for question in questions if question.kind == category]
            expected = [q.expected for q in asked]
            scores[category] = yes_no_scores([answers[q.key]["answer"] for q in asked], expected)
            scores[category]["chance"] = max(map(expected.count, ("yes", "no"))) / len(asked)
        means = (*METRICS, "lenient_accuracy", "chance")
        mean = {metric: sum(row[metric] for row in scores.values()) / len(scores) for metric in means}
        counts = {name: sum(row[name] for row in scores.values()) for name in COUNTS}
        return {**scores, "mean": {**mean, **counts}}

    def tables(self, scores: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> list[list[list[str]]]:
        """Two tables with a row for each category and one for the mean: by the authors' rule, and by the lenient one."""
        header = ["category", "questions", "accuracy", "precision", "recall", "F1", "yes ratio", "neither"]
        rows = [
            [name, str(row["questions"]), *(f"{row[metric]:.4f}" for metric in METRICS), str(row["neither"])]
            for name, row in scores.items()
        ]
        return [[header, *rows], lenient_table("category", scores, "neither")]
