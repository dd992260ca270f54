# SPDX-License-Identifier: Apache-2.0
"""CV-Bench: does a model see what is where? (Tong et al., 2024, Cambrian-1, arXiv 2406.16860)

Multiple-choice questions: how many, on which side (2D; images of ADE20K and COCO), what is nearer to the camera and what
to another object (3D; Omni3D).
"""

import os
import re
from collections import Counter
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
    is_text,
    lenient_table,
    read_lines,
    read_table,
)

SOURCES = ("ADE20K", "COCO", "Omni3D")
TASKS = ("Count", "Relation", "Depth", "Distance")

_COLUMNS = ("task", "source", "prompt", "choices", "answer")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# At the start: a letter with a mark after it, or with nothing. A capital does without, but for A, which is a word.
_MARKED_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,;*\"']|\s*$|\s*\n)|([B-Z])\b")
_LETTER_IN_PARENTHESES = re.compile(r"\(([A-Za-z])\)")


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names, or None. The first of these rules that finds one decides:

    1. the letter at the start, with or without parentheses: `A`, `(A)`, `A.`, `a) three`, `B because …`;
    2. the only letter in parentheses: `It must be (B).`;
    3. the only choice that occurs, word for word and whatever its case: `The red chair is nearer.`;
    4. the capital A at the start, which may be the article only where rule 3 found nothing: `A because …`.

    The answer starts after the last `answer is` or `answer:` in it, as in Cambrian's own evaluation, whose rule is the
    first character after that. Rule 1 reads the same letters from answers that begin with one; it does not take the
    first letter of a word for a choice (`above` for A). Rules 2 and 3 come from VLMEvalKit's `can_infer`, for models
    that answer in words.
    """
    letters = _LETTERS[: len(choices)]
    text = re.split(r"answer is|answer:", answer, flags=re.IGNORECASE)[-1]
    text = re.sub(r"^[^\w(]+", "", text)
    if match := _MARKED_LETTER.match(text):
        letter = (match[1] or match[2]).upper()
        if letter in letters:
            return letter
    named = {letter.upper() for letter in _LETTER_IN_PARENTHESES.findall(text)} & set(letters)
    if len(named) == 1:
        return named.pop()
    # The longest first, so that "dining table" is not "table".
    texts = {choice.strip().lower(): letter for choice, letter in zip(choices, letters, strict=True)}
    longest_first = "|".join(re.escape(choice) for choice in sorted(texts, key=len, reverse=True))
    found = {texts[choice] for choice in re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", text.lower())}
    if len(found) == 1:
        return found.pop()
    return "A" if not found and re.match(r"A\b", text) else None


# A letter that is named as one or stands in marks, and capitals that stand alone; "A" may be the article, "I" is a word.
_END = r"(?![\w'’])"
_NAMED_LETTER = re.compile(
    rf"\b(?i:option|choice|letter)s?\b[\W_]*([A-Za-z]){_END}"
    rf"|\b(?i:answer)\s*(?:is|[:=>-])[\W_]*(?:([A-Z]){_END}|([a-z])(?=\s*(?:[^\w\s]|$)))"
    r"|[(\[{<*_\"'`“‘]([A-Za-z])[)\]}>*_\"'`”’]"
    rf"|(?<![\w'’])([B-HJ-Z]){_END}"
    r"|(?<![\w'’])(A)(?=\s*(?:[^\w\s]|$)|\s+(?:or|and|is)\b)"
)
_NOT_THIS_LETTER = re.compile(rf"(?:\b(?:not|nor|neither)|n['’]t)\W+(?:\w+\W+)?[A-Za-z]{_END}", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_LETTER = rf"[(\[*_\"'`]*([A-Za-z]){_END}[)\]*_\"'`]*"
_ALTERNATIVES = re.compile(
    rf"(?<![\w'’]){_LETTER}\s*(?:,?\s*(?:or|and)\s+|[/&]\s*|,\s*(?=(?:\W*(?:or|and|[A-Za-z])(?!\w))+\W*$))"
    rf"(?:(?:the\s+)?(?:option|choice|letter)\s+)?{_LETTER}"
)


def read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names as a reader would take it, or None.

    What [`parse_choice`] reads is read alike, unless the answer names another letter as an alternative to it (`A or B`),
    which is None. Of other answers it is the only letter that they name: `Option B`, `The answer is option B.`,
    `Answer : B`, `<answer>B</answer>`, `**B**`, `I choose B`.
    """
    letters, found = set(_LETTERS[: len(choices)]), parse_choice(answer, choices)
    if found is None and (tagged := _TAGGED.findall(answer)):
        return read_choice(tagged[-1], choices)
    if found is None:
        groups = _NAMED_LETTER.findall(_NOT_THIS_LETTER.sub(" ", answer))
        named = {"".join(group).upper() for group in groups} & letters
        found = named.pop() if len(named) == 1 else None
    alternatives = ({letter.upper() for letter in pair} & letters for pair in _ALTERNATIVES.findall(answer))
    return None if any(found in pair and len(pair) > 1 for pair in alternatives) else found


def _check_row(row: Mapping[str, Any]) -> None:
    check_texts(row, ("prompt",))
    for name, known in (("task", TASKS), ("source", SOURCES)):
        if row[name] not in known:
            raise ValueError(f"{row['where']}: its {name} must be one of {', '.join(known)}, got {row[name]!r}")
    choices = row["choices"]
    texts = isinstance(choices, list) and [is_text(choice) for choice in choices]
    if not texts or not all(texts) or len(texts) > len(_LETTERS):
        raise ValueError(
            f"{row['where']}: its choices must be a list of texts, at most {len(_LETTERS)}, got {choices!a:.200}"
        )
    labels = [f"({letter})" for letter in _LETTERS[: len(choices)]]
    if row["answer"] not in labels:
        raise ValueError(f"{row['where']}: its answer must be one of {', '.join(labels)}, got {row['answer']!r}")


@dataclass(frozen=True)
class CvBench:
    """CV-Bench, a [`~agevlm.evaluation.benchmark.Benchmark`].

    Args:
        data: a data set with the columns of `nyu-visionx/CV-Bench` and its images: a Hub id, a folder or a `.parquet`
            file; or the authors' annotations `test_2d.jsonl` and `test_3d.jsonl`, one of them or a folder with them and
            no `.parquet` file.
        images: the folder that the annotations' file names start from; that of the annotations by default.
        tasks: of `Count`, `Relation`, `Depth` and `Distance`; all by default.
    """

    data: str | os.PathLike = "nyu-visionx/CV-Bench"
    images: str | os.PathLike | None = None
    tasks: Sequence[str] | None = None

    title = "CV-Bench"
    # What Cambrian's evaluation scripts add to each prompt.
    prompt_suffix = "Answer with the option's letter from the given choices directly."
    max_new_tokens = 128
    inspect = None
    draw = None

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Which questions are asked."""
        return data_settings(self.data, self.images, tasks=self.tasks)

    def questions(self, limit: int | None = None) -> list[Question]:
        """The questions; their `kind` is the task, `expected` is the letter of the right choice.

        Args:
            limit: the first questions of each task and source; all by default.

        Raises:
            FileNotFoundError: if there is no such data or image.
            ValueError: if something in the data is invalid, names what and where; if there is no such task; if `images`
                is not needed.
        """
        place = Path(self.data)
        if place.is_dir():
            files = sorted(place.glob("test_*.jsonl")) if not any(place.glob("**/*.parquet")) else []
        else:
            files = [place] if place.suffix == ".jsonl" else []
        if not files and self.images is not None:
            raise ValueError(
                f"--images {self.images} goes with the authors' .jsonl files; {self.data} holds its images"
            )

        rows: list[dict[str, Any]] = []
        for file in files:
            for number, row in enumerate(read_lines(file, (*_COLUMNS, "filename")), 1):
                row["where"] = f"{file}, row {number}"
                check_texts(row, ("filename",))
                rows.append(
                    {**row, "path": Path(file.parent if self.images is None else self.images) / row["filename"]}
                )
        if not files:
            for number, row in enumerate(read_table(self.data, _COLUMNS), 1):
                rows.append({**row, "where": f"{self.data}, row {number}"})
        for row in rows:
            _check_row(row)

        check_chosen(self.tasks, (row["task"] for row in rows), "task")
        numbered = [
            (number, row) for number, row in enumerate(rows, 1) if self.tasks is None or row["task"] in self.tasks
        ]
        return [
            Question(
                key=f"{row['task']}/{number}",
                load_image=image_file(row["path"], row["where"]) if "path" in row else row["load_image"],
                text=row["prompt"],
                expected=row["answer"][1],
                kind=row["task"],
                source=row["source"],
                choices=tuple(row["choices"]),
            )
            for number, row in first_of_each(numbered, limit, lambda pair: (pair[1]["task"], pair[1]["source"]))
        ]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Scores by the definitions of the data set's card.

        Returns:
            Rows of `accuracy` (from 0 to 1), `questions` and `unparsed`, the answers without a choice in them, which are
            wrong: of each source, and each task that was asked. `2D` is the mean of ADE20K and COCO, `3D` is Omni3D, and
            `overall` the mean of 2D and 3D; their accuracy is None where a part was not asked. `chance` is the accuracy of the
            most frequent letter. By the lenient rule,
            [`read_choice`]: `lenient_accuracy`; `lenient_unanswered`, the answers that it does not read, which are wrong;
            `lenient_only`, how many of the answers that are `unparsed` it reads.
        """
        texts = {question.key: (answers[question.key]["answer"], question.choices) for question in questions}
        given = {key: parse_choice(*text) for key, text in texts.items()}
        read = {key: read_choice(*text) for key, text in texts.items()}

        def row(asked: list[Question], *parts: dict[str, Any]) -> dict[str, Any]:
            def accuracy(name: str, chosen: Mapping[str, str | None]) -> float | None:
                accuracies = [part[name] for part in parts]
                if not parts and asked:
                    accuracies = [sum(chosen[question.key] == question.expected for question in asked) / len(asked)]
                whole = bool(accuracies) and None not in accuracies
                return sum(accuracies) / len(accuracies) if whole else None

            letters = Counter(question.expected for question in asked)
            same = {question.key: letters.most_common(1)[0][0] for question in asked}
            unread = [question.key for question in asked if given[question.key] is None]
            return {
                "accuracy": accuracy("accuracy", given),
                "chance": accuracy("chance", same),
                "questions": len(asked),
                "unparsed": len(unread),
                "lenient_accuracy": accuracy("lenient_accuracy", read),
                "lenient_unanswered": sum(read[question.key] is None for question in asked),
                "lenient_only": sum(read[key] is not None for key in unread),
            }

        by_source = {source: [q for q in questions if q.source == source] for source in SOURCES}
        ade, coco, omni = (row(asked) for asked in by_source.values())
        flat = row(by_source["ADE20K"] + by_source["COCO"], ade, coco)
        deep = row(by_source["Omni3D"], omni)
        scores = {"overall": row(list(questions), flat, deep), "2D": flat, "3D": deep}
        scores |= {source: part for source, part in zip(SOURCES, (ade, coco, omni), strict=True) if part["questions"]}
        by_task = {task: [q for q in questions if q.kind == task] for task in TASKS}
        return scores | {task: row(asked) for task, asked in by_task.items() if asked}

    def tables(self, scores: dict[str, dict[str, Any]], settings: Mapping[str, Any]) -> list[list[list[str]]]:
        """Two tables with a row for each part of the scores: by the score's rule, and by the lenient one."""
        rows = [
            [
                name,
                str(row["questions"]),
                "–" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
                str(row["unparsed"]),
            ]
            for name, row in scores.items()
        ]
        return [[["", "questions", "accuracy", "unparsed"], *rows], lenient_table("", scores, "unparsed")]
