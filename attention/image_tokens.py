# SPDX-License-Identifier: Apache-2.0
"""Which keys of a model's attention show the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ImageKeys:
    """Which keys show the image.

    Attributes:
        keys: bool `(batch, keys)`. Keys are the tokens of the sequence, or the visual tokens of a model with cross-attention.
        readers: bool `(batch, sequence)`, the tokens that may attend to an image; None where the attention mask says so.
    """

    keys: torch.Tensor
    readers: torch.Tensor | None = None


def image_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> ImageKeys:
    """Finds the keys that show the image, among the inputs of a model.

    Args:
        model: an image-text-to-text model of Transformers, with or without its head.
        inputs: what the model is called with.

    Raises:
        ValueError: if the model has no image token, or the inputs do not tell; says what is missing.
    """
    if has_cross_attention(model):
        return _visual_tokens(model, inputs)
    token = getattr(model.config, "image_token_id", None)
    name = type(model).__name__
    if token is None:
        raise ValueError(
            f"{name} has no `image_token_id` in its configuration, so the tokens that show the image are not known: pass `keys`."
        )
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            f"{name} was called without `input_ids`, which tell the tokens that show the image: pass `keys`."
        )
    return ImageKeys(ids == token)


def has_cross_attention(model: PreTrainedModel) -> bool:
    """Whether text attends to images in layers of its own, as in Mllama, rather than among the tokens of the sequence."""
    return bool(getattr(model.config.get_text_config(), "cross_attention_layers", None))


def _visual_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> ImageKeys:
    """Those of Mllama: of each tile of each image a class token, which has no place, and the patches. Padding has no tile."""
    tiles, mask = inputs.get("aspect_ratio_mask"), inputs.get("cross_attention_mask")
    if tiles is None or mask is None:
        missing = "aspect_ratio_mask" if tiles is None else "cross_attention_mask"
        # Without the latter Transformers' SDPA takes the attention to images for causal: the first token sees the first patch alone.
        raise ValueError(
            f"{type(model).__name__} was called without `{missing}`, which tells the tiles that a token sees: call it with the outputs of its "
            "processor."
        )
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    keys = tiles.bool()[..., None].repeat_interleave(patches, dim=-1)  # (batch, images, tiles, tokens of a tile)
    keys[..., 0] = False
    # Tokens that may see no tile attend to all of them: Mllama takes their output out afterwards.
    return ImageKeys(keys.flatten(1), mask.bool().flatten(2).any(-1))
