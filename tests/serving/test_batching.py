# SPDX-License-Identifier: Apache-2.0
"""Requests of several threads in batches: each gets what it gets alone, and nobody pays for another."""

import contextlib

import pytest
import torch
from evaluation_cases import age_vlm, picture

from agevlm.inference.replies import reply
from agevlm.serving import Batcher

pytestmark = pytest.mark.slow


def turn(text: str, *numbers: int) -> dict:
    images = [{"type": "image", "image": picture(number)} for number in numbers]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


CONVERSATIONS = [
    [turn("Is there a dog?", 0)],
    [turn("Is the cat on the sofa in the first image, and is it in the second one?", 1, 2)],
    [{"role": "user", "content": "Hello"}],
    [turn("Dog?", 3), {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}, turn("And now?", 1)],
]


@pytest.fixture(scope="module")
def parts():
    model, processor = age_vlm()
    model.generation_config.eos_token_id = None
    return model, processor


@contextlib.contextmanager
def passes(module):
    """The batch sizes of a module's forward passes."""
    sizes = []

    def count(module, args, kwargs):
        first = args[0] if args else kwargs.get("input_ids", kwargs.get("pixel_values"))
        sizes.append(tuple(first.shape[:2]) if first.ndim == 2 else len(first))

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    hook.remove()


def alone(model, processor, messages, **settings):
    (found,) = reply(model, processor, [messages], **settings)
    return found


def test_what_arrives_together_is_one_batch_and_each_gets_what_it_gets_alone(parts):
    model, processor = parts
    longest = [9, 3, 6, 12]
    with Batcher(model, processor, max_wait=0.3) as batcher, passes(model) as sizes:
        pending = [
            batcher.submit(messages, max_new_tokens=most, maps=True)
            for messages, most in zip(CONVERSATIONS, longest, strict=True)
        ]
        streamed = ["".join(one) for one in pending]
        found = [one.result(timeout=60) for one in pending]
    assert {size[0] for size in sizes} == {4}
    assert len(sizes) == 12 + 1  # the last token is read for its map
    for messages, most, got, text in zip(CONVERSATIONS, longest, found, streamed, strict=True):
        expected = alone(model, processor, messages, max_new_tokens=most, maps=True)
        assert (got.tokens, got.text, got.finish_reason) == (expected.tokens, expected.text, "length")
        assert (len(got.tokens), text) == (most, got.text)
        torch.testing.assert_close(got.maps.maps, expected.maps.maps, atol=1e-5, rtol=0)
