# SPDX-License-Identifier: Apache-2.0
"""Replies with maps, heat maps and grounded answers of other models than AGE-VLM."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import tiny_processor
from tiny_vlms import CONFIGURATIONS, tiny_vlm

from agevlm.attention.coverage import image_token_id
from agevlm.inference.attention import attend, can_show, show_reply
from agevlm.inference.generation import ask_about
from agevlm.inference.grounding import ground
from agevlm.inference.replies import read_reply, reply

QUESTION = "What is left of the brown dog?"


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(kind):
    processor = tiny_processor(kind)
    return tiny_vlm(kind, processor=processor), processor


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def check_sums(kind: str, attention: np.ndarray) -> None:
    """All attention is on a place of an image or elsewhere; but for what tokens have that show only padding, as Mllama's may."""
    assert (attention < 1 + 1e-5).all()
    assert (attention > (0.5 if kind == "mllama" else 1 - 1e-5)).all()


def test_maps_of_a_reply_are_those_of_eager_attention(kind, loaded):
    model, processor = loaded
    found = read_reply(model, processor, ask_about(QUESTION, picture()), "A white cat.")
    start = found.prompt.index("brown dog")
    own = found.maps.of_span(start, start + len("brown dog"))
    text = found.prompt + "A white cat."
    assert found.maps.text == text
    if kind == "mllama":  # its layers of cross-attention are compared in tests/attention
        assert ((own.sum(-1) > 0.5) & (own.sum(-1) < 1)).all()  # the rest is on class tokens
        return
    inputs = processor(images=[[picture()]], text=[found.prompt], return_tensors="pt", add_special_tokens=True)
    ids = processor.tokenizer("A white cat.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    extras = {
        name: torch.cat([value, value.new_full(ids.shape, int(kind == "paligemma"))], 1)
        for name, value in inputs.items()
        if value.shape == inputs["input_ids"].shape and name not in ("input_ids", "attention_mask")
    }
    sequence = torch.cat([inputs["input_ids"], ids], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(
            **{**inputs, **extras, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)},
            output_attentions=True, use_cache=False,
        ).attentions  # fmt: skip
    model.set_attn_implementation("sdpa")
    # The last tokens of the prompt that decode to text with the phrase.
    tokens = [token for token in range(sequence.shape[1]) if sequence[0, token] != image_token_id(processor)]
    decoded = [processor.tokenizer.decode(sequence[0, token:]) for token in tokens]
    first = max(token for token, rest in zip(tokens, decoded, strict=True) if "brown dog" in rest)
    after = min(token for token, rest in zip(tokens, decoded, strict=True) if token > first and "g?" not in rest)
    image = sequence[0] == image_token_id(processor)
    wanted = torch.stack([layer[0].mean(0)[first:after][:, image].mean(0) for layer in weights])
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


def test_maps_of_generated_replies_in_a_batch(loaded):
    model, processor = loaded
    conversations = [ask_about(QUESTION, picture(0)), ask_about("Why?", picture(1, (16, 40)))]
    found = reply(model, processor, conversations, max_new_tokens=4, maps=True)
    for one, conversation in zip(found, conversations, strict=True):
        (alone,) = reply(model, processor, [conversation], max_new_tokens=4, maps=True)
        assert one.text == alone.text
        assert one.maps.text == one.prompt + one.text
        assert one.maps.maps.shape == alone.maps.maps.shape
        torch.testing.assert_close(one.maps.maps, alone.maps.maps, rtol=1e-3, atol=1e-5)


def test_where_words_look(kind, loaded, tmp_path):
    model, processor = loaded
    image = picture()
    found = attend(model, processor, image, QUESTION, "A white cat.", phrases=["cat", "brown dog"])
    layers = 2 if kind == "mllama" else 3
    assert found.maps.shape[:2] == (layers, 2)
    width, height = found.cell
    assert width * found.maps.shape[3] == pytest.approx(image.width, rel=0.02)
    assert height * found.maps.shape[2] == pytest.approx(image.height, rel=0.02)
    check_sums(kind, found.maps.sum((2, 3)) + found.sink)
    assert found.rest == "elsewhere"
    found.save(tmp_path / "out")
    assert (tmp_path / "out" / "attention.png").stat().st_size > 1000


def test_heads_of_a_layer(kind, loaded):
    model, processor = loaded
    layer = {"mllama": 3, "gemma3": 1}.get(kind, 2)  # Gemma's others have a window that is too small here
    whole = attend(model, processor, picture(), QUESTION, "A white cat.", phrases=["cat"])
    heads = attend(model, processor, picture(), QUESTION, "A white cat.", phrases=["cat"], heads_of=layer)
    assert heads.blocks == [f"layer {layer}, head {head}" for head in range(4)]
    np.testing.assert_allclose(heads.maps.mean(0), whole.maps[1 if kind == "gemma3" else -1], atol=1e-6)
    assert abs(heads.maps - heads.maps.mean(0)).max() > 1e-3


def test_grounded_answers(loaded):
    model, processor = loaded
    image = picture()
    found = ground(model, processor, image, QUESTION, "A white cat.")
    assert "only an AGE-VLM can be calibrated" in found.reason
    assert {phrase.text for phrase in found.phrases} >= {"brown dog", "white cat"}
    for phrase in found.phrases:
        left, top, right, bottom = phrase.box
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
        assert left <= phrase.point[0] <= right
        assert top <= phrase.point[1] <= bottom
        assert phrase.confidence is phrase.there is None


def test_a_conversation_about_two_images(kind, loaded):
    if kind == "paligemma":
        pytest.skip("its processor moves all images to the beginning of a text")
    model, processor = loaded
    images = [picture(0), picture(1, (16, 40))]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": QUESTION}]
    found = read_reply(model, processor, [{"role": "user", "content": content}], "A cat.")
    shown = [show_reply(model, processor, found, QUESTION, ["dog"], image=number) for number in range(2)]
    assert shown[0].image.size == (24, 16)
    assert shown[1].image.size == (16, 40)
    on_images = sum(one.maps.sum((2, 3)) for one in shown)
    check_sums(kind, on_images + shown[0].sink)


def test_a_conversation_without_an_image(kind, loaded):
    model, processor = loaded
    if kind == "paligemma":
        pytest.skip("its processor refuses texts without an image")
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    found = read_reply(model, processor, messages, "A cat.")
    assert found.maps.maps.shape[-1] == 0


def test_what_can_be_shown(loaded):
    model, _ = loaded
    assert can_show(model)
    model.set_attn_implementation("eager")
    assert not can_show(model)
    model.set_attn_implementation("sdpa")
