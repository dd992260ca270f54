# SPDX-License-Identifier: Apache-2.0
"""The model against a plain Llama, against a float64 reference written by hand, and against its own properties."""

import contextlib
import copy
import json
import math
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_models import (
    COUNTS,
    GRID,
    IMAGE,
    IMAGE_SIZE,
    NUM_VISUAL,
    ROWS,
    VOCAB,
    batch,
    images,
    open_gates,
    pad,
    text,
    tiny_age_vlm,
    tiny_llama,
    tiny_vision,
    write_gguf,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from agevlm import (
    AgeVlmConfig,
    AgeVlmForConditionalGeneration,
    AgeVlmModel,
    AgeVlmTextConfig,
    AgeVlmTextModel,
    from_parts,
)
from agevlm.modeling_agevlm.modeling_agevlm import (
    AgeVlmCrossAttention,
    AgeVlmCrossAttentionInputs,
    AgeVlmImageFeatures,
    sincos_2d,
)

IMPLEMENTATIONS = ("eager", "sdpa")


@pytest.fixture(scope="module")
def model(request):
    return tiny_age_vlm(cross_attention_sink=getattr(request, "param", False))


@pytest.fixture
def trainable(request):
    """A fresh model in training mode, whose language model is frozen as in the paper's first stages."""
    model = tiny_age_vlm(cross_attention_sink=getattr(request, "param", False)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_attn" in name or "multi_modal_projector" in name)
    return model


# Without and with an attention sink in the blocks.
either_model = pytest.mark.parametrize("model", [False, True], indirect=True, ids=["", "sink"])
either_trainable = pytest.mark.parametrize("trainable", [False, True], indirect=True, ids=["", "sink"])


def has_sink(model) -> bool:
    return model.config.text_config.cross_attention_sink


@contextlib.contextmanager
def attention(model, implementation: str):
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": implementation})
    try:
        yield model
    finally:
        model.set_attn_implementation({"text_config": before})


def blocks(model) -> list[AgeVlmCrossAttention]:
    return [module for module in model.modules() if isinstance(module, AgeVlmCrossAttention)]


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


# ---------------------------------------------------------------------------------------- assembled from parts


def assert_equals_llama(assembled, llama) -> None:
    """Logits equal bit for bit: text-only and with images, padded left and right."""
    assert len(blocks(assembled)) == 4
    for side in ("left", "right"):
        inputs = batch(side)
        text_only = {**pad([torch.where(row == IMAGE, 5, row) for row in ROWS], side)}
        for images_and_text in (inputs, text_only):
            text_inputs = {k: v for k, v in images_and_text.items() if k != "pixel_values"}
            assert torch.equal(assembled(**images_and_text).logits, llama(**text_inputs).logits)


@pytest.mark.parametrize(("vision", "sink"), [("convnext", False), ("timm", False), ("convnext", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_assembled_from_instances_equals_llama(vision, sink, dtype, tied):
    llama, tower = tiny_llama(tie_word_embeddings=tied).to(dtype), tiny_vision(vision)
    assembled = from_parts(llama, tower, image_token_id=IMAGE, cross_attention_sink=sink)
    assert_equals_llama(assembled, llama)
    for block in blocks(assembled):
        assert (block.sink is not None) == sink
        assert not sink or 0.5 < block.sink.float().std() < 1.5, "of the visual tokens' scale"

    parts = {p.data_ptr() for part in (llama, tower) for p in part.parameters()}
    fresh = {n for n, p in assembled.named_parameters() if p.data_ptr() not in parts}
    assert parts <= {p.data_ptr() for p in assembled.parameters()}, "the parts' weights are taken over"
    assert all("multi_modal_projector" in name or "cross_attn" in name for name in fresh), "and not copied"
    assert (assembled.lm_head.weight is assembled.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("vision", ["convnext", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_assembled_from_paths_equals_llama(vision, dtype, tmp_path):
    tiny_llama(tie_word_embeddings=dtype == torch.bfloat16).to(dtype).save_pretrained(tmp_path / "llama")
    tiny_vision(vision).save_pretrained(tmp_path / "vision")
    assembled = from_parts(str(tmp_path / "llama"), str(tmp_path / "vision"), image_token_id=IMAGE)
    assert assembled.dtype == dtype
    assert_equals_llama(assembled, LlamaForCausalLM.from_pretrained(tmp_path / "llama"))
    expected = tiny_age_vlm(vision=vision).model.get_vision_tokens(images(1))[0]
    assert torch.allclose(assembled.model.get_vision_tokens(images(1))[0], expected, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_assembled_from_gguf_equals_llama(tied, tmp_path):
    llama = tiny_llama(tie_word_embeddings=tied, rms_norm_eps=1e-5)
    write_gguf(llama, tmp_path / "llama.gguf")
    assembled = from_parts(str(tmp_path / "llama.gguf"), tiny_vision(), image_token_id=IMAGE)
    assert_equals_llama(assembled, llama)


def test_parts_keep_their_own_generation_config():
    llama = tiny_llama()
    llama.generation_config.suppress_tokens = [7]
    assembled = from_parts(llama, tiny_vision(), image_token_id=IMAGE)
    assert llama.generation_config.suppress_tokens == [7]
    assert sorted(assembled.generation_config.suppress_tokens) == [7, IMAGE]


@pytest.mark.parametrize("as_path", [True, False])
def test_other_text_models_are_refused(as_path, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, **sizes))
    qwen.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen2"):
        from_parts(str(tmp_path) if as_path else qwen, tiny_vision())


def test_missing_part_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        from_parts(str(tmp_path / "nowhere"), tiny_vision())


# ---------------------------------------------------------------------------------------- who sees what


@either_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_of_a_mixed_batch(model, implementation, side):
    """A text-only row equals the plain Llama, and no row depends on its neighbors or on padding."""
    inputs, llama = batch(side), tiny_llama(attn_implementation=implementation)
    with attention(model, implementation):
        together = model(**inputs).logits
        pixels = inputs["pixel_values"].split(COUNTS)
        alone = [
            model(row[None], pixel_values=pixel if len(pixel) else None).logits[0]
            for row, pixel in zip(ROWS, pixels, strict=True)
        ]
    plain = llama(**pad(ROWS, side)).logits
    assert largest(together[0] - plain[0]) <= 1e-6
    assert largest(together[1] - plain[1]) > 0.1, "images matter"
    for logits, mask, expected in zip(together, inputs["attention_mask"].bool(), alone, strict=True):
        torch.testing.assert_close(logits[mask], expected, atol=2e-5, rtol=1e-5)


@either_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("image_at", [(2, 6), (4, 5), (0, 9)])
@pytest.mark.parametrize("changed", [0, 1])
@torch.no_grad()
def test_a_token_sees_the_images_at_or_before_it(model, implementation, image_at, changed):
    row, pixels = text(10, 3, image_at)[None], images(2)
    other = pixels.clone()
    other[changed] = images(1, seed=9)[0]
    with attention(model, implementation):
        difference = (model(row, pixel_values=pixels).logits - model(row, pixel_values=other).logits).abs().amax(-1)[0]
    assert difference[: image_at[changed]].sum() == 0
    assert difference[image_at[changed] :].min() > 1e-3


@torch.no_grad()
def test_more_visual_tokens_of_other_rows_change_nothing(model):
    """A row with one image next to a row with three: its filled-up places are seen by nobody."""
    rows = [text(8, 4, (2,)), text(8, 5, (0, 1, 2))]
    pixels = images(4)
    together = model(**pad(rows), pixel_values=pixels).logits[0]
    torch.testing.assert_close(together, model(rows[0][None], pixel_values=pixels[:1]).logits[0], atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- the block


def reference_block(block: AgeVlmCrossAttention, hidden, visual, visible) -> tuple[np.ndarray, np.ndarray]:
    """The block in float64, one query and one head at a time, without a line of the model's code.

    Returns what it adds to the residual stream `(B, S, D)`, and its attention to visual tokens `(B, S, V)`, the mean over
    the heads. A sink is one more key, after the visible ones, whose value is zero.
    """
    weights = {name: value.double().numpy() for name, value in block.state_dict().items()}
    head_dim, eps = block.config.head_dim, block.config.rms_norm_eps
    heads, groups = block.config.num_attention_heads, block.config.num_key_value_heads

    def rms(x):
        return np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def normed(x, name):
        return x / rms(x) * weights[f"{name}.weight"]

    hidden, visual, visible = hidden.double().numpy(), visual.double().numpy(), visible.numpy()
    added, attention = np.zeros_like(hidden), np.zeros(visible.shape)
    for b, s in np.argwhere(visible.any(-1)):
        query = weights["q_proj.weight"] @ normed(hidden[b, s], "layernorm")
        attended = []
        for head in range(heads):
            group = slice(head // (heads // groups) * head_dim, (head // (heads // groups) + 1) * head_dim)
            keys = normed(visual[b] @ weights["k_proj.weight"][group].T, "k_norm")[visible[b, s]]
            values = (visual[b] @ weights["v_proj.weight"][group].T)[visible[b, s]]
            if "sink" in weights:
                sink = normed(weights["k_proj.weight"][group] @ weights["sink"], "k_norm")
                keys, values = np.concatenate([keys, sink[None]]), np.concatenate([values, np.zeros((1, head_dim))])
            scores = keys @ normed(query[head * head_dim : (head + 1) * head_dim], "q_norm") / math.sqrt(head_dim)
            probabilities = np.exp(scores) / np.exp(scores).sum()
            attended.append(probabilities @ values)
            attention[b, s, visible[b, s]] += probabilities[: visible[b, s].sum()] / heads
        added[b, s] = (
            np.tanh(weights["gate"]) * rms(hidden[b, s]) * (weights["o_proj.weight"] @ np.concatenate(attended))
        )
    return added, attention


def block_inputs(seed: int = 0, batch_size: int = 2, seq_length: int = 5, num_visual: int = 7):
    """Hidden states of a large scale, visual tokens, and a random visibility with rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch_size, seq_length, 32, generator=generator) * 20
    visual = torch.randn(batch_size, num_visual, 32, generator=generator)
    visible = torch.rand(batch_size, seq_length, num_visual, generator=generator) < 0.5
    visible[0, 0], visible[1, 3] = False, False
    return hidden, visual, visible


@either_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_block_equals_reference(model, implementation):
    hidden, visual, visible = block_inputs()
    with attention(model, implementation):
        inputs = model.model.language_model._cross_attention_inputs(visible, hidden)
        for block in blocks(model):
            added, weights, _ = block(hidden, visual, inputs)
            expected, attended = reference_block(block, hidden, visual, visible)
            np.testing.assert_allclose(added.numpy(), expected, atol=2e-4)
            assert (added[~visible.any(-1)] == 0).all(), "a token that sees no image gets exactly nothing"
            if implementation == "eager":
                np.testing.assert_allclose(weights.mean(1).numpy(), attended, atol=1e-6)


@either_model
@torch.no_grad()
def test_maps_equal_reference(model):
    """Of phrases of one token, of several, of some that see nothing, and of nothing else."""
    hidden, visual, visible = block_inputs()
    queries = torch.zeros(2, 3, 5, dtype=torch.bool)
    queries[0, 0, 2], queries[0, 1, [1, 2, 4]], queries[0, 2, [0, 3]] = True, True, True
    queries[1, 0, 2:5], queries[1, 1, 3] = True, True
    inputs = model.model.language_model._cross_attention_inputs(visible, hidden, map_queries=queries)
    for block in blocks(model):
        _, _, maps = block(hidden, visual, inputs)
        _, attended = reference_block(block, hidden, visual, visible)
        assert maps.shape == (2, 3, 7)
        for b, p in np.ndindex(2, 3):
            tokens = queries[b, p].nonzero().flatten().tolist()
            expected = sum(attended[b, token] for token in tokens) / max(1, len(tokens))
            np.testing.assert_allclose(maps[b, p].numpy(), expected, atol=1e-6)
        assert (maps[0, 0].sum() < 0.99) == has_sink(model)


def test_no_gradient_flows_through_the_residual_scale(model):
    """All but that scale is blind to the size of the residual, so no gradient may point along it."""
    hidden, visual, visible = block_inputs()
    hidden.requires_grad_()
    torch.manual_seed(0)
    inputs = model.model.language_model._cross_attention_inputs(visible, hidden)
    added, _, _ = blocks(model)[0](hidden, visual, inputs)
    (gradient,) = torch.autograd.grad((added * torch.randn_like(added)).sum(), hidden)
    assert largest(gradient) > 0.1
    assert largest(torch.cosine_similarity(gradient, hidden, dim=-1)) < 1e-4


@either_model
@pytest.mark.parametrize(("implementation", "attended"), [("eager", 0.0), ("sdpa", True)])
def test_no_query_is_left_without_keys(model, implementation, attended):
    """A softmax over nothing is NaN, or has a NaN gradient, on some of the backends behind SDPA."""
    hidden, _, visible = block_inputs()
    with attention(model, implementation):
        inputs = model.model.language_model._cross_attention_inputs(visible, hidden)
    expected = visible | ~visible.any(-1, keepdim=True)
    if has_sink(model):  # comes last, and is always there
        expected = torch.cat([expected, torch.ones_like(expected[..., :1])], dim=-1)
    assert torch.equal(inputs.attention_mask[:, 0] == attended, expected)


@either_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_block_has_no_causal_mask(model, implementation):
    """Without any mask each text token attends to all visual tokens, which SDPA's default would deny it."""
    hidden, visual, visible = block_inputs()
    visible = torch.ones_like(visible)
    block = blocks(model)[0]
    with attention(model, implementation):
        added, _, _ = block(hidden, visual, AgeVlmCrossAttentionInputs(visible=visible))
    np.testing.assert_allclose(added.numpy(), reference_block(block, hidden, visual, visible)[0], atol=2e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_block_knows_no_order_of_text_or_visual_tokens(model, implementation):
    hidden, visual, visible = block_inputs()
    torch.manual_seed(0)
    texts, visuals = torch.randperm(hidden.shape[1]), torch.randperm(visual.shape[1])
    block, language_model = blocks(model)[0], model.model.language_model
    with attention(model, implementation):
        added, _, _ = block(hidden, visual, language_model._cross_attention_inputs(visible, hidden))
        inputs = language_model._cross_attention_inputs(visible[:, texts][:, :, visuals], hidden)
        permuted, _, _ = block(hidden[:, texts], visual[:, visuals], inputs)
    torch.testing.assert_close(permuted, added[:, texts], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_moving_the_image_changes_only_who_sees_it(model):
    """An image has no place in the text but the point from which it is seen."""
    language_model = model.model.language_model
    hidden, visual, _ = block_inputs(seq_length=8)
    added = []
    hook = blocks(model)[0].register_forward_hook(lambda module, args, output: added.append(output[0]))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(hook.remove)
        for position in (2, 5):
            positions = torch.full(visual.shape[:2], position)
            language_model(inputs_embeds=hidden, cross_attention_states=visual, visual_positions=positions)
    early, late = added  # the first block stands before the first layer: it sees the same hidden states
    assert (early[:, :2] == 0).all()
    assert (late[:, :5] == 0).all()
    assert early[:, 2:5].abs().min() > 0
    torch.testing.assert_close(early[:, 5:], late[:, 5:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sink", [False, True])
@torch.no_grad()
def test_implementations_agree(sink):
    # Few layers, because flex attention is compiled; each time anew, because PyTorch's code for CPUs does not compile for a
    # number of keys that changes.
    torch._dynamo.reset()
    model = tiny_age_vlm(llama={"num_hidden_layers": 2}, cross_attention_sink=sink)
    inputs, logits = batch(), {}
    if sink:  # and two texts in each row
        inputs["position_ids"] = torch.cat([inputs["position_ids"][:, :8], torch.arange(4).expand(3, -1)], dim=1)
    for implementation in (*IMPLEMENTATIONS, "flex_attention"):
        with attention(model, implementation):
            logits[implementation] = model(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(logits["flex_attention"], logits["eager"], atol=5e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- attention maps


def phrases() -> torch.Tensor:
    """Two phrases a row on the left-padded batch; the second is padding except in the row with two images."""
    queries = torch.zeros(3, 2, 12, dtype=torch.bool)
    queries[0, 0, 5:7] = True  # a row without image
    queries[1, 0, [4, 6, 11]] = True
    queries[2, 0, 3:5] = True  # sees the first image only
    queries[2, 1, 4:10] = True  # begins before the second image
    return queries


def eager_maps(model, inputs, queries) -> torch.Tensor:
    """The same maps from the full attention weights, which only eager attention gives."""
    with attention(model, "eager"):
        weights = torch.stack(model(**inputs, output_attentions=True).cross_attentions).mean(2)
    tokens = queries.to(weights.dtype)
    return torch.einsum("lbsv,bps->lbpv", weights, tokens) / tokens.sum(-1).clamp(min=1)[None, :, :, None]


@either_model
@torch.no_grad()
def test_maps_equal_eager_attention(model):
    inputs, queries = batch(), phrases()
    maps = model(**inputs, map_queries=queries).cross_attention_maps
    assert maps.shape == (4, 3, 2, 2 * NUM_VISUAL)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, eager_maps(model, inputs, queries), atol=1e-6, rtol=0)
    sums, sees = maps.sum(-1), torch.tensor([[False, False], [True, False], [True, True]])
    assert (sums[:, ~sees] == 0).all(), "zero without image and for padded phrases"
    if has_sink(model):
        assert ((sums[:, sees] > 0.1) & (sums[:, sees] < 0.999)).all(), "the rest is in the sink"
    else:
        torch.testing.assert_close(sums[:, sees], torch.ones(4, 3))
    assert (maps[:, 2, 0, NUM_VISUAL:] == 0).all(), "nothing of an image that comes later"
    assert maps[:, 1, 0].std(-1).min() > 0.01, "the maps vary"


@torch.no_grad()
def test_maps_are_float32_in_bfloat16():
    model = tiny_age_vlm().to(torch.bfloat16)
    maps = model(**batch(), map_queries=phrases()).cross_attention_maps
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1)[:, 1, 0], torch.ones(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(maps, eager_maps(model, batch(), phrases()).float(), atol=0.02, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maps_of_phrases_without_tokens_are_zero(model, implementation):
    """As in a batch that has other rows with tokens, and as without the question for maps."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    inputs, nothing = batch(), torch.zeros(3, 2, 12, dtype=torch.bool)
    found = model(**inputs, map_queries=nothing)
    torch.testing.assert_close(found.cross_attention_maps, torch.zeros(4, 3, 2, 2 * NUM_VISUAL), atol=0, rtol=0)
    torch.testing.assert_close(found.logits, model(**inputs).logits, atol=0, rtol=0)


@torch.no_grad()
def test_maps_without_images(model):
    inputs, queries = pad(ROWS[:1]), phrases()[:1, :, :9]
    assert model(**inputs, map_queries=queries).cross_attention_maps.shape == (4, 1, 2, 0)
    assert model(**inputs).cross_attention_maps is None


def gradients(model, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (maps * torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: dict, expected: dict, rtol: float = 1e-4) -> None:
    for name, gradient in actual.items():  # reentrant checkpointing gives zeros instead of None
        assert largest(gradient - expected.get(name, 0)) <= rtol * largest(expected.get(name, torch.zeros(1))), name
    assert expected.keys() <= actual.keys()


@either_trainable
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_of_maps_equal_those_through_eager_attention(trainable, use_reentrant):
    inputs, queries = batch(), phrases()
    expected = gradients(trainable, eager_maps(trainable, inputs, queries))
    trained = "layernorm", "q_proj", "k_proj", "q_norm", "k_norm"
    last = "model.language_model.cross_attn.4"
    assert {f"{last}.{name}.weight" for name in trained} <= expected.keys()
    assert (f"{last}.sink" in expected) == has_sink(trainable)
    assert {name for name in expected if "projector" in name} == {
        name for name, _ in trainable.named_parameters() if "projector" in name
    }
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values())
    if use_reentrant is not None:
        trainable.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        trainable.enable_input_require_grads()
    maps = trainable(**inputs, map_queries=queries).cross_attention_maps
    assert_gradients_close(gradients(trainable, maps), expected)


@either_trainable
def test_maps_of_nothing_have_zero_gradients_not_nan(trainable):
    """A phrase before any image, and padded phrases."""
    queries = torch.zeros(3, 2, 12, dtype=torch.bool)
    queries[2, 0, 2] = True  # the token before the first image
    maps = trainable(**batch(), map_queries=queries).cross_attention_maps
    assert (maps == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(trainable, maps).values())


def test_guidance_reaches_queries_and_keys_behind_shut_gates(trainable):
    open_gates(trainable, gate=0.0)
    found = gradients(trainable, trainable(**batch(), map_queries=phrases()).cross_attention_maps)
    for layer in blocks(trainable):
        assert layer.gate == 0
    for name, gradient in found.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert gradient.abs().max() > 1e-4, name


# ---------------------------------------------------------------------------------------- padding around images


@pytest.fixture(scope="module")
def independent_cells():
    """A model whose visual tokens each depend on the pixels of their own cell alone."""
    model = tiny_age_vlm()
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "layer_scale" in name:
                parameter.zero_()
    return model


def padded_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Three images and their sizes; the first and third fill only the upper left part of their square."""
    sizes = torch.full((3, 2), IMAGE_SIZE)
    sizes[0, 1] = 17  # one column of pixels still lies in the third column of cells
    sizes[2, 0] = 16
    return images(3), sizes


@torch.no_grad()
def test_padding_around_images_is_not_attended(independent_cells):
    model, text_inputs = independent_cells, pad(ROWS)
    pixels, sizes = padded_images()
    noise = images(3, seed=9)
    for image, original, (height, width) in zip(noise, pixels, sizes, strict=True):
        image[:, :height, :width] = original[:, :height, :width]
    # The cells at the border mix image and padding, as a real tower does: only whole cells of padding are replaced.
    noise[0, :, :, 16:24] = pixels[0, :, :, 16:24]
    inputs = {**text_inputs, "pixel_values": pixels}
    out = model(**inputs, image_sizes=sizes, map_queries=phrases())
    changed = model(**text_inputs, pixel_values=noise, image_sizes=sizes)
    torch.testing.assert_close(changed.logits, out.logits, atol=1e-6, rtol=0)
    assert largest(model(**inputs).logits - model(**text_inputs, pixel_values=noise).logits) > 0.1, "else it matters"

    cells = model.get_image_features(pixels, sizes).visual_attention_mask.view(3, *GRID)
    expected = torch.ones(3, *GRID, dtype=torch.bool)
    expected[0, :, 3], expected[2, 2:] = False, False
    assert torch.equal(cells, expected), "a cell counts as soon as it holds one pixel of the image"
    seen = torch.cat([cells[1].flatten(), cells[2].flatten()])
    maps = out.cross_attention_maps[:, 2, 1]
    assert (maps[:, ~seen] == 0).all()
    assert (maps[:, seen] > 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(4))


@pytest.mark.parametrize("canvas", [(32, 32), (41, 54), (36, 67)])
@torch.no_grad()
def test_visual_tokens_that_cover_a_pixel_of_the_image_are_seen(model, canvas, monkeypatch):
    """For all sizes of the image, also where the canvas is no multiple of the grid: the cells that pool a mask of pixels."""
    height, width = canvas
    sizes = torch.cartesian_prod(torch.arange(1, height + 1), torch.arange(1, width + 1))
    tokens, grid, outputs = model.model.get_vision_tokens(torch.zeros(1, 3, *canvas))
    assert min(grid) >= 4
    pixel_masks = torch.zeros(len(sizes), *canvas)
    for mask, (rows, columns) in zip(pixel_masks, sizes, strict=True):
        mask[:rows, :columns] = 1
    expected = torch.nn.functional.adaptive_max_pool2d(pixel_masks[:, None], grid).flatten(1) > 0
    monkeypatch.setattr(model.model, "get_vision_tokens", lambda pixels: (tokens, grid, outputs))  # of one, for all
    found = model.get_image_features(torch.zeros(len(sizes), 3, *canvas), sizes).visual_attention_mask
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)


@torch.no_grad()
def test_rows_without_images_may_come_with_an_empty_batch_of_images(model):
    """As TRL slices a batch that has images in other rows."""
    inputs = pad([text(9, 0), text(5, 1)])
    nothing = {"pixel_values": images(1)[:0], "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    assert torch.equal(model(**inputs, **nothing).logits, model(**inputs).logits)


@torch.no_grad()
def test_masked_visual_tokens_may_be_anything(model):
    pixels, sizes = padded_images()
    features = model.get_image_features(pixels, sizes)
    expected = model(**pad(ROWS), mm_encoder_outputs={"image": features}).logits
    assert torch.equal(expected, model(**pad(ROWS), pixel_values=pixels, image_sizes=sizes).logits)
    features.pooler_output = features.pooler_output.masked_fill(~features.visual_attention_mask[..., None], 1e3)
    replaced = model(**pad(ROWS), mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(replaced, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_kept_features_of_a_frozen_tower(model):
    pixels = images(3)
    tokens = model.get_image_features(pixels)
    kept = AgeVlmImageFeatures(last_hidden_state=tokens.last_hidden_state, grid=tokens.grid)
    for _ in range(2):  # and are kept as they were: the adapter may have learned by the next step
        logits = model(**pad(ROWS), mm_encoder_outputs={"image": kept}).logits
        assert torch.equal(logits, model(**pad(ROWS), pixel_values=pixels).logits)
        assert kept.pooler_output is None


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("vision", "sink"), [("convnext", False), ("timm", True)])
@pytest.mark.parametrize("train_tower", [False, True])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_text_only_training_touches_every_parameter_that_images_touch(vision, sink, train_tower, use_reentrant):
    """Data-parallel workers wait for every gradient, whatever their own share of the batch holds."""
    model, llama = tiny_age_vlm(vision=vision, cross_attention_sink=sink).train(), tiny_llama()
    model.model.vision_tower.requires_grad_(train_tower)
    model.model.language_model.embed_tokens.requires_grad_(False)
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()

    def touched(**inputs) -> tuple[set[str], torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}, loss

    with_images, _ = touched(**batch())
    text_only = pad([ROWS[0], text(12, 8)])
    without_images, loss = touched(**text_only)
    assert without_images == with_images
    assert {n for n, p in model.named_parameters() if p.requires_grad and "vision_tower" not in n} <= with_images
    assert any("vision_tower" in name for name in with_images) == train_tower
    for name, parameter in model.named_parameters():
        if name in without_images and any(part in name for part in ("cross_attn", "projector", "vision_tower")):
            assert (parameter.grad == 0).all(), name
    torch.testing.assert_close(loss, llama(**text_only, labels=text_only["input_ids"]).loss, atol=1e-6, rtol=0)


@torch.no_grad()
def test_text_only_evaluation_runs_no_visual_module(model):
    calls = []
    visual = [*blocks(model), model.model.multi_modal_projector, model.model.vision_tower]
    hooks = [module.register_forward_hook(lambda module, args, output: calls.append(module)) for module in visual]
    try:
        model(**pad(ROWS[:1]))
        assert not calls
        model(**batch())
        assert len(calls) == len(visual)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("logits_to_keep", [0, 1, 3, torch.tensor([2, 5])])
@torch.no_grad()
def test_logits_to_keep(model, logits_to_keep):
    logits = model(**batch()).logits
    where = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    torch.testing.assert_close(model(**batch(), logits_to_keep=logits_to_keep).logits, logits[:, where])


@torch.no_grad()
def test_loss_is_that_of_transformers_and_the_image_token_is_a_legal_label(model):
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert (labels == IMAGE).sum() == 3
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, ForCausalLMLoss(out.logits, labels, VOCAB))
    without = model(**inputs, labels=labels.masked_fill(labels == IMAGE, -100)).loss
    assert out.loss.isfinite()
    assert largest(out.loss - without) > 1e-3, "it counts"
    summed = ForCausalLMLoss(out.logits, labels, VOCAB, num_items_in_batch=7)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=7).loss, summed)


# ---------------------------------------------------------------------------------------- compiled and exported


def test_a_training_step_compiles_as_one_graph():
    """Without a break, with guidance, packed texts and rows of different numbers of images. Loss and gradients are equal."""
    model = tiny_age_vlm(llama={"num_hidden_layers": 1}, cross_attention_sink=True).train()
    inputs = {**batch(), "labels": batch()["input_ids"], "map_queries": phrases()}
    inputs["position_ids"] = torch.cat([inputs["position_ids"][:, :8], torch.arange(4).expand(3, -1)], dim=1)

    def step(forward) -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = forward(**inputs)
        (out.loss + (out.cross_attention_maps**2).sum()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {**found, "loss": out.loss.detach(), "logits": out.logits.detach()}

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = step(model), step(compiled)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # The logits are those of the texts, so the graph keeps them apart.
    first_texts = model(**{**{k: v[:, :8] for k, v in pad(ROWS).items()}, "pixel_values": images(3)}).logits
    seen = inputs["attention_mask"][:, :8].bool()
    torch.testing.assert_close(actual["logits"][:, :8][seen], first_texts[seen], atol=2e-5, rtol=1e-4)
    inputs["input_ids"] = torch.where(inputs["input_ids"] == IMAGE, 5, inputs["input_ids"])
    with pytest.raises(RuntimeError):  # the check of images and image tokens is in the graph
        compiled(**inputs)


@pytest.mark.parametrize("with_images", [False, True])
@torch.no_grad()
def test_exported_saved_and_loaded(with_images, tmp_path):
    """One program for any batch size, length and number of images."""
    model = tiny_age_vlm(llama={"num_hidden_layers": 1}, cross_attention_sink=with_images)

    def inputs(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        padded = pad(rows)
        count = int((padded["input_ids"] == IMAGE).sum())
        found = {name: padded[name] for name in ("input_ids", "attention_mask")}
        sizes = torch.tensor([[IMAGE_SIZE, 9 + i] for i in range(count)])
        return {**found, "pixel_values": images(count), "image_sizes": sizes} if with_images else found

    batches = [ROWS, [text(5, 1, (0,))], [text(20, 2, (5, 6)), text(9, 3), text(4, 4, (3,)), text(7, 5, (1, 2, 3))]]
    if not with_images:
        batches = [[torch.where(row == IMAGE, 5, row) for row in rows] for rows in batches]
    example = {**inputs(batches[0]), "use_cache": False}
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: dynamic, 1: dynamic}, "attention_mask": {0: dynamic, 1: dynamic}, "use_cache": None}
    if with_images:
        shapes |= {"pixel_values": {0: dynamic}, "image_sizes": {0: dynamic}}
    torch.export.save(torch.export.export(model, (), example, dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows in batches:
        expected = model(**inputs(rows)).logits
        torch.testing.assert_close(program(**inputs(rows), use_cache=False).logits, expected, atol=2e-5, rtol=1e-5)
    if with_images:
        with pytest.raises(RuntimeError):
            program(**{**example, **{name: example[name][:2] for name in ("pixel_values", "image_sizes")}})


# ---------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize(("tied", "sink"), [(True, False), (False, True)])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@torch.no_grad()
def test_saved_and_loaded_again(tied, sink, shards, tmp_path):
    model = tiny_age_vlm(
        llama={"tie_word_embeddings": tied}, vision="timm" if tied else "convnext", cross_attention_sink=sink
    )
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    assert {"modeling_agevlm.py", "configuration_agevlm.py"} <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_agevlm.AgeVlmConfig",
        "AutoModel": "modeling_agevlm.AgeVlmModel",
        "AutoModelForImageTextToText": "modeling_agevlm.AgeVlmForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_agevlm.AgeVlmForConditionalGeneration",
        "AutoProcessor": "processing_agevlm.AgeVlmProcessor",
        "AutoImageProcessor": "image_processing_agevlm.AgeVlmImageProcessor",
    }

    expected = model(**batch())
    # A sink is a single row, whose product depends, in its last bit, on where weights lie in memory.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5 if sink else 0)
    loaded, info = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert [block.sink is not None for block in blocks(loaded)] == [sink] * 4
    close(loaded(**batch()).logits, expected.logits)
    assert loaded.generation_config.suppress_tokens == [IMAGE]

    assert isinstance(AutoConfig.from_pretrained(tmp_path), AgeVlmConfig)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(auto) is AgeVlmForConditionalGeneration
    close(auto(**batch()).logits, expected.logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is AgeVlmModel
    close(base(**batch()).last_hidden_state, model.model(**batch()).last_hidden_state)


@torch.no_grad()
def test_text_model_keeps_its_dtype_beside_a_tower_of_another(tmp_path):
    llama = tiny_llama().to(torch.bfloat16)
    from_parts(llama, tiny_vision(), image_token_id=IMAGE).save_pretrained(tmp_path)
    llama.save_pretrained(tmp_path / "llama")
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert_equals_llama(loaded, LlamaForCausalLM.from_pretrained(tmp_path / "llama"))


def test_loads_as_remote_code_without_the_package(tmp_path):
    model = tiny_age_vlm()
    model.save_pretrained(tmp_path)
    ids, pixels = text(6, 0, (2,))[None], images(1)
    torch.save(
        {"ids": ids, "pixels": pixels, "logits": model(ids, pixel_values=pixels).logits}, tmp_path / "expected.pt"
    )
    script = """
        import importlib.abc, sys

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "agevlm":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocker())
        import torch
        from transformers import AutoModel, AutoModelForImageTextToText

        folder = sys.argv[1]
        expected = torch.load(folder + "/expected.pt")
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model(expected["ids"], pixel_values=expected["pixels"]).logits, expected["logits"])
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "AgeVlmModel"
        assert "agevlm" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    environment = {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_missing_weights_are_an_os_error(tmp_path):
    tiny_age_vlm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_llama_checkpoint_loads_into_the_text_model_as_it_is(tmp_path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path)
    config = AgeVlmTextConfig(**{k: v for k, v in llama.config.to_dict().items() if k != "model_type"})
    model, info = AgeVlmTextModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(key.startswith("cross_attn.") for key in info["missing_keys"])
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert torch.equal(model(**pad(ROWS)).last_hidden_state, llama.model(**pad(ROWS)).last_hidden_state)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": images(2)}, r"Got 2 image\(s\) for 3 image token\(s\).*\[0, 1, 2\]"),
        ({"pixel_values": images(4)}, r"Got 4 image\(s\) for 3 image token\(s\).*\[0, 1, 2\]"),
        ({"pixel_values": None}, r"Got 3 image token\(s\).* and no image"),
        ({"map_queries": torch.ones(3, 2, 11, dtype=torch.bool)}, r"\(3, 2, 11\).*\(3, num_phrases, 12\)"),
        ({"map_queries": torch.ones(2, 2, 12, dtype=torch.bool)}, r"\(2, 2, 12\).*\(3, num_phrases, 12\)"),
        ({"mm_encoder_outputs": {"image": AgeVlmImageFeatures()}}, "both pixel_values and mm_encoder_outputs"),
        ({"inputs_embeds": torch.zeros(3, 12, 32)}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
    ],
)
@torch.no_grad()
def test_bad_input(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**batch(), **change})


def test_images_without_image_token(model):
    with pytest.raises(ValueError, match=r"Got 1 image\(s\) for 0 image token\(s\)"):
        model(ROWS[0][None], pixel_values=images(1))


# ---------------------------------------------------------------------------------------- positions of visual tokens


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 12), ((3, 5), 16), ((2, 2), 6)])
def test_sincos_against_its_formula(grid, width):
    quarter = width // 4
    expected = np.zeros((*grid, width))
    for row, column, i in np.ndindex(*grid, quarter):
        frequency = 1 / max(grid) ** (i / quarter)
        expected[row, column, i] = math.sin(row * frequency)
        expected[row, column, quarter + i] = math.cos(row * frequency)
        expected[row, column, 2 * quarter + i] = math.sin(column * frequency)
        expected[row, column, 3 * quarter + i] = math.cos(column * frequency)
    signal = sincos_2d(grid, width)
    np.testing.assert_allclose(signal.numpy(), expected.reshape(-1, width), atol=1e-6)
    assert len(signal.unique(dim=0)) == grid[0] * grid[1], "no two places alike"


def test_every_part_of_the_position_signal_varies_over_the_image():
    """At the frequencies that texts use, most of it would hardly."""
    signal = sincos_2d((16, 16), 64)
    assert (signal.amax(0) - signal.amin(0)).min() > 0.3


@torch.no_grad()
def test_visual_position_embedding(model):
    positioned = tiny_age_vlm(visual_position_embedding=True)
    assert positioned.state_dict().keys() == model.state_dict().keys(), "a fixed signal has no parameters"
    assert largest(spread(model)) < 1e-5, "like features stay alike without the signal"
    assert spread(positioned).abs().amax(-1).min() > 1e-3, "and differ with it"
    assert largest(positioned(**batch()).logits - model(**batch()).logits) > 0.1


@torch.no_grad()
def test_position_and_content_weigh_alike_whatever_the_scale_of_the_mlp():
    projector = tiny_age_vlm(visual_position_embedding=True).model.multi_modal_projector
    tokens = torch.randn(1, NUM_VISUAL, projector.layernorm.normalized_shape[0])
    reference = projector(tokens, GRID)
    projector.linear_2.weight *= 100
    projector.linear_2.bias *= 100
    torch.testing.assert_close(projector(tokens, GRID), reference, atol=1e-3, rtol=1e-3)


def spread(model) -> torch.Tensor:
    """Differences between each visual token after the adapter and the first, from features that are all the same."""
    width = model.model.multi_modal_projector.layernorm.normalized_shape[0]
    tokens = torch.linspace(-1, 1, width).expand(1, NUM_VISUAL, width)
    projected = model.model.multi_modal_projector(tokens, GRID)[0]
    return projected[1:] - projected[:1]


# ---------------------------------------------------------------------------------------- configuration


def test_default_configuration_is_that_of_the_paper():
    config = AgeVlmTextConfig()
    assert config.num_hidden_layers == 16
    assert config.cross_attention_layers == [2, 7, 12, 17]
    assert config.cross_attention_llama_layers == [2, 6, 10, 14]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2, 20], "out of range"),
        ([-1, 4], "out of range"),
        ([7, 2], "increasing"),
        ([4, 4], "increasing"),
        ([2, 3], "two blocks"),
    ],
)
def test_impossible_places_of_blocks(layers, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AgeVlmTextConfig(cross_attention_layers=layers)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 11, 12, 16, 22, 30, 32, 80])
def test_default_places_fit_any_depth(depth):
    config = AgeVlmTextConfig(num_hidden_layers=depth)
    before = config.cross_attention_llama_layers
    assert len(before) == len(set(before)) == min(4, depth)
    if depth >= 12:
        assert before == [round(2 + i * depth / 4) for i in range(4)]


@pytest.mark.parametrize("vision", ["convnext", "timm"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_plain_attention_name_is_for_the_text_model(vision, implementation, tmp_path):
    """Towers without attention refuse one, and must not keep the text model from having its own."""
    model = tiny_age_vlm(vision=vision)
    model.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for vlm in (model, loaded):
        assert vlm.config._attn_implementation == implementation
        assert vlm.model.language_model.config._attn_implementation == implementation


def test_nothing_that_selects_maps_can_be_rounded(model):
    """Mixed precision of FSDP2 casts every floating point tensor that goes into a layer, and 1/3 is no bfloat16."""
    queries = torch.zeros(1, 2, 7, dtype=torch.bool)
    queries[0, 0, 1:4] = True
    visible = torch.ones(1, 7, 4, dtype=torch.bool)
    inputs = model.model.language_model._cross_attention_inputs(visible, torch.zeros(1, 7, 32), map_queries=queries)
    assert not any(value.is_floating_point() for value in (inputs.visible, inputs.map_index, inputs.map_members))
