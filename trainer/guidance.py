# SPDX-License-Identifier: Apache-2.0
"""Attention guidance: teaching the cross-attention maps where to look (paper, section on mask guidance)."""

import numpy as np
import torch
from torch import nn

from ..processing.image_processing_agevlm import AgeVlmImageProcessorMixin


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


def dice_loss(maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Soft Dice between attention maps and mask coverages, by phrase.

    A map sums to 1 while a mask sums to its area, so that the plain Dice of a large object could never come near 0: maps
    are scaled by their target's area first, and cut off at 1 where the attention is denser than the mask can be.

    Args:
        maps: probabilities `(..., num_visual_tokens)`, such as `cross_attention_maps`.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: keeps the quotient finite.

    Returns:
        `(...)`, from 0 where the attention is the mask to 1 where they do not meet.
    """
    area = targets.sum(-1)
    scaled = (maps * area[..., None]).clamp(max=1.0)
    return 1 - (2 * (scaled * targets).sum(-1) + eps) / (scaled.sum(-1) + area + eps)
