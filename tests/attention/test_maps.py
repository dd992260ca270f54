# SPDX-License-Identifier: Apache-2.0
"""Maps of nine architectures, against eager attention."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_age_vlm
from tiny_vlms import CONFIGURATIONS, IMAGE_TOKEN, tiny_inputs, tiny_queries, tiny_vlm
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from agevlm.attention import attention_maps, image_tokens
from agevlm.attention.maps import SDPA_WITH_MAPS

KINDS = list(CONFIGURATIONS)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def eager_maps(model, inputs, queries, over, per_head=False) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention_maps should give, from the attention weights of eager attention."""
    is_mllama = model.config.model_type == "mllama"
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    if is_mllama:
        tokens, numbers = 17, model.config.text_config.cross_attention_layers  # a class token and 16 patches a tile
        tiles = inputs["aspect_ratio_mask"].flatten(1).bool()
        keys = torch.stack(
            [torch.tensor([i % tokens > 0 for i in range(4 * tokens)]) & t.repeat_interleave(tokens) for t in tiles]
        )
        readers = inputs["cross_attention_mask"].flatten(2).any(-1)
    else:
        numbers, keys = range(len(weights)), inputs["input_ids"] == IMAGE_TOKEN
        readers = torch.ones_like(keys)
    most = int(keys.sum(1).max())
    maps = torch.zeros(len(numbers), *queries.shape[:1], 4, queries.shape[1], most)
    share = torch.zeros(maps.shape[:-1])
    for index, number in enumerate(numbers):
        for row, phrase in queries.any(-1).nonzero().tolist():
            read = weights[number][row][:, queries[row, phrase]]  # (heads, tokens of the phrase, keys)
            read = read * readers[row, queries[row, phrase]][:, None]
            image = read[..., keys[row]]
            share[index, row, :, phrase] = image.sum(-1).mean(-1)
            if over == "image":
                image = image / image.sum(-1, keepdim=True).clamp(min=1e-12)
            maps[index, row, :, phrase, : image.shape[-1]] = image.mean(1)
    return (maps, share) if per_head else (maps.mean(2), share.mean(2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("over", ["image", "all"])
def test_maps_are_those_of_eager_attention(kind, side, over):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind, side)
    queries = tiny_queries(inputs)
    with torch.no_grad():
        wanted, share = eager_maps(model, inputs, queries, over)
        with attention_maps(model, queries, over=over) as found:
            model(**inputs)
    assert found.maps.dtype == torch.float32
    assert found.maps.shape == wanted.shape
    assert found.layers == list(model.config.text_config.cross_attention_layers if kind == "mllama" else range(3))
    torch.testing.assert_close(found.maps, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.share, share, rtol=1e-5, atol=1e-6)


def test_maps_by_head_and_of_some_layers(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    last = 3 if kind == "mllama" else 2
    with torch.no_grad():
        wanted, share = eager_maps(model, inputs, queries, "all", per_head=True)
        with attention_maps(model, queries, layers=[last], over="all", per_head=True) as found:
            model(**inputs)
    torch.testing.assert_close(found.maps, wanted[-1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.share, share[-1:], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_eager_attention(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)

    def gradients(maps: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (maps * torch.randn(maps.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(eager_maps(model, inputs, queries, "image")[0])
    with attention_maps(model, queries) as found:
        model(**inputs)
    ours = gradients(found.maps)
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        assert torch.allclose(ours.get(name, torch.zeros_like(gradient)), gradient, atol=2e-5 * largest), name


def test_outputs_are_those_of_sdpa(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    with torch.no_grad():
        wanted = model(**inputs).logits
        with attention_maps(model, tiny_queries(inputs)) as found:
            logits = model(**inputs).logits
        assert found.maps.sum() > 0
        after = model(**inputs).logits
    assert torch.equal(logits, wanted)
    assert torch.equal(after, wanted)


def test_gradients_with_checkpointing(kind):
    model, inputs = tiny_vlm(kind).train(), tiny_inputs(kind)
    queries = tiny_queries(inputs)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with attention_maps(model, queries) as found:
            outputs = model(**inputs, use_cache=False)
        # After the block, as in a trainer.
        (found.maps.square().sum() + outputs.logits.square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(kind, cache):
    """The maps are of the prompt, which the first forward reads; the tokens are those of SDPA."""
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    wanted = model.generate(**inputs, **settings)
    with attention_maps(model, queries) as found:
        tokens = model.generate(**inputs, **settings)
    with torch.no_grad(), attention_maps(model, queries) as prompt:
        model(**inputs)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(found.maps, prompt.maps, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast(kind):
    """Probabilities are float32 also where the model computes in bfloat16, so every map that sees an image sums to 1."""
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    with torch.no_grad():
        wanted, _ = eager_maps(model, inputs, queries, "image")  # in float32: eager Mllama computes NaN under autocast
        with torch.autocast("cpu", torch.bfloat16), attention_maps(model, queries) as found:
            model(**inputs)
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps, wanted, rtol=0, atol=0.05)
    torch.testing.assert_close(found.maps.sum(-1), wanted.sum(-1), rtol=0, atol=1e-5)


def test_lora(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    with torch.no_grad(), attention_maps(model, queries) as before:
        model(**inputs)
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    with attention_maps(peft, queries) as found:
        peft(**inputs)
    torch.testing.assert_close(found.maps, before.maps)  # a fresh adapter adds nothing
    found.maps.square().sum().backward()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    moved = [name for name, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0]
    layers = found.layers
    assert any(f"layers.{layers[-1]}." in name and "q_proj.lora_B" in name for name in moved), moved


def test_nothing_of_it_is_saved(kind, tmp_path):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    with torch.no_grad(), attention_maps(model, tiny_queries(inputs)):
        wanted = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert SDPA_WITH_MAPS not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.get_text_config()._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, wanted)


def test_a_model_without_its_head(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    with torch.no_grad():
        with attention_maps(model, queries) as wanted:
            model(**inputs)
        with attention_maps(model.model, queries) as found:
            model.model(**inputs)
    assert torch.equal(found.maps, wanted.maps)


def test_the_first_forward_counts():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    queries = tiny_queries(inputs)
    with attention_maps(model, queries) as found:
        model(**inputs)
        first = found.maps
        with torch.no_grad():
            model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1})
    assert torch.equal(found.maps, first)
    assert first.requires_grad


def test_the_image_tokens_may_be_given():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    queries, keys = tiny_queries(inputs), inputs["input_ids"] == IMAGE_TOKEN
    keys[1, keys[1].nonzero()[0]] = False  # all but one
    with torch.no_grad():
        with attention_maps(model, queries, over="all") as whole:
            model(**inputs)
        embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        with attention_maps(model, queries, keys, over="all") as found:
            model(**inputs)
        with pytest.raises(ValueError, match=r"without `input_ids`.*pass `keys`"), attention_maps(model, queries):
            model(**{k: v for k, v in embedded.items() if k not in ("input_ids", "pixel_values")})
    torch.testing.assert_close(found.maps[:, 1, :, :-1], whole.maps[:, 1, :, 1:][..., : found.maps.shape[-1] - 1])
    torch.testing.assert_close(found.maps[:, 0, :, :16], whole.maps[:, 0, :, :16])


def test_phrases_before_their_image_and_without_one():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava", "right")
    queries = torch.zeros(2, 1, inputs["input_ids"].shape[1], dtype=torch.bool)
    queries[:, 0, 1] = True  # before the first image
    with attention_maps(model, queries) as found:
        model(**inputs)
    assert not found.maps.any()
    assert not found.share.any()
    found.maps.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_text_without_image():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    text = inputs["input_ids"].clone()
    text[text == IMAGE_TOKEN] = 7
    with attention_maps(model, tiny_queries(inputs)) as found:
        model(input_ids=text, attention_mask=inputs["attention_mask"])
    assert found.maps.shape == (3, 2, 3, 0)
    assert not found.share.any()


# ---------------------------------------------------------------------------------------- what is refused


def test_other_attention_than_sdpa_is_refused():
    model = tiny_vlm("llava")
    model.set_attn_implementation("eager")
    with (
        pytest.raises(ValueError, match=r"LlamaModel uses the attention 'eager'.*attn_implementation='sdpa'"),
        attention_maps(model, torch.ones(1, 1, 4, dtype=torch.bool)),
    ):
        pass


def test_unknown_layers_are_refused():
    with (
        pytest.raises(ValueError, match=r"`layers` has \[0\].*\[1, 3\]"),
        attention_maps(tiny_vlm("mllama"), torch.ones(1, 1, 4, dtype=torch.bool), layers=[0, 1]),
    ):
        pass


def test_a_language_model_has_no_image_tokens():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no `image_token_id`.*pass `keys`"):
        image_tokens(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    keys = torch.tensor([[True, True, False, False]])
    with (
        torch.no_grad(),
        attention_maps(model, torch.tensor([[[False, False, False, True]]]), keys, over="all") as found,
    ):
        model(torch.arange(4)[None])
    assert 0 < float(found.share) < 1
    assert found.maps.shape == (1, 1, 1, 2)


def test_maps_before_the_forward():
    queries = torch.ones(1, 1, 4, dtype=torch.bool)
    with attention_maps(tiny_vlm("llava"), queries) as found, pytest.raises(RuntimeError, match="no maps yet"):
        _ = found.maps


# ---------------------------------------------------------------------------------------- AGE-VLM


@pytest.mark.parametrize("sink", [False, True])
def test_an_agevlm_gives_its_own_maps(sink):
    model = tiny_age_vlm(cross_attention_sink=sink)
    inputs = {
        "input_ids": torch.tensor([[1, 90, 4, 5, 6]]),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }
    queries = torch.zeros(1, 2, 5, dtype=torch.bool)
    queries[0, 0, 3:] = queries[0, 1, 4] = True
    layers = list(model.config.text_config.cross_attention_layers)
    with torch.no_grad():
        wanted = model.model(**inputs, map_queries=queries).cross_attention_maps
        with attention_maps(model, queries, over="all") as found:
            model(**inputs)
        with attention_maps(model, queries, layers=layers[1:], over="image") as on_image:
            model(**inputs)
    assert found.layers == layers
    assert torch.equal(found.maps, wanted)
    torch.testing.assert_close(found.share, wanted.sum(-1))
    assert bool((found.share < 0.999).all()) == sink
    torch.testing.assert_close(on_image.maps.sum(-1), torch.ones(len(layers) - 1, 1, 2))
    torch.testing.assert_close(on_image.maps * on_image.share[..., None], wanted[1:])
    with pytest.raises(ValueError, match="averaged over heads"), attention_maps(model, queries, per_head=True):
        pass
