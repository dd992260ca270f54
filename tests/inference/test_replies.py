# SPDX-License-Identifier: Apache-2.0
"""Replies in batches: equal to those of one conversation alone, with maps of the very tokens."""

import copy

import pytest
import torch
from evaluation_cases import CONVERSATIONS, age_vlm, llava

from agevlm.inference.replies import read_reply, record_maps, reply


@pytest.fixture(scope="module")
def parts():
    return age_vlm()


def eager_maps(model, processor, found) -> torch.Tensor:
    """Eager cross-attention of one pass over all that `found` has: `(blocks, tokens, visual tokens)`."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = processor(text=found.prompt, images=found.images or None, add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([found.tokens])], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True, use_cache=False)
    return torch.stack(outputs.cross_attentions)[:, 0].mean(1)


def test_a_batch_gives_each_conversation_what_it_gets_alone(parts):
    model, processor = parts
    together = reply(model, processor, CONVERSATIONS, max_new_tokens=7, maps=True)
    assert [len(found.images) for found in together] == [1, 2, 0, 2]
    for messages, found in zip(CONVERSATIONS, together, strict=True):
        (alone,) = reply(model, processor, [messages], max_new_tokens=7, maps=True)
        assert (found.prompt, found.text, found.tokens) == (alone.prompt, alone.text, alone.tokens)
        torch.testing.assert_close(found.maps.maps, alone.maps.maps, atol=1e-5, rtol=0)
        plain = reply(model, processor, [messages], max_new_tokens=7)[0]
        assert (plain.tokens, plain.maps) == (found.tokens, None)


def test_maps_are_the_attention_of_each_token_that_was_read_or_written(parts):
    model, processor = parts
    for found in reply(model, processor, CONVERSATIONS, max_new_tokens=7, maps=True):
        count = len(found.images)
        assert found.maps.text == found.prompt + found.text
        assert found.maps.maps.shape[1] == len(found.maps.ids) == len(found.maps.offsets)
        if count:
            expected = eager_maps(model, processor, found)
            torch.testing.assert_close(found.maps.maps.flatten(2), expected, atol=1e-5, rtol=0)
        else:
            assert found.maps.maps.numel() == 0


def test_a_span_is_the_mean_of_its_tokens(parts):
    model, processor = parts
    (found,) = reply(model, processor, CONVERSATIONS[:1], max_new_tokens=4, maps=True)
    maps = found.maps
    start = maps.text.index("there a dog")
    numbers = maps.tokens(start, start + len("there a dog"))
    assert len(numbers) > 1
    covered = "".join(processor.tokenizer.decode(maps.ids[number]) for number in numbers)
    assert covered.strip() == "there a dog"
    mean = sum(maps.maps[:, number] for number in numbers) / len(numbers)
    torch.testing.assert_close(maps.of_span(start, start + len("there a dog")), mean)
    before = sum(maps.maps[:, number - 1] for number in numbers) / len(numbers)
    torch.testing.assert_close(maps.of_span(start, start + len("there a dog"), predicting=True), before)


def test_a_reply_that_is_read_has_the_maps_of_the_one_that_was_written(parts):
    model, processor = parts
    (written,) = reply(model, processor, CONVERSATIONS[3:], max_new_tokens=1, maps=True)
    read = read_reply(model, processor, CONVERSATIONS[3], written.text)
    assert read.tokens == written.tokens
    torch.testing.assert_close(read.maps.maps, written.maps.maps, atol=1e-5, rtol=0)


def test_the_end_of_a_reply(parts):
    model, processor = copy.deepcopy(parts)
    (found,) = reply(model, processor, CONVERSATIONS[:1], max_new_tokens=6)
    assert (len(found.tokens), found.finish_reason) == (6, "length")
    model.generation_config.eos_token_id = [found.tokens[2]]
    first = found.tokens.index(found.tokens[2])
    together = reply(model, processor, CONVERSATIONS, max_new_tokens=6, maps=True)
    assert (together[0].tokens, together[0].finish_reason) == (found.tokens[: first + 1], "stop")
    torch.testing.assert_close(
        together[0].maps.maps.flatten(2), eager_maps(model, processor, together[0]), atol=1e-5, rtol=0
    )


def test_nothing_is_left_on_the_model(parts):
    model, _ = parts
    with pytest.raises(RuntimeError, match="stop"), record_maps(model):
        raise RuntimeError("stop")
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_other_models_reply_too():
    model, processor = llava()
    together = reply(model, processor, CONVERSATIONS[:1] * 2, max_new_tokens=3)
    assert together[0].tokens == together[1].tokens
    assert len(together[0].tokens) == 3
