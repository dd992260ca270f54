# SPDX-License-Identifier: Apache-2.0
"""The example for SGLang against AGE-VLM itself, with SGLang's modules stubbed: weights, block, layer, prefill and decoding."""

import asyncio
import importlib
import sys
from array import array
from pathlib import Path

import pytest
import sglang_stubs
import torch
from PIL import Image
from sglang_stubs import ForwardBatch, ForwardMode
from tiny_models import images, text, tiny_age_vlm
from tiny_training import tiny_processor, tiny_trainable

from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttentionInputs

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "sglang"
SIZES = torch.tensor([[32, 32], [32, 20], [9, 32]])
"""Of the images: one without padding, one padded on the right, one below."""


@pytest.fixture(scope="module")
def sglang():
    """The example's package on the stubs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sglang_stubs.install(monkeypatch)
        monkeypatch.syspath_prepend(EXAMPLE)
        for name in ("agevlm_sglang", "agevlm_sglang.model", "agevlm_sglang.processor"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("agevlm_sglang.processor")
        for name in ("agevlm_sglang", "agevlm_sglang.model", "agevlm_sglang.processor"):
            sys.modules.pop(name, None)


# A Llama whose width is not heads * head_dim would show a mix-up of both.
CASES = {
    "paper": {},
    "sink": {"cross_attention_sink": True, "visual_position_embedding": True, "llama": {"head_dim": 16}},
    "tied": {"llama": {"tie_word_embeddings": True}, "vision": "timm"},
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def both(request, sglang, tmp_path_factory):
    """AGE-VLM, and SGLang's model with the weights of its checkpoint."""
    from safetensors.torch import load_file

    ours, folder = tiny_age_vlm(**request.param).eval(), tmp_path_factory.mktemp("checkpoint")
    ours.save_pretrained(folder)
    theirs = sglang.AgeVlmForConditionalGeneration(ours.config)
    theirs.load_weights(load_file(folder / "model.safetensors").items())
    return ours, theirs.eval()


def item(number: int, place: int, ours):
    """Image `number` at token `place`, as SGLang's processor of requests gives it."""
    from types import SimpleNamespace

    found = SimpleNamespace(
        feature=images(3)[number : number + 1], image_sizes=SIZES[number : number + 1], offsets=[(place, place)],
        pad_value=2**40 + number,
    )  # fmt: skip
    return SimpleNamespace(mm_items=[found], num_image_tokens=None)


# Four requests: without an image, and with an image of each size in different places.
TEXTS = [text(5, 0), text(8, 1, (3,)), text(7, 2, (0,)), text(9, 3, (5,))]
PLACES = [None, 3, 0, 5]


def requests(ours, theirs) -> list:
    found = [None if place is None else item(i - 1, place, ours) for i, place in enumerate(PLACES)]
    for ids, mm_inputs in zip(TEXTS, found, strict=True):
        if mm_inputs is not None:
            padded = theirs.pad_input_ids(array("q", ids.tolist()), mm_inputs)
            assert padded[mm_inputs.num_image_tokens :].tolist() == ids.tolist()
    return found


def expected_logits(ours, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each request alone, by AGE-VLM in one pass without a cache."""
    found = []
    for number, ids in enumerate(tokens):
        image = {} if PLACES[number] is None else {"pixel_values": images(3)[number - 1 : number]}
        image |= {} if PLACES[number] is None else {"image_sizes": SIZES[number - 1 : number]}
        found.append(ours(input_ids=ids[None], use_cache=False, **image).logits[0])
    return found


def run(theirs, tokens, start: int | list[int], mm_inputs, cache, mode) -> list[torch.Tensor]:
    """The logits of new tokens, from `start` on, in one batch."""
    starts = [start] * len(tokens) if isinstance(start, int) else start
    counts = [len(ids) for ids in tokens]
    batch = ForwardBatch(
        mode,
        extend_seq_lens=torch.tensor(counts),
        encoder_lens_cpu=[0 if one is None else one.num_image_tokens for one in mm_inputs],
        encoder_cached=[one is None or bool(begun) for one, begun in zip(mm_inputs, starts, strict=True)],
        mm_inputs=mm_inputs if mode == ForwardMode.EXTEND else None,
        cache=cache,
    )
    positions = torch.cat([torch.arange(begun, begun + n) for begun, n in zip(starts, counts, strict=True)])
    return list(theirs(torch.cat(tokens), positions, batch).next_token_logits.split(counts))


def assert_equal(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_prefill_decoding_and_a_later_turn(both):
    ours, theirs = both
    mm_inputs, cache = requests(ours, theirs), {}
    prompts = expected_logits(ours, TEXTS)
    assert_equal(run(theirs, TEXTS, 0, mm_inputs, cache, ForwardMode.EXTEND), prompts)
    assert set(cache) == set(range(theirs.start_layer, theirs.end_layer)), "the layers that SGLang makes its cache for"

    tokens = list(TEXTS)
    new = [logits[-1].argmax()[None] for logits in prompts]
    for _ in range(3):  # each step sees what the steps before have written
        starts = [len(ids) for ids in tokens]
        tokens = [torch.cat(pair) for pair in zip(tokens, new, strict=True)]
        got = run(theirs, new, starts, mm_inputs, cache, ForwardMode.DECODE)
        assert_equal(got, [logits[-1:] for logits in expected_logits(ours, tokens)])
        new = [logits[-1].argmax()[None] for logits in got]

    turn, starts = [text(4 + i, 10 + i) for i in range(4)], [len(ids) for ids in tokens]
    tokens = [torch.cat(pair) for pair in zip(tokens, turn, strict=True)]
    got = run(theirs, turn, starts, mm_inputs, cache, ForwardMode.EXTEND)
    assert_equal(got, [logits[begun:] for logits, begun in zip(expected_logits(ours, tokens), starts, strict=True)])


@torch.no_grad()
def test_a_batch_without_images_is_the_llama(both):
    ours, theirs = both
    got = run(theirs, TEXTS[:1], 0, [None], {}, ForwardMode.EXTEND)
    assert_equal(got, expected_logits(ours, TEXTS[:1]))


@torch.no_grad()
def test_the_encoder_has_the_visible_tokens_and_the_sink(both):
    ours, theirs = both
    sink = ours.config.text_config.cross_attention_sink
    # By hand: cells of 8 pixels; an image of 20 pixels reaches into three of them, one of 9 into two.
    assert [one.num_image_tokens for one in requests(ours, theirs)[1:]] == [16 + sink, 12 + sink, 8 + sink]


@torch.no_grad()
def test_a_block_is_the_block(both):
    ours, theirs = both
    for number, (layer, block) in enumerate(ours.model.language_model.cross_attn.items()):
        hidden, visual = (
            torch.randn(6, ours.config.text_config.hidden_size),
            torch.randn(2, 7, ours.config.text_config.hidden_size),
        )
        visible = torch.zeros(2, 3, 7, dtype=torch.bool)
        visible[0], visible[1, 1:] = True, True  # the first token of the second request stands before its image
        mask = torch.ones(2, 1, 3, 7 + ours.config.text_config.cross_attention_sink, dtype=torch.bool)
        inputs = AgeVlmCrossAttentionInputs(visible=visible, attention_mask=mask)
        expected = block(hidden.view(2, 3, -1), visual, inputs)[0].flatten(0, 1)
        sees_image = visible.any(-1).view(-1, 1)
        length = 7 + ours.config.text_config.cross_attention_sink
        batch = ForwardBatch(ForwardMode.EXTEND, torch.tensor([3, 3]), [length] * 2, [False] * 2, None)
        got = theirs.language_model.cross_attn[layer](hidden, list(visual), sees_image, batch)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert set(batch.cache) == {ours.config.text_config.num_hidden_layers + number}
        assert not got[3].any()


@torch.no_grad()
def test_a_layer_is_the_layer(both):
    ours, theirs = both
    hidden = torch.randn(5, ours.config.text_config.hidden_size)
    text_model = ours.model.language_model
    positions = torch.arange(5)
    expected = text_model.layers[1](
        hidden[None], position_embeddings=text_model.rotary_emb(hidden[None], positions[None]), attention_mask=None
    )[0]
    batch = ForwardBatch(ForwardMode.EXTEND, torch.tensor([5]), [0], [True], None)
    got = theirs.language_model.layers[1](positions, hidden, batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_all_weights_are_mapped(sglang):
    """A checkpoint that lacks any tensor is refused by its name, and so is one that has more."""
    ours = tiny_age_vlm(cross_attention_sink=True, vision="timm")
    theirs = sglang.AgeVlmForConditionalGeneration(ours.config)
    state = ours.state_dict()
    assert theirs.load_weights(state.items()) == set(theirs.state_dict())
    assert all(value.isfinite().all() for value in theirs.state_dict().values()), "the stubs' weights begin as NaN"
    for name in state:
        last = name.removeprefix("model.").split(".")[-1] if "_proj." not in name else ""
        with pytest.raises(ValueError, match=rf"The checkpoint lacks .*{last}"):
            theirs.load_weights((key, value) for key, value in state.items() if key != name)
    with pytest.raises(ValueError, match=r"The checkpoint has model\.other\.weight, which"):
        theirs.load_weights({**state, "model.other.weight": torch.zeros(1)}.items())


def test_requests_become_inputs(sglang):
    model, processor = tiny_trainable().eval(), tiny_processor()
    handler = sglang.AgeVlmProcessor(model.config, None, processor)
    assert {one.__name__ for one in handler.models} == {
        "AgeVlmForConditionalGeneration",
        "MllamaForConditionalGeneration",
    }
    picture = Image.effect_noise((40, 24), 90).convert("L")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]}], tokenize=False
    )
    output = asyncio.run(handler.process_mm_data_async([picture], prompt))
    assert output.input_ids.count(processor.image_token_id) == 1
    assert output.input_ids[output.mm_items[0].offsets[0][0]] == processor.image_token_id

    theirs = sglang.AgeVlmForConditionalGeneration(model.config)
    theirs.load_weights(model.state_dict().items())
    output.num_image_tokens = None
    theirs.pad_input_ids(array("q", output.input_ids), output)
    ids = torch.tensor(output.input_ids)
    with torch.no_grad():
        got = run(theirs, [ids], 0, [output], {}, ForwardMode.EXTEND)
        inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
        assert_equal(got, model(**inputs).logits)

    with pytest.raises(ValueError, match=r"2 images: in SGLang AGE-VLM takes one"):
        asyncio.run(handler.process_mm_data_async([picture, picture], prompt * 2))
