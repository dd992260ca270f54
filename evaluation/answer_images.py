# SPDX-License-Identifier: Apache-2.0
"""Answers about many images, from a folder or a list, to a file."""

import csv
import functools
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..files import claim, new_file, unfinished_path
from ..inference.generation import open_image
from ..inference.grounding import Calibration, ground_reply
from ..inference.replies import Reply
from ..resume import digest
from .answers import Question, answer

LISTS = (".txt", ".jsonl", ".csv")
OUTPUTS = (".jsonl", ".csv")


class Asked(NamedTuple):
    """An image, as the list names it, and what is asked about it."""

    image: str
    question: str
    place: str
    """The image's file or address."""


def read_image_list(source: str | os.PathLike, question: str | None = None) -> list[Asked]:
    """The images of a folder or a list.

    Args:
        source: a folder, whose images are taken in the order of their names, those of folders in it too; or a list:
            `.txt` with a file or an address a line, `.csv` with the column `image`, `.jsonl` with the key `image`. The
            latter two may have a `question` of each image. Files are relative to the folder of the list.
        question: asked about images that have no question of their own.

    Raises:
        FileNotFoundError: if there is no such folder or list.
        ValueError: if there are no images, a line of the list is damaged, or an image has no question.
    """
    source = Path(source)
    if source.is_dir():
        known = Image.registered_extensions()
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in known and file.is_file())
        entries = [(file.relative_to(source).as_posix(), None, f"{file}") for file in files]
        return _with_questions(entries, question, f"the folder {source} has no images (.png, .jpg, …)")
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from error
    found = []
    for line, entry in _read_entries(source, text):
        image, own = entry.get("image"), entry.get("question")
        if not isinstance(image, str) or not image.strip() or not isinstance(own, str | None):
            raise ValueError(f'{source}, line {line}: needs an "image", and "question" must be text, got {entry}')
        own = own.strip() if own else None
        address = image if image.startswith(("http://", "https://")) else os.fspath(source.parent / image)
        found.append((image, own or None, address))
    return _with_questions(found, question, f"{source} lists no images")


def _read_entries(source: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """Number of the line, and the entry."""
    if source.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))  # which keeps the line breaks in questions
        try:
            if "image" not in (reader.fieldnames or ()):
                raise ValueError(f'{source} has no column "image" in its first line; it has {reader.fieldnames}')
            return [(reader.line_num, dict(row)) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{source}, line {reader.line_num}: is not CSV ({error})") from error
    entries = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON and names may have the other line breaks of Unicode
        if not line.strip():
            continue
        if source.suffix == ".txt":
            entries.append((number, {"image": line.strip()}))
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{source}, line {number}: must be an object such as {{"image": "a.png"}}, got {entry}')
        entries.append((number, entry))
    return entries


def _with_questions(entries: Sequence[tuple[str, str | None, str]], question: str | None, if_none: str) -> list[Asked]:
    if not entries:
        raise ValueError(if_none)
    found = []
    for image, own, place in entries:
        if own is None and question is None:
            raise ValueError(
                f"there is no question about {image}: pass one, or give the list a question of each image"
            )
        found.append(Asked(image, own if own is not None else question or "", place))
    return found


def answer_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Asked],
    out: str | os.PathLike,
    *,
    settings: dict[str, Any] | None = None,
    ground: Calibration | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> dict[str, str]:
    """Answers a question about each image, in batches, and writes them to a file when all are answered.

    Answers are kept as they come in a hidden folder beside `out`, from which the same call continues after a stop. It tries images
    again that could not be read before.

    Args:
        asked: images and questions, as [`read_image_list`] gives them.
        out: `.jsonl` with `{"image", "question", "answer"}` a line, or `.csv` with these columns, in the order of `asked`. An
            image that cannot be read has no answer, and the reason as `error`.
        settings: what else the answers depend on, such as the model's name.
        ground: also write the `phrases` that question and answer name, as [`~agevlm.inference.grounding.Grounded`] has them; in `.csv`
            as JSON.

    Returns:
        the images that could not be read, with the reason.

    Raises:
        FileExistsError: if `out` exists, or if other settings or images were used before the stop.
        FileNotFoundError: if there is no folder for `out`.
        ValueError: for another kind of file, if no image can be read, or if the model's logits are not finite.
    """
    out = Path(out)
    if out.suffix not in OUTPUTS:
        raise ValueError(f"{out}: the name must end with {' or '.join(OUTPUTS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name, or delete it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it")
    questions = [
        Question(f"{number}", functools.partial(open_image, entry.place), entry.question, source=entry.place)
        for number, entry in enumerate(asked)
    ]
    errors: dict[str, str] = {}
    work = unfinished_path(out)
    work.mkdir(exist_ok=True)
    with claim(work):
        answers = answer(
            *(model, processor, questions, work / "answers.jsonl"),
            settings={
                **(settings or {}),
                "images": digest(asked),
                "calibration": None if ground is None else asdict(ground),
            },
            inspect=None if ground is None else functools.partial(_grounded, ground),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            unreadable=errors,
            progress="images",
        )
        if not answers:
            shutil.rmtree(work)
            raise ValueError(f"none of the {len(asked)} images can be read; the first: {next(iter(errors.values()))}")
        rows = []
        for number, entry in enumerate(asked):
            row = {"image": entry.image, "question": entry.question}
            rows.append({**row, **(answers.get(f"{number}") or {"error": errors[f"{number}"]})})
        # A name that is not UTF-8 becomes an escape, which JSON reads.
        with (
            new_file(out) as partial,
            open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            if out.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                more = ["phrases"] if ground is not None else []
                writer = csv.DictWriter(file, ["image", "question", "answer", *more, *(["error"] if errors else [])])
                writer.writeheader()
                writer.writerows(
                    {**row, "phrases": json.dumps(row["phrases"], ensure_ascii=False)} if "phrases" in row else row
                    for row in rows
                )
    shutil.rmtree(work)
    return {entry.place: errors[f"{number}"] for number, entry in enumerate(asked) if f"{number}" in errors}


def _grounded(
    calibration: Calibration, model: Any, processor: Any, questions: Sequence[Question], replies: Sequence[Reply]
) -> list[dict[str, Any]]:
    pairs = zip(questions, replies, strict=True)
    found = [ground_reply(model, processor, given, q.text, calibration=calibration).to_dict() for q, given in pairs]
    return [{"phrases": grounded["phrases"]} for grounded in found]
