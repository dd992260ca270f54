# SPDX-License-Identifier: Apache-2.0
"""From rows to batches: conversations with images and grounded phrases to model inputs, labels and guidance targets.

The rows are those of [`agevlm.processing.grounding`]: TRL's conversational vision format, with `grounding` where there is any.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils.chat_template_utils import render_jinja_template

from .grounding import mask_from_rle
from .image_processing_agevlm import AgeVlmImageProcessorMixin
from .processing_agevlm import AgeVlmProcessor

_CHECK = "`agevlm data check` lists all such rows of a data set."


def mask_coverage(mask: np.ndarray, grid: tuple[int, int], image_processor: AgeVlmImageProcessorMixin) -> torch.Tensor:
    """How much of each visual token's cell a mask covers, through exactly the geometry the image went through.

    Args:
        mask: bool `(height, width)`, of the image before any processing.
        grid: rows and columns of the visual tokens.
        image_processor: the one that makes `pixel_values` of the image.

    Returns:
        float32 `(rows * columns,)`, each in [0, 1].
    """
    size = image_processor.size
    height, width = image_processor.get_resized_size(*mask.shape)
    coverage = torch.from_numpy(mask.astype(np.float32))[None, None]
    coverage = nn.functional.interpolate(coverage, (height, width), mode="area")
    coverage = nn.functional.pad(coverage, (0, size["width"] - width, 0, size["height"] - height))
    return nn.functional.adaptive_avg_pool2d(coverage, grid).flatten()


def place_images(messages: Sequence[dict], num_images: int) -> list[dict]:
    """Messages whose contents are all lists of parts. Where no message has an image part, the images go in front of the
    first user message, as TRL puts them."""
    messages = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]
    if num_images and not any(part["type"] == "image" for m in messages for part in m["content"]):
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            raise ValueError(f"A row has {num_images} image(s), but no message that shows them and none of the user.")
        parts = [{"type": "image", "text": None}] * num_images + list(messages[first]["content"])
        messages[first] = {**messages[first], "content": parts}
    return messages


@dataclass
class RenderedConversation:
    """A conversation as its chat template writes it.

    `answers` are the characters `(start, end)` of the assistant's turns, `parts` for each message where its text parts stand:
    tuples of the part's first character in the message's text, its first in `text`, and its length.
    """

    text: str
    answers: list[tuple[int, int]]
    parts: list[list[tuple[int, int, int]]]

    def locate(self, message: int, start: int, end: int) -> tuple[int, int]:
        """Characters in `text` of a span of a message's text.

        Raises:
            ValueError: if the message does not exist or the span is empty, reversed or outside its text.
        """
        if not 0 <= message < len(self.parts):
            raise ValueError(
                f"A grounded phrase is in message {message} of a row with {len(self.parts)} messages. {_CHECK}"
            )
        parts = self.parts[message]
        length = max((begin + size for begin, _, size in parts), default=0)
        if not 0 <= start < end <= length:
            raise ValueError(
                f"The grounded span ({start}, {end}) in message {message} must be 0 <= start < end <= {length}, the "
                f"length of that message's text. {_CHECK}"
            )
        first = next(where + start - begin for begin, where, size in parts if begin <= start < begin + size)
        last = next(where + end - 1 - begin for begin, where, size in parts if begin < end <= begin + size)
        return first, last + 1


def render_conversation(processor: AgeVlmProcessor, messages: Sequence[dict]) -> RenderedConversation:
    """Writes a conversation with the processor's chat template, and says where everything stands in it.

    Assistant turns are what the template marks with `{% generation %}`. In a template without that mark, they are what
    each adds to the text rendered up to there with a generation prompt.

    Raises:
        ValueError: if there is no chat template, or it changes the text of messages or of earlier turns.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if template is None:
        raise ValueError("The processor has no chat template: set `processor.chat_template`.")
    marked = "endgeneration" in template

    def render(messages, prompt: bool = False):
        (text,), spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **processor.tokenizer.special_tokens_map,
        )
        return text, [tuple(span) for span in spans[0]] if marked else []

    text, answers = render(messages)
    if not marked:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, turn = render(messages[:i], True)[0], render(messages[: i + 1])[0]
                if not (turn.startswith(prompt) and text.startswith(turn)):
                    raise ValueError(
                        "The chat template writes a turn otherwise once others follow, so the assistant's part cannot be "
                        "told: mark it in the template with {% generation %} and {% endgeneration %}."
                    )
                answers.append((len(prompt), len(turn)))

    # Where each text part stands: rendered once more with a character at its ends that occurs nowhere else.
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
    for strip in (False, True):  # many templates trim contents
        texts = [[p["text"] or "" for p in m["content"] if p["type"] == "text"] for m in messages]
        kept = [["".join(t).strip() and t.strip() if strip else t for t in row] for row in texts]
        bounded = [
            {
                **m,
                "content": [
                    {**p, "text": f"{mark}{next(row)}{mark}"} if p["type"] == "text" else p for p in m["content"]
                ],
            }
            for m, row in zip(messages, map(iter, kept), strict=True)
        ]
        pieces = render(bounded)[0].split(mark)
        if "".join(pieces) == text and len(pieces) == 2 * sum(map(len, texts)) + 1:
            break
    else:
        raise ValueError(
            "The chat template changes the text of messages, so that grounded phrases cannot be found in it."
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = iter(ends[::2].tolist())
    parts: list[list[tuple[int, int, int]]] = []
    for row, row_kept in zip(texts, kept, strict=True):
        begin = 0
        parts.append([])
        for full, part in zip(row, row_kept, strict=True):
            parts[-1].append((begin + full.find(part), next(starts), len(part)))
            begin += len(full)
    return RenderedConversation(text, answers, parts)


@dataclass
class GuidedPhrase:
    """A phrase whose attention is guided: its characters in the rendered text, its target `(images of the row * T,)`, and
    the first image it names something in."""

    span: tuple[int, int]
    target: torch.Tensor
    image: int


@dataclass
class AgeVlmDataCollator:
    """Turns rows into a batch for AGE-VLM: model inputs, labels and, for grounded rows, what guidance needs.

    Rows have `messages` (or `prompt` and `completion`), `images` (one, many or none) and optionally `grounding`, see
    [`agevlm.processing.grounding`]. The batch has `input_ids`, `attention_mask`, `labels` `(B, S)`, padded on the right;
    `pixel_values` and perhaps `pixel_attention_mask` of all images in order; and where there are phrases to guide

    - `map_queries`: bool `(B, P, S)`, the tokens of each phrase;
    - `map_targets`: float32 `(B, P, V)`, how much of each visual token's cell the phrase's mask covers, all zero where a
      row has fewer phrases;
    - `num_dropped_phrases`: `(1,)`, how many had to be left out: truncated, before their image, or with an empty mask.

    Entries of `grounding` with the same span are one phrase, which may look at all that their masks cover. Entries without
    a mask are no part of guidance.

    Args:
        processor: of the model.
        grid: rows and columns of an image's visual tokens; [`visual_grid`] finds them. None for no guidance.
        max_length: tokens that a text is cut to; all are kept by default.
        assistant_only_loss: learn the assistant's turns only; otherwise all of the text.
        pad_to_multiple_of: pad texts to a multiple of this.
        guided_fraction: share of the grounded rows whose masks are used, drawn by their content and `seed`; so the
            choice is the same in every epoch, process and resumed run.
        seed: of that draw.

    Raises:
        ValueError: when called with a row that does not hold together; the message says how.
    """

    processor: AgeVlmProcessor
    grid: tuple[int, int] | None = None
    max_length: int | None = None
    assistant_only_loss: bool = True
    pad_to_multiple_of: int | None = None
    guided_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"guided_fraction is a share of the rows, from 0 to 1, got {self.guided_fraction}.")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row_images(row) for row in rows]
        messages = [place_images(row_messages(row), len(shown)) for row, shown in zip(rows, images, strict=True)]
        rendered = [render_conversation(self.processor, conversation) for conversation in messages]
        inputs = self.processor(
            images=images if any(images) else None,
            text=[conversation.text for conversation in rendered],
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=False,  # the chat template has written them
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        batch = dict(inputs)
        offsets, attended = batch.pop("offset_mapping"), batch["attention_mask"].bool()
        learn = attended.clone()
        answers = [self._answers(row, conversation) for row, conversation in zip(rows, rendered, strict=True)]
        if any(spans is not None for spans in answers):
            spans = [
                spans if spans is not None else [(0, len(c.text))] for spans, c in zip(answers, rendered, strict=True)
            ]
            learn &= self.processor.get_map_queries(offsets, spans).any(1)
        batch["labels"] = batch["input_ids"].masked_fill(~learn, -100)
        phrases = [self.guided_phrases(*row) for row in zip(rows, images, rendered, strict=True)]
        texts = [conversation.text for conversation in rendered]
        batch.update(self.guidance_inputs(phrases, offsets, attended, texts))
        return batch

    def _answers(self, row: dict, conversation: RenderedConversation) -> list[tuple[int, int]] | None:
        """Characters to learn, None for all."""
        if "completion" in row:
            return conversation.answers[-1:]
        return conversation.answers if self.assistant_only_loss else None

    def guided_phrases(self, row: dict, images: list, conversation: RenderedConversation) -> list[GuidedPhrase]:
        """The phrases of a row that have masks, if the row is one of those to be guided."""
        grounding = [entry for entry in row.get("grounding") or () if entry.get("mask") is not None]
        if self.grid is None or not grounding or not self._is_guided(grounding):
            return []
        size = self.grid[0] * self.grid[1]
        phrases: dict[tuple[int, int], GuidedPhrase] = {}
        for entry in grounding:
            span, image = conversation.locate(entry["message"], entry["start"], entry["end"]), entry["image"]
            if not 0 <= image < len(images):
                raise ValueError(
                    f"A grounded phrase names image {image} of a row with {len(images)} image(s). {_CHECK}"
                )
            mask = mask_from_rle(entry["mask"])
            if mask.shape != (shape := (images[image].height, images[image].width)):
                raise ValueError(
                    f"The mask of the phrase {conversation.text[slice(*span)]!r} has {mask.shape[0]}x{mask.shape[1]} "
                    f"pixels (height x width), but its image has {shape[0]}x{shape[1]}. {_CHECK}"
                )
            phrase = phrases.setdefault(span, GuidedPhrase(span, torch.zeros(len(images) * size), image))
            cells = phrase.target[image * size : (image + 1) * size]
            cells.copy_(torch.maximum(cells, mask_coverage(mask, self.grid, self.processor.image_processor)))
            phrase.image = min(phrase.image, image)
        return list(phrases.values())

    def _is_guided(self, grounding: list[dict]) -> bool:
        content = json.dumps([self.seed, grounding], sort_keys=True, default=str)
        return zlib.crc32(content.encode()) / 2**32 < self.guided_fraction

    def guidance_inputs(
        self,
        phrases: Sequence[Sequence[GuidedPhrase]],
        offsets: torch.Tensor,
        attended: torch.Tensor,
        texts: Sequence[str],
    ) -> dict[str, torch.Tensor]:
        """`map_queries`, `map_targets` and `num_dropped_phrases` of a batch; empty where it has no grounded phrase.

        Args:
            phrases: of each row.
            offsets: `(B, S, 2)`, characters of each token.
            attended: bool `(B, S)`.
            texts: of each row, as rendered.
        """
        if not any(phrases):
            return {}
        queries = self.processor.get_map_queries(offsets, [[p.span for p in row] for row in phrases], attended, texts)
        token = self.processor.image_token
        kept: list[list[int]] = []
        for i, row in enumerate(phrases):
            kept.append([])
            for j, phrase in enumerate(row):
                found = offsets[i][queries[i, j]]
                whole = len(found) > 0 and found[:, 0].min() <= phrase.span[0] and found[:, 1].max() >= phrase.span[1]
                sees = texts[i][: phrase.span[0]].count(token) > phrase.image
                if whole and sees and phrase.target.any():
                    kept[-1].append(j)
        dropped = sum(map(len, phrases)) - sum(map(len, kept))
        batch = {"num_dropped_phrases": torch.tensor([dropped])}
        if any(kept):
            most, width = max(map(len, kept)), max(len(p.target) for row in phrases for p in row)
            width = max(width, max(text.count(token) for text in texts) * self.grid[0] * self.grid[1])
            map_queries = torch.zeros(len(phrases), most, offsets.shape[1], dtype=torch.bool)
            map_targets = torch.zeros(len(phrases), most, width)
            for i, row in enumerate(kept):
                for slot, j in enumerate(row):
                    map_queries[i, slot] = queries[i, j]
                    map_targets[i, slot, : len(phrases[i][j].target)] = phrases[i][j].target
            batch = {"map_queries": map_queries, "map_targets": map_targets, **batch}
        return batch


def row_images(row: dict[str, Any]) -> list:
    """The images of a row: `images`, or the single `image`, or none."""
    if row.get("image") is not None:
        return [row["image"]]
    return list(row.get("images") or [])


def row_messages(row: dict[str, Any]) -> list[dict]:
    """The conversation of a row: `messages`, or `prompt` followed by `completion` (or `chosen`).

    Raises:
        ValueError: if the row has neither, or they are not lists of messages.
    """
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and ("completion" in row or "chosen" in row):
        after = row["completion"] if "completion" in row else row["chosen"]
        both_lists = isinstance(row["prompt"], list) and isinstance(after, list)
        messages = row["prompt"] + after if both_lists else None
    else:
        raise ValueError(f"A row needs `messages`, or `prompt` and `completion`; this one has {sorted(row)}.")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            "A row's conversation must be a list of messages, each with a `role` and a `content`: see the README's section "
            "on grounding data."
        )
    return list(messages)
