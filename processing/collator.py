# SPDX-License-Identifier: Apache-2.0
"""From rows to batches: conversations with images and grounded phrases become model inputs, labels and guidance targets.

[`agevlm.processing.rows`] describes the rows: TRL's conversational vision format, with optional `grounding`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_agevlm import AgeVlmImageProcessorMixin, decode_image, load_image
from .processing_agevlm import AgeVlmProcessor, RenderedChat
from .rows import ORIGIN_COLUMN, mask_from_rle, message_text, place_images, row_messages


def mask_coverage(mask: np.ndarray, grid: tuple[int, int], image_processor: AgeVlmImageProcessorMixin) -> torch.Tensor:
    """The share of each visual token's cell that a mask covers, with exactly the geometry that the image was resized with.

    Args:
        mask: bool `(height, width)`, of the size of the unprocessed image.
        grid: rows and columns of the visual tokens.
        image_processor: it makes `pixel_values` of the image.

    Returns:
        float32 `(rows * columns,)`, each in [0, 1].
    """
    size = image_processor.size
    height, width = image_processor.get_resized_size(*mask.shape)
    rows = _cell_shares(mask.shape[0], height, size["height"], grid[0])
    columns = _cell_shares(mask.shape[1], width, size["width"], grid[1])
    return (rows @ torch.from_numpy(mask.astype(np.float32)) @ columns.T).clamp(max=1).flatten()


@lru_cache(maxsize=64)  # most data sets have images of few sizes
def _cell_shares(pixels: int, length: int, target: int, cells: int) -> torch.Tensor:
    """`(cells, pixels)`: the share of each cell that each pixel covers, along one side of an image. The side's `pixels` are
    resized to `length`, which is the beginning of a `target` of `cells` equal cells."""
    # In integers, so exact. The unit is 1 / (pixels * cells) of a resized pixel.
    cell, pixel = target * pixels, length * cells
    cell_starts, pixel_starts = torch.arange(cells)[:, None] * cell, torch.arange(pixels) * pixel
    overlap = torch.minimum(cell_starts + cell, pixel_starts + pixel) - torch.maximum(cell_starts, pixel_starts)
    return (overlap.clamp(min=0).double() / cell).float()


@dataclass
class RenderedConversation:
    """A conversation as its chat template writes it.

    `answers` are the characters `(start, end)` of the assistant's turns in `text`. `render` wrote `text` from `messages`,
    whose contents are lists of parts.
    """

    text: RenderedChat
    answers: list[tuple[int, int]]
    messages: list[dict]
    render: Callable[[list[dict]], str]

    def locate(self, message: int, start: int, end: int) -> tuple[int, int]:
        """Find a span of a message's text in `text`.

        Returns:
            its first character in `text` and the character after its last one, without white space at the ends.

        Raises:
            ValueError: if the message does not exist, the span is empty, reversed, outside the message's text or only
                white space, or the chat template changes the message's text.
        """
        if not 0 <= message < len(self.messages):
            raise ValueError(f"A grounded phrase is in message {message} of a row with {len(self.messages)} messages.")
        text = message_text(self.messages[message])
        phrase = text[max(start, 0) : end]
        if not (0 <= start < end <= len(text) and phrase.strip()):
            raise ValueError(
                f"The grounded span ({start}, {end}) in message {message} must be 0 <= start < end <= {len(text)}, "
                "the length of that message's text, and not only white space."
            )
        first = self._places[message][end - len(phrase.lstrip())]
        last = self._places[message][start + len(phrase.rstrip()) - 1]
        if first is None or last is None:
            raise ValueError(
                f"The chat template changes the text of message {message}, so the grounded phrase {phrase!r} cannot "
                "be found in it. Use a template that writes contents unchanged (it may trim them), or remove the grounding "
                "of such messages."
            )
        return first, last + 1

    @cached_property
    def _places(self) -> list[list[int | None]]:
        """The place in `text` of each character of each message's text. None for white space at the ends of text
        parts, and for parts that the template changes, repeats or omits."""
        # The conversation is rendered again, with a mark at both ends of each text part: a character that occurs nowhere
        # else. Marks are put inside the white space at the ends, which many templates trim.
        unused = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in self.text)
        marks: dict[str, tuple[int, int, str]] = {}  # message, first character in the message's text, marked text
        messages = []
        for i, message in enumerate(self.messages):
            content, length = [], 0
            for part in message["content"]:
                part_text = part["text"] if part["type"] == "text" else ""
                if core := part_text.strip():
                    before, _, after = part_text.partition(core)
                    mark = next(unused)
                    marks[mark] = i, length + len(before), core
                    part = {**part, "text": before + mark + core + mark + after}
                content.append(part)
                length += len(part_text)
            messages.append({**message, "content": content})
        text = self.render(messages)
        found: dict[str, list[int]] = {mark: [] for mark in marks}
        for count, match in enumerate(re.finditer(f"[{''.join(marks)}]", text)):
            found[match[0]].append(match.start() - count)

        places: list[list[int | None]] = [[None] * len(message_text(message)) for message in self.messages]
        # Lengths are compared rather than texts, because a template may write the time.
        if len(text) - sum(map(len, found.values())) == len(self.text):
            for mark, (i, first, core) in marks.items():
                if len(found[mark]) == 2 and self.text[slice(*found[mark])] == core:
                    places[i][first : first + len(core)] = range(*found[mark])
        return places


def render_conversation(processor: ProcessorMixin, messages: Sequence[dict]) -> RenderedConversation:
    """Writes a conversation with the processor's chat template, and finds the assistant's turns in it.

    The template marks assistant turns with `{% generation %}`. If it has no such mark, a turn is what it adds to the text of
    all earlier messages with a generation prompt, without the white space after its end of turn.

    Args:
        processor: of the model.
        messages: their contents are lists of parts; see `place_images`.

    Raises:
        ValueError: if there is no chat template, or it has no marks and changes the text of earlier turns.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if template is None:
        raise ValueError("The processor has no chat template: set `processor.chat_template`.")
    marked = "endgeneration" in template

    def render(messages: Sequence[dict], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        (text,), spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **processor.tokenizer.special_tokens_map,
        )
        return text, [tuple(span) for span in spans[0]] if marked else []

    def render_turns() -> tuple[str, list[tuple[int, int]]] | None:
        text, answers = render(messages)[0], []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt, turn = render(messages[:i], prompt=True)[0], render(messages[: i + 1])[0]
            except TemplateError:  # the template refuses a part of the conversation
                return None
            if not (turn.startswith(prompt) and text.startswith(turn)):
                return None
            if turn[len(prompt) :].strip() != message_text(message).strip():  # else white space ends the turn
                turn = turn.rstrip()
            answers.append((len(prompt), len(turn)))
        return text, answers

    # Tried twice, because a template may write the date, which can change between two renderings.
    rendered = render(messages) if marked else render_turns() or render_turns()
    if rendered is None:
        raise ValueError(
            "The chat template changes earlier turns when others follow, so the assistant's turns cannot be found. "
            "Mark them in the template with {% generation %} and {% endgeneration %}."
        )

    def render_text(messages: Sequence[dict]) -> str:
        return render(messages)[0]

    sanitizes = isinstance(processor, AgeVlmProcessor) and processor.sanitize_chats
    typed = processor.find_typed_tokens(messages, render_text) if sanitizes else ()
    return RenderedConversation(RenderedChat(rendered[0], typed), rendered[1], list(messages), render_text)


@dataclass
class GuidedPhrase:
    """A phrase whose attention is guided: its characters in the rendered text, and its targets, float32 `(T,)` for each of the row's
    images with its `T` image tokens. `absent`: the images show nothing that it names."""

    span: tuple[int, int]
    targets: list[torch.Tensor]
    absent: bool = False


@dataclass
class RowCollator:
    """Turns rows into a batch: a model's inputs, labels and, for grounded rows, the inputs of guidance.

    Rows have `messages` (or `prompt` and `completion`), `images` (one, many or none) and optionally `grounding`, see
    [`agevlm.processing.rows`]. The batch has what the processor makes, `labels` `(B, S)`, and if phrases are guided

    - `map_queries`: bool `(B, P, S)`, the tokens of each phrase;
    - `map_targets`: float32 `(B, P, V)`, the share of each image token's area that the phrase's mask covers, all zero for
      the missing phrases of rows that have fewer; `V` are the image tokens of all images of a row;
    - `num_dropped_phrases`: `(1,)`, the number of dropped phrases: truncated, before their image, or with an empty mask.

    Entries of `grounding` with the same span are one phrase. Its target is the union of their masks in the images before it.
    Guidance ignores entries without a mask. An empty mask without a score means that the image shows nothing that the phrase
    names; an empty mask with a score, that a mask teacher was not sure.

    A subclass says how a processor encodes texts and images ([`encode`]) and which image tokens a mask covers ([`cover`]).

    Args:
        processor: of the model.
        max_length: number of tokens that texts are truncated to; by default they are not truncated.
        assistant_only_loss: learn the assistant's turns only, otherwise all of the text. In rows with `prompt` and
            `completion`, only the assistant's turns of the completion are learned.
        pad_to_multiple_of: pad texts to a multiple of this.
        guided_fraction: share of the grounded rows whose masks are used. The rows are chosen by their content and `seed`, so
            the choice is the same in every epoch, process and resumed run. It does not concern phrases that name nothing.
        guide_absent: also guide phrases that name nothing in the image, for models with an attention sink.
        seed: of that choice.
        allow_urls: fetch images that rows name by a URL, from public addresses only; see
            [`~agevlm.processing.image_processing_agevlm.load_image`].

    Raises:
        BadRowError: when called with an inconsistent row; the message names the row and the mistake.
    """

    processor: Any
    max_length: int | None = None
    assistant_only_loss: bool = True
    pad_to_multiple_of: int | None = None
    guided_fraction: float = 1.0
    guide_absent: bool = False
    seed: int = 0
    allow_urls: bool = False

    def __post_init__(self):
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"guided_fraction must be a share of the rows, from 0 to 1, got {self.guided_fraction}.")

    # --- what a subclass says ---

    @property
    def guides(self) -> bool:
        """Whether grounded phrases become inputs of guidance."""
        raise NotImplementedError

    def encode(self, texts: list[RenderedChat], images: list[list]) -> dict[str, Any]:
        """The inputs of a model, texts padded on the right, as tensors; with `offset_mapping` `(B, S, 2)`, the characters of each
        token in its text as it was given."""
        raise NotImplementedError

    def count_images(self, text: str) -> int:
        """How many images a part of a rendered text shows."""
        raise NotImplementedError

    def cover(self, masks: dict[int, np.ndarray], images: list) -> list[torch.Tensor]:
        """Of each image the share of each of its tokens' areas that its mask covers, float32 `(T,)`; 0 without a mask.

        Args:
            masks: by number of the image, bool `(height, width)`.
        """
        raise NotImplementedError

    def most_image_tokens(self, texts: Sequence[str], phrases: Sequence[Sequence[GuidedPhrase]]) -> int:
        """How many image tokens a row of `map_targets` has. A model's maps have as many, or more behind them."""
        return max(sum(map(len, row[0].targets)) for row in phrases if row)

    # --- rows to batches ---

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return naming_bad_rows(self._collate, rows)[0]

    def find_problem(self, row: dict[str, Any]) -> str | None:
        """What keeps a row from training, found by collating it; None if it trains."""
        return self.try_row(row)[1]

    def try_row(self, row: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """The batch of a row alone, without features; or None and what keeps it from training."""
        try:
            return self._collate([row])[0], None
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            return None, _reason(row, error)

    def _collate(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list]:
        """The batch, and all images in order."""
        images = [row_images(row, self.allow_urls) for row in rows]
        rendered = [
            render_conversation(self.processor, place_images(row_messages(row), len(pictures)))
            for row, pictures in zip(rows, images, strict=True)
        ]
        texts = [conversation.text for conversation in rendered]
        batch = self.encode(texts, images)
        offsets, attended = batch.pop("offset_mapping"), batch["attention_mask"].bool()
        learn = torch.zeros_like(attended)
        for i, (row, conversation) in enumerate(zip(rows, rendered, strict=True)):
            first, last = offsets[i].unbind(-1)
            for start, end in self._learned_spans(row, conversation):
                # All tokens between, even empty ones: trimmed offsets show white space as empty tokens.
                learn[i] |= (first < end) & (last > start)
        batch["labels"] = batch["input_ids"].masked_fill(~(learn & attended), -100)
        phrases = [self.guided_phrases(*row) for row in zip(rows, images, rendered, strict=True)]
        batch.update(self.guidance_inputs(phrases, offsets, attended, texts))
        return batch, [image for row in images for image in row]

    def _learned_spans(self, row: dict, conversation: RenderedConversation) -> list[tuple[int, int]]:
        """The characters that the language-modeling loss covers."""
        answers = conversation.answers
        if row.get("messages") is None and row.get("completion") is not None:
            number = sum(message["role"] == "assistant" for message in row["completion"])
            return answers[max(0, len(answers) - number) :]
        return answers if self.assistant_only_loss else [(0, len(conversation.text))]

    def guided_phrases(self, row: dict, images: list, conversation: RenderedConversation) -> list[GuidedPhrase]:
        """The phrases of a row that have masks; only the absent ones if the row is not guided (`guided_fraction`)."""
        grounding = [entry for entry in row.get("grounding") or () if entry.get("mask") is not None]
        if not self.guides or not grounding:
            return []
        is_guided = self._is_guided(grounding)
        if not is_guided and not self.guide_absent:
            return []
        decoded: dict[tuple, np.ndarray] = {}  # a question and its answer often name the same object
        masks: dict[tuple[int, int], dict[int, np.ndarray]] = {}  # by span and image
        absent: dict[tuple[int, int], bool] = {}
        for entry in grounding:
            *place, image = (entry.get(name) for name in ("message", "start", "end", "image"))
            if not all(isinstance(number, (int, np.integer)) for number in (*place, image)):
                raise ValueError(
                    f"A grounded phrase has whole numbers for message, start, end and image, not {[*place, image]}."
                )
            span = conversation.locate(*place)
            phrase = conversation.text[slice(*span)]
            if not 0 <= image < len(images):
                raise ValueError(
                    f"The grounded phrase {phrase!r} names image {image} of a row with {len(images)} image(s)."
                )
            rle, size = str(entry["mask"]), (images[image].height, images[image].width)
            try:
                mask = decoded.get((rle, size))
                if mask is None:
                    mask = decoded[rle, size] = mask_from_rle(entry["mask"], size)
            except ValueError as error:
                raise ValueError(f"The mask of the phrase {phrase!r} cannot be read: {error}.") from error
            absent[span] = absent.get(span, True) and entry.get("score") is None and not mask.any()
            joined = masks.setdefault(span, {})
            joined[image] = joined[image] | mask if image in joined else mask
        phrases = []
        for span, joined in masks.items():
            if not is_guided and not absent[span]:
                continue
            phrases.append(GuidedPhrase(span, self.cover(joined, images), absent[span]))
        return phrases

    def _is_guided(self, grounding: list[dict]) -> bool:
        if self.guided_fraction == 1:
            return True
        # Without boxes and scores, which Arrow rounds.
        content = [[entry[key] for key in ("message", "start", "end", "image", "mask")] for entry in grounding]
        digest = hashlib.sha256(json.dumps([self.seed, content], sort_keys=True, default=str).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < self.guided_fraction

    def guidance_inputs(
        self,
        phrases: Sequence[Sequence[GuidedPhrase]],
        offsets: torch.Tensor,
        attended: torch.Tensor,
        texts: Sequence[RenderedChat],
    ) -> dict[str, torch.Tensor]:
        """`map_queries`, `map_targets` and `num_dropped_phrases` of a batch; nothing if it has no grounded phrase.

        Args:
            phrases: of each row.
            offsets: `(B, S, 2)`, characters of each token.
            attended: bool `(B, S)`.
            texts: of each row, as rendered.
        """
        if not self.guides or not any(phrases):
            return {}
        queries = AgeVlmProcessor.get_map_queries(offsets, [[p.span for p in row] for row in phrases], attended, texts)
        shown = [text.without_typed_tokens for text in texts]  # an image token that someone typed shows nothing
        kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for row_phrases, row_queries, row_offsets, text in zip(phrases, queries, offsets, shown, strict=True):
            kept.append([])
            for phrase, query in zip(row_phrases, row_queries, strict=False):
                start, end = phrase.span
                tokens = row_offsets[query]
                complete = len(tokens) > 0 and tokens[:, 0].min() <= start and tokens[:, 1].max() >= end
                visible_images = self.count_images(text[:start])
                target = torch.cat(
                    # The phrase cannot attend to images after it.
                    [cover if image < visible_images else cover * 0 for image, cover in enumerate(phrase.targets)]
                )
                if complete and (target.any() or (phrase.absent and self.guide_absent and visible_images)):
                    kept[-1].append((query, target))
        dropped = sum(map(len, phrases)) - sum(map(len, kept))
        batch = {"num_dropped_phrases": torch.tensor([dropped])}
        if any(kept):
            most = max(map(len, kept))
            map_queries = torch.zeros(len(kept), most, offsets.shape[1], dtype=torch.bool)
            map_targets = torch.zeros(len(kept), most, self.most_image_tokens(shown, phrases))
            for i, row in enumerate(kept):
                for j, (query, target) in enumerate(row):
                    map_queries[i, j] = query
                    map_targets[i, j, : len(target)] = target
            batch = {"map_queries": map_queries, "map_targets": map_targets, **batch}
        return batch


@dataclass
class AgeVlmDataCollator(RowCollator):
    """The collator of AGE-VLM. A batch has `input_ids`, `attention_mask`, `labels` `(B, S)`, padded on the right; `pixel_values` and, if
    the processor makes it, `image_sizes` of all images in order; and the inputs of guidance ([`RowCollator`]).

    Args:
        grid: rows and columns of an image's visual tokens; see [`agevlm.trainer.visual_grid`]. None for no guidance.
        features: takes images and gives the vision tower's features of them, as [`agevlm.data.FeatureStore`] does. The
            batch then has `mm_encoder_outputs` in place of `pixel_values` and `image_sizes`.
    """

    grid: tuple[int, int] | None = None
    features: Callable[[list], Any] | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch, images = naming_bad_rows(self._collate, rows)
        if self.features is not None and images:
            batch["mm_encoder_outputs"] = {"image": self.features(images)}
        return batch

    @property
    def guides(self) -> bool:
        return self.grid is not None

    def encode(self, texts: list[RenderedChat], images: list[list]) -> dict[str, Any]:
        encode: Callable = self.processor.tokenize
        if self.features is None:
            encode = partial(self.processor, images=images if any(images) else None)
        inputs = encode(
            text=texts,
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=False,  # the chat template has written them
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        return {name: tensor for name, tensor in inputs.items() if name not in self.processor.unused_input_names}

    def count_images(self, text: str) -> int:
        return text.count(self.processor.image_token)

    def most_image_tokens(self, texts: Sequence[str], phrases: Sequence[Sequence[GuidedPhrase]]) -> int:
        assert self.grid is not None
        return max(map(self.count_images, texts)) * self.grid[0] * self.grid[1]

    def cover(self, masks: dict[int, np.ndarray], images: list) -> list[torch.Tensor]:
        assert self.grid is not None
        nothing = torch.zeros(self.grid[0] * self.grid[1])
        return [
            mask_coverage(masks[number], self.grid, self.processor.image_processor) if number in masks else nothing
            for number in range(len(images))
        ]


class BadRowError(ValueError):
    """A row that cannot be collated; the message names it, and says why and what to do."""

    def __init__(self, message: str):
        # PyTorch's data loaders put a traceback before the message of an error in a worker.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def naming_bad_rows(collate: Callable[[list], Any], rows: Sequence[dict[str, Any]]) -> Any:
    """What `collate` makes of rows. Its error names the first row that it cannot collate by itself.

    Raises:
        BadRowError: with the row's origin ([`~agevlm.processing.rows.ORIGIN_COLUMN`]) or its place in the batch, the reason, and
            the files of its images where they are known.
    """
    try:
        return collate(list(rows))
    except (ImportError, MemoryError):
        raise
    except Exception:  # templates, decoders and tokenizers raise errors of many types
        for number, row in enumerate(rows):
            try:
                collate([row])
            except Exception as error:
                raise BadRowError(_describe_bad_row(row, number, error)) from error
        raise


def _describe_bad_row(row: dict[str, Any], number: int, error: Exception) -> str:
    origin = row.get(ORIGIN_COLUMN)
    where = f"{origin['file']}, row {origin['row']}" if origin else f"row {number} of the batch"
    fix = "Correct the row or remove it: `agevlm data check --model MODEL` lists all such rows of a data set."
    if origin:
        fix += " `on_bad_row: skip` in the recipe's entry of the data leaves them out."
    return f"{where}: {_reason(row, error)}. {fix}"


def _reason(row: dict[str, Any], error: Exception) -> str:
    """What is wrong with a row, with the files of its images where they are known."""
    reason = (
        f"{error}" if isinstance(error, (ValueError, OSError, TemplateError)) else f"{type(error).__name__}: {error}"
    )
    images = row["images"] if isinstance(row.get("images"), (list, tuple)) else [row.get("image")]
    names = [image.get("path") if isinstance(image, dict) else getattr(image, "filename", image) for image in images]
    files = ", ".join(f"{name:.200}" for name in names if isinstance(name, str) and name and name not in reason)
    return f"{reason.rstrip('. ')}{f' (images: {files})' if files else ''}"


def row_images(row: dict[str, Any], allow_urls: bool = False) -> list:
    """The images of a row: `images`, or the single `image`, or none. Paths, and images as `datasets` stores them
    (`{"bytes": ..., "path": ...}`), are opened with `load_image`.

    Raises:
        ValueError: if one cannot be read, or is at a URL and `allow_urls` is False.
    """
    images = [row["image"]] if row.get("image") is not None else row.get("images") or []
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"its `images` are not a list of images, but {images!r:.80}")
    return [_open_image(image, "public" if allow_urls else "none") for image in images]


def _open_image(image: Any, urls: Literal["public", "none"]) -> Any:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if image is None:
        raise ValueError("it has an image that is neither a file nor bytes")
    if isinstance(image, PIL.Image.Image):
        return decode_image(image)  # upright, as masks and boxes are
    return load_image(image, urls=urls) if isinstance(image, (str, bytes, os.PathLike)) else image
