# Copyright 2026 The AGE-VLM contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""PyTorch AGE-VLM model: gated cross-attention from a frozen Llama to the image tokens of a vision tower (arXiv 2511.17793).

`save_pretrained` copies this file to the Hub with every model. It therefore imports libraries and its sibling
configuration only.

Shapes: `B` rows of the batch, `S` text tokens, `N` images of the batch in order, `T` visual tokens per image, `V` visual
tokens per row (the row's images one after another, padded), `P` phrases, `D` width of the text model.
"""

import functools
import itertools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices, flex_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    MultimodalBaseModelOutputWithPast,
    MultimodalCausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto import AutoModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_agevlm import AgeVlmConfig, AgeVlmTextConfig

logger = logging.get_logger(__name__)

# Position of a visual token that no text token may see: it covers only padding, or fills up a row with fewer images.
NEVER = torch.iinfo(torch.long).max

# Cross-attentions of each token that the `generate` call in progress has generated.
_generated_cross_attentions: ContextVar[list | None] = ContextVar("generated_cross_attentions", default=None)

# Pooling heads by type of vision tower. No visual token goes through them.
POOLING_HEADS = {
    "beit": ("pooler",),
    "clip_vision_model": ("post_layernorm",),
    "convnext": ("layernorm",),
    "convnextv2": ("layernorm",),
    "timm_wrapper": (
        "attn_pool",
        "conv_head",
        "fc_norm",
        "head",
        "in_conv",
        "norm_head",
        "pre_classifier",
        "pre_logits",
    ),
    "vit": ("pooler",),
}


@auto_docstring(custom_intro="Image features: the output of the vision tower and of the adapter.")
@dataclass
class AgeVlmImageFeatures(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_images, num_visual_tokens, vision_width)`):
        Tokens of the vision tower, row by row of the image. The features of a frozen tower can be computed once and
        kept: passed without `pooler_output` as `mm_encoder_outputs["image"]`, they go through the adapter only.
    pooler_output (`torch.Tensor` of shape `(num_images, num_visual_tokens, hidden_size)`):
        Visual tokens after the adapter. The cross-attention reads them.
    visual_attention_mask (`torch.Tensor` of shape `(num_images, num_visual_tokens)`, *optional*):
        False for visual tokens that cover only padding. None if every token covers a part of the image.
    grid (`tuple[int, int]`):
        Rows and columns of the visual tokens, `num_visual_tokens = rows * columns`.
    """

    visual_attention_mask: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


@auto_docstring(custom_intro="Output of the AGE-VLM base model.")
@dataclass
class AgeVlmModelOutputWithPast(MultimodalBaseModelOutputWithPast):
    r"""
    cache (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Keys and values of the self-attention layers, followed by one layer per cross-attention block with the keys
        and values of the visual tokens.
    hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
        The input of the first Llama layer, and the output of each Llama layer. The blocks do not count as layers.
    image_outputs (`AgeVlmImageFeatures`, *optional*, returned with images):
        Output of `get_image_features`. Its `pooler_output` holds the visual tokens after the adapter.
    cross_attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
        One tensor of shape `(batch_size, num_heads, sequence_length, num_visual_tokens)` per cross-attention block.
        Rows of text tokens that see no image are zero. Eager attention only.
    cross_attention_maps (`torch.Tensor` of shape `(num_blocks, batch_size, num_phrases, num_visual_tokens)`, *optional*, returned with `map_queries`):
        Where each phrase looks: float32 attention probabilities, averaged over heads and over the tokens of the phrase.
        A map sums to 1 if the phrase stands after an image, and to 0 otherwise. With an attention sink, the sum is less
        by the attention to the sink.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_maps: torch.Tensor | None = None


@auto_docstring(custom_intro="Output of AGE-VLM with its language modeling head.")
@dataclass
class AgeVlmCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss (for next-token prediction).
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modeling head, before softmax.
    cache (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        See [`AgeVlmModelOutputWithPast`].
    image_outputs (`AgeVlmImageFeatures`, *optional*, returned with images):
        See [`AgeVlmModelOutputWithPast`].
    cross_attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
        See [`AgeVlmModelOutputWithPast`].
    cross_attention_maps (`torch.Tensor` of shape `(num_blocks, batch_size, num_phrases, num_visual_tokens)`, *optional*, returned with `map_queries`):
        See [`AgeVlmModelOutputWithPast`].
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_maps: torch.Tensor | None = None


class AgeVlmCrossAttentionCacheLayer(CacheLayerMixin):
    """Keys and values of one cross-attention block for the visual tokens, and the positions of their images.

    These layers follow the self-attention layers of the caller's cache, dynamic or static. Beam search, batch selection
    and reset therefore reach them like any other layer. A layer grows with images, not with text.

    `positions` `(B, V)` holds, for each visual token, the cache index of the text token that stands for its image,
    or `NEVER`. A text token at index `q` sees exactly the visual tokens with `positions <= q`.
    """

    # A compiled decoding step only reads the layer, which changes no shape.
    is_compileable = True
    is_croppable = True
    supports_early_init = False
    # Not in `__dict__`, whose tensors are inputs of an exported program: those of the text layer would be inputs twice.
    # Computed, because type checkers take a literal for all attributes that there are.
    __slots__ = dict.fromkeys(("text_layer",))

    def __init__(self, text_layer: CacheLayerMixin):
        super().__init__()
        self.text_layer = text_layer
        self.keys: Any = None
        self.values: Any = None
        self.positions: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values `(B, kv_heads, V', head_dim)` with their positions `(B, V')`; returns all keys and values."""
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
            positions = torch.cat([self.positions, positions], dim=-1)
        else:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values, self.positions = key_states, value_states, positions
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        # The layer is small and the next token needs it again, so it stays on its device.
        pass

    def prefetch(self) -> None:
        # An offloaded cache fetches the layer after the one in use. After the last self-attention layer that is the first of
        # these layers, but the next in use is the first of all.
        self.text_layer.prefetch()

    def reset(self) -> None:
        # Dropped rather than filled with zeros: the next prompt has other images, or none.
        self.keys = self.values = self.positions = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Keeps an image whole if its text token remains; hides it from all text tokens otherwise."""
        if self.is_initialized and tokens_to_remove != 0:
            # The self-attention layers come first in the cache, so they are cropped already.
            length = self.text_layer.get_seq_length()
            self.positions = self.positions.masked_fill(self.positions >= length, NEVER)

    def _select(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values, self.positions = select(self.keys), select(self.values), select(self.positions)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices])


def append_cross_attention_layers(cache: Cache, config: AgeVlmTextConfig) -> None:
    """Appends the cross-attention layers to a cache that has self-attention layers only; otherwise does nothing."""
    num_layers = config.num_hidden_layers
    if cache.layer_class_to_replicate is not None:  # `DynamicCache()` without a configuration creates its layers late
        cache.layers += [cache.layer_class_to_replicate() for _ in range(num_layers - len(cache.layers))]
    if len(cache.layers) == num_layers:
        cache.layers += [AgeVlmCrossAttentionCacheLayer(cache.layers[0]) for _ in config.cross_attention_llama_layers]


def num_cached_tokens(cache: Cache | None) -> int | torch.Tensor:
    """Number of text tokens in the cache.

    Continuous batching, which supports text only, has a cache of another class and passes `position_ids`.
    """
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def cached_visual_positions(cache: Cache | None, config: AgeVlmTextConfig) -> torch.Tensor | None:
    """Positions `(B, V)` of the visual tokens in the cache, None if it holds none."""
    cross_attention_layers = cache.layers[config.num_hidden_layers :] if isinstance(cache, Cache) else []
    return cross_attention_layers[0].positions if cross_attention_layers else None


def packed_texts(
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """Which of its row's texts each token belongs to, as numbers `(B, S)`. None if each row is one text.

    A row with several texts (packing, padding-free training) brings their boundaries in the form of FlashAttention
    (`cu_seq_lens_q`) or of linear attention (`seq_idx`), or its position ids start anew with each text.

    Args:
        tokens: `(B, S, ...)`, of which the shape and the device are read.
        position_ids: `(B, S)` or `(1, S)`.
        attention_mask: `(B, S)`, 0 for padding.
    """
    batch_size, seq_length = tokens.shape[:2]
    index = torch.arange(batch_size * seq_length, device=tokens.device).view(batch_size, seq_length)
    if cu_seq_lens_q is not None:
        texts = torch.bucketize(index, cu_seq_lens_q[1:].to(index), right=True)
    elif seq_idx is not None:
        texts = seq_idx.expand(batch_size, -1)
    elif position_ids is None:
        return None
    elif attention_mask is None:  # the rule of Llama and of all models of Transformers
        texts = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
        if texts is None:
            return None
    else:
        # The position ids of padding may be anything, so each token is compared with the last one that is not padding.
        position_ids, is_token = position_ids.expand(batch_size, -1), attention_mask.bool()
        index = index - index[:, :1]
        last = torch.where(is_token, index, -1).cummax(-1).values
        last = nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        restarts = is_token & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))
        texts = restarts.cumsum(-1)
    return texts if is_tracing(texts) or bool((texts != texts[:, :1]).any()) else None


def positions_in_texts(texts: torch.Tensor) -> torch.Tensor:
    """Position ids `(B, S)` that start anew with each of the `texts` of [`packed_texts`]."""
    index = torch.arange(texts.shape[1], device=texts.device)
    starts = nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(-1).values


def to_attention_mask(allowed: torch.Tensor, attn_implementation: str | None, dtype: torch.dtype) -> Any:
    """Bool `(B, queries, keys)`, True where a query may attend to a key, in the form of an attention implementation."""
    if attn_implementation == "flex_attention":
        return flex_attention_mask(
            *allowed.shape,
            mask_function=lambda batch_idx, head_idx, q_idx, kv_idx: allowed[batch_idx, q_idx, kv_idx],
            device=allowed.device,
        )
    if attn_implementation == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
    return allowed[:, None]


def visible_images(
    self_attention_mask: Any, text_positions: torch.Tensor, visual_positions: torch.Tensor
) -> torch.Tensor:
    """Bool `(B, S, V)`: a text token sees a visual token if it may attend to the text token that stands for its image.

    Args:
        self_attention_mask: as it goes to the Llama layers: `(B, heads, S, keys)`, bool or added to the scores; a
            `BlockMask`; or None for plain causal attention.
        text_positions: `(S,)`, indices of the text tokens, counted with the cached ones.
        visual_positions: `(B, V)`, see [`AgeVlmCrossAttentionCacheLayer`].
    """
    # Plain causal attention, and whatever the mask says of `NEVER`.
    visible = visual_positions[:, None] <= text_positions[:, None]
    if self_attention_mask is None:
        return visible
    (batch_size, seq_length, _), num_keys = visible.shape, self_attention_mask.shape[-1]
    keys = visual_positions.clamp(max=num_keys - 1)[:, None]
    if isinstance(self_attention_mask, torch.Tensor):
        mask = self_attention_mask.expand(batch_size, -1, seq_length, -1)
        allowed = mask.gather(-1, keys[:, None].expand(-1, mask.shape[1], seq_length, -1))
        # At -1000 a probability is zero in any floating point type, while a bias (ALiBi) is far above it.
        allowed = (allowed if allowed.dtype == torch.bool else allowed > -1000).any(1)
    else:
        rows = torch.arange(batch_size, device=keys.device)[:, None, None]
        queries = torch.arange(seq_length, device=keys.device)[:, None]
        allowed = self_attention_mask.mask_mod(rows, torch.zeros_like(rows), queries, keys)
    return visible & allowed


# A `ModelOutput`, because `device_map` and FSDP2 look for the tensors of a module's inputs inside mappings. The tensors that
# select map rows are not floating point, because the mixed precision of FSDP2 would round them.
@auto_docstring(custom_intro="Inputs that all gated blocks of a forward pass share, apart from the visual tokens.")
@dataclass
class AgeVlmCrossAttentionInputs(ModelOutput):
    r"""
    visible (`torch.Tensor` of shape `(batch_size, sequence_length, num_visual_tokens)`):
        Which visual tokens each text token may see, including the cached ones.
    attention_mask (`torch.Tensor` or `BlockMask`, *optional*):
        `visible` in the form that the attention implementation expects.
    positions (`torch.Tensor` of shape `(batch_size, num_new_visual_tokens)`, *optional*):
        Positions of the new visual tokens, see [`AgeVlmCrossAttentionCacheLayer`].
    map_index (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
        Text tokens of all phrases in `map_queries`, padded. The blocks compute maps for these rows only.
    map_members (`torch.Tensor` of shape `(batch_size, num_phrases, num_rows)`, *optional*):
        Which of these rows belong to each phrase.
    """

    visible: torch.Tensor
    attention_mask: Any = None
    positions: torch.Tensor | None = None
    map_index: Any = None
    map_members: Any = None


class AgeVlmCrossAttention(GradientCheckpointingLayer):
    """The gated block `tanh(gate) * rms(h) * CrossAttention(RMSNorm(h), visual)`, which is added to `h` (paper, section 3).

    The block has grouped-query attention with the head counts of the language model, RMSNorm on queries and keys, and no
    feed-forward network. `gate` starts at 0, so a new block adds exactly nothing. `config.cross_attention_sink` adds one
    key whose value is zero, so that a text token can attend to nothing. The output is scaled by the RMS of each token's
    residual, because the residual stream of a trained language model is many times larger than the output of a new block.
    """

    # Without this flag SDPA assumes a causal mask, which would hide later visual tokens from earlier text tokens.
    is_causal = False

    def __init__(self, config: AgeVlmTextConfig, cache_layer_idx: int):
        super().__init__()
        self.config = config
        self.cache_layer_idx = cache_layer_idx
        self.head_dim = config.head_dim
        num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

        self.layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.gate = nn.Parameter(torch.zeros(1))
        # Unit scale, like the visual tokens after the adapter.
        # CODEPATH: age-vlm-1b has no sinks, as in the paper; the demo checkpoint has them.
        self.sink = nn.Parameter(torch.randn(config.hidden_size)) if config.cross_attention_sink else None

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_attention_states: torch.Tensor | None,
        inputs: AgeVlmCrossAttentionInputs,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `(B, S, D)`, the residual stream.
            cross_attention_states: `(B, V', D)`, the new visual tokens; None to read the cached ones only. It is not a
                field of `inputs`, because reentrant checkpointing keeps gradients of positional tensors only.
            inputs: shared by all blocks.
            cache: keeps the keys and values of the new visual tokens.

        Returns:
            The update of the residual stream `(B, S, D)`, exactly zero for text tokens that see no image; the attention
            weights `(B, heads, S, V)`, with eager attention only; the maps `(B, P, V)`, if `inputs` selects rows.
        """
        input_shape = hidden_states.shape[:-1]

        def heads(states: torch.Tensor) -> torch.Tensor:
            # An explicit number of heads, because -1 is ambiguous for a turn without visual tokens.
            return states.unflatten(-1, (states.shape[-1] // self.head_dim, self.head_dim))

        # A block that trains is float32, also in a bfloat16 model. A norm has the block's type; the weights of a linear
        # layer may be quantized.
        dtype = self.layernorm.weight.dtype
        query_states = self.q_norm(heads(self.q_proj(self.layernorm(hidden_states.to(dtype))))).transpose(1, 2)
        if cross_attention_states is not None:
            cross_attention_states = cross_attention_states.to(dtype)
            key_states = self.k_norm(heads(self.k_proj(cross_attention_states))).transpose(1, 2)
            value_states = heads(self.v_proj(cross_attention_states)).transpose(1, 2)
            if cache is not None:
                key_states, value_states = cache.update(
                    key_states, value_states, self.cache_layer_idx, inputs.positions
                )
        else:
            cached = cache.layers[self.cache_layer_idx]
            key_states, value_states = cached.keys, cached.values
        if self.sink is not None:
            # The sink is the last key, and its value is zero.
            sink = self.k_norm(heads(self.k_proj(self.sink[None, None]))).transpose(1, 2)
            sink = sink.expand(key_states.shape[0], -1, -1, -1)
            key_states = torch.cat([key_states, sink.to(key_states)], dim=2)
            value_states = nn.functional.pad(value_states, (0, 0, 0, 1))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            inputs.attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())

        rms = hidden_states.detach().float().pow(2).mean(-1, keepdim=True).add(self.config.rms_norm_eps).sqrt()
        # A float32 block in a bfloat16 model must not change the dtype of the residual stream.
        attn_output = (self.gate.tanh() * attn_output * rms).to(hidden_states.dtype)
        sees_image = inputs.visible.any(-1)
        attn_output = attn_output.masked_fill(~sees_image[..., None], 0.0)
        if attn_weights is not None:
            attn_weights = attn_weights[..., : inputs.visible.shape[-1]]  # without the sink
            attn_weights = attn_weights.masked_fill(~sees_image[:, None, :, None], 0.0)

        attention_map = self.attention_map(query_states, key_states, inputs) if inputs.map_index is not None else None
        return attn_output, attn_weights, attention_map

    def attention_map(
        self, query_states: torch.Tensor, key_states: torch.Tensor, inputs: AgeVlmCrossAttentionInputs
    ) -> torch.Tensor:
        """Attention probabilities `(B, P, V)` of the selected rows in float32, averaged over heads and tokens of a phrase."""
        batch_size, num_heads, _, head_dim = query_states.shape
        num_rows = inputs.map_index.shape[1]
        query_states = query_states.gather(2, inputs.map_index[:, None, :, None].expand(-1, num_heads, -1, head_dim))
        visible = inputs.visible.gather(1, inputs.map_index[..., None].expand(-1, -1, inputs.visible.shape[-1]))
        # The query heads of a group share a key head. They become rows, so that the keys need not be repeated.
        query_states = query_states.reshape(
            batch_size, key_states.shape[1], self.num_key_value_groups * num_rows, head_dim
        )
        with maybe_autocast(device_type=query_states.device.type, enabled=False):
            scores = query_states.float() @ key_states.float().transpose(2, 3) * self.scaling
            scores = scores.view(batch_size, num_heads, num_rows, key_states.shape[2])
            hidden = ~visible[:, None]
            if self.sink is not None:
                hidden = nn.functional.pad(hidden, (0, 1), value=False)
            # The lowest finite number rather than -inf: a row that sees nothing has the map 0 and the gradient 0, not NaN.
            probabilities = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
            members = inputs.map_members.float()
            weights = members / members.sum(-1, keepdim=True).clamp(min=1)
            maps = weights @ probabilities.masked_fill(hidden, 0.0).mean(1)
            return maps[..., : visible.shape[-1]]  # without the sink


class AgeVlmDecoderLayer(LlamaDecoderLayer):
    """A Llama layer without any change. The gated blocks are modules of [`AgeVlmTextModel`], beside the layers."""


class AgeVlmMultiModalProjector(nn.Module):
    """The adapter: LayerNorm, an MLP of two layers from vision to text width, an optional position signal, RMSNorm."""

    def __init__(self, config: AgeVlmConfig, vision_width: int):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.visual_position_embedding = config.visual_position_embedding
        self.layernorm = nn.LayerNorm(vision_width)
        self.linear_1 = nn.Linear(vision_width, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.output_norm = LlamaRMSNorm(hidden_size, eps=config.text_config.rms_norm_eps)

    def forward(self, visual_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens `(N, T, vision_width)` on a `grid` of rows and columns to visual tokens `(N, T, D)`."""
        visual_tokens = self.linear_2(self.act(self.linear_1(self.layernorm(visual_tokens))))
        if self.visual_position_embedding:
            # Content and position have the same scale. The signal follows the MLP, so that nothing stands between it and
            # the cross-attention.
            visual_tokens = nn.functional.rms_norm(
                visual_tokens, visual_tokens.shape[-1:], eps=self.output_norm.variance_epsilon
            )
            visual_tokens = visual_tokens + sincos_2d(grid, visual_tokens.shape[-1]).to(visual_tokens)
        return self.output_norm(visual_tokens)


def sincos_2d(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position signal `(rows * columns, width)` in float32.

    A quarter of the width each is for the sine of the row, the cosine of the row, the sine of the column and the cosine of
    the column. The frequencies go from 1 to 1 / (longer side of the grid), so that each of them varies over the image.
    The remainder of a width that is not divisible by 4 is zero.
    """
    quarter = width // 4
    frequencies = float(max(grid)) ** (-torch.arange(quarter) / quarter)
    rows, columns = (torch.arange(n)[:, None] * frequencies for n in grid)
    rows = rows[:, None].expand(-1, grid[1], -1)
    columns = columns[None].expand(grid[0], -1, -1)
    signal = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1).flatten(0, 1)
    return nn.functional.pad(signal, (0, width - signal.shape[-1]))


@auto_docstring
class AgeVlmPreTrainedModel(PreTrainedModel):
    config: AgeVlmConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["AgeVlmDecoderLayer", "AgeVlmCrossAttention"]
    # Flash attention has no form of the cross-attention mask: every text token would see every image.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # Left out of quantization, also where a list of modules to leave out is given: they are small, they train in full beside
    # LoRA, and a convolutional tower has few linear layers. Regular expressions of full names.
    _keep_in_fp32_modules = [".*multi_modal_projector", ".*cross_attn", ".*vision_tower"]

    # Without this override these modules are float32 in a float16 model, which makes the tower several times slower. It can go
    # when Transformers has a list of modules to leave out of quantization.
    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        plan = super()._get_dtype_plan(dtype)
        return {name: plan[name] for name in plan.keys() - set(AgeVlmPreTrainedModel._keep_in_fp32_modules)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AgeVlmCrossAttention):
            init.zeros_(module.gate)
            if module.sink is not None:
                init.normal_(module.sink)

    # Without this override `model.set_attn_implementation("sdpa")` raises for a convolutional tower of Transformers'
    # (ConvNext), which has no attention. It can go when Transformers skips submodels without attention.
    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """Sets the attention implementation. A plain name skips a vision tower that does not support it."""
        tower = getattr(self.base_model, "vision_tower", None)
        plain = attn_implementation if isinstance(attn_implementation, str) else None
        if tower is not None and not tower_supports(type(tower), plain):
            attn_implementation = {"": plain, "text_config": plain}
        super().set_attn_implementation(attn_implementation, **kwargs)

    # Without this override only the Auto class of the saved class loads the folder with `trust_remote_code`. It can go
    # when the model is part of Transformers, or when Transformers keeps all registered Auto classes in `auto_map`.
    def save_pretrained(self, save_directory, **kwargs):
        """Saves the model and its code, with an `auto_map` for every Auto class."""
        self.config.auto_map = {
            "AutoConfig": "configuration_agevlm.AgeVlmConfig",
            "AutoModel": "modeling_agevlm.AgeVlmModel",
            "AutoModelForImageTextToText": "modeling_agevlm.AgeVlmForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_agevlm.AgeVlmForConditionalGeneration",
            "AutoProcessor": "processing_agevlm.AgeVlmProcessor",
            "AutoImageProcessor": "image_processing_agevlm.AgeVlmImageProcessor",
        }
        super().save_pretrained(save_directory, **kwargs)


@auto_docstring(
    custom_intro="A Llama model with gated cross-attention blocks. It loads the weights of a Llama checkpoint."
)
class AgeVlmTextModel(AgeVlmPreTrainedModel):
    config: AgeVlmTextConfig
    input_modalities: tuple[str, ...] = ("text",)
    _can_record_outputs = {
        "hidden_states": AgeVlmDecoderLayer,
        "attentions": LlamaAttention,
        "cross_attentions": AgeVlmCrossAttention,
    }

    def __init__(self, config: AgeVlmTextConfig):
        super().__init__(config)
        # The same names as in `LlamaModel`, so that a Llama checkpoint loads without renaming.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([AgeVlmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # Key: the Llama layer that the block precedes. In a cache the blocks follow the Llama layers.
        self.cross_attn = nn.ModuleDict(
            {
                str(layer): AgeVlmCrossAttention(config, cache_layer_idx=config.num_hidden_layers + block)
                for block, layer in enumerate(config.cross_attention_llama_layers)
            }
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cross_attention_states: torch.Tensor | None = None,
        visual_positions: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmModelOutputWithPast:
        r"""
        cross_attention_states (`torch.Tensor` of shape `(batch_size, num_visual_tokens, hidden_size)`, *optional*):
            Visual tokens that are new in this call, the images of a row one after another.
        visual_positions (`torch.Tensor` of shape `(batch_size, num_visual_tokens)`, *optional*):
            For each visual token, the index in the text (including the cached part) of the token that stands for its image.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens belong to each phrase. `cross_attention_maps` has a map per phrase.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]

        text_positions = torch.arange(seq_length, device=inputs_embeds.device) + num_cached_tokens(cache)
        texts = self._packed_texts(inputs_embeds, attention_mask, position_ids, cache, **kwargs)
        if texts is not None:
            allowed = (texts[:, :, None] == texts[:, None]) & (text_positions <= text_positions[:, None])
            if attention_mask is not None:
                allowed = allowed & attention_mask[:, None].bool()
            attention_mask = to_attention_mask(allowed, self.config._attn_implementation, inputs_embeds.dtype)
            if position_ids is None:
                position_ids = positions_in_texts(texts)
        # A cache holds one text a row. Compiled code cannot know whether there are more.
        if use_cache and cache is None and (texts is None or is_tracing(texts)):
            cache = DynamicCache(config=self.config)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=cache
        )
        if position_ids is None:
            position_ids = text_positions.unsqueeze(0)

        cached_positions = cached_visual_positions(cache, self.config)
        all_positions = [positions for positions in (cached_positions, visual_positions) if positions is not None]
        cross_attention_inputs = None
        if all_positions:
            if cache is not None:
                append_cross_attention_layers(cache, self.config)
            visible = visible_images(causal_mask, text_positions, torch.cat(all_positions, dim=-1))
            cross_attention_inputs = self._cross_attention_inputs(
                visible, inputs_embeds, visual_positions, map_queries
            )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        attention_maps = []
        for i, decoder_layer in enumerate(self.layers):
            if cross_attention_inputs is not None and str(i) in self.cross_attn:
                # The maps are an output of the block rather than captured by a hook, so that both kinds of gradient
                # checkpointing keep their gradient.
                attn_output, _, attention_map = self.cross_attn[str(i)](
                    hidden_states, cross_attention_states, cross_attention_inputs, cache=cache
                )
                hidden_states = hidden_states + attn_output
                if attention_map is not None:
                    attention_maps.append(attention_map)
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)

        cross_attention_maps = None
        if map_queries is not None:
            shape = (len(self.config.cross_attention_llama_layers), batch_size, map_queries.shape[1], 0)
            cross_attention_maps = (
                torch.stack(attention_maps) if attention_maps else hidden_states.new_zeros(shape).float()
            )
        return AgeVlmModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=cache,
            cross_attention_maps=cross_attention_maps,
        )

    def _packed_texts(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor | None:
        """[`packed_texts`] of this call, None if the caller's own 4-D mask says who attends to whom.

        Raises:
            ValueError: if there are several texts in a row, and a cache.
        """
        if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
            return None
        if cache is None:
            return packed_texts(inputs_embeds, position_ids, attention_mask, **kwargs)
        seq_length = inputs_embeds.shape[1]
        # The positions of one token do not say anything, and compiled code must not read a value. Continuous batching has
        # a cache of another class, which keeps the texts apart.
        if isinstance(cache, Cache) and not is_tracing(inputs_embeds) and seq_length > 1:
            # In a cached text the position ids may skip some, but not start anew.
            is_token = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
            if attention_mask is not None:
                is_token = attention_mask[:, -seq_length:]
            if packed_texts(inputs_embeds, position_ids, is_token, **kwargs) is not None:
                raise ValueError(
                    "Got several texts in a row of the batch (position ids that start anew, `cu_seq_lens_q` or "
                    "`seq_idx`) together with a cache, which holds one text a row. Pass the packed texts without "
                    "`cache`, or each text in its own row."
                )
        return None

    def _cross_attention_inputs(
        self,
        visible: torch.Tensor,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
    ) -> AgeVlmCrossAttentionInputs:
        # A softmax over no key is NaN, and so is its gradient. Rows that see nothing attend to all keys, and the block sets
        # its output for them to zero.
        attend = visible | ~visible.any(-1, keepdim=True)
        # CODEPATH: as in `AgeVlmCrossAttention`.
        if self.config.cross_attention_sink:
            attend = nn.functional.pad(attend, (0, 1), value=True)
        attention_mask = to_attention_mask(attend, self.config._attn_implementation, inputs_embeds.dtype)
        map_index = map_members = None
        if map_queries is not None:
            # First the tokens of any phrase, in order, then tokens of no phrase as padding. Compiled code must not read how
            # many there are, and keeps all in their places.
            asked = map_queries.any(dim=1)
            if is_tracing(asked):
                map_index = torch.arange(asked.shape[1], device=asked.device).expand_as(asked)
            else:
                num_rows = int(asked.sum(-1).max())
                map_index = asked.int().argsort(dim=-1, descending=True, stable=True)[:, :num_rows]
            map_members = map_queries.gather(2, map_index[:, None].expand(-1, map_queries.shape[1], -1))
        return AgeVlmCrossAttentionInputs(
            visible=visible,
            attention_mask=attention_mask,
            positions=positions,
            map_index=map_index,
            map_members=map_members,
        )


@auto_docstring(custom_intro="AGE-VLM without a language modeling head: vision tower, adapter and text model.")
class AgeVlmModel(AgeVlmPreTrainedModel):
    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        # The language model comes first, because `dtype` is that of the first parameter and is saved. The tower may be
        # float32 while the language model is bfloat16.
        self.language_model = AgeVlmTextModel._from_config(config.text_config)
        # As for `set_attn_implementation`, here for `from_pretrained(..., attn_implementation="sdpa")`.
        tower_class = AutoModel._model_mapping[type(config.vision_config)]
        supported = tower_supports(tower_class, config.vision_config._attn_implementation)
        if not supported:
            config.vision_config._attn_implementation = "eager"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        remove_pooling_head(self.vision_tower)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config, vision_width(self.vision_tower))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    # Without this override every trainer that calls `model.train()` lets the batch norms of a frozen tower collect
    # statistics, which changes the tower. It can go when Transformers keeps frozen submodels in evaluation mode.
    def train(self, mode: bool = True) -> "AgeVlmModel":
        """Sets the mode, but leaves the frozen parts of the vision tower and all its batch norms in evaluation mode.

        The batches of fine-tuning are too small for batch statistics.
        """
        super().train(mode)
        if mode:
            set_training_mode(self.vision_tower)
        return self

    @can_return_tuple
    @auto_docstring(custom_intro="Runs the vision tower and the adapter.")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            All images of the batch, in order.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            The height and the width in pixels that each image fills from the top left; the rest is padding.
        """
        tokens, grid, outputs = self.get_vision_tokens(pixel_values, **kwargs)
        visual_attention_mask = None
        if image_sizes is not None:
            # A token counts as soon as one pixel of the image lies in its cell. The cell's first pixel is the nearest one.
            rows, columns = (
                torch.arange(number, device=image_sizes.device) * side // number
                for number, side in zip(grid, pixel_values.shape[-2:], strict=True)
            )
            height, width = image_sizes[:, :1], image_sizes[:, 1:]
            visual_attention_mask = ((rows < height)[:, :, None] & (columns < width)[:, None]).flatten(1)
        return AgeVlmImageFeatures(
            last_hidden_state=tokens,
            pooler_output=self.project_vision_tokens(tokens, grid),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),  # a convolutional tower has none
            visual_attention_mask=visual_attention_mask,
            grid=grid,
        )

    def get_vision_tokens(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, tuple[int, int], ModelOutput]:
        """Runs the vision tower alone.

        Args:
            pixel_values: `(N, 3, H, W)`.

        Returns:
            The tokens `(N, T, vision_width)`, row by row of the image; their grid `(rows, columns)`; the output of the
            tower.

        Raises:
            ValueError: if the tokens do not form a grid.
        """
        height, width = pixel_values.shape[-2:]
        # A frozen tower keeps no graph, also where `enable_input_require_grads` has put a hook on its embeddings.
        is_trainable = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(is_trainable and torch.is_grad_enabled()):
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if isinstance(features, (list, tuple)):  # timm's `features_only`: the last requested stage
            features = features[-1]
        channels = self.multi_modal_projector.layernorm.normalized_shape[0]
        if features.ndim == 4:
            if features.shape[1] != channels:  # some timm models have channels last
                features = features.permute(0, 3, 1, 2)
            grid = (features.shape[-2], features.shape[-1])
            return features.flatten(2).transpose(1, 2), grid, outputs
        features = features[:, num_prefix_tokens(self.vision_tower) :]
        rows = round(math.sqrt(features.shape[1] * height / width))
        grid = (rows, features.shape[1] // rows)
        if grid[0] * grid[1] != features.shape[1]:
            raise ValueError(
                f"The vision tower returned {features.shape[1]} tokens for a {height}x{width} image, which do not form a "
                "grid of rows and columns. Use a tower that keeps the layout of the image."
            )
        return features, grid, outputs

    def project_vision_tokens(self, tokens: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """Runs the adapter on tokens `(N, T, vision_width)` of [`~AgeVlmModel.get_vision_tokens`]; returns `(N, T, D)`.

        Raises:
            ValueError: if `grid` does not fit the number of tokens.
        """
        if grid is None or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"grid={grid} does not fit image features of {tokens.shape[1]} tokens. Pass the grid that "
                "`get_image_features` returned with them."
            )
        return self.multi_modal_projector(tokens.to(self.multi_modal_projector.layernorm.weight.dtype), grid)

    def get_image_token_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Bool `(B, S)`: which tokens stand for an image. Without `input_ids` they are found by their embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token_id = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)

    def _place_images(
        self, features: AgeVlmImageFeatures, image_token_mask: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorts the images into the rows of the batch.

        Returns:
            `cross_attention_states` `(B, V, D)` and `visual_positions` `(B, V)` for [`AgeVlmTextModel`].

        Raises:
            ValueError: if there are more or fewer images than image tokens.
        """
        device = image_token_mask.device
        tokens, mask = features.pooler_output.to(device), features.visual_attention_mask
        counts = image_token_mask.sum(-1)
        if is_tracing(counts):
            # No value may be read, so each row has room for all images, and the check waits for the run.
            max_images = tokens.shape[0]
            # Not `torch_compilable_check`, which makes a GPU wait, and which PyTorch 2.11 can neither compile nor export.
            torch._assert_async(counts.sum() == max_images, "Each image needs exactly one image token.")
        else:
            max_images = int(counts.max())
            new = self._new_images(tokens.shape[0], counts.tolist(), cache)
            if new is not None:
                tokens = tokens[new.to(device)]
                mask = mask[new.to(mask.device)] if mask is not None else None
        num_images, num_tokens, width = tokens.shape
        batch_size, seq_length = image_token_mask.shape
        # The n-th image token, row by row, stands for the n-th image.
        images = torch.arange(num_images, device=device)
        index = torch.searchsorted(image_token_mask.flatten().cumsum(0), images, right=True)
        rows, columns = index // seq_length, index % seq_length
        slots = images - (counts.cumsum(0) - counts)[rows]
        shape = (batch_size, max_images, num_tokens)
        image_positions = (columns + num_cached_tokens(cache))[:, None].expand(-1, num_tokens)
        if mask is not None:
            image_positions = image_positions.masked_fill(~mask.to(device), NEVER)
        states = tokens.new_zeros((*shape, width)).index_put((rows, slots), tokens)
        positions = rows.new_full(shape, NEVER).index_put((rows, slots), image_positions)
        return states.flatten(1, 2), positions.flatten(1, 2)

    def _new_images(self, num_images: int, counts: list[int], cache: Cache | None) -> torch.Tensor | None:
        """Indices of the images that the cache does not hold, None if it holds none of them.

        Args:
            num_images: number of images that the caller passed.
            counts: number of image tokens in each row.
            cache: a later turn may pass the images of the whole conversation again.

        Raises:
            ValueError: if there are more or fewer images than image tokens.
        """
        if num_images == sum(counts):
            return None
        cached = cached_visual_positions(cache, self.language_model.config)
        if cached is not None:
            seen = [row[row != NEVER].unique().numel() for row in cached]
            if num_images == sum(seen) + sum(counts):
                ends = itertools.accumulate(before + new for before, new in zip(seen, counts, strict=True))
                return torch.cat([torch.arange(end - new, end) for end, new in zip(ends, counts, strict=True)])
        raise ValueError(
            f"Got {num_images} image(s) for {sum(counts)} image token(s) (id {self.config.image_token_id}; "
            f"by row of the batch: {counts}). Each image needs exactly one image token in the text, in the "
            "same order; AgeVlmProcessor puts them there."
        )

    def _blank_image(self, batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`cross_attention_states` and `visual_positions` of one visual token per row that no text token may see.

        It passes through every module that an image passes through, and adds exactly zero to outputs and gradients.
        Without it, several processes hang when one of them has a batch of text only: FSDP2 and ZeRO-3 wait for the modules
        that this process did not run, and DDP for their gradients. It can go when Transformers or Accelerate keep the
        processes in step.
        """
        channels = self.multi_modal_projector.layernorm.normalized_shape[0]
        if is_distributed() or any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            # A convolutional tower accepts any size. Other towers have theirs in the configuration.
            size = getattr(self.config.vision_config, "image_size", None) or 64
            tokens, _, _ = self.get_vision_tokens(torch.zeros(1, 3, size, size, device=device))
            tokens = tokens.mean(1, keepdim=True)
        else:
            tokens = torch.zeros(1, 1, channels, device=device)
        states = self.project_vision_tokens(tokens, (1, 1)).expand(batch_size, -1, -1)
        return states, torch.full((batch_size, 1), NEVER, device=device)

    def _needs_blank_image(self, cache: Cache | None) -> bool:
        if self.training and torch.is_grad_enabled():
            return True
        # Sharded weights are gathered in evaluation too. With a cache, once is enough.
        is_new = cached_visual_positions(cache, self.language_model.config) is None
        return is_distributed() and is_new and (cache is None or isinstance(cache, Cache))

    def _check_no_image_token(self, input_ids: torch.Tensor | None, cache: Cache | None) -> None:
        # Only at the start of a text: the images of a cached text are cached too, and a draft may propose any token. Not
        # in compiled code, where reading a value breaks the graph.
        if input_ids is None or is_tracing(input_ids):
            return
        if num_cached_tokens(cache) == 0 and (num_tokens := int((input_ids == self.config.image_token_id).sum())):
            raise ValueError(
                f"Got {num_tokens} image token(s) (id {self.config.image_token_id}) and no image. Pass `pixel_values`, "
                "or remove the image token from the text."
            )

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, AgeVlmImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmModelOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            All images of the batch, in the order of their image tokens, row by row. A row may have no image, one or
            several. With a cache, pass either the new images or all images of the conversation.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            The height and the width in pixels that each image fills from the top left; the rest of `pixel_values` is
            padding. Visual tokens that cover only padding are not attended to.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens belong to each phrase. `cross_attention_maps` has a map per phrase.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if map_queries is not None and map_queries.shape[::2] != inputs_embeds.shape[:2]:
            raise ValueError(
                f"map_queries has shape {tuple(map_queries.shape)}; for this batch it must be (batch_size, num_phrases, "
                f"sequence_length) = ({inputs_embeds.shape[0]}, num_phrases, {inputs_embeds.shape[1]})."
            )

        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and pixel_values.shape[0] > 0:  # TRL slices none for rows without images
            features = self.get_image_features(pixel_values, image_sizes, return_dict=True)

        cross_attention_states = visual_positions = None
        if features is not None:
            if features.pooler_output is None:  # precomputed features of a frozen tower
                pooler_output = self.project_vision_tokens(features.last_hidden_state, features.grid)
                # A new object, because the caller passes the same one again after the adapter has changed.
                features = AgeVlmImageFeatures(**{**features, "pooler_output": pooler_output})
            image_token_mask = self.get_image_token_mask(input_ids, inputs_embeds)
            cross_attention_states, visual_positions = self._place_images(features, image_token_mask, cache)
            cross_attention_states = cross_attention_states.to(inputs_embeds.device, inputs_embeds.dtype)
        else:
            self._check_no_image_token(input_ids, cache)
            if self._needs_blank_image(cache):
                cross_attention_states, visual_positions = self._blank_image(
                    inputs_embeds.shape[0], inputs_embeds.device
                )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            cross_attention_states=cross_attention_states,
            visual_positions=visual_positions,
            map_queries=map_queries,
            use_cache=use_cache,
            **kwargs,
        )
        return AgeVlmModelOutputWithPast(**outputs, image_outputs=features)


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def set_training_mode(module: nn.Module, parent_is_trainable: bool = False) -> None:
    """Sets the mode of a module and its children: training if it has trainable parameters, or if it has no parameters and
    its parent has trainable ones. Batch norms are always in evaluation mode."""
    parameters = list(module.parameters())
    is_trainable = any(parameter.requires_grad for parameter in parameters) if parameters else parent_is_trainable
    module.training = is_trainable and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    for child in module.children():
        set_training_mode(child, is_trainable)


def remove_pooling_head(vision_tower: PreTrainedModel) -> None:
    """Removes the parameters of a vision tower that no visual token goes through.

    They would never get a gradient. Data-parallel processes would wait for it, and a sharded checkpoint would have no
    optimizer state of them.
    """
    parent = getattr(vision_tower, "timm_model", vision_tower)
    for name in POOLING_HEADS.get(vision_tower.config.model_type, ()):
        # In an EfficientNet of timm, which has a `bn2`, `conv_head` belongs to the features.
        if getattr(parent, name, None) is not None and not (name == "conv_head" and hasattr(parent, "bn2")):
            setattr(parent, name, nn.Identity())
    for module in vision_tower.modules():
        # The embedding of masked patches. A buffer, because Transformers initializes and loads it.
        if (mask_token := module._parameters.pop("mask_token", None)) is not None:
            module.mask_token = nn.Buffer(mask_token.data)


def vision_width(vision_tower: PreTrainedModel) -> int:
    """Width of the tokens of a vision tower.

    Raises:
        ValueError: if neither the timm model nor the configuration has it.
    """
    if (timm_model := getattr(vision_tower, "timm_model", None)) is not None:
        if vision_tower.features_only:
            return timm_model.feature_info.channels()[-1]
        return timm_model.num_features
    config = vision_tower.config
    width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"The width of the features of {type(vision_tower).__name__} is unknown: its configuration has neither "
            "`hidden_sizes` nor `hidden_size`. Use a timm model or a ConvNext, ConvNextV2 or DINOv3-ConvNeXt checkpoint."
        )
    return width


def tower_supports(tower_class: type[PreTrainedModel], attn_implementation: str | None) -> bool:
    """Whether a vision tower supports an attention implementation.

    Convolutional towers have no attention and support none. Transformers raises an error if an implementation that was
    requested for the whole model is set on them.
    """
    flags = {
        "sdpa": "_supports_sdpa",
        "flex_attention": "_supports_flex_attn",
        "flash_attention": "_supports_flash_attn",
    }
    return all(getattr(tower_class, flag) for name, flag in flags.items() if name in (attn_implementation or ""))


def num_prefix_tokens(vision_tower: PreTrainedModel) -> int:
    """Number of tokens of a vision tower before the image grid (class token, registers)."""
    if (timm_model := getattr(vision_tower, "timm_model", None)) is not None:
        return getattr(timm_model, "num_prefix_tokens", 0)
    # A tower of Transformers' that returns a sequence has one class token first, and then its registers, if any.
    return 1 + (getattr(vision_tower.config, "num_register_tokens", None) or 0)


@auto_docstring(custom_intro="AGE-VLM with a language modeling head: image and text to text.")
class AgeVlmForConditionalGeneration(AgeVlmPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.model = AgeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # A generated image token would have no image.
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @auto_docstring
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            All images of the batch, in order.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            The height and the width in pixels that each image fills from the top left; the rest is padding.
        """
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, AgeVlmImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmCausalLMOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            All images of the batch, in the order of their image tokens, row by row. A row may have no image, one or
            several. With a cache, pass either the new images or all images of the conversation.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            The height and the width in pixels that each image fills from the top left; the rest of `pixel_values` is
            padding. Visual tokens that cover only padding are not attended to.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Labels of the language modeling loss, in `[0, ..., vocab_size]` or -100 to be ignored.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens belong to each phrase. `cross_attention_maps` has a map per phrase.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import agevlm  # registers the Auto classes

        >>> model = AutoModelForImageTextToText.from_pretrained("path/to/age-vlm")
        >>> processor = AutoProcessor.from_pretrained("path/to/age-vlm")
        >>> messages = [
        ...     {
        ...         "role": "user",
        ...         "content": [
        ...             {"type": "image", "image": Image.open("dog.jpg")},
        ...             {"type": "text", "text": "Is there a dog in the image?"},
        ...         ],
        ...     }
        ... ]
        >>> inputs = processor.apply_chat_template(
        ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> outputs = model.generate(**inputs, max_new_tokens=10)
        >>> processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            cache=cache,
            inputs_embeds=inputs_embeds,
            map_queries=map_queries,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AgeVlmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            cross_attentions=outputs.cross_attentions,
            cross_attention_maps=outputs.cross_attention_maps,
        )

    # Without this override and the next, `generate(output_attentions=True)` drops the cross-attentions: Transformers collects
    # those of encoder-decoder models only. They can go when it collects those of any model that returns them.
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        collected: list[tuple[torch.Tensor, ...]] = []
        token = _generated_cross_attentions.set(collected)
        try:
            outputs: Any = super().generate(*args, **kwargs)
        finally:
            _generated_cross_attentions.reset(token)
        if getattr(outputs, "attentions", None) is not None:
            # Transformers may run one step too many, and leaves it out.
            outputs["cross_attentions"] = tuple(collected[: len(outputs.attentions)])
        return outputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        collected, blocks = _generated_cross_attentions.get(), outputs.get("cross_attentions")
        # Only eager attention returns its weights. A batch without images has none: the tuple is empty.
        if collected is not None and blocks is not None and all(block is not None for block in blocks):
            if "num_new_tokens" in kwargs:
                # Assisted decoding checks several tokens in one pass, the first of them after the prompt.
                drafted = outputs.logits.shape[1] - 1
                rows = [block.split([block.shape[2] - drafted, *[1] * drafted], dim=2) for block in blocks]
                collected += zip(*rows, strict=True) if rows else [()] * (drafted + 1)
                del collected[len(collected) - drafted - 1 + kwargs["num_new_tokens"] :]
            else:
                collected.append(blocks)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    # Without this override a draft model gets no images: Transformers passes `mm_encoder_outputs` in the first iteration only,
    # and no call of a draft counts as one. It can go when assisted decoding sets `is_first_iteration` for the prefill of a
    # draft. `inputs_embeds` is a named argument, because Transformers looks for it before it generates from embeddings.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def prepare_inputs_for_generation(self, input_ids, cache=None, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, cache=cache, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("is_first_iteration"):
            # Here, because for a static cache the mask is 4-D from here on, and no longer tells padding from texts.
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            mask, position_ids = kwargs.get("attention_mask"), inputs.get("position_ids")
            self.model.language_model._packed_texts(tokens, mask, position_ids, cache)
        # A draft has no static cache. The length of a static cache is a tensor, whose comparison would make the host wait at
        # every token.
        length = cache.get_seq_length() if cache is not None else None
        if isinstance(length, int) and length == 0:
            inputs.setdefault("mm_encoder_outputs", kwargs.get("mm_encoder_outputs"))
        return inputs

    # Without this override chunked prefill cuts the image features by image token, and a draft model cannot have
    # its own image features, because Transformers drops the pixels. Remove it when Transformers refuses to chunk features
    # that do not correspond to tokens, and keeps the pixels for the draft.
    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        has_images = model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs")
        if has_images and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "Chunked prefill cuts image features by image token, but AGE-VLM has one token per image. Pass "
                "`prefill_chunk_size=None`."
            )
        pixels = {name: model_kwargs.get(name) for name in ("pixel_values", "image_sizes")}
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        if pixels["pixel_values"] is not None:
            model_kwargs["mm_encoder_outputs"]["pixels"] = pixels  # for a draft model
        return model_kwargs

    # Without this override an AGE-VLM draft reads this model's image features, whose width may not be its own. It can go when
    # Transformers lets a multimodal draft encode the images itself, as it does for encoder-decoder drafts.
    def _get_candidate_generator(self, *args, **kwargs):
        """Returns the candidate generator. An AGE-VLM draft gets image features from its own vision tower and adapter."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        draft, encoded = kwargs.get("assistant_model"), kwargs["model_kwargs"].get("mm_encoder_outputs")
        if isinstance(draft, AgeVlmForConditionalGeneration) and encoded:
            if "pixels" in encoded:
                features = draft.get_image_features(**encoded["pixels"], return_dict=True)
            else:  # precomputed features of a tower that both models share
                features = AgeVlmImageFeatures(**{**encoded["image"], "pooler_output": None})
            generator.assistant_kwargs["mm_encoder_outputs"] = {"image": features}
        return generator

    # Without this override beam search fails: Transformers expects one image token per feature, and repeats `pooler_output`
    # only. It can go when Transformers repeats all features of an image by the number of images in each row.
    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """Repeats the images of a row together with the row, for beams and return sequences."""
        features = mm_encoder_output.get("image")
        if features is None:
            return mm_encoder_output
        only_embeds = input_ids is None or input_ids.numel() == 0
        counts = self.model.get_image_token_mask(None if only_embeds else input_ids, inputs_embeds).sum(-1).tolist()
        if sum(counts) != features.pooler_output.shape[0]:
            raise ValueError(
                f"Got {features.pooler_output.shape[0]} image(s) for {sum(counts)} image token(s) in the prompts (by row "
                f"of the batch: {counts}). Beam search and several return sequences need all images of the conversation."
            )
        order = torch.cat([rows.repeat(expand_size) for rows in torch.arange(sum(counts)).split(counts)])
        expanded: Any = {
            name: value[order.to(value.device)] if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        return {**mm_encoder_output, "image": AgeVlmImageFeatures(**expanded)}


AgeVlmModel.register_for_auto_class("AutoModel")
AgeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel", "AgeVlmTextModel"]
