# SPDX-License-Identifier: Apache-2.0
"""Attention guidance: teaching the cross-attention maps where to look (paper, section on mask guidance)."""

import torch


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
