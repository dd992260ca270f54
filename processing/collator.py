# SPDX-License-Identifier: Apache-2.0
"""From rows to batches: conversations with images and grounded phrases to model inputs, labels and guidance targets."""

import numpy as np
import torch
from torch import nn

from .image_processing_agevlm import AgeVlmImageProcessorMixin


def mask_coverage(mask: np.ndarray, grid: tuple[int, int], image_processor: AgeVlmImageProcessorMixin) -> torch.Tensor:
    """How much of each visual token's cell a mask covers, through exactly the geometry the image went through.

    Args:
        mask: bool `(height, width)`, of the image before any processing.
        grid: rows and columns of the visual tokens.
        image_processor: the one that makes `pixel_values` of the image.

    Returns:
        float32 `(rows * columns,)`, each in [0, 1].
    """
    size = image_processor.size
    height, width = image_processor.get_resized_size(*mask.shape)
    coverage = torch.from_numpy(mask.astype(np.float32))[None, None]
    coverage = nn.functional.interpolate(coverage, (height, width), mode="area")
    coverage = nn.functional.pad(coverage, (0, size["width"] - width, 0, size["height"] - height))
    return nn.functional.adaptive_avg_pool2d(coverage, grid).flatten()
