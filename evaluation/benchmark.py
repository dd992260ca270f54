# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks do: load a model, ask it questions about images, keep its answers, write down the scores.

The model is any decoder-only image-text-to-text model of Transformers whose processor has a chat template: an AGE-VLM,
a LLaVA.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..processing.image_processing_agevlm import load_image
from ..processing.processing_agevlm import AgeVlmProcessor

# Greedy decoding, whatever the checkpoint's own generation settings are.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Values of each weight that go into the digest of a model: any training changes some of them.
_DIGEST_VALUES = 64


class Question(NamedTuple):
    """A question about one image. `key` names it in its benchmark, `load_image` gives the image when its turn comes."""

    key: str
    load_image: Callable[[], Image.Image]
    text: str

    def open_image(self) -> Image.Image:
        """
        Raises:
            ValueError: if the image cannot be read; says whose it is.
        """
        try:
            return self.load_image()
        except Exception as error:  # decoders raise errors of many types for damaged data
            raise ValueError(f"question {self.key}: {error or type(error).__name__}") from error


def render_question(processor: ProcessorMixin, text: str) -> str:
    """The prompt that asks `text` about one image. Its special tokens are written: tokenise it with
    `add_special_tokens=False`."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an image-text-to-text model and its processor.

    Args:
        name: folder or Hub id.
        device: `cpu`, `cuda` or `auto`, the GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16` or `auto`, as it was saved.

    Raises:
        ValueError: for another device or dtype, a GPU that is not there, a model of another kind, or a processor that
            has no chat template.
        OSError: if there is no such model.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"the device must be auto, cpu or cuda, got '{device}'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use for the device cuda; choose cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    processor = AutoProcessor.from_pretrained(name)
    _check_processor(processor, name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), processor


Reply = Callable[[PreTrainedModel, ProcessorMixin, Sequence[Question], int], Sequence[Mapping[str, Any]]]
"""What answers a batch of questions in at most so many tokens: for each, its `answer` and what else to write down."""


def reply_greedily(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], max_new_tokens: int
) -> list[dict[str, Any]]:
    """The [`Reply`] of any image-text-to-text model: `generate`, and nothing else to write down."""
    return [{"answer": text} for text in _generate(model, processor, questions, max_new_tokens)]


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Iterable[Question],
    file: str | os.PathLike,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    max_new_tokens: int = 128,
    reply: Reply = reply_greedily,
    progress: str | None = "questions",
) -> dict[str, str]:
    """Ask a model questions about images, each in a conversation of its own, with greedy decoding.

    The answers go to `file` as they come, a batch at a time, so that a run that was stopped goes on where it was: what
    the file answers already is not asked again. Its first line says what the answers depend on, which is `settings`, the
    longest answer, the model's weights and the questions; they do not depend on the size of the batches.

    Args:
        questions: images are loaded when their batch comes.
        file: JSON lines; the header, then `{"key": …, "question": …, "answer": …}` and what else `reply` gives.
        settings: what to know about the answers later, such as the model's name; anything that JSON can hold.
        batch_size: questions that are answered together; their images are in memory together.
        max_new_tokens: longest answer, in tokens.
        reply: what answers a batch.
        progress: what the progress bar says; None for none.

    Returns:
        the answers by key, in the order of the questions, without spaces at their ends.

    Raises:
        ValueError: if `file` has answers of another run, or other content; if two questions have the same key; if an
            image cannot be read; or if the processor has no chat template.
    """
    questions = list(questions)
    file = Path(file)
    _check_processor(processor, type(processor).__name__)
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    if twice := [key for key, count in Counter(question.key for question in questions).items() if count > 1]:
        raise ValueError(f"two questions have the key '{twice[0]}': keys must be unique")
    header = {
        **settings,
        "max_new_tokens": max_new_tokens,
        "weights": _weights_digest(model),
        "questions": digest((question.key, question.text) for question in questions),
    }
    answers = _kept_answers(file, json.loads(json.dumps(header)))
    left = [question for question in questions if question.key not in answers]
    model.eval()
    with Progress(disable=progress is None) as bar, file.open("a", encoding="utf-8", newline="\n") as output:
        task = bar.add_task(progress or "", total=len(questions), completed=len(answers))
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            replies = reply(model, processor, batch, max_new_tokens)
            lines = []
            for question, given in zip(batch, replies, strict=True):
                answers[question.key] = given["answer"]
                line = {"key": question.key, "question": question.text, **given}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            output.write("".join(lines))
            output.flush()
            bar.advance(task, len(batch))
    return {question.key: answers[question.key] for question in questions}


def _check_processor(processor: Any, name: str) -> None:
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{name} has no processor of images and text: it is not an image-text-to-text model")
    if processor.chat_template is None:
        raise ValueError(
            f"the processor of {name} has no chat template, so that nobody knows how the model wants to be asked: set "
            "processor.chat_template as the model was trained and save it, or choose a checkpoint that has one"
        )


def digest(parts: Iterable[Any]) -> str:
    """Tells apart what JSON can hold."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(json.dumps(part).encode() + b"\n")
    return sha.hexdigest()[:16]


def _weights_digest(model: PreTrainedModel) -> str:
    """Tells models apart that were saved under the same name, as those of two trainings."""
    return digest(
        (name, weight.detach().reshape(-1)[:_DIGEST_VALUES].float().tolist())
        for name, weight in model.named_parameters()
    )


def _kept_answers(file: Path, header: dict[str, Any]) -> dict[str, str]:
    """The answers that `file` has already; begins it where it is missing, and drops a line that was not written to its
    end."""
    first_line = json.dumps({"settings": header}) + "\n"
    written = file.read_bytes() if file.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if not whole and first_line.encode().startswith(written):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(first_line, encoding="utf-8", newline="\n")
        return {}

    lines = whole.split(b"\n")[:-1]
    mend = "choose another output folder, or delete the file to start afresh"
    try:
        found = json.loads(lines[0])["settings"]
        found.keys()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} exists and is not a file of answers; {mend}") from error
    if changed := [name for name in (header | found) if header.get(name) != found.get(name)]:
        differences = ", ".join(f"{name} was {found.get(name)!r}, is {header.get(name)!r}" for name in changed)
        raise ValueError(f"{file} has answers of another run ({differences}); {mend}")
    answers = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            entry = json.loads(line)
            answers[entry["key"]] = entry["answer"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, line {number}: is damaged; delete the line to ask its question again"
            ) from error
    if len(whole) < len(written):
        os.truncate(file, len(whole))
    return answers


@torch.no_grad()
def _generate(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], max_new_tokens: int
) -> list[str]:
    conversations = []
    for question in questions:
        content = [{"type": "image", "image": question.open_image()}, {"type": "text", "text": question.text}]
        conversations.append([{"role": "user", "content": content}])
    # An AGE-VLM has learnt from what its template writes and nothing before it. For others Transformers adds the special
    # tokens of the tokenizer where the template has not written the first of them.
    special = {"add_special_tokens": False} if isinstance(processor, AgeVlmProcessor) else {}
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", **special},
    ).to(model.device)
    tokens = model.generate(
        **inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=processor.tokenizer.pad_token_id
    )
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def read_lines(file: str | os.PathLike, columns: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, whatever its name ends with.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is not an object, or lacks one of `columns`; says which.
    """
    rows = []
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: is not an object; write one object a line")
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{file}, line {number}: lacks {', '.join(missing)}; it has {', '.join(row)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no lines")
    return rows


def read_table(data: str | os.PathLike, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a data set that holds its images in a column `image`: a Hub id, or a folder or `.parquet` file.

    Returns:
        rows of `columns` and of `load_image`, for [`Question`].

    Raises:
        FileNotFoundError: if there is nothing of this name, here or on the Hub.
        ValueError: if it is not a data set, or lacks a column.
        ImportError: if `datasets` is not installed.
    """
    from ..data.readers import read_rows

    dataset = read_rows(data)
    if missing := [name for name in (*columns, "image") if name not in dataset.column_names]:
        raise ValueError(f"{data} lacks the columns {', '.join(missing)}; it has {', '.join(dataset.column_names)}")

    from datasets import Image as ImageFeature

    try:
        images = dataset.select_columns(["image"]).cast_column("image", ImageFeature())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{data}: its column image does not hold images: {error}") from error
    return [
        {**row, "load_image": functools.partial(_row_image, images, number, str(data))}
        for number, row in enumerate(dataset.select_columns(list(columns)))
    ]


def _row_image(images: Any, number: int, name: str) -> Image.Image:
    try:
        return images[number]["image"].convert("RGB")
    except Exception as error:  # as above
        raise ValueError(
            f"{name}, row {number + 1}: its image cannot be read ({error or type(error).__name__})"
        ) from error


def image_file(path: Path, where: str) -> Callable[[], Image.Image]:
    """What loads the image of a file, for [`Question`]. `where` says which row it belongs to.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such image file: {path}; name the folder of the images with --images")

    def load() -> Image.Image:
        try:
            return load_image(path).convert("RGB")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return load


def first_of_each(rows: Iterable[Any], limit: int | None, group: Callable[[Any], Any]) -> list[Any]:
    """The first `limit` rows of each group, in order; all of them by default."""
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, got {limit}")
    seen: Counter[Any] = Counter()
    kept = []
    for row in rows:
        seen[group(row)] += 1
        if limit is None or seen[group(row)] <= limit:
            kept.append(row)
    return kept


def check_chosen(chosen: Sequence[str] | None, known: Iterable[str], what: str) -> None:
    """
    Raises:
        ValueError: if one of `chosen` is not `known`.
    """
    known = list(dict.fromkeys(known))
    if unknown := [name for name in chosen or () if name not in known]:
        raise ValueError(f"there is no {what} '{unknown[0]}' in the data; there are: {', '.join(known)}")


def answer_benchmark(
    questions: Iterable[Question],
    out: str | os.PathLike,
    *,
    model: str,
    prompt_suffix: str,
    batch_size: int,
    max_new_tokens: int,
    device: str,
    dtype: str,
    progress: str | None,
    reply: Reply = reply_greedily,
    **settings: Any,
) -> tuple[dict[str, str], dict[str, Any]]:
    """[`load_model`] `model`, and [`answer`] with it to `answers.jsonl` in the folder `out`.

    Args:
        prompt_suffix: a line to add to each question; none where it is empty.
        reply: what answers a batch.
        settings: of the benchmark, to know about the answers later.

    Returns:
        the answers by key, and all settings that they depend on.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loaded, processor = load_model(model, device, dtype)
    settings = {
        **settings,
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt_suffix": prompt_suffix,
        "max_new_tokens": max_new_tokens,
    }
    answers = answer(
        loaded,
        processor,
        [Question(key, image, "\n".join(filter(None, (text, prompt_suffix)))) for key, image, text in questions],
        out / "answers.jsonl",
        settings=settings,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        reply=reply,
        progress=progress,
    )
    return answers, settings


def save_results(
    out: str | os.PathLike,
    settings: Mapping[str, Any],
    scores: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *more: tuple[Sequence[str], Sequence[Sequence[str]]],
) -> Table:
    """Write `results.json` (settings, versions, scores) and `report.md` (the tables) to the folder `out`.

    Args:
        more: columns and rows of further tables.

    Returns:
        the table of `rows` under `columns`, with `more` below it, for the terminal.
    """
    import transformers

    from .. import __version__

    title = f"{settings['benchmark']}: {settings['model']}"
    versions = {"agevlm": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    results = {"settings": dict(settings), "versions": versions, "scores": dict(scores)}
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in settings.items() if value not in (None, ""))]
    tables: list[Table] = []
    for names, contents in ((columns, rows), *more):
        lines += ["", f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in contents]
        tables.append(Table(title=None if tables else Text(title), title_justify="left"))
        for number, name in enumerate(names):
            tables[-1].add_column(name, justify="right" if number else "left")
        for row in contents:
            tables[-1].add_row(*row)
    out = Path(out)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if len(tables) == 1:
        return tables[0]
    below_each_other = Table.grid()
    for table in tables:
        below_each_other.add_row(table)
    return below_each_other
