# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM as a model of SGLang 0.5.23: gated cross-attention from Llama layers to image tokens that lie in the cache of encoders.

SGLang keeps the keys and values of an "encoder" before those of the text, per request and per layer. A block is one more
layer of that cache. SGLang's cross-attention has no mask, so this file does what AGE-VLM's mask does by other means:

- visual tokens of padding are left out of the encoder's sequence;
- the attention sink is the last token of that sequence, with a value of zero;
- text before the image gets exactly zero from a block. So a request has one image or none.

Shapes: `T` text tokens of all requests, one after another; `V` encoder tokens of the requests whose image is new.
"""

from array import array
from collections.abc import Iterable

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaDecoderLayer
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import AutoModel

from agevlm import AgeVlmModel
from agevlm.modeling_agevlm.modeling_agevlm import (
    AgeVlmMultiModalProjector,
    AgeVlmPreTrainedModel,
    remove_pooling_head,
    vision_width,
)

# Our names -> SGLang's stacked parameter, and which part of it.
STACKED = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


class CrossAttention(nn.Module):
    """The gated block `tanh(gate) * rms(h) * CrossAttention(RMSNorm(h), visual)`, on the attention and the cache of SGLang."""

    def __init__(self, config, layer_id: int, quant_config=None, prefix: str = ""):
        super().__init__()
        workers = get_parallel().tp_size
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.num_heads = config.num_attention_heads // workers
        self.num_kv_heads = max(1, config.num_key_value_heads // workers)
        self.sizes = [self.num_heads * self.head_dim] + [self.num_kv_heads * self.head_dim] * 2
        self.layernorm = RMSNorm(config.hidden_size, eps=self.eps)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.q_norm = RMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = RMSNorm(self.head_dim, eps=self.eps)
        self.gate = nn.Parameter(torch.zeros(1))
        self.sink = nn.Parameter(torch.zeros(config.hidden_size)) if config.cross_attention_sink else None
        self.attn = RadixAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            self.num_kv_heads,
            layer_id=layer_id,
            is_cross_attention=True,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def _normalize(self, states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return norm(states.reshape(-1, self.head_dim)).view(states.shape[0], -1, self.head_dim)

    def forward(
        self, hidden_states: torch.Tensor, visual: list[torch.Tensor] | None, sees_image: torch.Tensor, forward_batch
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(T, D)`, the residual stream.
            visual: the new images, each `(tokens, D)`; None where all are in the cache.
            sees_image: bool `(T, 1)`.

        Returns:
            The update of the residual stream `(T, D)`.
        """
        query, _, _ = self.qkv_proj(self.layernorm(hidden_states))[0].split(self.sizes, dim=-1)
        query = self._normalize(query, self.q_norm)
        key = value = None
        if visual is not None:
            if self.sink is not None:  # its own row behind each image
                visual = [torch.cat([image, self.sink[None].to(image)]) for image in visual]
            _, key, value = self.qkv_proj(torch.cat(visual))[0].split(self.sizes, dim=-1)
            key = self._normalize(key, self.k_norm)
            value = value.reshape(key.shape)
            if self.sink is not None:
                ends = torch.tensor([len(image) for image in visual], device=value.device).cumsum(0) - 1
                value = value.index_fill(0, ends, 0.0)
        attended = self.attn(query, key, value, forward_batch)
        output, _ = self.o_proj(attended.reshape(hidden_states.shape[0], -1))
        rms = hidden_states.float().pow(2).mean(-1, keepdim=True).add(self.eps).sqrt()
        update = (self.gate.tanh() * output * rms).to(hidden_states.dtype)
        # Also where the attention of a request without an image has returned what is no number.
        return update.masked_fill(~sees_image, 0.0)


class DecoderLayer(LlamaDecoderLayer):
    """SGLang's Llama layer, whose residual stream is added here, because the blocks stand between the layers."""

    def __init__(self, config, layer_id: int, quant_config=None, prefix: str = ""):
        super().__init__(config, layer_id=layer_id, quant_config=quant_config, prefix=prefix, stage_boundaries=False)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch) -> torch.Tensor:
        attended = self.self_attn(
            positions=positions, hidden_states=self.input_layernorm(hidden_states), forward_batch=forward_batch
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), forward_batch)


class TextModel(nn.Module):
    """The Llama with its blocks, under the names of AGE-VLM's own text model."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, quant_config, add_prefix(f"layers.{layer}", prefix))
            for layer in range(config.num_hidden_layers)
        )
        # In the cache the blocks follow the Llama layers. They are small and are not quantized.
        self.cross_attn = nn.ModuleDict(
            {
                str(layer): CrossAttention(
                    config, config.num_hidden_layers + block, prefix=add_prefix(f"cross_attn.{layer}", prefix)
                )
                for block, layer in enumerate(config.cross_attention_llama_layers)
            }
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        visual: list[torch.Tensor] | None,
        sees_image: torch.Tensor | None,
        forward_batch,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for number, layer in enumerate(self.layers):
            if sees_image is not None and str(number) in self.cross_attn:
                block = self.cross_attn[str(number)]
                hidden_states = hidden_states + block(hidden_states, visual, sees_image, forward_batch)
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.norm(hidden_states)


class Images(AgeVlmPreTrainedModel):
    """Vision tower and adapter as they are in AGE-VLM, by Transformers or timm; each worker has them whole."""

    get_image_features = AgeVlmModel.get_image_features
    get_vision_tokens = AgeVlmModel.get_vision_tokens
    project_vision_tokens = AgeVlmModel.project_vision_tokens

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        remove_pooling_head(self.vision_tower)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config, vision_width(self.vision_tower))


class AgeVlmForConditionalGeneration(nn.Module):
    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        self.config, text = config, config.text_config
        self.images = Images(config).eval()
        self.language_model = TextModel(text, quant_config, add_prefix("language_model", prefix))
        if config.tie_word_embeddings:
            self.lm_head = self.language_model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=add_prefix("lm_head", prefix))
        self.logits_processor = LogitsProcessor(text)
        # SGLang makes its cache for these layers, where Transformers' configuration has the Llama's own number.
        self.start_layer, self.end_layer = 0, text.num_hidden_layers + len(text.cross_attention_llama_layers)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    # --- images ---

    def _visible(self, item) -> torch.Tensor:
        """Which visual tokens of an image cover a part of it, bool `(tokens,)`; without running the tower on the image."""
        height, width = item.feature.shape[-2:]
        if (height, width) not in self._grids:
            parameter = next(self.images.parameters())
            with torch.no_grad():
                blank = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
                self._grids[height, width] = self.images.get_vision_tokens(blank)[1]
        rows, columns = self._grids[height, width]
        filled = (int(side) for side in torch.as_tensor(item.image_sizes).flatten())
        row, column = (
            torch.arange(number) * side // number < size
            for number, side, size in zip((rows, columns), (height, width), filled, strict=True)
        )
        return (row[:, None] & column).flatten()

    def pad_input_ids(self, input_ids: "array[int]", mm_inputs) -> "array[int]":
        """The ids of a request behind as many ids as its image has tokens in the cache. They say which image it is."""
        (item,) = mm_inputs.mm_items
        has_sink = bool(self.config.text_config.cross_attention_sink)
        mm_inputs.num_image_tokens = int(self._visible(item).sum()) + has_sink
        return array("q", [item.pad_value]) * mm_inputs.num_image_tokens + input_ids

    @torch.no_grad()
    def _encode(self, forward_batch) -> list[torch.Tensor] | None:
        """The visual tokens `(tokens, D)` of each image that is not in the cache."""
        if forward_batch.forward_mode.is_decode() or all(forward_batch.encoder_cached):
            return None
        parameter, found = next(self.images.parameters()), []
        for cached, mm_inputs in zip(forward_batch.encoder_cached, forward_batch.mm_inputs, strict=True):
            if not cached:
                (item,) = mm_inputs.mm_items
                pixels = torch.as_tensor(item.feature).to(parameter.device, parameter.dtype)
                tokens = self.images.get_image_features(pixels, return_dict=True).pooler_output[0]
                found.append(tokens[self._visible(item).to(tokens.device)])
        return found

    def _sees_image(self, positions: torch.Tensor, forward_batch) -> torch.Tensor | None:
        """Which text tokens stand at or after their request's image, bool `(T, 1)`; None where no request has one."""
        lengths = forward_batch.encoder_lens_cpu
        if lengths is not None and not any(lengths):
            return None
        if forward_batch.forward_mode.is_decode():  # None on the host in a CUDA graph, where no value may be read
            return (forward_batch.encoder_lens != 0)[:, None]
        first = [
            mm_inputs.mm_items[0].offsets[0][0] if length else torch.iinfo(torch.long).max
            for length, mm_inputs in zip(lengths, forward_batch.mm_inputs or [None] * len(lengths), strict=True)
        ]
        counts = torch.as_tensor(forward_batch.extend_seq_lens, device=positions.device)
        return (positions >= torch.tensor(first, device=positions.device).repeat_interleave(counts))[:, None]

    # --- SGLang's interface ---

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch):
        visual, sees_image = self._encode(forward_batch), self._sees_image(positions, forward_batch)
        hidden_states = self.language_model(input_ids, positions, visual, sees_image, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint of AGE-VLM.

        Returns:
            The names of the parameters and buffers here that have got their values.

        Raises:
            ValueError: if the checkpoint has a weight that this model lacks, or lacks one of it.
        """
        here = self.state_dict(keep_vars=True)
        if self.config.tie_word_embeddings:
            del here["lm_head.weight"]
        parts: dict[str, set] = {name: set() for name in here}
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            target, part = name.removeprefix("model."), ()
            if target.startswith(("vision_tower.", "multi_modal_projector.")):
                target = f"images.{target}"
            else:
                for ours, (theirs, kind) in STACKED.items():
                    if ours in target:
                        target, part = target.replace(ours, theirs), (kind,)
            if target not in here:
                raise ValueError(f"The checkpoint has {name}, which AGE-VLM in SGLang does not have.")
            getattr(here[target], "weight_loader", default_weight_loader)(here[target], tensor, *part)
            parts[target].add(part)
        for name, found in parts.items():
            kinds = {(kind,) for theirs, kind in STACKED.values() if theirs in name and not name.startswith("images.")}
            if missing := (kinds or {()}) - found:
                raise ValueError(f"The checkpoint lacks {name}, or parts of it: {sorted(map(str, missing))}.")
        return set(parts)


EntryClass = AgeVlmForConditionalGeneration
