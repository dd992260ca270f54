# SPDX-License-Identifier: Apache-2.0
"""Caches, compiled models, inputs of several sizes; and what is refused, with its reason."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from other_vlms import other_vlm, text_inputs
from tiny_vlms import CONFIGURATIONS, IMAGE_TOKEN, tiny_inputs, tiny_queries, tiny_vlm
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel, StaticCache

from agevlm.attention import attention_maps
from agevlm.attention.maps import NAMES_SDPA

ANY = torch.ones(1, 1, 4, dtype=torch.bool)


def enter(model: nn.Module, **settings) -> None:
    with attention_maps(model, ANY, **settings):
        pass


# ---------------------------------------------------------------------------------------- text models


def llava_with(text: dict) -> PreTrainedModel:
    """A tiny Llava with another text model."""
    sizes = CONFIGURATIONS["llava"]
    config = AutoConfig.for_model("llava", **{**sizes, "text_config": {**sizes["text_config"], **text}})
    return AutoModelForImageTextToText.from_config(config).eval()


SPARSE = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "index_n_heads": 2, "index_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 8,
}  # fmt: skip
REFUSED = {
    "gemma2": ({"head_dim": 8}, r"Gemma2Model does not support SDPA.*soft cap"),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 2}, r"GptOssModel does not support SDPA.*sink"),
    "deepseek_v32": (SPARSE, r"DeepseekV32Model does something of its own where its attention is named 'sdpa'"),
    "glm_moe_dsa": (SPARSE, r"GlmMoeDsaModel does something of its own where its attention is named 'sdpa'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_text_models_that_are_refused(kind):
    sizes, reason = REFUSED[kind]
    model = llava_with({"model_type": kind, **sizes})
    before = model.config.get_text_config()._attn_implementation
    with pytest.raises(ValueError, match=reason):
        enter(model)
    assert model.config.get_text_config()._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("inkling_mm_model", "InklingAttention has a bias of positions"),
        ("glm5_next", "Glm5NextTextModel does something of its own"),
        ("pix2struct", "an encoder and a decoder"),
        ("t5gemma2", "an encoder and a decoder"),
        ("git", "GitModel has no list `layers`"),
    ],
)
def test_whole_models_that_are_refused(kind, reason):
    model, inputs = other_vlm(kind), text_inputs(kind)
    keys = inputs["input_ids"] == IMAGE_TOKEN
    with pytest.raises(ValueError, match=reason), attention_maps(model, keys[:, None], keys):
        model(**inputs)


def compares_with_sdpa(source: str) -> bool:
    """Whether code compares an attribute `_attn_implementation` with the name "sdpa", by its syntax tree."""
    return any(
        isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Attribute) and part.attr == "_attn_implementation" for part in ast.walk(node))
        and any(isinstance(part, ast.Constant) and part.value == "sdpa" for part in ast.walk(node))
        for node in ast.walk(ast.parse(source))
    )


def test_which_models_depend_on_the_name_of_their_attention():
    """All of them compute something else under another name: what a sparse indexer chose, a mask, or causality (Gemma 4)."""
    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = path.read_text()
        if '"sdpa"' in source:
            found[path.stem.removeprefix("modeling_")] = (bool(NAMES_SDPA.search(source)), compares_with_sdpa(source))
    named = {name for name, (ours, _) in found.items() if ours}
    assert named == {name for name, (_, parsed) in found.items() if parsed}
    assert named >= {"deepseek_v32", "glm_moe_dsa", "minimax_m3_vl", "hy_v4_vl", "gemma4", "gemma4_unified"}
    assert not named & {"llama", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "gemma3", "mllama"}


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attention_than_sdpa(attention):
    model = tiny_vlm("llava")
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=f"uses the attention '{attention}'.*attn_implementation='sdpa'"):
        enter(model)


def test_models_that_do_not_use_the_interface(monkeypatch):
    model = tiny_vlm("llava")
    monkeypatch.setattr(PreTrainedModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match=r"LlamaModel cannot change its attention.*AttentionInterface"):
        enter(model)


class OwnLayer(nn.Module):
    """A layer in place of one of Llama's."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


class WithoutKeywords(OwnLayer):
    def forward(self, hidden_states):
        return hidden_states


class WithoutAttention(OwnLayer):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.layer.mlp(hidden_states)


class Twice(OwnLayer):
    def forward(self, hidden_states, **kwargs):
        return self.layer(self.layer(hidden_states, **kwargs), **kwargs)


class LastTokens(OwnLayer):
    """As Gemma 4's last layers, which compute only those whose logits are wanted."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        cos, sin = position_embeddings
        last = (cos[:, -5:], sin[:, -5:])
        return self.layer(hidden_states[:, -5:], attention_mask=None, position_embeddings=last, **kwargs)


def test_layers_without_keyword_arguments():
    model = tiny_vlm("llava")
    model.get_decoder().layers[1] = WithoutKeywords(model.get_decoder().layers[1])
    with pytest.raises(ValueError, match="Layer 1, a WithoutKeywords, takes no further keyword arguments"):
        enter(model)
    enter(model, layers=[0, 2])


@pytest.mark.parametrize(
    ("layer", "error", "reason"),
    [
        (WithoutAttention, RuntimeError, r"Layers \[1\] have computed no map.*Choose other `layers`"),
        (Twice, ValueError, "Layer 1 attends twice"),
        (LastTokens, ValueError, "LlamaAttention of layer 1 computes 5 of the .* tokens"),
    ],
)
def test_layers_whose_attention_is_not_one_of_all_tokens(layer, error, reason):
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    queries = tiny_queries(inputs)
    layers = model.get_decoder().layers
    layers[1] = layer(layers[1])
    with pytest.raises(error, match=reason), attention_maps(model, queries) as found:  # noqa: PT012
        model(**inputs, use_cache=False)
        _ = found.maps
    if layer is not LastTokens:  # which leaves the following layers with fewer tokens
        with attention_maps(model, queries, layers=[0, 2]) as found:
            model(**inputs, use_cache=False)
        assert found.maps.shape[0] == 2


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_reentrant_checkpointing_is_refused_where_there_are_gradients(kind):
    model, inputs = tiny_vlm(kind).train(), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"is reentrant.*'use_reentrant': False"), attention_maps(model, queries):
        model(**inputs, use_cache=False)
    with torch.no_grad(), attention_maps(model, queries) as found:
        model(**inputs, use_cache=False)
    assert found.maps.sum() > 0


# ---------------------------------------------------------------------------------------- compiled models


@pytest.mark.slow
def test_a_compiled_model_runs_eagerly_inside_the_block():
    model, inputs = tiny_vlm("llava", num_hidden_layers=1), tiny_inputs("llava")
    queries = tiny_queries(inputs)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = compiled(**inputs).logits
    for moved in (queries, queries.roll(-1, 1)):  # other phrases, as in the next step of training
        with attention_maps(compiled, moved) as found:
            assert torch.equal(compiled(**inputs).logits, logits)
        with attention_maps(model, moved) as wanted:
            model(**inputs)
        torch.testing.assert_close(found.maps, wanted.maps)
        assert found.maps.requires_grad
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------- inputs


def test_queries_and_keys_of_other_inputs():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    queries = tiny_queries(inputs)
    length = queries.shape[-1]
    settings = {"max_new_tokens": 2, "do_sample": False}
    for wrong in (queries[:1], queries[..., 1:]):
        said = (
            rf"`queries` has the shape \({len(wrong)}, 3, {wrong.shape[-1]}\).*called with 2 rows of {length} tokens"
        )
        with pytest.raises(ValueError, match=said), attention_maps(model, wrong):
            model.generate(**inputs, **settings)
    with (
        pytest.raises(ValueError, match=rf"`keys` has the shape \(1, {length}\).*2 rows"),
        attention_maps(model, queries, queries[:1, 0]),
    ):
        model(**inputs)
    longer = torch.ones(2, length + 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"has {length} keys and `keys` {length + 3}"):  # noqa: SIM117
        with attention_maps(model, queries, longer):
            model(**inputs)


def test_embeddings_instead_of_tokens():
    model, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    queries, keys = tiny_queries(inputs), inputs["input_ids"] == IMAGE_TOKEN
    given = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, kw: given.update(kw), with_kwargs=True)
    with torch.no_grad():
        with attention_maps(model, queries) as wanted:
            model(**inputs)
        hook.remove()
        with attention_maps(model, queries, keys) as found:
            model(inputs_embeds=given["inputs_embeds"], attention_mask=inputs["attention_mask"])
    assert torch.equal(found.maps, wanted.maps)


@pytest.mark.parametrize("missing", ["aspect_ratio_mask", "cross_attention_mask"])
def test_mllama_without_what_says_which_tiles_are_seen(missing):
    model, inputs = tiny_vlm("mllama"), tiny_inputs("mllama")
    queries = tiny_queries(inputs)
    del inputs[missing]
    with pytest.raises(ValueError, match=f"without `{missing}`.*its processor"), attention_maps(model, queries):
        model(**inputs)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_static_cache(kind):
    model, inputs = tiny_vlm(kind), tiny_inputs(kind)
    queries = tiny_queries(inputs)
    with torch.no_grad():
        with attention_maps(model, queries) as wanted:
            model(**inputs, use_cache=False)
        with attention_maps(model, queries) as found:
            model(**inputs, cache=StaticCache(config=model.config.get_text_config(), max_cache_len=64))
    torch.testing.assert_close(found.maps, wanted.maps)
    torch.testing.assert_close(found.share, wanted.share)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_a_cache_that_has_tokens_already(kind):
    """The keys must be given; layers with a window may have dropped some of them."""
    model, inputs = tiny_vlm(kind), tiny_inputs(kind, "right")
    ids, mask = inputs.pop("input_ids")[1:], inputs.pop("attention_mask")[1:]
    images = {"pixel_values": inputs["pixel_values"][1:]}
    if kind == "gemma3":
        images["token_type_ids"] = inputs["token_type_ids"][1:]
    start = ids.shape[1] - 3
    whole = torch.zeros(1, 1, ids.shape[1], dtype=torch.bool)
    whole[..., -2:] = True
    with torch.no_grad():
        with attention_maps(model, whole, over="all") as wanted:
            model(input_ids=ids, attention_mask=mask, use_cache=False, **images)
        cache = DynamicCache(config=model.config.get_text_config())
        first = {name: value[:, :start] if name == "token_type_ids" else value for name, value in images.items()}
        model(input_ids=ids[:, :start], attention_mask=mask[:, :start], cache=cache, **first)
        last = {"input_ids": ids[:, start:], "attention_mask": mask, "cache": cache}
        with pytest.raises(ValueError, match=f"cache has {start} tokens.*without a cache"):  # noqa: SIM117
            with attention_maps(model, whole[..., start:]):
                model(**last)
        keys = ids == IMAGE_TOKEN
        if kind == "gemma3":
            with pytest.raises(ValueError, match=r"keys and `keys` .*without a cache"):  # noqa: SIM117
                with attention_maps(model, whole[..., start:], keys):
                    model(**last)
        else:
            with attention_maps(model, whole[..., start:], keys, over="all") as found:
                model(**last)
            torch.testing.assert_close(found.maps, wanted.maps)
            torch.testing.assert_close(found.share, wanted.share)
