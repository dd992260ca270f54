# SPDX-License-Identifier: Apache-2.0
"""Attention guidance: it trains cross-attention maps to match what phrases name (paper, section on mask guidance).

Shapes: `maps` are `cross_attention_maps` `(blocks, B, P, V)`, `targets` `(B, P, V)` say how much of each visual token's
cell a phrase's object covers, in [0, 1]; for `B` rows of the batch, `P` phrases a row has at most and `V` visual tokens.
Rows have different numbers of phrases; the target of a slot without one covers nothing, and so does the target of an
absent phrase, whose object is not in the image.

Losses are computed in the maps' own type, which is float32 whatever the model's.
"""

import math
from collections.abc import Callable
from functools import partial

import torch


def scale_to_area(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Maps `(..., V)` on the scale of their targets, which broadcast to them.

    A map sums to 1 while a mask sums to its area: maps are scaled by their target's area, and cut off at 1 where the
    attention is denser than the mask can be.
    """
    return (maps * targets.sum(-1, keepdim=True)).clamp(max=1.0)


def dice_loss(maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-3, *, rescale: bool = True) -> torch.Tensor:
    """Soft Dice (V-Net, arXiv 1606.04797) between attention maps and mask coverages, by phrase.

    Args:
        maps: probabilities `(..., num_visual_tokens)`, such as `cross_attention_maps`.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: keeps the quotient finite.
        rescale: compare the map on the scale of the mask (`scale_to_area`). False compares it unscaled: the loss of an object
            of `n` tokens is then `(n - 1) / (n + 1)` at best.

    Returns:
        `(...)`, from 0 where the attention is a mask of whole tokens to 1 where they do not meet; exactly 0, and with a
        gradient of exactly 0, where the target covers nothing and maps are rescaled.
    """
    scaled = scale_to_area(maps, targets) if rescale else maps
    return 1 - (2 * (scaled * targets).sum(-1) + eps) / (scaled.sum(-1) + targets.sum(-1) + eps)


def log_dice_loss(
    maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-5, *, rescale: bool = True
) -> torch.Tensor:
    """The negative logarithm of the Dice coefficient, by phrase.

    With `p` the attention on the object, Dice has a gradient of about `p (1 - p)` behind a softmax, which is close to 0 for a
    map that looks elsewhere. This loss divides it by `p`, so that a phrase that is wrong learns as fast as one that is nearly right.

    Args:
        maps: probabilities `(..., num_visual_tokens)`.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: keeps the quotient of Dice and the logarithm finite. Smaller than that of [`dice_loss`], so that objects smaller
            than a visual token are taught as well.
        rescale: as for [`dice_loss`].

    Returns:
        `(...)`, in nats: 0 where the attention is a mask of whole tokens; exactly 0, and with a gradient of exactly 0, where
        the target covers nothing and maps are rescaled.
    """
    coefficient = 1 - dice_loss(maps, targets, eps, rescale=rescale)
    return math.log1p(eps) - (coefficient + eps).log()


def bce_loss(maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-4, *, rescale: bool = True) -> torch.Tensor:
    """Binary cross-entropy between attention maps and mask coverages, by phrase: its mean over the visual tokens that the
    phrase may see, less the targets' own entropy.

    That entropy is the cross-entropy where the attention equals the mask: 0 for tokens that are covered wholly or
    not at all. It has no gradient, and without it the minimum of the loss would differ from mask to mask.

    Args:
        maps: probabilities `(..., num_visual_tokens)`, exactly 0 for tokens that are hidden from the phrase.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: added in the logarithms, so that they and their gradients, at most `1 / eps` a token, are finite. Not smaller: a
            scaled map that comes near 1 where the target is below has a gradient of that size.
        rescale: as for [`dice_loss`].

    Returns:
        `(...)`, in nats: 0 where the attention is the mask; exactly 0, and with a gradient of exactly 0, where the target
        covers nothing and maps are rescaled.
    """
    scaled = scale_to_area(maps, targets) if rescale else maps
    divergence = _rel_entr(targets, scaled, eps) + _rel_entr(1 - targets, 1 - scaled, eps)
    # Padding, later images and what fills up rows with fewer images have neither attention nor target, and add exactly 0.
    seen = ((maps > 0) | (targets > 0)).sum(-1)
    return divergence.sum(-1) / seen.clamp(min=1)


def kl_loss(maps: torch.Tensor, targets: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kullback-Leibler divergence of attention maps from masks that are scaled to sum to 1, by phrase.

    Args:
        maps: probabilities `(..., num_visual_tokens)`.
        targets: coverages in [0, 1], of a shape that broadcasts to that of `maps`.
        eps: added in the logarithms, so that they and their gradients are finite; small against a map that is spread over
            thousands of tokens.

    Returns:
        `(...)`, in nats: from 0 where the attention is the mask to `-log(eps)` where they do not meet; exactly 0, and with
        a gradient of exactly 0, where the target covers nothing.
    """
    area = targets.sum(-1, keepdim=True)
    return _rel_entr(targets / area.clamp(min=torch.finfo(area.dtype).tiny), maps, eps).sum(-1)


def _rel_entr(p: torch.Tensor, q: torch.Tensor, eps: float) -> torch.Tensor:
    """`p log(p / q)`, exactly 0 where `p` is 0 or `q` is `p`."""
    return p * ((p + eps).log() - (q + eps).log())


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dice": dice_loss,
    "log_dice": log_dice_loss,
    "bce": bce_loss,
    "kl": kl_loss,
}
"""Guidance losses by name. Dice is the paper's."""


def resolve_loss(name: str, rescale: bool = True) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A guidance loss of [`LOSSES`], of maps that are rescaled to their targets' area or taken as they are.

    Raises:
        ValueError: if there is no such loss, or it has no form without rescaling.
    """
    if name not in LOSSES:
        raise ValueError(f"There is no guidance_loss '{name}': choose one of {', '.join(LOSSES)}.")
    if rescale:
        return LOSSES[name]
    if name == "kl":
        raise ValueError(
            "guidance_loss='kl' scales masks to the maps, which stay as they are: leave rescale_maps out, or choose dice, log_dice or bce."
        )
    return partial(LOSSES[name], rescale=False)


def guidance_losses(
    maps: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = dice_loss,
    named: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guidance loss of each phrase, averaged over the blocks.

    It is not averaged over phrases: a trainer that accumulates gradients, or uses several devices, divides by the number of
    phrases in all batches of the step.

    The rest of a map's sum to 1 is in the attention sink, which counts as one more visual token. No object covers it, and
    it is the whole target of a phrase whose object is not in the image.

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.
        loss: of [`resolve_loss`].
        named: bool `(B, P)`, which slots hold a phrase; by default those whose target covers something. Others that are
            named here are phrases whose object is not in the image, which need blocks with a sink.

    Returns:
        The losses `(B, P)`, exactly 0 and with a gradient of exactly 0 in slots without a phrase, and which slots hold one,
        bool `(B, P)`.
    """
    there = (targets > 0).any(-1)
    named = there if named is None else named
    if (absent := named & ~there).any():
        sink = (1 - maps.sum(-1, keepdim=True)).clamp(min=0.0)
        maps = torch.cat([maps, sink], dim=-1)
        targets = torch.cat([targets, absent[..., None].to(targets)], dim=-1)
    return loss(maps, targets).mean(0).masked_fill(~named, 0.0), named


def pointing_cells(targets: torch.Tensor) -> torch.Tensor:
    """The visual tokens that count as a phrase's object: covered by it, and at least half as much as the token that it
    covers most.

    Args:
        targets: `(..., V)`.

    Returns:
        bool `(..., V)`, False throughout for a target that covers nothing.
    """
    if targets.shape[-1] == 0:  # no image in the batch
        return targets > 0
    return (targets > 0) & (targets >= targets.amax(-1, keepdim=True) / 2)


@torch.no_grad()
def pointing_hits(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether each phrase points at its object (after the pointing game, arXiv 1608.00507).

    It does if the token that it attends most, on average over the blocks, is one of the object's [`pointing_cells`].

    Training, evaluation and benchmarks share this definition. It judges cells because attention has no finer resolution: the
    middle of the strongest cell says nothing about an object that is smaller than a cell, or that covers another part of it.
    The half takes the place of the pointing game's tolerance of 15 pixels. [`pointing_chances`] follow from the same cells.

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.

    Returns:
        bool `(B, P)`, False for phrases that attend nothing and in slots without a phrase.
    """
    cells = pointing_cells(targets)
    if targets.shape[-1] == 0:
        return cells.any(-1)
    attention, strongest = maps.mean(0).max(-1)
    return (attention > 0) & cells.gather(-1, strongest[..., None])[..., 0]


@torch.no_grad()
def pointing_chances(target: torch.Tensor, objects: torch.Tensor, visible: torch.Tensor) -> tuple[float, float]:
    """How often a map that ignores what is asked would hit ([`pointing_hits`]).

    Args:
        target: `(V,)`, the coverage of the object that is asked for.
        objects: `(n, V)`, the coverage of each object in the image.
        visible: bool `(V,)`, the tokens that show some of the image rather than padding.

    Returns:
        The chance of a map that points anywhere in the image, which is the object's share of the image's cells; and of one
        that points at some object of the image, which is the object's share of the cells of all objects.
    """
    cells = pointing_cells(target)
    in_image, on_objects = visible | cells, pointing_cells(objects).any(0) | cells
    hits = float(cells.sum())
    return hits / max(1, int(in_image.sum())), hits / max(1, int(on_objects.sum()))


@torch.no_grad()
def attention_iou(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft intersection over union (Ruzicka similarity, `sum(min) / sum(max)`) of attention and mask, by phrase.

    The attention is the maps' average over the blocks, rescaled (`scale_to_area`) whatever the guidance loss.

    Args:
        maps: `(blocks, B, P, V)`.
        targets: `(B, P, V)`.

    Returns:
        `(B, P)` from 0 where they do not meet to 1 where the attention is the mask; 0 in slots without a phrase.
    """
    attention = scale_to_area(maps.mean(0), targets)
    union = torch.maximum(attention, targets).sum(-1)
    return torch.minimum(attention, targets).sum(-1) / union.clamp(min=torch.finfo(union.dtype).tiny)
