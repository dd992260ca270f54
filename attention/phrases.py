# SPDX-License-Identifier: Apache-2.0
"""The tokens of phrases, for any processor of Transformers.

A processor replaces each placeholder of an image by many tokens, and some add tokens of their own, so the characters of its tokens are not
those of the text that it was given. Here each part of a text between placeholders is marked at both ends by a character that occurs nowhere
else. The tokenizer gets the text without the marks, and they tell where each part has gone, whatever the processor does.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from ..processing.processing_agevlm import AgeVlmProcessor


def phrase_tokens(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Any]] | None,
    spans: Sequence[Sequence[tuple[int, int]]],
    **kwargs: Any,
) -> tuple[BatchFeature, torch.Tensor]:
    """Makes a model's inputs, and finds the tokens of phrases in them.

        inputs, queries = phrase_tokens(processor, texts, images, spans)
        with attention_maps(model, queries) as found:
            model(**inputs)

    A token belongs to a phrase if they share a character, as [`AgeVlmProcessor.get_map_queries`] has it.

    Args:
        processor, texts, images, kwargs: see [`encode_with_offsets`].
        spans: per text, the phrases as `(start, end)` in characters of that text.

    Returns:
        the inputs, and bool `(batch, phrases, sequence)`. A row is all False for a phrase whose tokens were truncated, and for texts with
        fewer phrases than others.

    Raises:
        ValueError: as [`encode_with_offsets`] does, and if a span is not inside its text.
    """
    inputs = encode_with_offsets(processor, texts, images, **kwargs)
    offsets = inputs.pop("offset_mapping")
    return inputs, AgeVlmProcessor.get_map_queries(offsets, spans, inputs.get("attention_mask"), texts)


def encode_with_offsets(
    processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Any]] | None = None, **kwargs: Any
) -> BatchFeature:
    """A model's inputs, with the characters of each token in its text.

    Args:
        processor: of an image-text-to-text model, with a fast tokenizer.
        texts: as a chat template writes them, with one placeholder an image.
        images: per text, its images in order; empty for a text without.
        kwargs: go to the processor, by default with `padding=True`.

    Returns:
        what the processor returns, as tensors, and `offset_mapping` `(batch, sequence, 2)`: first character of each token in its text as given here, and
        the one after its last. It is empty for tokens of images, of padding and others that the text does not have.

    Raises:
        ValueError: if the tokenizer is not a fast one, or the processor changes the text between placeholders.
    """
    kwargs = {"padding": True, **kwargs, "return_tensors": "pt"}
    given = list(images) if images is not None and any(images) else None
    if isinstance(processor, AgeVlmProcessor):  # it expands nothing, and knows the special tokens that were typed
        return processor(text=texts, images=given, return_offsets_mapping=True, **kwargs)
    name = type(processor).__name__
    if not processor.tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {name} is not a fast one, so the characters of its tokens are not known.")
    placeholder = getattr(processor, "image_token", None)
    # Transformers has its own marks in the private characters before these.
    mark = next(c for c in map(chr, range(0x100000, 0x10FFFE)) if not any(c in text for text in texts))
    parts = [_parts(text, placeholder) for text in texts]
    marked = [
        _insert(text, mark, [place for part in row for place in part]) for text, row in zip(texts, parts, strict=True)
    ]
    recorder = _Recorder(processor.tokenizer, mark)
    recording = copy.copy(processor)
    recording.tokenizer = recorder
    inputs = recording(text=marked, images=given, **kwargs)
    if recorder.offsets.shape[:2] != tuple(inputs["input_ids"].shape):
        raise ValueError(f"{name} changes the tokens of texts, so the characters of its tokens are not known.")
    mapped = []
    for text, row, expanded, places, offsets in zip(
        texts, parts, recorder.texts, recorder.places, recorder.offsets, strict=True
    ):
        found = list(zip(places[::2], places[1::2], strict=False))
        if [text[slice(*part)] for part in row] != [expanded[slice(*part)] for part in found]:
            raise ValueError(f"{name} changes the text between images, so the characters of its tokens are not known.")
        mapped.append(_map_back(offsets, len(expanded), len(text), found, row))
    return BatchFeature({**inputs, "offset_mapping": torch.from_numpy(np.stack(mapped))})


def adds_special_tokens(processor: ProcessorMixin, prompt: str) -> bool:
    """Whether the tokenizer adds special tokens to a rendered prompt.

    An AGE-VLM has learned from what its chat template writes, and from nothing before it. For other models it is as in
    `apply_chat_template`: the tokenizer adds its special tokens where the template has not written the first one.
    """
    bos = processor.tokenizer.bos_token
    return not isinstance(processor, AgeVlmProcessor) and not (bos is not None and prompt.startswith(bos))


def _parts(text: str, placeholder: str | None) -> list[tuple[int, int]]:
    """What is between placeholders, without what is empty."""
    found = re.finditer(re.escape(placeholder), text) if placeholder else ()
    edges = [0, *(edge for match in found for edge in match.span()), len(text)]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _insert(text: str, mark: str, places: Sequence[int]) -> str:
    edges = [0, *places, len(text)]
    return mark.join(text[start:end] for start, end in pairwise(edges))


def _map_back(
    offsets: np.ndarray, expanded: int, given: int, found: Sequence[tuple[int, int]], parts: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Offsets in a text that was given, from those in the expanded one, by the places of its parts in both."""
    origin = np.full(expanded, -1)
    for (start, end), (first, last) in zip(found, parts, strict=True):
        origin[start:end] = np.arange(first, last)
    # Of each place the next character that was given, and the end of the last one.
    after = np.append(np.minimum.accumulate(np.where(origin < 0, given, origin)[::-1])[::-1], given)
    before = np.append(0, np.maximum.accumulate(origin + 1))
    start, end = after[offsets[:, 0]], before[offsets[:, 1]]
    return np.stack([start, end], axis=-1) * (start <= end)[:, None]


class _Recorder:
    """A tokenizer that reads texts without their marks, and remembers them, the places of the marks and the offsets of the tokens."""

    def __init__(self, tokenizer: Any, mark: str):
        self._tokenizer, self._mark = tokenizer, mark
        self.texts: list[str] = []
        self.places: list[list[int]] = []
        self.offsets = np.zeros((0, 0, 2), dtype=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        marks = [[match.start() for match in re.finditer(self._mark, row)] for row in text]
        self.places = [[place - count for count, place in enumerate(row)] for row in marks]
        self.texts = [row.replace(self._mark, "") for row in text]
        encoding = self._tokenizer(self.texts, *args, **{**kwargs, "return_offsets_mapping": True})
        self.offsets = np.asarray(encoding.pop("offset_mapping"))
        if kwargs.get("text_pair") is not None:  # its characters are those of another text
            pairs = np.array([encoding.sequence_ids(row) for row in range(len(self.texts))])
            self.offsets = self.offsets * (pairs != 1)[..., None]
        find = encoding.char_to_token
        # Processors that ask it count the marks.
        encoding.char_to_token = lambda row, char, *rest: find(row, char - bisect_left(marks[row], char), *rest)
        return encoding
