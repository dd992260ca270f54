# SPDX-License-Identifier: Apache-2.0
"""POPE: does a model say that objects are there which are not? (Li et al., 2023, arXiv 2305.10355)

Yes/no questions about the objects of COCO images, in three categories that differ in how the absent objects were
chosen: at random, among the most frequent ones, or among those that often stand beside what is there.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from .benchmark import (
    Question,
    answer_benchmark,
    check_chosen,
    first_of_each,
    image_file,
    read_lines,
    read_table,
    save_results,
)

HUB_DATA = "lmms-lab/POPE"
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True)
class PopeQuestion:
    """A question with its category and its label, `yes` or `no`. `key` is the category and the row in the data."""

    key: str
    category: str
    text: str
    label: str
    load_image: Callable[[], Image.Image]


def parse_yes_no(answer: str) -> str:
    """`yes` or `no`, by the rules of POPE's `evaluate.py`.

    Of the first sentence, without its commas, the words between spaces are looked at: with `No`, `no` or `not` among them
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


def read_pope(
    data: str | os.PathLike = HUB_DATA,
    images: str | os.PathLike | None = None,
    categories: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[PopeQuestion]:
    """Read POPE's questions.

    Args:
        data: the authors' files (`coco_pope_random.json`, …, which are JSON lines), one of them or their folder; or a
            data set with the columns of `lmms-lab/POPE` and its images: a Hub id, a folder or a `.parquet` file.
        images: the folder of the images that the authors' files name, COCO's val2014.
        categories: `random`, `popular`, `adversarial`; all that there are by default.
        limit: the first questions of each category; all by default.

    Raises:
        FileNotFoundError: if there is no such data or image.
        ValueError: if something in the data is not as it should be, says what and where; if there is no such category;
            if `images` is missing, or not needed.
    """
    place = Path(data)
    if place.is_dir():
        files = sorted(file for kind in ("json", "jsonl") for file in place.glob(f"*_pope_*.{kind}"))
    else:
        files = [place] if place.suffix in (".json", ".jsonl") else []
    if not files and images is not None:
        raise ValueError(f"--images {images} goes with POPE's own files; {data} holds its images")

    rows: list[dict[str, Any]] = []
    for file in files:
        # "random" of coco_pope_random.json
        category = file.stem.rpartition("_pope_")[2]
        if any(row["category"] == category for row in rows):
            raise ValueError(f"{data} has two files of the category {category}; name one of them")
        for number, row in enumerate(read_lines(file, ("image", "text", "label")), 1):
            rows.append({**row, "category": category, "row": number, "where": f"{file}, row {number}"})
    if files and images is None:
        raise ValueError(f"{data} names images without holding them: name their folder, COCO's val2014, with --images")
    if not files:
        for number, row in enumerate(read_table(data, ("question", "answer", "category")), 1):
            named = {"text": row["question"], "label": row["answer"], "row": number, "where": f"{data}, row {number}"}
            rows.append({**row, **named})
    for row in rows:
        if str(row["label"]).strip().lower() not in ("yes", "no"):
            raise ValueError(f"{row['where']}: its label must be yes or no, got {row['label']!r}")

    check_chosen(categories, (row["category"] for row in rows), "category")
    chosen = [row for row in rows if categories is None or row["category"] in categories]
    questions = []
    for row in first_of_each(chosen, limit, lambda row: row["category"]):
        load = image_file(Path(images) / row["image"], row["where"]) if images is not None else row["load_image"]
        questions.append(
            PopeQuestion(
                key=f"{row['category']}/{row['row']}",
                category=row["category"],
                text=row["text"],
                label=row["label"].strip().lower(),
                load_image=load,
            )
        )
    return questions


def score_pope(questions: Sequence[PopeQuestion], answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The [`yes_no_scores`] of each category, and under `mean` the plain mean of each metric over the categories.

    Args:
        answers: by the questions' keys.
    """
    scores = {}
    for category in dict.fromkeys(question.category for question in questions):
        asked = [question for question in questions if question.category == category]
        scores[category] = yes_no_scores(
            [answers[question.key] for question in asked], [question.label for question in asked]
        )
    mean = {metric: sum(row[metric] for row in scores.values()) / len(scores) for metric in METRICS}
    counts = {name: sum(row[name] for row in scores.values()) for name in ("questions", "neither")}
    return {**scores, "mean": {**mean, **counts}}


def evaluate_pope(
    model: str,
    out: str | os.PathLike,
    data: str | os.PathLike = HUB_DATA,
    images: str | os.PathLike | None = None,
    *,
    categories: Sequence[str] | None = None,
    limit: int | None = None,
    prompt_suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    progress: str | None = "questions",
) -> tuple[dict[str, dict[str, float]], Table]:
    """Evaluate a model on POPE, and write `answers.jsonl`, `results.json` and `report.md` to the folder `out`.

    Args:
        model: folder or Hub id of an image-text-to-text model.
        out: folder; with the answers of a run of the same settings that was stopped, the run goes on.
        data, images, categories, limit: see [`read_pope`].
        prompt_suffix: a line to add to each question; POPE itself asks the question as it is.
        batch_size, max_new_tokens, progress: see [`answering.answer`].
        device, dtype: see [`answering.load_model`].

    Returns:
        the scores ([`score_pope`]), and a table of them.
    """
    questions = read_pope(data, images, categories, limit)
    answers, settings = answer_benchmark(
        [Question(question.key, question.load_image, question.text) for question in questions],
        out,
        benchmark="POPE",
        data=str(data),
        images=None if images is None else str(images),
        categories=None if categories is None else list(categories),
        limit=limit,
        model=model,
        prompt_suffix=prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    scores = score_pope(questions, answers)
    columns = ("category", "questions", "accuracy", "precision", "recall", "F1", "yes ratio", "neither")
    rows = [
        (name, str(row["questions"]), *(f"{row[metric]:.4f}" for metric in METRICS), str(row["neither"]))
        for name, row in scores.items()
    ]
    return scores, save_results(out, settings, scores, columns, rows)
