# SPDX-License-Identifier: Apache-2.0
"""Questions in, answers out: the question type, and the one loop that answers by greedy decoding."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin

from ..files import name_full_disk, new_file
from ..inference.attention import can_show
from ..inference.generation import ask_about, check_processor
from ..inference.replies import Reply, reply
from ..processing.image_processing_agevlm import to_rgb
from ..resume import FIX, digest, fingerprint, refuse_changes


@dataclass(frozen=True)
class Question:
    """A question about one image, and what its benchmark needs to score the answer.

    Args:
        key: its name in the benchmark; unique.
        load_image: gives the image when its turn comes.
        text: what is asked.
        expected: the right answer as the benchmark writes it.
        kind: the group that it is scored in: a category, a task.
        source: where its image is from: a data set, a scene.
        choices: the texts to choose from, of a multiple-choice question; of a scene, the classes of all scenes.
        span: characters `(start, end)` of a phrase in `text` that names something in the image.
        mask: COCO RLE of what the phrase names.
        objects: COCO RLE of each object in the image.
        names: what each of `objects` is called.
    """

    key: str
    load_image: Callable[[], Image.Image]
    text: str
    expected: str = ""
    kind: str = ""
    source: str = ""
    choices: tuple[str, ...] = ()
    span: tuple[int, int] | None = None
    mask: Mapping[str, Any] | None = None
    objects: tuple[Mapping[str, Any], ...] = ()
    names: tuple[str, ...] = ()

    def open_image(self) -> Image.Image:
        """The image, RGB.

        Raises:
            ValueError: if the image cannot be read; names the question.
        """
        try:
            return to_rgb(self.load_image())
        except Exception as error:  # decoders raise errors of many types for damaged data
            raise ValueError(f"question {self.key}: {error or type(error).__name__}") from error


Inspect = Callable[[PreTrainedModel, ProcessorMixin, Sequence[Question], Sequence[Reply]], Sequence[Mapping[str, Any]]]
"""What else to write down of each question of a batch, beside its answer. Replies of a model that has maps have them."""


def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    max_new_tokens: int,
    inspect: Inspect | None = None,
) -> list[dict[str, Any]]:
    """Answers questions together: for each its `answer`, without spaces at its ends, and what `inspect` gives."""
    replies = reply(
        model,
        processor,
        [ask_about(question.text, question.open_image()) for question in questions],
        max_new_tokens=max_new_tokens,
        maps=inspect is not None and can_show(model),
        names=[f"question {question.key} ({question.text!r})" for question in questions],
    )
    more = inspect(model, processor, questions, replies) if inspect is not None else [{}] * len(replies)
    return [{"answer": given.text.strip(), **found} for given, found in zip(replies, more, strict=True)]


# --- all questions ---


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Iterable[Question],
    file: str | os.PathLike | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    inspect: Inspect | None = None,
    unreadable: MutableMapping[str, str] | None = None,
    progress: str | None = "questions",
) -> dict[str, dict[str, Any]]:
    """Ask a model questions about images, each in a separate conversation, with greedy decoding.

    The answers go to `file` as they come, a batch at a time, so that a run that was stopped resumes where it was: what the
    file answers already is not asked again. Its first line has all that the answers depend on: `settings`, the longest
    answer, the model's weights and the questions. They do not depend on the size of the batches.

    Args:
        questions: images are loaded when their batch comes.
        file: JSON lines; the settings, then `{"key": …, "question": …, "answer": …}` and what else `inspect` gives. By
            default nothing is written.
        settings: what to know about the answers later, such as the model's name; anything that JSON can hold.
        batch_size: questions that are answered together; their images are in memory together.
        max_new_tokens: longest answer, in tokens.
        inspect: what else to write down of a batch.
        unreadable: gets, by key, why an image cannot be read; its question has no answer, and a run that resumes asks it again. By
            default that is an error.
        progress: the label of the progress bar; None for none.

    Returns:
        by key, in the order of the questions: the `answer`, without spaces at its ends, and what else `inspect` gives.

    Raises:
        FileExistsError: if `file` has answers of other settings.
        ValueError: if `file` has other content; if two questions have the same key; if an image cannot be read, and there is no
            `unreadable`; if the processor has no chat template; or if the model's logits are not finite.
    """
    questions = list(questions)
    check_processor(processor, type(processor).__name__)
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    if twice := [key for key, count in Counter(question.key for question in questions).items() if count > 1]:
        raise ValueError(f"two questions have the key '{twice[0]}': keys must be unique")
    answers: dict[str, dict[str, Any]] = {}
    if file is not None:
        header = {
            **(settings or {}),
            "max_new_tokens": max_new_tokens,
            "weights": fingerprint(model),
            "questions": digest((q.key, q.text, q.span, q.mask, q.objects) for q in questions),
        }
        answers = _kept_answers(Path(file), json.loads(json.dumps(header)))
    left = [question for question in questions if question.key not in answers]
    model.eval()
    with Progress(disable=progress is None) as bar:
        task = bar.add_task(progress or "", total=len(questions), completed=len(answers))
        for start in range(0, len(left), batch_size):
            batch, taken = left[start : start + batch_size], min(batch_size, len(left) - start)
            if unreadable is not None:
                batch = _readable(batch, unreadable)
            given = answer_batch(model, processor, batch, max_new_tokens, inspect) if batch else []
            answers |= {question.key: found for question, found in zip(batch, given, strict=True)}
            if file is not None:
                entries = [{"key": q.key, "question": q.text, **found} for q, found in zip(batch, given, strict=True)]
                with name_full_disk(file), open(file, "a", encoding="utf-8", newline="\n") as output:
                    output.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            bar.advance(task, taken)
    return {question.key: answers[question.key] for question in questions if question.key in answers}


def _readable(questions: Sequence[Question], unreadable: MutableMapping[str, str]) -> list[Question]:
    """Those whose image can be read, with it; `unreadable` gets the others."""
    found = []
    for question in questions:
        try:
            image = question.open_image()
        except ValueError as error:
            unreadable[question.key] = str(error.__cause__)
        else:
            found.append(replace(question, load_image=functools.partial(to_rgb, image)))
    return found


def _kept_answers(file: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers that `file` has already; begins it where it is missing or has none, and drops a last line that is not
    complete."""
    first_line = json.dumps({"settings": header}) + "\n"
    written = file.read_bytes() if file.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]

    def begin() -> dict[str, dict[str, Any]]:
        with new_file(file) as partial:
            partial.write_text(first_line, encoding="utf-8", newline="\n")
        return {}

    if not whole and first_line.encode().startswith(written):
        return begin()
    lines = whole.split(b"\n")[:-1]
    try:
        found = json.loads(lines[0])["settings"]
        found.keys()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} exists and is not a file of answers; {FIX.format(place=file)}") from error
    if len(lines) == 1:  # of a run that ended before the first answer, with any settings
        return begin()
    refuse_changes(found, header, file)
    answers = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            entry = json.loads(line)
            key, _ = entry.pop("key"), entry.pop("question")
            answers[key] = {"answer": entry.pop("answer"), **entry}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}: is damaged; delete the line to ask its question again"
            ) from error
    if len(whole) < len(written):
        os.truncate(file, len(whole))
    return answers
