# SPDX-License-Identifier: Apache-2.0
"""Attention guidance: teaching the cross-attention maps where to look (paper, section on mask guidance).

Shapes: `maps` are `cross_attention_maps` `(blocks, B, P, V)`, `targets` `(B, P, V)` say how much of each visual token's
cell a phrase's object covers, in [0, 1]; for `B` rows of the batch, `P` phrases a row has at most and `V` visual tokens.
A slot whose target covers nothing holds no phrase: rows have different numbers of them.
"""

import torch


def scale_to_area(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Maps `(..., V)` on the scale of their targets, which broadcast to them.

    A map sums to 1 while a mask sums to its area: maps are scaled by their target's area, and cut off at 1 where the
    attention is denser than the mask can be.
    """
    return (maps * targets.sum(-1, keepdim=True)).clamp(max=1.0)


def dice_loss(maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Soft Dice (V-Net, arXiv 1606.04797) between attention maps and mask coverages, by phrase.

    Without the scaling of `scale_to_area` the loss of a large object could never come near 0.

    Args:
        maps: probabilities `(..., num_visual_tokens)`, such as `cross_attention_maps`.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: keeps the quotient finite.

    Returns:
        `(...)`, from 0 where the attention is the mask to 1 where they do not meet; exactly 0, and with a gradient of
        exactly 0, where the target covers nothing.
    """
    scaled = scale_to_area(maps, targets)
    return 1 - (2 * (scaled * targets).sum(-1) + eps) / (scaled.sum(-1) + targets.sum(-1) + eps)


def guidance_losses(maps: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The guidance loss of each phrase: its Dice, averaged over the blocks.

    Not averaged over phrases: whoever accumulates gradients, or trains on several devices, divides by the number of
    phrases in all of the step's batches.

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.

    Returns:
        The losses `(B, P)`, exactly 0 in slots without a phrase, and which slots hold one, bool `(B, P)`.
    """
    return dice_loss(maps, targets).mean(0), (targets > 0).any(-1)


@torch.no_grad()
def pointing_hits(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether each phrase points at its object (after the pointing game, arXiv 1608.00507).

    It does when the token that it attends most, on average over the blocks, lies on the object: covered at least half as
    much as the token that the object covers most, so that objects smaller than a token can be hit as well.

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.

    Returns:
        bool `(B, P)`, False for phrases that attend nothing and in slots without a phrase.
    """
    if targets.shape[-1] == 0:  # no image in the batch
        return (targets > 0).any(-1)
    attention, strongest = maps.mean(0).max(-1)
    coverage = targets.gather(-1, strongest[..., None])[..., 0]
    return (attention > 0) & (coverage > 0) & (coverage >= targets.amax(-1) / 2)


@torch.no_grad()
def attention_iou(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft intersection over union (Ruzicka similarity, `sum(min) / sum(max)`) of attention and mask, by phrase.

    The attention is the maps' average over the blocks, scaled as for the Dice loss (`scale_to_area`).

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.

    Returns:
        `(B, P)` from 0 where they do not meet to 1 where the attention is the mask; 0 in slots without a phrase.
    """
    attention = scale_to_area(maps.mean(0), targets)
    union = torch.maximum(attention, targets).sum(-1)
    return torch.minimum(attention, targets).sum(-1) / union.clamp(min=torch.finfo(union.dtype).tiny)
