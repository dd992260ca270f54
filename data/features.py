# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen vision tower, computed once."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.progress import Progress
from transformers import PreTrainedModel

from ..modeling_agevlm.modeling_agevlm import AgeVlmImageFeatures
from ..processing.processing_agevlm import AgeVlmProcessor

if TYPE_CHECKING:
    from datasets import Dataset


def scene_images(dataset: "Dataset") -> dict[int, Image.Image]:
    """Each scene's image, by the scene's number."""
    first: dict[int, int] = {}
    for row, scene in enumerate(dataset["scene"]):
        first.setdefault(scene, row)
    return {scene: dataset[row]["images"][0].convert("RGB") for scene, row in first.items()}


@torch.no_grad()
def image_features(
    model: PreTrainedModel,
    processor: AgeVlmProcessor,
    images: Iterable[Image.Image],
    batch_size: int = 16,
    progress: str | None = None,
) -> AgeVlmImageFeatures:
    """The vision tower's tokens of many images, computed once; the adapter is left to the model's forward.

    Give rows of the result ([`select_features`]) to the model as `mm_encoder_outputs={"image": ...}`.
    """
    images = list(images)
    parts: list[Any] = []
    # Channels last is several times faster for depthwise convolutions on CPUs, and changes no value's meaning.
    model.model.vision_tower.to(memory_format=torch.channels_last)
    with Progress(disable=progress is None) as bar:
        for start in bar.track(range(0, len(images), batch_size), description=progress or ""):
            inputs = processor.image_processor(images[start : start + batch_size], return_tensors="pt")
            pixels = inputs["pixel_values"].to(model.device, memory_format=torch.channels_last)
            parts.append(
                model.model.get_image_features(pixels, pixel_attention_mask=inputs.get("pixel_attention_mask"))
            )
    masks = [part.visual_attention_mask for part in parts]
    return AgeVlmImageFeatures(
        last_hidden_state=torch.cat([part.last_hidden_state for part in parts]),
        visual_attention_mask=None if masks[0] is None else torch.cat(masks),
        grid=parts[0].grid,
    )


def select_features(features: AgeVlmImageFeatures, rows: list[int]) -> AgeVlmImageFeatures:
    """The tower's tokens of some of the images, in the order of `rows`."""
    mask = features.visual_attention_mask
    return AgeVlmImageFeatures(
        last_hidden_state=features.last_hidden_state[rows],
        visual_attention_mask=None if mask is None else mask[rows],
        grid=features.grid,
    )
