# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose outputs vary: weights large enough that every token, every image and every block matters."""

import torch
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from agevlm import AgeVlmForConditionalGeneration
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention

VOCAB, PAD, IMAGE = 96, 0, 90
IMAGE_SIZE, GRID = 32, (4, 4)
NUM_VISUAL = GRID[0] * GRID[1]


def tiny_llama(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """Six layers, four heads in two groups, no end of text; `kwargs` go to its configuration."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**defaults, **kwargs})).eval()
    if not model.config.tie_word_embeddings:
        # Otherwise the context decides alone, and greedy decoding falls into repeating one token.
        model.model.embed_tokens.weight.data *= 4
    return model


def tiny_vision(kind: str = "convnext", seed: int = 1) -> ConvNextModel | TimmWrapperModel:
    """A tower that turns an image of 32x32 pixels into 4x4 tokens."""
    torch.manual_seed(seed)
    if kind == "timm":
        config = TimmWrapperConfig(
            architecture="convnext_femto",
            do_pooling=False,
            model_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12), "output_stride": 8},
        )
        return TimmWrapperModel(config).eval()
    config = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        initializer_range=0.3,
        layer_scale_init_value=0.3,
        image_size=IMAGE_SIZE,
    )
    return ConvNextModel(config).eval()


@torch.no_grad()
def open_gates(model: torch.nn.Module, gate: float = 1.0, seed: int = 2) -> torch.nn.Module:
    """Opens every block's gate, and makes the fresh modules' norms and biases anything but ones and zeros."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name or "cross_attn" in name:
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, AgeVlmCrossAttention):
            module.gate.fill_(gate)
    return model


def tiny_age_vlm(gate: float = 1.0, seed: int = 0, vision: str = "convnext", llama: dict | None = None, **kwargs):
    """An AGE-VLM from the parts above, with open gates. `kwargs` go to `from_parts`, `llama` to the Llama."""
    text_model, vision_model = tiny_llama(seed, **(llama or {})), tiny_vision(vision, seed + 1)
    torch.manual_seed(seed + 2)
    model = AgeVlmForConditionalGeneration.from_parts(text_model, vision_model, **{"image_token_id": IMAGE, **kwargs})
    return open_gates(model, gate, seed + 3)


def images(count: int, seed: int = 0, size: int = IMAGE_SIZE) -> torch.Tensor:
    """`(count, 3, size, size)` images that differ from each other and from cell to cell."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int, image_at: tuple[int, ...] = ()) -> torch.Tensor:
    """`(length,)` random token ids, none of them special, with the image token where it is asked for."""
    ids = torch.randint(2, IMAGE, (length,), generator=torch.Generator().manual_seed(seed))
    ids[list(image_at)] = IMAGE
    return ids


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` of a batch of rows of any lengths."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


ROWS = [text(9, 0), text(12, 1, (3,)), text(10, 2, (1, 5))]  # without, with one and with two images
COUNTS = [0, 1, 2]


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    """The three rows above with their images."""
    return {**pad(ROWS, side), "pixel_values": images(sum(COUNTS))}
