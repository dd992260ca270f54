# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM: gated cross-attention from a frozen Llama to convolutional image tokens (arXiv 2511.17793).

This file travels to the Hub with every saved model, so it imports nothing but libraries and its sibling configuration.

Shapes used throughout: `B` rows of the batch, `S` text tokens, `N` images of the batch in order, `T` visual tokens an
image, `V` visual tokens a row sees at most (its images one after another), `P` phrases, `D` the text model's width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
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
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from .configuration_agevlm import AgeVlmConfig, AgeVlmTextConfig

logger = logging.get_logger(__name__)

# The position of a visual token that nobody may see: one that covers only padding, or fills up a row with fewer images.
NEVER = torch.iinfo(torch.long).max


@auto_docstring(custom_intro="Image features as the vision tower and the adapter give them.")
@dataclass
class AgeVlmImageFeatures(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_images, num_visual_tokens, vision_width)`):
        The vision tower's tokens, row by row of the image. Given alone as `mm_encoder_outputs["image"]`, they go
        through the adapter only, so that the features of a frozen tower can be computed once and kept.
    pooler_output (`torch.Tensor` of shape `(num_images, num_visual_tokens, hidden_size)`):
        The visual tokens after the adapter, which the cross-attention reads.
    visual_attention_mask (`torch.Tensor` of shape `(num_images, num_visual_tokens)`, *optional*):
        False for visual tokens that cover only padding. None when every token covers some of the image.
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
        The self-attention layers' keys and values, followed by one layer a cross-attention block that holds the
        visual tokens' keys and values.
    image_outputs (`AgeVlmImageFeatures`, *optional*, returned with images):
        What `get_image_features` gives; its `pooler_output` are the visual tokens after the adapter.
    cross_attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
        One tensor a cross-attention block of shape `(batch_size, num_heads, sequence_length, num_visual_tokens)`; rows
        of text tokens that see no image are zero. Eager attention only.
    cross_attention_maps (`torch.Tensor` of shape `(num_blocks, batch_size, num_phrases, num_visual_tokens)`, *optional*, returned with `map_queries`):
        Where each phrase looks: float32 attention probabilities averaged over heads and over the phrase's tokens, the
        row's images one after another. A phrase whose tokens see an image sums to 1 (less what the attention sink holds,
        where there is one), one before any image to 0.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_maps: torch.Tensor | None = None


@auto_docstring(custom_intro="Output of AGE-VLM with its language modelling head.")
@dataclass
class AgeVlmCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modelling loss (for next-token prediction).
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modelling head, before softmax.
    cache (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        See [`AgeVlmModelOutputWithPast`].
    image_outputs (`AgeVlmImageFeatures`, *optional*, returned with images):
        What `get_image_features` gives; its `pooler_output` are the visual tokens after the adapter.
    cross_attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
        See [`AgeVlmModelOutputWithPast`].
    cross_attention_maps (`torch.Tensor` of shape `(num_blocks, batch_size, num_phrases, num_visual_tokens)`, *optional*, returned with `map_queries`):
        See [`AgeVlmModelOutputWithPast`].
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_maps: torch.Tensor | None = None


class AgeVlmCrossAttentionCacheLayer(CacheLayerMixin):
    """Keys and values of the visual tokens that one cross-attention block has computed, and whose image they are.

    Appended behind the self-attention layers of the cache the caller brought, dynamic or static, so that beams, batch
    selection and reset reach it like any other layer. It grows with images, not with text.

    `positions` `(B, V)` holds, for each visual token, the cache index of the text token that stands for its image,
    or `NEVER`. A text token at index `q` sees exactly the visual tokens with `positions <= q`.
    """

    # Reading it in a compiled decoding step changes no shape.
    is_compileable = True
    is_croppable = True
    supports_early_init = False

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
        """Appends `(B, kv_heads, V', head_dim)` keys and values with their `(B, V')` positions; returns all of them."""
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
        # Small, and needed again by the next token: it stays where it was computed.
        pass

    def reset(self) -> None:
        # Dropped rather than zeroed: the next prompt brings its own images, or none.
        self.keys = self.values = self.positions = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Images whose text token is still there stay whole; those whose token was removed are seen by nobody."""
        if self.is_initialized and tokens_to_remove != 0:
            # The self-attention layers come first in the cache and are cropped already.
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
    """Gives a cache built for the self-attention layers alone its cross-attention layers. Does nothing the second time."""
    if cache.layer_class_to_replicate is not None:  # `DynamicCache()` without a configuration makes its layers late
        cache.layers += [cache.layer_class_to_replicate() for _ in range(config.num_hidden_layers - len(cache.layers))]
    if len(cache.layers) == config.num_hidden_layers:
        cache.layers += [AgeVlmCrossAttentionCacheLayer(cache.layers[0]) for _ in config.cross_attention_llama_layers]


def num_cached_tokens(cache: Cache | None) -> int | torch.Tensor:
    """How many text tokens of the batch are in the cache. Continuous batching, which is for text alone, has a cache of
    another kind, whose texts tell their places by `position_ids`."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def cached_visual_positions(cache: Cache | None, config: AgeVlmTextConfig) -> torch.Tensor | None:
    """Positions `(B, V)` of the visual tokens in the cache, None when it holds none."""
    if not isinstance(cache, Cache) or not config.cross_attention_layers:
        return None
    if len(cache.layers) <= config.num_hidden_layers:
        return None
    return cache.layers[config.num_hidden_layers].positions


@dataclass
class AgeVlmCrossAttentionInputs(ModelOutput):
    r"""
    What all gated blocks of one forward pass share, beside the visual tokens themselves.

    It is a `ModelOutput`, so that `device_map` and FSDP2 find the tensors in it and move them with a block's other inputs.
    The tensors for maps hold no floating point numbers, which FSDP2's mixed precision would round on the way.

    visible (`torch.Tensor` of shape `(batch_size, sequence_length, num_visual_tokens)`):
        Which visual tokens each text token may see, the cached ones included.
    attention_mask (`torch.Tensor` or `BlockMask`, *optional*):
        `visible` in the form of the attention implementation in use.
    positions (`torch.Tensor` of shape `(batch_size, num_new_visual_tokens)`, *optional*):
        Positions of the visual tokens that are new in this pass, see [`AgeVlmCrossAttentionCacheLayer`].
    map_index (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
        The text tokens that `map_queries` asks for, so that each block computes the maps of these rows alone.
    map_members (`torch.Tensor` of shape `(batch_size, num_phrases, num_rows)`, *optional*):
        Which of these rows belong to each phrase.
    """

    visible: torch.Tensor | None = None
    attention_mask: Any = None
    positions: torch.Tensor | None = None
    map_index: torch.Tensor | None = None
    map_members: torch.Tensor | None = None


class AgeVlmCrossAttention(GradientCheckpointingLayer):
    """The gated block: `tanh(gate) * rms(h) * CrossAttention(RMSNorm(h), visual)`, to be added to `h` (paper, section 3).

    Grouped-query attention with the language model's own head counts, RMSNorm on queries and keys, no FFN. `gate`
    starts at 0, so a fresh block adds exactly nothing. With `config.cross_attention_sink` there is one more key, whose value
    is zero: what attention goes to it is taken over from nowhere. The block's output is scaled by each token's residual RMS,
    because a trained language model's residual stream is many times larger than a fresh block's output.
    """

    # SDPA takes a missing flag for True and would hide later visual tokens from earlier text.
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
        # A visual token of no image, of unit scale as those are that the adapter gives.
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
            cross_attention_states: `(B, V', D)`, visual tokens that are new in this call; None to read the cache alone.
                Not a field of `inputs`, because reentrant checkpointing gives gradients to positional tensors only.
            inputs: what all blocks share.

        Returns:
            What to add to the residual stream `(B, S, D)`, exactly zero for text tokens that see no image; the attention
            weights `(B, heads, S, V)` (eager only); the maps `(B, P, V)`.
        """
        input_shape = hidden_states.shape[:-1]

        def heads(states: torch.Tensor) -> torch.Tensor:
            # The count is spelt out because a turn may bring no new visual token at all.
            return states.unflatten(-1, (states.shape[-1] // self.head_dim, self.head_dim))

        query_states = self.q_norm(heads(self.q_proj(self.layernorm(hidden_states)))).transpose(1, 2)
        if cross_attention_states is not None:
            # The block may be float32 in a bfloat16 model.
            cross_attention_states = cross_attention_states.to(self.k_proj.weight.dtype)
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
            # The last key, behind all images; its value is zero.
            sink = self.k_norm(heads(self.k_proj(self.sink)))[None, :, None].expand(key_states.shape[0], -1, -1, -1)
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
        # Back to the stream's own type: a float32 block in a bfloat16 model must not widen all that follows.
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
        """Attention probabilities `(B, P, V)` of the selected rows, in float32, averaged over heads and phrase tokens."""
        batch_size, num_heads, _, head_dim = query_states.shape
        num_rows = inputs.map_index.shape[1]
        query_states = query_states.gather(2, inputs.map_index[:, None, :, None].expand(-1, num_heads, -1, head_dim))
        visible = inputs.visible.gather(1, inputs.map_index[..., None].expand(-1, -1, inputs.visible.shape[-1]))
        # Query heads of one group share a key head: fold the group into the rows instead of repeating the keys.
        query_states = query_states.reshape(batch_size, -1, self.num_key_value_groups * num_rows, head_dim)
        with maybe_autocast(device_type=query_states.device.type, enabled=False):
            scores = query_states.float() @ key_states.float().transpose(2, 3) * self.scaling
            scores = scores.view(batch_size, num_heads, num_rows, -1)
            hidden = ~visible[:, None]
            if self.sink is not None:
                hidden = nn.functional.pad(hidden, (0, 1), value=False)
            # The lowest finite number, not -inf: a row that sees nothing must give 0, and a gradient of 0, not NaN.
            probabilities = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
            members = inputs.map_members.float()
            weights = members / members.sum(-1, keepdim=True).clamp(min=1)
            maps = weights @ probabilities.masked_fill(hidden, 0.0).mean(1)
            return maps[..., : visible.shape[-1]]  # without the sink


class AgeVlmDecoderLayer(LlamaDecoderLayer):
    """A Llama layer as it is. The gated blocks stand beside the layers, see [`AgeVlmTextModel`]."""


class AgeVlmMultiModalProjector(nn.Module):
    """The adapter: LayerNorm, a two-layer MLP from vision to text width, an optional fixed position signal, RMSNorm."""

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
        """`(N, T, vision_width)` tokens on a `grid` of rows and columns to `(N, T, D)`."""
        visual_tokens = self.linear_2(self.act(self.linear_1(self.layernorm(visual_tokens))))
        if self.visual_position_embedding:
            # Content and place at the same scale, and no MLP between the place and what reads it.
            visual_tokens = nn.functional.rms_norm(
                visual_tokens, visual_tokens.shape[-1:], eps=self.output_norm.variance_epsilon
            )
            visual_tokens = visual_tokens + sincos_2d(grid, visual_tokens.shape[-1]).to(visual_tokens)
        return self.output_norm(visual_tokens)


def sincos_2d(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed sine-cosine position signal `(rows * columns, width)`, float32.

    A quarter of the width each holds the sine and cosine of the row, and of the column, at frequencies from 1 down to
    that of the grid's longer side, so that all of them vary over the image (at 1/10000, as for texts, most would not); a
    width that four does not divide is filled up with zeros.
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
    # Flash attention has no mask for "this text may see those images": cross-attention would look at every image.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @property
    def dtype(self) -> torch.dtype:
        # The text model's, and not that of the first parameter: a tower may be kept in float32, and saving writes this
        # into the configuration, so that a bfloat16 text model would come back widened.
        return self.get_input_embeddings().weight.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, AgeVlmCrossAttention):
            init.zeros_(module.gate)
            if module.sink is not None:
                init.normal_(module.sink)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in Transformers; a plain name passes over a vision tower that does not support it, see `tower_supports`."""
        tower = getattr(self.base_model, "vision_tower", None)
        plain = attn_implementation if isinstance(attn_implementation, str) else None
        if tower is not None and not tower_supports(type(tower), plain):
            attn_implementation = {"": plain, "text_config": plain}
        super().set_attn_implementation(attn_implementation, **kwargs)

    def enable_input_require_grads(self):
        """As in Transformers, for the text's embeddings alone: the tower's would keep a graph through its frozen part."""

        def require_grads(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require_grads)
        self._require_grads_hooks = [self._require_grads_hook]

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers, with an `auto_map` that names every Auto class, so that one flag loads all of them."""
        self.config.auto_map = {
            "AutoConfig": "configuration_agevlm.AgeVlmConfig",
            "AutoModel": "modeling_agevlm.AgeVlmModel",
            "AutoModelForImageTextToText": "modeling_agevlm.AgeVlmForConditionalGeneration",
            "AutoProcessor": "processing_agevlm.AgeVlmProcessor",
            "AutoImageProcessor": "image_processing_agevlm.AgeVlmImageProcessor",
        }
        super().save_pretrained(save_directory, **kwargs)


@auto_docstring(custom_intro="A Llama model with gated cross-attention blocks. A Llama checkpoint loads as it is.")
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
        # The names are LlamaModel's own, so that a Llama checkpoint loads with no renaming.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([AgeVlmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # The gated blocks by the Llama layer that each precedes. In a cache they follow the Llama layers.
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
            Visual tokens that are new in this call, each row's images one after another.
        visual_positions (`torch.Tensor` of shape `(batch_size, num_visual_tokens)`, *optional*):
            Index in the text (the cached part counted) of the token that stands for each visual token's image.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens make up each phrase whose `cross_attention_maps` are returned.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]

        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        text_positions = torch.arange(seq_length, device=inputs_embeds.device) + num_cached_tokens(cache)
        if position_ids is None:
            position_ids = text_positions.unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

        cached_positions = cached_visual_positions(cache, self.config)
        all_positions = [positions for positions in (cached_positions, visual_positions) if positions is not None]
        cross_attention_inputs = None
        if all_positions:
            if cache is not None:
                append_cross_attention_layers(cache, self.config)
            visible = torch.cat(all_positions, dim=-1)[:, None, :] <= text_positions[None, :, None]
            cross_attention_inputs = self._cross_attention_inputs(
                visible, inputs_embeds, visual_positions, map_queries
            )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        attention_maps = []
        for i, decoder_layer in enumerate(self.layers):
            if cross_attention_inputs is not None and str(i) in self.cross_attn:
                # The maps are an output of the block rather than captured on the side, so that checkpointing of either
                # kind keeps their gradient.
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

    def _cross_attention_inputs(
        self,
        visible: torch.Tensor,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
    ) -> AgeVlmCrossAttentionInputs:
        # A softmax over nothing is NaN, and so is its gradient: such rows look anywhere, and the block zeroes them.
        attend = visible | ~visible.any(-1, keepdim=True)
        if self.config.cross_attention_sink:
            attend = nn.functional.pad(attend, (0, 1), value=True)
        attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            encoder_hidden_states=inputs_embeds.new_empty((attend.shape[0], attend.shape[-1], 0)),
            and_mask_function=lambda batch_idx, head_idx, q_idx, kv_idx: attend[batch_idx, q_idx, kv_idx],
        )
        map_index = map_members = None
        if map_queries is not None:
            # Each row's tokens of any phrase come first, in order; rows with fewer are padded with tokens of no phrase.
            asked = map_queries.any(dim=1)
            map_index = asked.int().argsort(dim=-1, descending=True, stable=True)[:, : int(asked.sum(-1).max())]
            map_members = map_queries.gather(2, map_index[:, None].expand(-1, map_queries.shape[1], -1))
        return AgeVlmCrossAttentionInputs(
            visible=visible,
            attention_mask=attention_mask,
            positions=positions,
            map_index=map_index,
            map_members=map_members,
        )


@auto_docstring(custom_intro="AGE-VLM without a language modelling head: vision tower, adapter and text model.")
class AgeVlmModel(AgeVlmPreTrainedModel):
    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        tower_class = AutoModel._model_mapping[type(config.vision_config)]
        if not tower_supports(tower_class, config.vision_config._attn_implementation):
            config.vision_config._attn_implementation = "eager"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config, vision_width(self.vision_tower))
        self.language_model = AgeVlmTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "AgeVlmModel":
        """As in PyTorch, but what is frozen of the vision tower stays in evaluation mode, and so do its batch norms:
        batches of a fine-tuning are too small for statistics."""
        super().train(mode)
        if mode:
            _train_what_learns(self.vision_tower, False)
        return self

    @can_return_tuple
    @auto_docstring(custom_intro="Runs the vision tower and the adapter.")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            All images of the batch, in order.
        pixel_attention_mask (`torch.Tensor` of shape `(num_images, height, width)`, *optional*):
            1 for pixels of the image, 0 for padding around it.
        """
        tokens, grid, outputs = self.get_vision_tokens(pixel_values, **kwargs)
        visual_attention_mask = None
        if pixel_attention_mask is not None:
            # A token counts as soon as one pixel of the image lies in its cell.
            cells = nn.functional.adaptive_max_pool2d(pixel_attention_mask[:, None].float(), grid)
            visual_attention_mask = cells.flatten(1) > 0
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
        """`(N, 3, H, W)` pixels to `(N, T, vision_width)` tokens in row-major order, their rows and columns, and all of
        the tower's output."""
        height, width = pixel_values.shape[-2:]
        # A frozen tower keeps no graph, whatever asks its input embeddings for gradients.
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if isinstance(features, (list, tuple)):  # timm's `features_only`: the last of the stages asked for
            features = features[-1]
        channels = self.multi_modal_projector.layernorm.normalized_shape[0]
        if features.ndim == 4:
            if features.shape[1] != channels:  # timm models that keep channels last
                features = features.permute(0, 3, 1, 2)
            grid = (features.shape[-2], features.shape[-1])
            return features.flatten(2).transpose(1, 2), grid, outputs
        features = features[:, num_prefix_tokens(self.vision_tower) :]
        rows = round(math.sqrt(features.shape[1] * height / width))
        grid = (rows, features.shape[1] // rows)
        if grid[0] * grid[1] != features.shape[1]:
            raise ValueError(
                f"The vision tower gave {features.shape[1]} tokens for a {height}x{width} image, which is no grid of "
                "rows and columns: use a tower that keeps the image's layout."
            )
        return features, grid, outputs

    def project_vision_tokens(self, tokens: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        if grid is None or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"Image features of {tokens.shape[1]} tokens need their grid of rows and columns to go through the "
                f"adapter, got grid={grid}: keep what `get_image_features` returns."
            )
        return self.multi_modal_projector(tokens.to(self.multi_modal_projector.linear_1.weight.dtype), grid)

    def get_image_token_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """`(B, S)`, true where a token stands for an image; found by its embedding when only embeddings are given."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)

    def _place_images(
        self, features: AgeVlmImageFeatures, image_token_mask: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lays the images out by row of the batch.

        Returns `cross_attention_states` `(B, V, D)` and `visual_positions` `(B, V)`, see [`AgeVlmTextModel`].

        Raises:
            ValueError: if there are more or fewer images than image tokens.
        """
        tokens, mask = features.pooler_output, features.visual_attention_mask
        counts = image_token_mask.sum(-1)
        rows, columns = image_token_mask.nonzero(as_tuple=True)  # row-major, which is the order of the images
        cached = cached_visual_positions(cache, self.language_model.config)
        if tokens.shape[0] != rows.shape[0] and cached is not None:
            # A later turn may bring the images of the whole conversation again: those in the cache are done.
            seen = torch.tensor([row[row != NEVER].unique().numel() for row in cached], device=counts.device)
            if tokens.shape[0] == int((seen + counts).sum()):
                ends = (seen + counts).cumsum(0)
                new = torch.cat(
                    [torch.arange(end - n, end) for end, n in zip(ends.tolist(), counts.tolist(), strict=True)]
                )
                tokens = tokens[new.to(tokens.device)]
                mask = mask[new.to(mask.device)] if mask is not None else None
        if tokens.shape[0] != rows.shape[0]:
            raise ValueError(
                f"Got {tokens.shape[0]} image(s) for {rows.shape[0]} image token(s) (id {self.config.image_token_id}; "
                f"by row of the batch: {counts.tolist()}). Each image needs exactly one image token in the text, in the "
                "same order; AgeVlmProcessor puts them there."
            )
        num_images, num_tokens, width = tokens.shape
        slots = torch.arange(num_images, device=rows.device) - (counts.cumsum(0) - counts)[rows]
        shape = (image_token_mask.shape[0], int(counts.max()), num_tokens)
        image_positions = (columns + num_cached_tokens(cache))[:, None].expand(-1, num_tokens)
        if mask is not None:
            image_positions = image_positions.masked_fill(~mask.to(rows.device), NEVER)
        states = tokens.new_zeros((*shape, width)).index_put((rows, slots), tokens)
        positions = rows.new_full(shape, NEVER).index_put((rows, slots), image_positions)
        return states.flatten(1, 2), positions.flatten(1, 2)

    def _blank_image(self, batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """One visual token a row that nobody may see, made by every module that images go through.

        A text-only batch in training must still touch each trainable parameter, or data-parallel workers wait for
        gradients that never come. What it adds, and the gradients it gives, are exactly zero.
        """
        channels = self.multi_modal_projector.layernorm.normalized_shape[0]
        if any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            # A convolutional tower takes any size; others say theirs in their configuration.
            size = getattr(self.config.vision_config, "image_size", None) or 64
            tokens, _, _ = self.get_vision_tokens(torch.zeros(1, 3, size, size, device=device))
            tokens = tokens.mean(1, keepdim=True)
        else:
            tokens = torch.zeros(1, 1, channels, device=device)
        states = self.project_vision_tokens(tokens, (1, 1)).expand(batch_size, -1, -1)
        return states, torch.full((batch_size, 1), NEVER, device=device)

    def _check_no_image_token(self, input_ids: torch.Tensor | None, cache: Cache | None) -> None:
        # Only at the start of a text: a cached one has had its images, and drafted tokens may be any. Not while
        # compiling, where looking at a value breaks the graph.
        if input_ids is None or is_torchdynamo_compiling():
            return
        if num_cached_tokens(cache) == 0 and (num_tokens := int((input_ids == self.config.image_token_id).sum())):
            raise ValueError(
                f"Got {num_tokens} image token(s) (id {self.config.image_token_id}) and no image: pass `pixel_values`, "
                "or take the image token out of the text."
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
        pixel_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        map_queries: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, AgeVlmImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmModelOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*):
            All images of the batch, in the order of their image tokens, rows of the batch one after another. A row may
            have none, one or many. With a cache, either the new images alone or those of the whole conversation.
        pixel_attention_mask (`torch.Tensor` of shape `(num_images, height, width)`, *optional*):
            1 for pixels of the image, 0 for padding around it. Visual tokens that cover only padding are not attended.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens make up each phrase whose `cross_attention_maps` are returned.
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
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, pixel_attention_mask, return_dict=True)

        cross_attention_states = visual_positions = None
        if features is not None:
            if features.pooler_output is None:  # a frozen tower's features, computed before
                pooler_output = self.project_vision_tokens(features.last_hidden_state, features.grid)
                # A new object: the caller's is good for the next step as well, when the adapter has learnt.
                features = AgeVlmImageFeatures(**{**features, "pooler_output": pooler_output})
            image_token_mask = self.get_image_token_mask(input_ids, inputs_embeds)
            cross_attention_states, visual_positions = self._place_images(features, image_token_mask, cache)
            cross_attention_states = cross_attention_states.to(inputs_embeds.device, inputs_embeds.dtype)
        else:
            self._check_no_image_token(input_ids, cache)
            if self.training and torch.is_grad_enabled():
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


def _train_what_learns(module: nn.Module, parent_learns: bool) -> None:
    """Sets the mode of each module below: training where it holds parameters that learn, or none and its parent learns."""
    parameters = list(module.parameters())
    learns = any(parameter.requires_grad for parameter in parameters) if parameters else parent_learns
    module.training = learns and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    for child in module.children():
        _train_what_learns(child, learns)


def vision_width(vision_tower: PreTrainedModel) -> int:
    """Channels of the tokens that a vision tower gives.

    Raises:
        ValueError: if neither the timm model nor the configuration says.
    """
    if (timm_model := getattr(vision_tower, "timm_model", None)) is not None:
        if vision_tower.features_only:
            return timm_model.feature_info.channels()[-1]
        return timm_model.num_features
    config = vision_tower.config
    width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"Cannot tell the width of {type(vision_tower).__name__}'s features: its configuration has neither "
            "`hidden_sizes` nor `hidden_size`. Use a timm model or a ConvNext, ConvNextV2 or DINOv3-ConvNeXt checkpoint."
        )
    return width


def tower_supports(tower_class: type[PreTrainedModel], attn_implementation: str | None) -> bool:
    """Whether a vision tower takes an attention implementation.

    Convolutional towers have no attention and declare support of none, and Transformers refuses to build them with one
    that was asked for the whole model: such a request is for the text model then.
    """
    flags = {
        "sdpa": "_supports_sdpa",
        "flex_attention": "_supports_flex_attn",
        "flash_attention": "_supports_flash_attn",
    }
    return all(getattr(tower_class, flag) for name, flag in flags.items() if name in (attn_implementation or ""))


def num_prefix_tokens(vision_tower: PreTrainedModel) -> int:
    """How many of a vision tower's tokens stand before those of the image grid (class token, registers)."""
    if (timm_model := getattr(vision_tower, "timm_model", None)) is not None:
        return getattr(timm_model, "num_prefix_tokens", 0)
    # Transformers' own towers that give a token sequence put one class token first, and registers where they have any.
    return 1 + (getattr(vision_tower.config, "num_register_tokens", None) or 0)


@auto_docstring(custom_intro="AGE-VLM with a language modelling head: image and text to text.")
class AgeVlmForConditionalGeneration(AgeVlmPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.model = AgeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # A generated image token would stand for an image that is not there.
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
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | AgeVlmImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            All images of the batch, in order.
        pixel_attention_mask (`torch.Tensor` of shape `(num_images, height, width)`, *optional*):
            1 for pixels of the image, 0 for padding around it.
        """
        return self.model.get_image_features(pixel_values, pixel_attention_mask, **kwargs)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
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
            All images of the batch, in the order of their image tokens, rows of the batch one after another. A row may
            have none, one or many. With a cache, either the new images alone or those of the whole conversation.
        pixel_attention_mask (`torch.Tensor` of shape `(num_images, height, width)`, *optional*):
            1 for pixels of the image, 0 for padding around it. Visual tokens that cover only padding are not attended.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Labels for computing the language modelling loss, in `[0, ..., vocab_size]` or -100 to be ignored.
        map_queries (`torch.Tensor` of shape `(batch_size, num_phrases, sequence_length)`, *optional*):
            Which tokens make up each phrase whose `cross_attention_maps` are returned.

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
            pixel_attention_mask=pixel_attention_mask,
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

    # `inputs_embeds` is named because Transformers looks for it here before it generates from embeddings.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def prepare_inputs_for_generation(self, input_ids, cache=None, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, cache=cache, inputs_embeds=inputs_embeds, **kwargs)
        # Transformers takes no call of a draft model for the first, and would leave its images out. A static cache serves
        # no draft, and comparing its length, a tensor, would make the host wait at every token.
        length = cache.get_seq_length() if cache is not None else None
        if isinstance(length, int) and length == 0:
            inputs.setdefault("mm_encoder_outputs", kwargs.get("mm_encoder_outputs"))
        return inputs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        has_images = model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs")
        if has_images and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "Chunked prefill cuts image features by image token, which fits models with one token a feature. "
                "AGE-VLM has one token an image: pass `prefill_chunk_size=None`, the prompt is short anyway."
            )
        pixels = {name: model_kwargs.get(name) for name in ("pixel_values", "pixel_attention_mask")}
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        if pixels["pixel_values"] is not None:
            model_kwargs["mm_encoder_outputs"]["pixels"] = pixels  # for a draft model
        return model_kwargs

    def _get_candidate_generator(self, *args, **kwargs):
        """Gives a draft model that sees images its own features of them; Transformers hands it this model's."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        draft, encoded = kwargs.get("assistant_model"), kwargs["model_kwargs"].get("mm_encoder_outputs")
        if draft is not None and draft.config.model_type == self.config.model_type and encoded:
            if "pixels" in encoded:
                features = draft.get_image_features(**encoded["pixels"], return_dict=True)
            else:  # features of a tower that both share, computed before
                features = AgeVlmImageFeatures(**{**encoded["image"], "pooler_output": None})
            generator.assistant_kwargs["mm_encoder_outputs"] = {"image": features}
        return generator

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """Repeats a row's images together with the row (for beams), where Transformers counts one token a feature."""
        features = mm_encoder_output.get("image")
        if features is None:
            return mm_encoder_output
        only_embeds = input_ids is None or input_ids.numel() == 0
        counts = self.model.get_image_token_mask(None if only_embeds else input_ids, inputs_embeds).sum(-1).tolist()
        if sum(counts) != features.pooler_output.shape[0]:
            raise ValueError(
                f"Got {features.pooler_output.shape[0]} image(s) for {sum(counts)} image token(s) in the prompts (by row "
                f"of the batch: {counts}). Beam search and several return sequences need every image of the conversation."
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
