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
from .benchmark_data import check_chosen, check_texts, data_settings, first_of_each, image_file, read_lines, read_table

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def parse_yes_no(answer: str) -> str:
    """`yes` or `no`, by the rules of POPE's `evaluate.py`.

    Only the words of the first sentence count, without its commas and split at spaces. With `No`, `no` or `not` among them
    the answer is `no`, and otherwise `yes`, whatever it says.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Score answers to yes/no questions; `yes` is the positive class.

    Args:
        answers: as the model gave them ([`parse_yes_no`] reads them).
        labels: `yes` or `no`.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` and `yes_ratio` (how often the answer is yes), all from 0 to 1; the number
        of `questions`; `neither`, how many answers have none of the words yes, no and not in them, which count as yes.
        Precision is 0 where nothing was answered with yes, recall where no label is yes, and F1 where both are 0.

    Raises:
        ValueError: if there are no answers, not as many as labels, or another label.
    """
    if not answers or len(answers) != len(labels):
        raise ValueError(f"expected one label for each of some answers, got {len(labels)} for {len(answers)}")
    if wrong := set(labels) - {"yes", "no"}:
        raise ValueError(f"labels must be yes or no, got {sorted(wrong)[0]!r}")
    said = [parse_yes_no(answer) == "yes" for answer in answers]
    there = [label == "yes" for label in labels]
    hits = sum(a and b for a, b in zip(said, there, strict=True))
    # Every yes that is wrong and every yes that is missing counts against F1 = 2 TP / (2 TP + FP + FN).
    return {
        "questions": len(answers),
        "accuracy": sum(a == b for a, b in zip(said, there, strict=True)) / len(answers),
        "precision": hits / max(1, sum(said)),
        "recall": hits / max(1, sum(there)),
        "f1": 2 * hits / max(1, sum(said) + sum(there)),
        "yes_ratio": sum(said) / len(answers),
        "neither": sum(not re.search(r"\b(yes|no|not)\b", answer, re.IGNORECASE) for answer in answers),
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
        """The [`yes_no_scores`] of each category, and under `mean` the plain mean of each metric over the categories."""
        scores = {}
        for category in dict.fromkeys(question.kind for question in questions):
            asked = [question for question in questions if question.kind == category]
            scores[category] = yes_no_scores([answers[q.key]["answer"] for q in asked], [q.expected for q in asked])
        mean = {metric: sum(row[metric] for row in scores.values()) / len(scores) for metric in METRICS}
        counts = {name: sum(row[name] for row in scores.values()) for name in ("questions", "neither")}
        return {**scores, "mean": {**mean, **counts}}

    def tables(self, scores: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> list[list[list[str]]]:
        """One table, a row for each category and one for the mean."""
        header = ["category", "questions", "accuracy", "precision", "recall", "F1", "yes ratio", "neither"]
        rows = [
            [name, str(row["questions"]), *(f"{row[metric]:.4f}" for metric in METRICS), str(row["neither"])]
            for name, row in scores.items()
        ]
        return [[header, *rows]]
