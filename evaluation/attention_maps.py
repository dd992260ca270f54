# SPDX-License-Identifier: Apache-2.0
"""Where a phrase looks: its cross-attention maps, on the image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmImageFeatures
from ..processing.processing_agevlm import AgeVlmProcessor


def find_phrase(text: str, phrase: str) -> tuple[int, int]:
    """Characters `(start, end)` of the last place in `text` that reads `phrase`, whatever its case.

    Raises:
        ValueError: if `text` does not contain it.
    """
    start = text.lower().rfind(phrase.lower())
    if start < 0 or not phrase:
        raise ValueError(f"The phrase '{phrase}' does not occur in the text '{text}': choose words of it.")
    return start, start + len(phrase)


@torch.no_grad()
def phrase_maps(
    model: AgeVlmForConditionalGeneration,
    processor: AgeVlmProcessor,
    text: str,
    image: Image.Image,
    spans: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Cross-attention maps of phrases in a text with one image, laid on the image.

    Args:
        text: with its image token, as the chat template renders it.
        image: the image as it is, before any resizing.
        spans: characters `(start, end)` of each phrase in `text`.

    Returns:
        float32 `(blocks, phrases, rows, columns)`: attention on the visual tokens that show some of the image, the
        padding cut away. Sums to 1 over rows and columns for a phrase after the image.

    Raises:
        ValueError: if a span lies outside the text.
    """
    inputs = processor(images=image, text=text, return_offsets_mapping=True, return_tensors="pt")
    map_queries = processor.get_map_queries(inputs.pop("offset_mapping"), [list(spans)], text=[text])
    inputs = inputs.to(model.device)
    features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("pixel_attention_mask", None))
    outputs = model.model(
        **inputs, mm_encoder_outputs={"image": features}, map_queries=map_queries.to(model.device), use_cache=False
    )
    return crop_to_image(outputs.cross_attention_maps[:, 0], features, processor, image.size)


def crop_to_image(
    maps: torch.Tensor, features: AgeVlmImageFeatures, processor: AgeVlmProcessor, image_size: tuple[int, int]
) -> np.ndarray:
    """Maps `(..., num_visual_tokens)` of one image as `(..., rows, columns)`, without the tokens that show only padding.

    `image_size` is the image's `(width, height)` in pixels, as PIL gives it.
    """
    if features.grid is None:
        raise ValueError("The image features do not say their grid: keep what `get_image_features` returns.")
    rows, columns = features.grid
    size = processor.image_processor.size
    height, width = processor.image_processor.get_resized_size(image_size[1], image_size[0])
    maps = maps.unflatten(-1, (rows, columns))
    # The image stands at the top left; a cell that it only touches is still looked at.
    maps = maps[..., : -(-height * rows // size["height"]), : -(-width * columns // size["width"])]
    return maps.float().cpu().numpy()


def draw_heatmaps(
    image: Image.Image, maps: np.ndarray, titles: Sequence[str], path: str | Path, caption: str | None = None
) -> None:
    """Writes a PNG with the image, and the image under each map `(n, rows, columns)`, side by side.

    Each map has its own colour scale, from no attention to its maximum, so that faint maps can be read too; the number
    in the title says how much of the attention the strongest cell holds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(2.6 * (len(maps) + 1), 3.1), layout="constrained")
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=9)
    grey = image.convert("L")
    for axis, attention, title in zip(axes[1:], maps, titles, strict=True):
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, image.width, image.height, 0))
        axis.imshow(
            attention,
            cmap="inferno",
            vmin=0,
            alpha=0.6,
            interpolation="bilinear",
            extent=(0, image.width, image.height, 0),
        )
        axis.set_title(f"{title} (max {attention.max():.2f})", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    if caption:
        figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def block_titles(model: AgeVlmForConditionalGeneration) -> list[str]:
    """A name for each cross-attention block, by the Llama layer that it stands before."""
    return [f"before layer {layer}" for layer in model.config.text_config.cross_attention_llama_layers]
