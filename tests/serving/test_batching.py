# SPDX-License-Identifier: Apache-2.0
"""Requests of several threads in batches: each gets what it gets alone, and nobody pays for another."""

import contextlib
import re
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from evaluation_cases import CONVERSATIONS, age_vlm, llava, picture, turn
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from agevlm.inference.replies import reply
from agevlm.serving import Batcher, PendingReply
from agevlm.serving.batching import _RowStreamer

pytestmark = pytest.mark.slow


# The characters that a byte-level vocabulary writes for bytes.
BYTES = bytes_to_unicode()


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


def test_other_settings_are_another_batch_and_a_batch_has_a_largest_size(parts):
    model, processor = parts
    with Batcher(model, processor, max_wait=0.2, max_batch_size=3) as batcher, passes(model) as sizes:
        plain = [batcher.submit(CONVERSATIONS[0], max_new_tokens=4) for _ in range(4)]
        other = batcher.submit(CONVERSATIONS[0], max_new_tokens=4, repetition_penalty=5.0)
        assert len({tuple(one.result(60).tokens) for one in plain}) == 1
        expected = alone(model, processor, CONVERSATIONS[0], max_new_tokens=4, repetition_penalty=5.0)
        assert other.result(60).tokens == expected.tokens != plain[0].result().tokens
    assert [size[0] for size in sizes[:-4]] == [3] * 4 + [1] * 8


def test_a_long_reply_lets_others_take_their_turn_and_goes_on_as_if_it_had_not_paused(parts):
    model, processor = parts
    joined, ended = [], []

    def join(piece: str) -> None:  # in the model's thread, while the long one is written
        if len(joined) < 3:
            settings = {"maps": True} if joined else {"repetition_penalty": 5.0}
            joined.append(batcher.submit(CONVERSATIONS[len(joined)], max_new_tokens=5, **settings))
            joined[-1].future.add_done_callback(ended.append)

    with Batcher(model, processor, turn=4) as batcher, passes(model) as sizes:
        long = batcher.submit(CONVERSATIONS[1], max_new_tokens=60, maps=True, on_piece=join)
        long.future.add_done_callback(ended.append)
        assert "".join(long) == long.result().text
    assert len(ended) == 4
    assert ended[-1] is long.future
    first = [size[0] for size in sizes[:9]]
    assert first[:4] == [1] * 4, "the long one alone"
    assert 3 in {size[0] for size in sizes}, "the long one with both that have its settings"
    expected = alone(model, processor, CONVERSATIONS[1], max_new_tokens=60, maps=True)
    assert long.result().tokens == expected.tokens
    torch.testing.assert_close(long.result().maps.maps, expected.maps.maps, atol=1e-5, rtol=0)
    for messages, one in zip(CONVERSATIONS[1:], joined[1:], strict=False):
        expected = alone(model, processor, messages, max_new_tokens=5, maps=True)
        assert one.result().tokens == expected.tokens
        torch.testing.assert_close(one.result().maps.maps, expected.maps.maps, atol=1e-5, rtol=0)


def test_a_reply_ends_at_the_end_token_or_a_stop_string(parts):
    model, processor = parts
    with Batcher(model, processor, max_wait=0.1) as batcher:
        whole = batcher.submit(CONVERSATIONS[0], max_new_tokens=12).result(60)
        found = re.search("[a-z]{2}", whole.text[3:-3])
        stop = found[0]
        first = whole.text.index(stop) + len(stop)
        stopped = batcher.submit(CONVERSATIONS[0], max_new_tokens=12, stop_strings=[stop])
        beside = batcher.submit(CONVERSATIONS[2], max_new_tokens=12, stop_strings=[stop])
        found = stopped.result(60)
        assert whole.text.startswith(found.text)
        assert first <= len(found.text) < first + 8
        assert found.finish_reason == "stop"
        assert "".join(stopped) == found.text
        plain = alone(model, processor, CONVERSATIONS[2], max_new_tokens=12)
        assert plain.text.startswith(beside.result(60).text)
        try:
            model.generation_config.eos_token_id = whole.tokens[4]
            ended = [batcher.submit(messages, max_new_tokens=12) for messages in CONVERSATIONS]
            for messages, one in zip(CONVERSATIONS, ended, strict=True):
                expected = alone(model, processor, messages, max_new_tokens=12)
                assert (one.result(60).tokens, one.result().finish_reason) == (expected.tokens, expected.finish_reason)
            assert ended[0].result().finish_reason == "stop"
        finally:
            model.generation_config.eos_token_id = None


def test_what_is_canceled_stops_costing(parts):
    model, processor = parts
    canceled: list[PendingReply] = []

    def cancel(piece: str) -> None:
        for one in canceled:
            one.cancel()

    with Batcher(model, processor, max_wait=0.1, turn=1000) as batcher, passes(model) as sizes:
        kept = batcher.submit(CONVERSATIONS[0], max_new_tokens=20)
        gone = batcher.submit(CONVERSATIONS[1], max_new_tokens=200, on_piece=cancel)
        waiting = batcher.submit(CONVERSATIONS[1], max_new_tokens=200, repetition_penalty=2.0)
        canceled += [gone, waiting]
        streamed = ["".join(one) for one in canceled]
        for one in canceled:
            with pytest.raises(CancelledError):
                one.result(60)
        kept.result(60)
        only = batcher.submit(CONVERSATIONS[1], max_new_tokens=200, on_piece=lambda piece: only.cancel())
        assert next(iter(only))
        with pytest.raises(CancelledError):
            only.result(60)
    assert len(sizes) < 20 + 30, "a batch whose rows are all canceled goes on"
    text = alone(model, processor, CONVERSATIONS[1], max_new_tokens=20).text
    assert text.startswith(streamed[0])
    assert 0 < len(streamed[0]) < len(text)
    assert streamed[1] == ""
    assert kept.result().tokens == alone(model, processor, CONVERSATIONS[0], max_new_tokens=20).tokens
    assert kept.result().text == "".join(kept)


def test_an_error_is_raised_to_the_request_that_has_it_and_to_no_other(parts, monkeypatch):
    model, processor = parts
    features = model.get_image_features
    poisoned = picture(5)
    pixels = processor.image_processor(poisoned, return_tensors="pt")["pixel_values"][0]

    def poison(values, *args):
        found = features(values, *args)
        bad = torch.tensor([torch.equal(one, pixels) for one in values])
        found.pooler_output[bad] = torch.nan
        return found

    monkeypatch.setattr(model, "get_image_features", poison)
    with Batcher(model, processor, max_wait=0.2) as batcher:
        good = [batcher.submit(messages, max_new_tokens=8) for messages in CONVERSATIONS]
        bad = {
            "not finite": batcher.submit([turn("Dog?", 5)], max_new_tokens=8),
            'mode "F"': batcher.submit(
                [{"role": "user", "content": [{"type": "image", "image": Image.new("F", (4, 4))}]}], max_new_tokens=8
            ),
        }
        for messages, one in zip(CONVERSATIONS, good, strict=True):
            expected = alone(model, processor, messages, max_new_tokens=8)
            assert one.result(60).tokens == expected.tokens
            assert "".join(one) == expected.text
        for message, one in bad.items():
            with pytest.raises(ValueError, match=message):
                one.result(60)
            with pytest.raises(ValueError, match=message):
                list(one)


def test_a_listener_that_fails_ends_its_own_request_only(parts):
    model, processor = parts

    def hang_up(piece):
        raise ConnectionError("gone")

    with Batcher(model, processor, max_wait=0.1) as batcher:
        heard: list[str] = []
        kept = batcher.submit(CONVERSATIONS[0], max_new_tokens=5, on_piece=heard.append)
        gone = batcher.submit(CONVERSATIONS[1], max_new_tokens=5, on_piece=hang_up)
        assert kept.result(60).text == "".join(heard)
        with pytest.raises(ConnectionError):
            gone.result(60)


def test_an_image_is_encoded_once_a_conversation(parts):
    model, processor = parts
    messages = []
    with Batcher(model, processor, known_images=2) as batcher, passes(model.model.vision_tower) as images:
        for question in ("Dog?", "Is it red?", "And the cat?"):
            messages.append(turn(question, *([0] if not messages else [])))
            found = batcher.submit(messages, max_new_tokens=4).result(60)
            assert found.tokens == alone(model, processor, messages, max_new_tokens=4).tokens
            messages.append({"role": "assistant", "content": found.text})
        calls = len(images) - 3  # those of `alone`
        assert calls == 1
        del images[:]
        for number in (0, 1, 0, 2, 0, 1):  # with a place for two, 1 is the longest unused when 2 comes
            batcher.submit([turn("Dog?", number)], max_new_tokens=1).result(60)
        assert images == [1, 1, 1]


def test_closing_ends_what_is_in_flight_and_what_waits(parts):
    model, processor = parts
    batcher = Batcher(model, processor)
    running = batcher.submit(CONVERSATIONS[0], max_new_tokens=200)
    next(iter(running))
    waiting = batcher.submit(CONVERSATIONS[0], max_new_tokens=200, repetition_penalty=2.0)
    started = time.monotonic()
    batcher.close()
    assert time.monotonic() - started < 5
    for one in (running, waiting):
        with pytest.raises(RuntimeError, match="closed"):
            one.result(0)
        with pytest.raises(RuntimeError, match="closed"):
            list(one)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(CONVERSATIONS[0])
    assert "agevlm-batcher" not in {thread.name for thread in threading.enumerate()}


def test_pieces_are_whole_characters(parts):
    _, processor = parts
    tokenizer = processor.tokenizer
    text = "a dög 🐕 ..."
    ids = [token for byte in text.encode() for token in tokenizer.convert_tokens_to_ids([BYTES[byte]])]
    rows = [PendingReply([], 99, False, None, {}) for _ in range(2)]
    streamer = _RowStreamer(processor, rows)
    streamer.put(torch.zeros(2, 3))
    for number, token in enumerate(ids):
        streamer.put(torch.tensor([token, token if number < 4 else -1]))
    for row in rows:
        row._pieces.put(None)
    pieces = [[row._pieces.get() for _ in range(row._pieces.qsize() - 1)] for row in rows]
    assert pieces[0] == list(text)
    assert pieces[1] == list("a d")


def test_other_models_are_batched_too():
    model, processor = llava()
    conversations = [[turn("Dog?", 0)], [turn("Is the cat on the sofa?", 1)]]
    with Batcher(model, processor, max_wait=0.2) as batcher, passes(model) as sizes:
        found = [batcher.submit(messages, max_new_tokens=5) for messages in conversations]
        for messages, one in zip(conversations, found, strict=True):
            assert one.result(60).tokens == alone(model, processor, messages, max_new_tokens=5).tokens
    assert [size[0] for size in sizes[:5]] == [2] * 5
