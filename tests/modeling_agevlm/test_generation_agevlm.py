# SPDX-License-Identifier: Apache-2.0
"""Generation in every mode against plain forward passes without a cache, one row at a time and without padding."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import COUNTS, IMAGE, ROWS, batch, images, pad, text, tiny_age_vlm, tiny_llama
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, Fp8QuantizedLayer

from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttentionCacheLayer

pytestmark = pytest.mark.slow

STEPS = 16
PIXELS = list(images(sum(COUNTS)).split(COUNTS))


@pytest.fixture(scope="module")
def model(request):
    sink = getattr(request, "param", False)
    return tiny_age_vlm(0.5 if sink else 1.0, cross_attention_sink=sink)  # gates with which its tokens vary


# Without and with an attention sink in the blocks.
either_model = pytest.mark.parametrize("model", [False, True], indirect=True, ids=["", "sink"])


@torch.no_grad()
def next_logits(model, row: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
    """Logits after a row, from one forward pass over all of it; the image token is not for generating."""
    has_images = pixels is not None and len(pixels)
    inputs = {"pixel_values": pixels} if has_images else {}
    logits = model(row[None], use_cache=False, **inputs).logits[0, -1].clone()
    logits[IMAGE] = -torch.inf
    return logits


def greedy(model, row: torch.Tensor, pixels: torch.Tensor | None = None, steps: int = STEPS) -> torch.Tensor:
    """The tokens after `row`."""
    start = len(row)
    for _ in range(steps):
        row = torch.cat([row, next_logits(model, row, pixels).argmax()[None]])
    return row[start:]


def generate(model, inputs: dict, **kwargs) -> torch.Tensor:
    """The new tokens of every row."""
    sequences = model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False, **kwargs})
    return sequences[:, inputs["input_ids"].shape[1] :]


def one(i: int) -> dict[str, torch.Tensor]:
    """Row `i` alone."""
    inputs = {"input_ids": ROWS[i][None]}
    return {**inputs, "pixel_values": PIXELS[i]} if COUNTS[i] else inputs


@pytest.fixture(scope="module")
def expected(model):
    """Greedy continuations of the three rows. They vary, and the images decide them: else all below would be empty."""
    tokens = torch.stack([greedy(model, row, pixels) for row, pixels in zip(ROWS, PIXELS, strict=True)])
    assert all(len(row.unique()) >= 5 for row in tokens)
    for i in (1, 2):
        assert not torch.equal(tokens[i], greedy(model, ROWS[i], images(COUNTS[i], seed=9)))
    assert torch.equal(tokens[0], greedy(tiny_llama(), ROWS[0])), "a row without image is plain Llama"
    return tokens


# ---------------------------------------------------------------------------------------- decoding modes


@either_model
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=str)
def test_greedy(model, expected, implementation, cache):
    """A left-padded batch of rows without, with one and with two images."""
    model.set_attn_implementation({"text_config": implementation})
    try:
        assert torch.equal(generate(model, batch(), **cache), expected)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.parametrize("image_at", [(0, 1, 2), (3, 4, 9), (9,)])
def test_images_in_a_row_and_at_the_end_of_the_prompt(model, image_at):
    row, pixels = text(10, 11, image_at), images(len(image_at), seed=4)
    generated = generate(model, {"input_ids": row[None], "pixel_values": pixels})
    assert torch.equal(generated[0], greedy(model, row, pixels))


@pytest.mark.parametrize("cache", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=str)
def test_sampling(model, cache):
    torch.manual_seed(7)
    generated = generate(model, batch(), do_sample=True, top_k=0, temperature=0.7, **cache)
    torch.manual_seed(7)
    rows = list(ROWS)
    for _ in range(STEPS):
        logits = torch.stack([next_logits(model, row, pixels) for row, pixels in zip(rows, PIXELS, strict=True)])
        tokens = (logits / 0.7).softmax(-1).multinomial(1)
        rows = [torch.cat([row, token]) for row, token in zip(rows, tokens, strict=True)]
    assert torch.equal(generated, torch.stack([row[-STEPS:] for row in rows]))


def log_probability(model, row: torch.Tensor, generated: torch.Tensor, pixels: torch.Tensor) -> float:
    """Of generated tokens, from one plain forward pass."""
    total = 0.0
    for token in generated:
        inputs = {"pixel_values": pixels} if len(pixels) else {}
        with torch.no_grad():
            total += model(row[None], use_cache=False, **inputs).logits[0, -1].log_softmax(-1)[token].item()
        row = torch.cat([row, token[None]])
    return total


@either_model
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search(model, expected, use_cache, returned):
    """Beams follow their own row's images: tokens equal those of each row alone, and scores equal those of plain passes."""
    kwargs = {"num_beams": 3, "num_return_sequences": returned, "return_dict_in_generate": True, "output_scores": True}
    together = model.generate(**batch(), max_new_tokens=STEPS, do_sample=False, use_cache=use_cache, **kwargs)
    generated = together.sequences[:, len(batch()["input_ids"][0]) :].view(len(ROWS), returned, STEPS)
    assert not torch.equal(generated[:, 0], expected), "beam search finds other tokens than greedy"
    for i, row in enumerate(ROWS):
        alone = model.generate(**one(i), max_new_tokens=STEPS, do_sample=False, use_cache=False, **kwargs)
        assert torch.equal(generated[i], alone.sequences[:, len(row) :])
        for j in range(returned):
            score = together.sequences_scores[i * returned + j].item() * STEPS
            assert score == pytest.approx(log_probability(model, row, generated[i, j], PIXELS[i]), abs=1e-3)


def test_several_samples_of_each_row(model):
    kwargs = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(3)
    with_cache = generate(model, batch(), **kwargs)
    torch.manual_seed(3)
    assert torch.equal(with_cache, generate(model, batch(), use_cache=False, **kwargs))
    twice = {**pad([row for row in ROWS for _ in range(2)])}
    twice["pixel_values"] = torch.cat([pixels for pixels in PIXELS for _ in range(2)])
    torch.manual_seed(3)
    assert torch.equal(with_cache, generate(model, twice, do_sample=True))


# ---------------------------------------------------------------------------------------- drafts


DRAFTS = {
    "llama": lambda: tiny_llama(),
    "small llama": lambda: tiny_llama(3, hidden_size=16, num_hidden_layers=2),
    "same": lambda: tiny_age_vlm(),
    "other images": lambda: tiny_age_vlm(5, vision="timm"),
    "narrower": lambda: tiny_age_vlm(7, llama={"hidden_size": 16, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("i", range(len(ROWS)))
def test_assisted_decoding(model, expected, draft, i):
    """Mllama cannot: cropping its cache for a rejected draft cuts into the image."""
    assert torch.equal(generate(model, one(i), assistant_model=DRAFTS[draft]())[0], expected[i])


@torch.no_grad()
def test_a_draft_sees_the_images(model, expected):
    """A draft with the same weights is always right, which it can only be if it sees the same images."""
    draft, calls = DRAFTS["same"](), []
    hook = model.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape[1]))
    try:
        for features in (False, True):
            inputs = one(2)
            if features:
                inputs["mm_encoder_outputs"] = {"image": model.get_image_features(inputs.pop("pixel_values"))}
            calls.clear()
            draft.generation_config.num_assistant_tokens = 4
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
            assert torch.equal(generate(model, inputs, assistant_model=draft)[0], expected[2])
            assert sum(calls) <= STEPS + 1
            assert len(calls) <= -(-STEPS // 5) + 1, "every call accepts the four tokens of the draft"
    finally:
        hook.remove()


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_prompt_lookup(model, expected, i):
    assert torch.equal(generate(model, one(i), prompt_lookup_num_tokens=3)[0], expected[i])


@pytest.mark.parametrize("draft", ["lookup", "small llama", "other images"])
def test_drafts_into_a_static_cache(model, expected, draft):
    kwargs = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": DRAFTS[draft]()}
    for i in range(len(ROWS)):
        # Longer than the text: Transformers looks up tokens beyond the end of the static cache that it makes itself.
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        assert torch.equal(generate(model, one(i), cache=cache, **kwargs)[0], expected[i])


def test_prompt_lookup_does_not_propose_the_image_token(model):
    """The end of the prompt repeats what stands before an image token, at the first call and later ones."""
    pixels = images(1, seed=3)
    for before in range(2, 60):
        row = torch.cat([text(6, before), torch.tensor([before, IMAGE]), text(4, before + 1), torch.tensor([before])])
        expected = greedy(model, row, pixels)
        inputs = {"input_ids": row[None], "pixel_values": pixels}
        assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3)[0], expected)
        if before in expected:  # the model repeats that token itself, so that lookup meets it again later
            break
    else:
        pytest.fail("no prompt makes the model repeat the token before the image token")


# ---------------------------------------------------------------------------------------- attentions


@torch.no_grad()
def whole_cross_attentions(model, sequence: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
    """Of all blocks `(blocks, heads, S, V)`, from one forward pass."""
    has_images = pixels is not None and len(pixels)
    inputs = {"pixel_values": pixels} if has_images else {}
    blocks = model(sequence[None], output_attentions=True, use_cache=False, **inputs).cross_attentions
    return torch.cat(blocks) if blocks else torch.empty(0)


def tiny_eager_model():
    model = tiny_age_vlm()
    model.set_attn_implementation({"text_config": "eager"})
    return model


@pytest.fixture(scope="module")
def eager_model():
    return tiny_eager_model()


ATTENTIONS = {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": STEPS}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assisted": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("i", [0, 2])
def test_generated_cross_attentions(eager_model, kwargs, i):
    """One tuple of blocks a token: rows of the prompt first, then one row each, as for `attentions`."""
    if kwargs.get("assisted"):
        kwargs = {"assistant_model": tiny_eager_model()}  # whose tokens are all accepted
    out = eager_model.generate(**one(i), **ATTENTIONS, **kwargs)
    assert len(out.cross_attentions) == len(out.attentions) == STEPS
    if i == 0:  # a text without image
        assert out.cross_attentions == ((),) * STEPS
        return
    whole, prompt = whole_cross_attentions(eager_model, out.sequences[0], PIXELS[i]), len(ROWS[i])
    for step, blocks in enumerate(out.cross_attentions):
        end = prompt + step
        start = 0 if step == 0 or kwargs.get("use_cache") is False else end - 1
        torch.testing.assert_close(torch.cat(blocks), whole[:, :, start:end], atol=1e-5, rtol=0)


def test_generated_cross_attentions_of_beams_and_drafts(eager_model):
    """Beams as Transformers returns them for `attentions`: a row for each beam. A draft's attentions are its own."""
    out = eager_model.generate(**batch(), **ATTENTIONS, num_beams=2)
    assert len(out.cross_attentions) == len(out.attentions)
    for step, blocks in enumerate(out.cross_attentions):
        rows = batch()["input_ids"].shape[1] if step == 0 else 1
        assert [block.shape for block in blocks] == [(6, 4, rows, 2 * 16)] * 4
    first = torch.cat(out.cross_attentions[0])[4, :, -len(ROWS[2]) :]  # row 2, first beam and block
    whole = whole_cross_attentions(eager_model, ROWS[2], PIXELS[2])
    torch.testing.assert_close(first, whole[0], atol=1e-5, rtol=0)
    assert "cross_attentions" not in eager_model.generate(**one(1), return_dict_in_generate=True, max_new_tokens=2)


# ---------------------------------------------------------------------------------------- compiled


@torch.no_grad()
def test_compiled_static_decoding(model, expected):
    """One graph without a break serves every step, on the backend in use."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        generated = generate(model, batch(), cache_implementation="static", compile_config=config)
    assert torch.equal(generated, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ---------------------------------------------------------------------------------------- caches


@either_model
@pytest.mark.parametrize("all_images", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_a_conversation(model, all_images, static):
    """Images in later turns, where the caller passes all again or only the new ones; turns without an image."""
    conversation, seen, cache = torch.empty(0, dtype=torch.long), images(0), None
    if static:
        cache = StaticCache(config=model.config.text_config, max_cache_len=128)
    for turn, image_at in enumerate([(2,), (), (1, 4), ()]):
        conversation = torch.cat([conversation, text(7, 20 + turn, image_at)])
        new = images(len(image_at), seed=turn)
        seen = torch.cat([seen, new])
        pixels = seen if all_images else new
        inputs = {"input_ids": conversation[None], **({"pixel_values": pixels} if len(pixels) else {})}
        out = model.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        expected = greedy(model, conversation, seen, steps=8)
        assert torch.equal(out.sequences[0, len(conversation) :], expected)
        conversation, cache = out.sequences[0], out.cache


@pytest.mark.parametrize("all_images", [True, False])
def test_a_conversation_of_a_batch(model, expected, all_images):
    """The first turn has no image in row 0 and two in row 2; the second brings one to rows 0 and 2."""
    first = batch()
    out = model.generate(**first, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    turns = [text(6, 30, (3,)), text(6, 31), text(6, 32, (0,))]
    new = [images(1, seed=5), images(0), images(1, seed=6)]
    both = [torch.cat(pixels) for pixels in zip(PIXELS, new, strict=True)]
    inputs = {
        "input_ids": torch.cat([out.sequences, torch.stack(turns)], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], torch.ones(3, STEPS + 6, dtype=torch.long)], dim=1),
        "pixel_values": torch.cat(both if all_images else new),
    }
    generated = generate(model, inputs, cache=out.cache)
    for i, row in enumerate(ROWS):
        whole = torch.cat([row, expected[i], turns[i]])
        assert torch.equal(generated[i], greedy(model, whole, both[i]))


@pytest.mark.parametrize("i", [0, 1])
def test_cache_made_without_a_configuration(model, expected, i):
    """Such a cache makes its layers late. In row 0 the first image comes after a turn without."""
    out = model.generate(
        **one(i), cache=DynamicCache(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences[0, len(ROWS[i]) :], expected[i, :4])
    row, new = torch.cat([out.sequences[0], text(5, 40, (2,))]), images(1)
    generated = generate(model, {"input_ids": row[None], "pixel_values": new}, cache=out.cache)
    assert torch.equal(generated[0], greedy(model, row, torch.cat([PIXELS[i], new])))


class Stream:
    """In place of a stream of an accelerator."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def wait_stream(self, stream):
        pass


@pytest.fixture
def emulated_offloading(monkeypatch):
    """Layers of a cache lie on the CPU and their device is the CPU too: an offloaded layer loses its data until it is fetched."""
    offloaded = {}

    def offload(layer):
        if layer.is_initialized:
            offloaded[layer] = layer.keys, layer.values
            layer.keys = layer.values = None

    def prefetch(layer):
        if layer in offloaded:
            layer.keys, layer.values = offloaded.pop(layer)

    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    return offloaded


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "late", "made", "made static"])
@pytest.mark.parametrize("with_images", [False, True])
def test_offloaded_caches(model, expected, emulated_offloading, kind, with_images):
    """A layer is back on its device before each use. The layer after the last self-attention layer is the first one."""
    config = model.config.text_config
    caches = {
        "late": lambda: DynamicCache(offloading=True),
        "made": lambda: DynamicCache(config=config, offloading=True),
        "made static": lambda: StaticCache(config=config, max_cache_len=64, offloading=True),
    }
    kwargs = {"cache": caches[kind]()} if kind in caches else {"cache_implementation": kind}
    i = 2 if with_images else 0
    out = model.generate(**one(i), **kwargs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences[0, len(ROWS[i]) :], expected[i])
    text_layers, visual_layers = out.cache.layers[:6], out.cache.layers[6:]
    assert sum(layer in emulated_offloading for layer in text_layers) >= 5
    assert len(visual_layers) == (4 if with_images else 0)
    assert all(layer.keys is not None for layer in visual_layers)

    if kind != "offloaded_static":  # which has room for one turn
        row = torch.cat([out.sequences[0], text(4, 90)])
        inputs = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        generated = generate(model, inputs, cache=out.cache, max_new_tokens=4)
        assert torch.equal(generated[0], greedy(model, row, PIXELS[i], steps=4))


def test_quantized_cache(model, expected, monkeypatch):
    """Self-attention is quantized, visual tokens are not. With a quantization that loses nothing, tokens are the same."""
    inputs = {**batch(), "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    assert [type(layer) for layer in out.cache.layers] == [Fp8QuantizedLayer] * 6 + [
        AgeVlmCrossAttentionCacheLayer
    ] * 4
    assert torch.equal(out.sequences[:, -STEPS], expected[:, 0])
    monkeypatch.setattr(Fp8QuantizedLayer, "_quantize", lambda self, tensor, scale=None: (tensor, 1.0))
    for kwargs in ({}, {"num_beams": 3}):
        reference = expected if not kwargs else generate(model, batch(), **kwargs)
        assert torch.equal(generate(model, inputs, **kwargs), reference)


@torch.no_grad()
def cached(model, inputs: dict[str, torch.Tensor], static: bool = False) -> Cache:
    cache = StaticCache(config=model.config.text_config, max_cache_len=64) if static else None
    return model(**inputs, cache=cache, use_cache=True).cache


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("removed", [1, 4, 6, 8, 9])
def test_crop(model, removed, static):
    """Back to after or before the second image (at 5) or the first (at 1), and on with another image."""
    row, new = ROWS[2], images(1, seed=8)
    cache = cached(model, one(2), static)
    cache.crop(-removed)
    kept = len(row) - removed
    assert cache.get_seq_length() == kept
    row = torch.cat([row[:kept], text(5, 50, (1,))])
    pixels = torch.cat([PIXELS[2][: int((row[:kept] == IMAGE).sum())], new])
    expected = greedy(model, row, pixels)
    inputs = {"input_ids": row[None], "pixel_values": new}
    assert torch.equal(generate(model, inputs, cache=cache)[0], expected)

    cache = cached(model, one(2), static)
    cache.crop(-removed)
    inputs["pixel_values"] = pixels  # all that the conversation still has
    assert torch.equal(generate(model, inputs, cache=cache)[0], expected)


def test_crop_and_on_without_image(model):
    cache = cached(model, one(2))
    cache.crop(-6)
    row = torch.cat([ROWS[2][:4], text(6, 51)])
    generated = generate(model, {"input_ids": row[None]}, cache=cache)
    assert torch.equal(generated[0], greedy(model, row, PIXELS[2][:1]))


def test_reset(model, expected):
    cache = cached(model, one(2))
    cache.reset()
    for i in (1, 0):
        assert torch.equal(generate(model, one(i), cache=cache)[0], expected[i])
        cache.reset()


@either_model
@torch.no_grad()
def test_selected_and_repeated_rows_of_the_cache(model):
    prompt, token = batch(), text(3, 60)[:, None]

    def after(cache, rows: list[int]) -> torch.Tensor:
        mask = torch.cat([prompt["attention_mask"][rows], torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        out = model(token[rows], attention_mask=mask, position_ids=positions, cache=cache)
        return out.logits[:, 0]

    expected = torch.stack(
        [
            model(torch.cat([row, t])[None], **one_pixels(i)).logits[0, -1]
            for i, (row, t) in enumerate(zip(ROWS, token, strict=True))
        ]
    )
    for rows, change in [
        ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        ([1, 2, 2], lambda cache: cache.reorder_cache(torch.tensor([1, 2, 2]))),
    ]:
        cache = cached(model, prompt)
        change(cache)
        torch.testing.assert_close(after(cache, rows), expected[rows], atol=2e-5, rtol=1e-5)


def one_pixels(i: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": PIXELS[i]} if COUNTS[i] else {}


@either_model
@torch.no_grad()
def test_step_by_step_equals_one_pass(model):
    """Logits of a cached text fed in pieces, whose images come with their piece."""
    row, pixels = text(14, 61, (1, 6, 7)), images(3)
    whole = model(row[None], pixel_values=pixels).logits
    cache, pieces = DynamicCache(config=model.config.text_config), []
    for start, end in [(0, 1), (1, 5), (5, 7), (7, 8), (8, 9), (9, 14)]:
        piece = row[None, start:end]
        before, count = int((row[:start] == IMAGE).sum()), int((piece == IMAGE).sum())
        new = {"pixel_values": pixels[before : before + count]} if count else {}
        pieces.append(model(piece, cache=cache, use_cache=True, **new).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["", "model", "model.language_model"])
@torch.no_grad()
def test_the_cache_may_still_be_called_by_its_old_name(model, part):
    """As in Llama: with a warning, until Transformers lets go of it."""
    module = model.get_submodule(part)
    first, second = ROWS[0][None, :6], ROWS[0][None, 6:]
    cache = module(first, use_cache=True).cache
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated.*Use `cache` instead"):
        out = module(second, past_key_values=cache)
    assert out.past_key_values is out["past_key_values"] is out.cache is cache
    assert cache.get_seq_length() == len(ROWS[0])
    torch.testing.assert_close(out[0], module(ROWS[0][None])[0][:, 6:], atol=2e-5, rtol=1e-5)


def test_generate_knows_the_old_name_of_the_cache(model, expected):
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated.*Use `cache` instead"):
        generated = generate(model, one(1), past_key_values=DynamicCache())
    assert torch.equal(generated[0], expected[1])


def test_continuous_batching_of_text(model):
    """It has a cache of another kind than all else. Images are not for it, in Transformers."""
    rows = [ROWS[0], text(5, 80)]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(
        page_size=16, num_blocks=8, max_batch_tokens=32
    )  # by default, nearly all there is
    outputs = model.generate_batch([row.tolist() for row in rows], config, memory)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert generated == {tuple(row.tolist()): greedy(tiny_llama(), row).tolist() for row in rows}


# ---------------------------------------------------------------------------------------- inputs and limits


@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(model, expected, with_ids):
    """Image tokens are found by their embedding."""
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    ids = {"input_ids": inputs.pop("input_ids")}
    out = model.generate(
        inputs_embeds=embeds, **inputs, **(ids if with_ids else {}), max_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(out[:, -STEPS:], expected)


def test_precomputed_features(model, expected):
    inputs = batch()
    features = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(generate(model, inputs, mm_encoder_outputs={"image": features}), expected)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"generation_config": GenerationConfig(num_beams=1)}],
    ids=str,
)
def test_the_image_token_is_never_generated(expected, kwargs):
    model = tiny_age_vlm()
    with torch.no_grad():  # now wherever token `often` wins, the image token would
        often = expected[2].mode().values
        model.lm_head.weight[IMAGE] = 1.5 * model.lm_head.weight[often]
    assert IMAGE in generate(model, one(2), suppress_tokens=[])
    assert IMAGE not in generate(model, one(2), **kwargs)


def test_chunked_prefill_of_images_is_refused(model, expected):
    with pytest.raises(ValueError, match="Chunked prefill"):
        generate(model, one(2), prefill_chunk_size=4)
    assert torch.equal(generate(model, one(0), prefill_chunk_size=4)[0], expected[0])


def test_beams_need_every_image_of_the_conversation(model):
    cache = cached(model, one(1))
    row = torch.cat([ROWS[1], text(5, 70, (1,))])
    inputs = {"input_ids": row[None], "pixel_values": images(1)}
    with pytest.raises(ValueError, match=r"Got 1 image\(s\) for 2 image token\(s\)"):
        generate(model, inputs, cache=cache, num_beams=2)


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_text_alone_keeps_in_step_with_processes_that_have_images(model, expected, kwargs):
    """FSDP2 gathers a block's weights in the processes that run it, and hangs unless all of them do."""
    calls = {"model": 0, "block": 0}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, module in (("model", model), ("block", model.model.language_model.cross_attn["0"]))
    ]
    alone = generate(model, one(0), **kwargs)
    assert calls["model"] > 0
    assert calls["block"] == 0, "a single process saves itself the work"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for i in (0, 1):
            calls.update(model=0, block=0)
            tokens = generate(model, one(i), **kwargs)
            assert calls["block"] == calls["model"] > 0
            if i == 0:
                assert torch.equal(tokens, alone)
            if "num_beams" not in kwargs:
                assert torch.equal(tokens[0], expected[i])
    finally:
        dist.destroy_process_group()
        for hook in hooks:
            hook.remove()
