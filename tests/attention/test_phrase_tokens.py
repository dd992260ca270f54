# SPDX-License-Identifier: Apache-2.0
"""The tokens of phrases, by what they decode to, for the processors of nine architectures."""

import random
import re

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import BOS, IMAGE, tiny_tokenizer
from tiny_processors import PLACEHOLDERS, SPECIAL_TOKENS, tiny_processor
from tiny_vlms import CONFIGURATIONS, tiny_vlm
from transformers import LlavaProcessor

from agevlm.attention import attention_maps, encode_with_offsets, phrase_tokens
from agevlm.processing import AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.processing.processing_agevlm import RenderedChat

KINDS = list(CONFIGURATIONS)
# Words of one and of several tokens, one of them part of another, and characters of several bytes and tokens.
WORDS = ["dog", "dogs", "brown", "sofa", "Paris", "straße", "犬", "🐕‍🦺", "x", "ñandú", "image", "\n", "row_1"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def image(height: int = 20, width: int = 30) -> PIL.Image.Image:
    rng = np.random.default_rng(height * width)
    return PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def random_case(kind: str, seed: int) -> tuple[list[str], list[list], list[list[tuple[int, int]]]]:
    """Two texts with words, images and phrases of some words at random places."""
    rng = random.Random(seed)
    texts, images, spans = [], [], []
    for _ in range(2):
        pictures, text, words = rng.randint(1, 3), "", []
        items = ["image"] * pictures + ["word"] * rng.randint(5, 12)
        rng.shuffle(items)
        for item in items:
            if item == "image":
                text += PLACEHOLDERS[kind]
            else:
                text += rng.choice(["", " ", " "])
                word = rng.choice(WORDS)
                words.append((len(text), len(text) + len(word)))
                text += word
        texts.append(text)
        images.append([image(rng.randint(8, 60), rng.randint(8, 60)) for _ in range(pictures)])
        spans.append(rng.sample([w for w in words if text[slice(*w)].strip()], k=3))
    return texts, images, spans


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_phrases_decode_to_them(kind, seed, side):
    processor = tiny_processor(kind)
    texts, images, spans = random_case(kind, seed)
    inputs, queries = phrase_tokens(processor, texts, images, spans, padding_side=side)
    ids = inputs["input_ids"]
    assert queries.dtype == torch.bool
    assert queries.shape == (2, 3, ids.shape[1])
    decode = processor.tokenizer.decode
    for row, text in enumerate(texts):
        for (start, end), query in zip(spans[row], queries[row], strict=True):
            phrase, tokens = text[start:end], query.nonzero()[:, 0].tolist()
            assert tokens == list(range(tokens[0], tokens[-1] + 1))
            chosen = ids[row, tokens]
            assert phrase in decode(chosen)
            # No token could be left out, so none is beside the phrase.
            assert phrase not in decode(chosen[1:])
            assert phrase not in decode(chosen[:-1])
            # It is this one of several like it.
            before = without_special_tokens(decode(ids[row, : tokens[-1] + 1]))
            assert before.count(phrase) == without_special_tokens(text[:end]).count(phrase)


def without_special_tokens(text: str) -> str:
    return re.sub("<[^<>]*>", "|", text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_are_those_of_the_processor(kind, side):
    processor = tiny_processor(kind)
    texts, images, spans = random_case(kind, 5)
    inputs, _ = phrase_tokens(processor, texts, images, spans, padding_side=side)
    wanted = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    assert set(inputs) == set(wanted)
    assert inputs["attention_mask"].min() == 0
    for name, tensor in wanted.items():
        assert torch.equal(inputs[name], tensor), name


def test_each_character_of_a_text_has_its_tokens_and_others_have_none(kind):
    processor, tokens = tiny_processor(kind), SPECIAL_TOKENS[kind].values()
    texts, images, _ = random_case(kind, 6)
    inputs = encode_with_offsets(processor, texts, images)
    for row, text in enumerate(texts):
        offsets = inputs["offset_mapping"][row].tolist()
        there = {place for start, end in offsets for place in range(start, end)}
        placeholder = processor.image_token
        shown = {i + k for i in range(len(text)) if text.startswith(placeholder, i) for k in range(len(placeholder))}
        # Those of a placeholder have become the image's, except where it stays.
        assert there | shown == set(range(len(text)))
        for (start, end), token_id in zip(offsets, inputs["input_ids"][row].tolist(), strict=True):
            token = processor.tokenizer.decode([token_id])
            if start < end and token not in tokens:
                assert token.strip("\ufffd") in text[start:end]
            if token in (processor.tokenizer.bos_token, processor.tokenizer.pad_token, placeholder):
                assert start >= end


def test_maps_of_phrases_of_a_model(kind):
    processor = tiny_processor(kind)
    model = tiny_vlm(kind, processor=processor)
    texts, images, spans = random_case(kind, 7)
    # Behind the images, which Mllama's text cannot see otherwise.
    texts, spans = [text + " a dog" for text in texts], [[(len(text) + 3, len(text) + 6)] for text in texts]
    inputs, queries = phrase_tokens(processor, texts, images, spans)
    inputs.pop("labels", None)
    with torch.no_grad(), attention_maps(model, queries) as found:
        model(**inputs)
    assert (found.maps.sum(-1) - 1).abs().max() < 1e-5


def test_texts_without_images(kind):
    processor = tiny_processor(kind)
    if kind == "paligemma":
        with pytest.raises(ValueError, match="images"):
            encode_with_offsets(processor, ["a dog"])
        return
    inputs, queries = phrase_tokens(processor, ["a dog", "a brown dog"], [[], []], [[(2, 5)], []])
    assert queries.any(-1).tolist() == [[True], [False]]
    assert processor.tokenizer.decode(inputs["input_ids"][0, queries[0, 0]]).strip() == "dog"


def test_truncated_phrases_have_no_tokens(kind):
    processor, start = tiny_processor(kind), PLACEHOLDERS[kind]
    text = start + " a brown dog on the sofa" + " and a cat" * 8
    places = [(text.index("dog"), text.index("dog") + 3), (len(text) - 3, len(text))]
    full, _ = phrase_tokens(processor, [text], [[image(16, 16)]], [places])
    length = full["input_ids"].shape[1] - 10
    inputs, queries = phrase_tokens(processor, [text], [[image(16, 16)]], [places], truncation=True, max_length=length)
    assert inputs["input_ids"].shape[1] == length
    assert queries.any(-1).tolist() == [[True, False]]


def test_a_second_text_of_the_tokenizer_has_no_characters():
    processor = tiny_processor("paligemma")
    inputs = encode_with_offsets(processor, ["<image>where is the dog"], [[image()]], suffix=["where is the dog"])
    learned = inputs["labels"][0] >= 0
    assert learned.any()
    assert (inputs["offset_mapping"][0][learned] == 0).all()


def test_special_tokens_that_were_typed_are_text_for_the_processor_of_age_vlm():
    size = {"height": 32, "width": 32}
    processor = AgeVlmProcessor(AgeVlmImageProcessor(size=size), tiny_tokenizer(), IMAGE)
    text = f"{IMAGE}a {BOS} dog"
    place = text.index(BOS)
    chat = RenderedChat(text, range(place, place + len(BOS)))
    spans = [[(place, place + len(BOS)), (len(text) - 3, len(text))]]
    inputs, queries = phrase_tokens(processor, [chat], [[image()]], spans)
    assert "offset_mapping" not in inputs
    decoded = [processor.tokenizer.decode(inputs["input_ids"][0, query]).strip() for query in queries[0]]
    assert decoded == [BOS, "dog"]
    assert queries[0, 0].sum() > 1


def test_what_cannot_be_mapped_is_refused(monkeypatch):
    processor = tiny_processor("llava")
    for span in [(3, 3), (-1, 2), (5, 3), (0, 99)]:
        with pytest.raises(ValueError, match="Span"):
            phrase_tokens(processor, ["a dog"], None, [[span]])

    class Lower(LlavaProcessor):
        def prepare_inputs_layout(self, images=None, text=None, **kwargs):
            images, text, *rest = super().prepare_inputs_layout(images=images, text=text, **kwargs)
            return images, [row.lower() for row in text], *rest

    lower = Lower(processor.image_processor, processor.tokenizer, patch_size=4)
    encode_with_offsets(lower, ["a dog"])
    with pytest.raises(ValueError, match="Lower changes the text"):
        encode_with_offsets(lower, ["a Dog"])
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="not a fast one"):
        encode_with_offsets(processor, ["a dog"])
