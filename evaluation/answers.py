# SPDX-License-Identifier: Apache-2.0
"""Questions in, answers out: the question type, loading of models, and the one loop that answers by greedy decoding.

The model is any decoder-only image-text-to-text model of Transformers whose processor has a chat template: an AGE-VLM, a
LLaVA. It is always asked through its own processor.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import Progress
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from ..files import name_full_disk, new_file
from ..hub import load_pretrained, load_processor
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from ..processing.image_processing_agevlm import load_image, to_rgb
from ..processing.processing_agevlm import AgeVlmProcessor
from ..resume import FIX, digest, fingerprint, refuse_changes

# Greedy decoding, whatever the checkpoint's own generation settings are.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
# Transformers would hide the outputs of diverged models.
KEEP_INVALID = {"remove_invalid_values": False}
DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        choices: the texts to choose from, of a multiple-choice question.
        span: characters `(start, end)` of a phrase in `text` that names something in the image.
        mask: COCO RLE of what the phrase names.
        objects: COCO RLE of each object in the image.
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

    def open_image(self) -> Image.Image:
        """The image, RGB.

        Raises:
            ValueError: if the image cannot be read; names the question.
        """
        try:
            return to_rgb(self.load_image())
        except Exception as error:  # decoders raise errors of many types for damaged data
            raise ValueError(f"question {self.key}: {error or type(error).__name__}") from error


def open_image(source: str | os.PathLike) -> Image.Image:
    """The image of a file, a URL or a base64 string: upright, RGB.

    Raises:
        ValueError: if it cannot be read.
    """
    return to_rgb(load_image(source))


def render_question(processor: ProcessorMixin, text: str) -> str:
    """The prompt that asks `text` about one image, as the processor's chat template writes it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return render_chat(processor, [{"role": "user", "content": content}], add_generation_prompt=True)


def render_chat(processor: ProcessorMixin, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
    """A conversation as the processor's chat template writes it. An AGE-VLM reads special tokens in its messages as text."""
    if isinstance(processor, AgeVlmProcessor):
        kwargs["sanitize_control_tokens"] = processor.sanitize_chats
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


def load_model(
    name: str | os.PathLike, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, ProcessorMixin]:
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
    processor = load_processor(name)
    _check_processor(processor, str(name))
    model = load_pretrained(AutoModelForImageTextToText, name, dtype=dtype)
    return model.to(device).eval(), processor


def _check_processor(processor: Any, name: str) -> None:
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{name} has no processor of images and text: it is not an image-text-to-text model")
    if processor.chat_template is None:
        raise ValueError(
            f"the processor of {name} has no chat template, which says how the model is asked: set "
            "processor.chat_template to the template of the model's training and save it, or choose a checkpoint that has one"
        )


# --- a batch ---


@dataclass(frozen=True)
class Batch:
    """Texts about one image each, or about none, as a model reads them.

    `inputs` are the model's, on its device and padded on the left. `offsets` `(B, S, 2)` are the characters of each token in
    its prompt; only for AGE-VLM, whose tokens stand for characters of the prompt alone.
    """

    prompts: list[str]
    images: list[Image.Image]
    inputs: BatchFeature
    offsets: torch.Tensor | None = None

    @property
    def features(self) -> AgeVlmImageFeatures:
        """The image features of an AGE-VLM, a row for each prompt."""
        return self.inputs["mm_encoder_outputs"]["image"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an AGE-VLM's visual tokens."""
        assert self.features.grid is not None
        return self.features.grid


def read_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Image.Image] | None = None,
) -> Batch:
    """Makes inputs of rendered prompts, by the model's own processor.

    Several prompts about one image go through the vision tower of an AGE-VLM once.

    Args:
        prompts: as the chat template has rendered them, with one image or with none.
        images: one for each prompt; None for prompts without images.

    Raises:
        ValueError: if the model has no embedding of a token.
    """
    prompts = list(prompts)
    settings: dict[str, Any] = {
        "padding": True,
        "padding_side": "left",
        "add_special_tokens": adds_special_tokens(processor, prompts[0]),
        "return_tensors": "pt",
    }
    if images is None:
        inputs = processor(text=prompts, **settings)
        _check_tokens(model, processor, inputs)
        return Batch(prompts, [], inputs.to(model.device))
    nested = [[image] for image in images]
    if not isinstance(model, AgeVlmForConditionalGeneration):
        return Batch(prompts, list(images), processor(images=nested, text=prompts, **settings).to(model.device))
    inputs = processor(images=nested, text=prompts, return_offsets_mapping=True, **settings)
    _check_tokens(model, processor, inputs)
    offsets = inputs.pop("offset_mapping")
    features = _features(model, inputs.pop("pixel_values"), inputs.pop("image_sizes", None))
    inputs = inputs.to(model.device)
    inputs["mm_encoder_outputs"] = {"image": features}
    return Batch(prompts, list(images), inputs, offsets)


def _check_tokens(model: PreTrainedModel, processor: ProcessorMixin, inputs: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: if an AGE-VLM has no embedding of a token. Other models may replace such tokens.
    """
    if not isinstance(model, AgeVlmForConditionalGeneration):
        return
    embedding: Any = model.get_input_embeddings()
    rows, most = embedding.num_embeddings, int(inputs["input_ids"].max())
    if most >= rows:
        raise ValueError(
            f"the tokenizer writes {processor.tokenizer.convert_ids_to_tokens(most)!r}, which the model's embedding of {rows} "
            "tokens lacks: correct the special tokens in tokenizer_config.json, or take the tokenizer of the model"
        )


def adds_special_tokens(processor: ProcessorMixin, prompt: str) -> bool:
    """Whether the tokenizer adds special tokens to a rendered prompt.

    An AGE-VLM has learned from what its chat template writes, and from nothing before it. For other models it is as in
    `apply_chat_template`: the tokenizer adds its special tokens where the template has not written the first one.
    """
    bos = processor.tokenizer.bos_token
    return not isinstance(processor, AgeVlmProcessor) and not (bos is not None and prompt.startswith(bos))


@torch.no_grad()
def _features(
    model: AgeVlmForConditionalGeneration, pixels: torch.Tensor, sizes: torch.Tensor | None
) -> AgeVlmImageFeatures:
    """Features `(N, ...)` of `(N, 3, H, W)` pixels and their sizes without padding, with equal images computed once."""
    number: dict[tuple[bytes, ...], int] = {}
    parts = [pixels] if sizes is None else [pixels, sizes]
    keys = (tuple(part.cpu().numpy().tobytes() for part in image) for image in zip(*parts, strict=True))
    rows = [number.setdefault(key, len(number)) for key in keys]
    first = [rows.index(n) for n in range(len(number))]
    # Channels last is several times faster for depthwise convolutions on CPUs.
    different = [part[first].to(model.device) for part in parts]
    different[0] = different[0].contiguous(memory_format=torch.channels_last)
    found = model.get_image_features(*different)
    visible = found.visual_attention_mask
    return AgeVlmImageFeatures(
        last_hidden_state=found.last_hidden_state[rows],
        pooler_output=found.pooler_output[rows],
        visual_attention_mask=None if visible is None else visible[rows],
        grid=found.grid,
    )


class FiniteLogits(LogitsProcessor):
    """Remembers which rows of a generation had only finite logits, as bool `(rows,)` in `rows`. It changes none.

    The flag stays on the model's device, so that no step waits for the GPU. Logits that another processor has set to minus
    infinity do not count.
    """

    rows: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite = scores.amax(-1).isfinite()  # NaN is the largest
        self.rows = finite if self.rows is None else self.rows & finite
        return scores


def check_finite(model: PreTrainedModel, finite: torch.Tensor | None, asked: Sequence[str]) -> None:
    """
    Args:
        finite: bool `(len(asked), ...)`, whether the model's outputs for each are finite numbers.
        asked: what was asked, for the message.

    Raises:
        ValueError: if some are not; names the model, what was asked, and the first damaged weight if there is one.
    """
    if finite is None or finite.all():
        return
    place = asked[int((~finite.reshape(len(asked), -1).all(-1)).nonzero()[0])]
    name = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if name is None:
        reason = (
            f"Its weights are finite, and too large for {model.dtype}: choose a wider dtype or another checkpoint."
        )
    else:
        reason = f"Its weights have diverged, {name} is not finite: choose an earlier checkpoint."
    raise ValueError(
        f"{model.name_or_path or type(model).__name__} computes numbers that are not finite (NaN or infinity) for {place}, "
        f"so nothing that it says can be scored or shown. {reason}"
    )


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    asked: Sequence[str],
) -> torch.Tensor:
    """The tokens `(B, T)` that the model writes after its inputs.

    Args:
        asked: what each row asks, for the message.

    Raises:
        ValueError: if a logit is not finite ([`check_finite`]).
    """
    finite = FiniteLogits()
    tokens = model.generate(
        **inputs,
        **GREEDY,
        **KEEP_INVALID,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=[finite],
    )
    check_finite(model, finite.rows, asked)
    return tokens[:, inputs["input_ids"].shape[1] :]


Inspect = Callable[[PreTrainedModel, ProcessorMixin, Sequence[Question], Batch], Sequence[Mapping[str, Any]]]
"""What else to write down of each question of a batch, beside its answer."""


def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    max_new_tokens: int,
    inspect: Inspect | None = None,
) -> list[dict[str, Any]]:
    """Answers questions together: for each its `answer`, without spaces at its ends, and what `inspect` gives."""
    images = [question.open_image() for question in questions]
    prompts = [render_question(processor, question.text) for question in questions]
    batch = read_batch(model, processor, prompts, images)
    asked = [f"question {question.key} ({question.text!r})" for question in questions]
    tokens = generate_greedily(model, processor, batch.inputs, max_new_tokens, asked)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    more = inspect(model, processor, questions, batch) if inspect is not None else [{}] * len(texts)
    return [{"answer": text.strip(), **found} for text, found in zip(texts, more, strict=True)]


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
        progress: the label of the progress bar; None for none.

    Returns:
        by key, in the order of the questions: the `answer`, without spaces at its ends, and what else `inspect` gives.

    Raises:
        FileExistsError: if `file` has answers of other settings.
        ValueError: if `file` has other content; if two questions have the same key; if an image cannot be read; if the
            processor has no chat template; or if the model's logits are not finite.
    """
    questions = list(questions)
    _check_processor(processor, type(processor).__name__)
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
            batch = left[start : start + batch_size]
            given = answer_batch(model, processor, batch, max_new_tokens, inspect)
            answers |= {question.key: found for question, found in zip(batch, given, strict=True)}
            if file is not None:
                entries = [{"key": q.key, "question": q.text, **found} for q, found in zip(batch, given, strict=True)]
                with name_full_disk(file), open(file, "a", encoding="utf-8", newline="\n") as output:
                    output.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            bar.advance(task, len(batch))
    return {question.key: answers[question.key] for question in questions}


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
