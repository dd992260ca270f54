# SPDX-License-Identifier: Apache-2.0
"""Guidance against its definition and a naive computation in float64, and mask geometry against the image's own."""

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from tiny_models import GRID, IMAGE_SIZE, NUM_VISUAL, images, pad, text, tiny_age_vlm
from torch.overrides import TorchFunctionMode

from agevlm import AgeVlmImageProcessor
from agevlm.attention.losses import (
    LOSSES,
    attention_iou,
    bce_loss,
    dice_loss,
    guidance_losses,
    kl_loss,
    pointing_cells,
    pointing_chances,
    pointing_hits,
    resolve_loss,
)
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention
from agevlm.processing.collator import mask_coverage

# Every loss with maps on the scale of their targets and, where it has that form, as they are.
VARIANTS = [
    ("dice", True),
    ("dice", False),
    ("log_dice", True),
    ("log_dice", False),
    ("bce", True),
    ("bce", False),
    ("kl", True),
]
every_loss = pytest.mark.parametrize(("name", "rescale"), VARIANTS)


def test_dice_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 30, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    targets = torch.rand(3, 4, 30, generator=generator, dtype=torch.float64)
    loss = dice_loss(maps, targets)
    assert loss.shape == (2, 3, 4)
    for index in np.ndindex(*loss.shape):
        a, m = maps[index].detach().numpy(), targets[index[1:]].numpy()
        a = np.minimum(a * m.sum(), 1)
        expected = 1 - (2 * (a * m).sum() + 1e-3) / (a.sum() + m.sum() + 1e-3)
        assert loss[index].item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, targets).sum(), (maps,))


def test_dice_is_by_default_what_it_was_before_there_were_others():
    """Bit by bit: in value, in gradient, and as `guidance_losses` uses it."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(3, 4, 30, generator=generator) * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    found, expected = ((3 * torch.randn(2, 3, 4, 30, generator=generator.manual_seed(1))).softmax(-1) for _ in "12")
    found.requires_grad_(), expected.requires_grad_()
    scaled = (expected * targets.sum(-1, keepdim=True)).clamp(max=1.0)
    loss = 1 - (2 * (scaled * targets).sum(-1) + 1e-3) / (scaled.sum(-1) + targets.sum(-1) + 1e-3)
    assert torch.equal(dice_loss(found, targets), loss)
    losses, _ = guidance_losses(found, targets)
    assert torch.equal(losses, loss.mean(0))
    losses.sum().backward(), loss.mean(0).sum().backward()
    assert torch.equal(found.grad, expected.grad)


def by_definition(name: str, rescale: bool, attention: list[float], mask: list[float]) -> float:
    """A phrase's loss in one block, written out in float64; tokens without attention and target are hidden."""
    area = sum(mask)
    scaled = [min(a * area, 1.0) if rescale else a for a in attention]
    if name == "dice":
        both = sum(a * m for a, m in zip(scaled, mask, strict=True))
        return 1 - (2 * both + 1e-3) / (sum(scaled) + area + 1e-3)
    if name == "log_dice":
        both = sum(a * m for a, m in zip(scaled, mask, strict=True))
        return -math.log(((2 * both + 1e-5) / (sum(scaled) + area + 1e-5) + 1e-5) / (1 + 1e-5))
    if name == "kl":
        shares = [m / area for m in mask]
        return sum(q * math.log((q + 1e-6) / (a + 1e-6)) for q, a in zip(shares, attention, strict=True))

    def cross_entropy(a: float, m: float) -> float:
        return -m * math.log(a + 1e-4) - (1 - m) * math.log(1 - a + 1e-4)

    seen = [i for i, (a, m) in enumerate(zip(attention, mask, strict=True)) if a > 0 or m > 0]
    return sum(cross_entropy(scaled[i], mask[i]) - cross_entropy(mask[i], mask[i]) for i in seen) / len(seen)


@every_loss
def test_losses_equal_their_definition(name, rescale):
    maps, targets, named = some_maps()
    hidden = (0, 4)  # padding
    scaled = (maps * targets.sum(-1, keepdim=True))[:, named]
    assert (scaled > 1).any()
    assert (scaled < 1).any()
    loss = resolve_loss(name, rescale)
    padded = [torch.nn.functional.pad(tensor, hidden) for tensor in (maps, targets)]
    padded[1][0, 0, -1] = 0.5  # covered, but so far from attention that a softmax has a zero there
    found, in_float32 = loss(*padded), loss(*(tensor.float() for tensor in padded))
    assert in_float32.dtype == torch.float32
    for block in range(len(maps)):
        for b, p in named.nonzero().tolist():
            expected = by_definition(name, rescale, padded[0][block, b, p].tolist(), padded[1][b, p].tolist())
            assert found[block, b, p].item() == pytest.approx(expected, rel=1e-10)
            assert in_float32[block, b, p].item() == pytest.approx(expected, rel=1e-4)

    def of_scores(scores: torch.Tensor) -> torch.Tensor:
        return loss(torch.nn.functional.pad(scores.softmax(-1), hidden), padded[1])[:, named]

    assert torch.autograd.gradcheck(of_scores, (maps.log().requires_grad_(),))


@pytest.mark.parametrize("rescale", [True, False])
def test_bce_and_kl_are_those_of_pytorch_less_the_entropy(rescale):
    """Where nothing is near 0 or 1, and the small number in the logarithms makes no difference."""
    functional, generator = torch.nn.functional, torch.Generator().manual_seed(0)
    maps = torch.rand(5, 12, generator=generator, dtype=torch.float64).add(0.5)
    maps = maps / maps.sum(-1, keepdim=True)
    targets = torch.rand(5, 12, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    scaled = maps * targets.sum(-1, keepdim=True) if rescale else maps
    assert scaled.max() < 0.9
    entropy = functional.binary_cross_entropy(targets, targets, reduction="none")
    expected = (functional.binary_cross_entropy(scaled, targets, reduction="none") - entropy).mean(-1)
    torch.testing.assert_close(bce_loss(maps, targets, rescale=rescale), expected, rtol=0, atol=1e-3)
    shares = targets / targets.sum(-1, keepdim=True)
    expected = functional.kl_div(maps.log(), shares, reduction="none").sum(-1)
    torch.testing.assert_close(kl_loss(maps, targets), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 4, 12])
def test_attention_spread_over_the_mask_has_no_loss_whatever_its_area(size, name):
    mask = torch.zeros(16)
    mask[:size] = 1
    loss = resolve_loss(name)
    assert loss(mask / size, mask) == pytest.approx(0, abs=1e-6)
    beside = (1 - mask) / (16 - size)
    worst = loss(beside, mask)
    assert dice_loss(beside, mask) > 0.99
    for moved in (0.1, 0.5, 0.9):
        assert 0 < loss(mask / size * (1 - moved) + beside * moved, mask) < worst


@pytest.mark.parametrize("name", ["bce", "kl"])
def test_at_coverages_between_0_and_1_cross_entropies_are_least_where_the_attention_is_the_mask(name):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(20, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    scores = mask.log().requires_grad_()
    loss = resolve_loss(name)
    least = loss(scores.softmax(-1), mask)
    least.backward()
    assert least.item() == pytest.approx(0, abs=1e-12)
    assert dice_loss(scores.detach().softmax(-1), mask) > 0.1, "and Dice is not"
    assert scores.grad.abs().max() < 1e-4
    for _ in range(50):
        moved = scores.detach() + 0.3 * torch.randn(20, generator=generator, dtype=torch.float64)
        assert loss(moved.softmax(-1), mask) > 1e-3


@pytest.mark.parametrize("size", [1, 4, 12])
def test_without_rescaling_a_large_object_is_never_without_loss(size):
    mask = torch.zeros(16, dtype=torch.float64)
    mask[:size] = 1
    assert dice_loss(mask / size, mask, 0, rescale=False) == pytest.approx((size - 1) / (size + 1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # and that is the least
        maps = (4 * torch.randn(16, generator=generator, dtype=torch.float64) + 4 * mask).softmax(-1)
        assert dice_loss(maps, mask, 0, rescale=False) >= (size - 1) / (size + 1)


@every_loss
def test_an_empty_mask_gives_no_nan(name, rescale):
    maps = torch.full((16,), 1 / 16, requires_grad=True)
    resolve_loss(name, rescale)(maps, torch.zeros(16)).backward()
    assert maps.grad.isfinite().all()


@every_loss
def test_attention_moves_toward_the_mask(name, rescale):
    scores = torch.zeros(16, requires_grad=True)
    mask = torch.zeros(16)
    mask[5:8] = 1
    resolve_loss(name, rescale)(scores.softmax(-1), mask).backward()
    assert (scores.grad[5:8] < 0).all()
    assert (scores.grad[:5] > 0).all()
    assert (scores.grad[8:] > 0).all()


@every_loss
def test_gradients_are_finite_whatever_the_attention(name, rescale):
    """On one token, on the mask or beside it; nowhere; so that a scaled map is just below, at or above 1; and behind a
    softmax of scores so far apart that it has zeros."""
    mask = torch.tensor([1.0, 1.0, 0.5, 0.01, 0.0, 0.0, 0.0, 0.0])
    loss, area = resolve_loss(name, rescale), mask.sum()
    at_1 = torch.full((8,), 1.0) / area
    maps = torch.cat([torch.eye(8), torch.zeros(1, 8), at_1[None], at_1[None] * (1 - 1e-6), at_1[None] * (1 + 1e-6)])
    maps.requires_grad_()
    losses = loss(maps, mask)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert maps.grad.isfinite().all()
    assert maps.grad.abs().max() <= 1e6
    scores = (200 * torch.eye(8)).requires_grad_()
    assert (scores.softmax(-1) == 0).any()
    loss(scores.softmax(-1), mask).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().max() < 2, "the softmax takes the steep part of the logarithm away"


@every_loss
def test_tokens_that_a_phrase_may_not_see_change_nothing(name, rescale):
    """Padding around the image, images that come later, and what fills up rows with fewer images."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 10, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    targets = torch.rand(3, 10, generator=generator, dtype=torch.float64) * 0.7
    targets[:, ::3] = 0  # seen, but not covered
    loss, widen = resolve_loss(name, rescale), functools.partial(torch.nn.functional.pad, pad=(0, 25))
    alone = loss(maps, targets)
    among = loss(widen(maps), widen(targets))
    torch.testing.assert_close(among, alone, rtol=1e-12, atol=0)
    (expected,), (found,) = (torch.autograd.grad(losses.sum(), maps) for losses in (alone, among))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.003, 0.02, 0.1, 0.4])
def test_at_even_attention_bce_teaches_as_strongly_as_dice(share):
    """Within a factor of two, for objects of any size; KL more strongly, and Dice of maps as they are less."""
    side = share**0.5 * 24
    covered = (torch.arange(24) + 1).clamp(max=5.3 + side) - torch.arange(24).clamp(min=5.3)
    mask = (covered.clamp(0, 1)[:, None] * covered.clamp(0, 1)).flatten()
    assert mask.sum() == pytest.approx(share * 24 * 24, rel=1e-4)
    strengths = {}
    for name, loss in LOSSES.items():
        scores = torch.zeros(24 * 24, requires_grad=True)
        loss(scores.softmax(-1), mask).backward()
        strengths[name] = scores.grad.norm().item()
    assert 0.5 < strengths["bce"] / strengths["dice"] < 2
    assert 2 < strengths["kl"] / strengths["dice"] < 400
    assert 0.5 < strengths["log_dice"] / strengths["kl"] < 2
    scores = torch.zeros(24 * 24, requires_grad=True)
    dice_loss(scores.softmax(-1), mask, rescale=False).backward()
    assert scores.grad.norm() < strengths["dice"]


def test_log_dice_teaches_maps_that_look_elsewhere():
    """With attention p on an object of whole tokens, the gradient on scores is p (1 - p) of Dice, and 1 - p of its logarithm."""
    mask = torch.zeros(256, dtype=torch.float64)
    mask[:4] = 1
    for p in (1e-3, 4 / 256, 0.2):  # where nothing is cut off at 1: the object has p of the attention, evenly
        target = torch.where(mask > 0, p / 4, (1 - p) / 252)
        slopes = {}
        for name in ("dice", "log_dice"):
            shift = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the object's scores
            resolve_loss(name)((target.log() + shift * mask).softmax(-1), mask).backward()
            slopes[name] = -shift.grad.item()
        assert slopes["dice"] == pytest.approx(p * (1 - p), rel=2e-3)
        assert slopes["log_dice"] == pytest.approx(1 - p, rel=2e-2)


def test_losses_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no guidance_loss 'focal': choose one of dice, log_dice, bce, kl"):
        resolve_loss("focal")
    with pytest.raises(ValueError, match="leave rescale_maps out, or choose dice, log_dice or bce"):
        resolve_loss("kl", rescale=False)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 90), (100, 40), (17, 23)])
@pytest.mark.parametrize("do_pad", [True, False])
def test_mask_lies_where_the_image_lies(height, width, do_pad):
    """The processor's own picture of the mask, pooled, is the coverage."""
    processor = AgeVlmImageProcessor(size={"height": 64, "width": 64}, do_pad=do_pad, do_normalize=False)
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 4 : height // 2, width // 3 : width - 2] = True
    picture = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    pixels = processor(picture, return_tensors="pt")["pixel_values"][:, 0]
    expected = torch.nn.functional.adaptive_avg_pool2d(pixels, (4, 4)).flatten()
    coverage = mask_coverage(mask, (4, 4), processor)
    torch.testing.assert_close(coverage, expected, atol=0.05, rtol=0)  # bicubic against area resampling
    # Nothing is gained or lost: the mask keeps its share of the image's area.
    resized_height, resized_width = processor.get_resized_size(height, width)
    share = coverage.sum() / 16 * 64 * 64 / (resized_height * resized_width)
    assert share == pytest.approx(mask.mean(), abs=0.02)


# ---------------------------------------------------------------------------------------- by phrase


def some_maps(blocks: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps `(blocks, 2, 3, 20)`, targets `(2, 3, 20)` in float64, and which slots hold a phrase."""
    generator = torch.Generator().manual_seed(0)
    maps = (3 * torch.randn(blocks, 2, 3, 20, generator=generator, dtype=torch.float64)).softmax(-1)
    targets = torch.rand(2, 3, 20, generator=generator, dtype=torch.float64)
    targets = targets * (torch.rand(2, 3, 20, generator=generator) < 0.4)
    named = torch.tensor([[True, True, True], [True, False, False]])
    return maps, targets * named[..., None], named


def test_a_phrase_is_where_its_target_covers_something():
    maps, targets, named = some_maps()
    targets[0, 1] = 0
    targets[0, 1, 7] = 1e-6  # as little of one token as can be
    losses, found = guidance_losses(maps, targets)
    assert torch.equal(found, named)
    for b, p in named.nonzero().tolist():
        expected = np.mean([dice_loss(maps[block, b, p], targets[b, p]).item() for block in range(len(maps))])
        assert losses[b, p].item() == pytest.approx(expected, rel=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_without_a_phrase_have_exactly_no_loss_and_no_gradient(dtype, name, rescale):
    """Whatever their map: zero, as the model gives it for padding, or of a phrase that was asked without a mask."""
    maps, targets, named = some_maps()
    maps, targets = maps.to(dtype), targets.to(dtype)
    maps[:, 1, 2] = 0
    maps.requires_grad_()
    losses, _ = guidance_losses(maps, targets, resolve_loss(name, rescale))
    losses.sum().backward()
    assert (losses[~named] == 0).all()
    assert (losses[named] > 0).all()
    assert (maps.grad[:, ~named] == 0).all()
    assert (maps.grad[:, named] != 0).any(-1).all()


@every_loss
def test_a_phrase_whose_object_is_not_there_is_to_look_at_the_sink_alone(name, rescale):
    """What a map lacks to a sum of 1 is one more token, written out here."""
    maps, targets, named = some_maps()
    targets[0, 1], targets[1, 0] = 0, 0
    absent = named & ~targets.any(-1)
    assert absent.sum() == 2 < named.sum()
    generator = torch.Generator().manual_seed(1)
    sink = 0.1 + 0.8 * torch.rand(*maps.shape[:-1], 1, generator=generator, dtype=torch.float64)
    with_sink = torch.cat([maps * (1 - sink), sink], dim=-1)
    targets_with_sink = torch.cat([targets, absent[..., None].double()], dim=-1)
    loss = resolve_loss(name, rescale)
    losses, found = guidance_losses(with_sink[..., :-1], targets, loss, named)
    assert torch.equal(found, named)
    assert (losses[~named] == 0).all()
    for b, p in named.nonzero().tolist():
        attention, target = with_sink[:, b, p].tolist(), targets_with_sink[b, p].tolist()
        expected = np.mean([by_definition(name, rescale, block, target) for block in attention])
        assert losses[b, p].item() == pytest.approx(expected, rel=1e-9)

    def of_scores(scores: torch.Tensor) -> torch.Tensor:
        return guidance_losses(scores.softmax(-1)[..., :-1], targets, loss, named)[0][named]

    scores = with_sink.log().requires_grad_()
    assert torch.autograd.gradcheck(of_scores, (scores,))
    (gradient,) = torch.autograd.grad(of_scores(scores).sum(), scores)
    assert (gradient[:, absent][..., -1] < 0).all(), "toward the sink"
    at_the_sink = torch.zeros_like(maps)
    assert guidance_losses(at_the_sink, targets, loss, absent)[0].abs().max() < 1e-12


@every_loss
def test_without_absent_phrases_it_makes_no_difference_which_are_named(name, rescale):
    maps, targets, named = some_maps()
    loss = resolve_loss(name, rescale)
    assert torch.equal(guidance_losses(maps, targets, loss, named)[0], guidance_losses(maps, targets, loss)[0])


@every_loss
def test_a_batch_without_any_phrase_or_image_has_no_loss(name, rescale):
    for width in (20, 0):
        maps = torch.full((3, 2, 3, width), 0.05, requires_grad=True)
        losses, named = guidance_losses(maps, torch.zeros(2, 3, width), resolve_loss(name, rescale))
        losses.sum().backward()
        assert (losses == 0).all()
        assert not named.any()
        assert (maps.grad == 0).all()
        assert not pointing_hits(maps, torch.zeros(2, 3, width)).any()
        assert (attention_iou(maps, torch.zeros(2, 3, width)) == 0).all()


def test_pointing_is_to_attend_the_object_most():
    targets = torch.tensor([0.0, 0.2, 0.8, 0.4, 0.39, 0.0]).expand(1, 6, 6)
    one_hot = torch.eye(6)[None, None].expand(2, -1, -1, -1)
    # At least half of the best-covered token's 0.8.
    assert pointing_hits(one_hot, targets)[0].tolist() == [False, False, True, True, False, False]
    # An object smaller than a token is still hit.
    assert pointing_hits(one_hot, targets / 100)[0].tolist() == [False, False, True, True, False, False]
    assert not pointing_hits(one_hot * 0, targets).any(), "no attention points nowhere, not at the first token"
    assert not pointing_hits(torch.zeros(2, 1, 1, 6), torch.ones(1, 1, 6)).any()
    assert not pointing_hits(one_hot, targets * 0).any(), "slots without a phrase"
    # The blocks' average decides: each block alone attends a token beside the object most.
    maps = torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.0, 0.6], [0.6, 0.0, 0.4, 0.0, 0.0, 0.0]])[:, None, None]
    assert pointing_hits(maps, targets[:, :1]).all()
    assert not pointing_hits(maps[:1], targets[:, :1]).any()


def test_the_chances_of_pointing_are_the_shares_of_the_cells_that_hit():
    """By counting: where each one-hot map on the image, or on an object of it, points."""
    target = torch.tensor([0.0, 0.2, 0.8, 0.4, 0.39, 0.0, 0.0, 0.0])
    other = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.2, 1.0, 0.9, 0.0])
    visible = torch.tensor([True] * 7 + [False])  # the last cell is padding
    assert pointing_cells(target).tolist() == [False, False, True, True, False, False, False, False]
    hits = pointing_hits(torch.eye(8)[None, None], target.expand(1, 8, 8))[0]
    on_objects = pointing_cells(torch.stack([target, other])).any(0)
    assert on_objects.nonzero().flatten().tolist() == [2, 3, 5, 6]
    expected = hits[visible].float().mean().item(), hits[on_objects].float().mean().item()
    assert expected == pytest.approx((2 / 7, 2 / 4))
    assert pointing_chances(target, torch.stack([target, other]), visible) == pytest.approx(expected)
    assert pointing_chances(target, target[None], visible)[1] == 1, "the only object of the image"
    assert pointing_chances(target * 0, other[None], visible) == (0, 0)
    assert pointing_chances(target[:0], other[None, :0], visible[:0]) == (0, 0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 40)])
def test_the_chance_of_pointing_anywhere_is_the_objects_share_of_the_image(height, width):
    """Up to its border: cells that it covers by half count as a whole, the others not at all."""
    processor = AgeVlmImageProcessor(size={"height": 64, "width": 64})
    mask = np.zeros((height, width), dtype=bool)
    mask[8:40, 9:29] = True
    cover = functools.partial(mask_coverage, grid=(16, 16), image_processor=processor)
    share, _ = pointing_chances(cover(mask), cover(mask)[None], cover(np.ones_like(mask)) > 0)
    assert share == pytest.approx(mask.mean())


def test_iou_equals_its_definition():
    maps, targets, named = some_maps()
    iou = attention_iou(maps, targets)
    for b, p in np.ndindex(*named.shape):
        area, attention = targets[b, p].sum().item(), maps[:, b, p].numpy().sum(0) / 3
        shared, union = 0.0, 0.0
        for a, m in zip(attention, targets[b, p].tolist(), strict=True):
            shared, union = shared + min(a * area, 1, m), union + max(min(a * area, 1), m)
        assert iou[b, p].item() == pytest.approx(shared / union if union else 0, abs=1e-12)
    assert 0 < iou[named].min() < iou[named].max() < 1


def test_iou_is_1_on_the_object_0_beside_it_and_that_of_the_sets_for_binary_maps():
    mask, attended = torch.zeros(16), torch.zeros(16)
    mask[:8], attended[4:12] = 1, 1
    for attention, expected in ((mask, 1.0), (1 - mask, 0.0), (attended, 4 / 12)):
        iou = attention_iou((attention / 8).expand(2, 1, 1, 16), mask[None, None])
        assert iou.item() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------- a whole step against the naive computation


WEIGHT = 20.0  # so that guidance makes up most of the gradient, and even bfloat16 would not hide an error in it
# Without an image, with one, with two and with three; the second row sees an image that is mostly padding.
GUIDED_ROWS = [text(9, 10), text(12, 11, (2,)), text(16, 12, (1, 6)), text(14, 13, (0, 4, 5))]
# (row, its tokens from the row's start, the image whose object it names, as the row counts them)
PHRASES = [
    (1, (5, 6, 7), 0),
    (1, (7, 8), 0),  # shares a token with the one before
    (2, (4,), 0),
    (2, (8, 9, 13), 1),  # not contiguous
    (2, (5, 6, 7), 1),  # begins before its image and ends after it
    (2, (3, 4), 1),  # before its image
    (2, (0,), 0),  # before any image: sees nothing
    (3, (7, 8, 9, 10), 2),
    (3, (11,), 0),
]


def guided_batch(side: str = "left", dtype: torch.dtype = torch.float32):
    """Inputs with labels, the tokens of each phrase `(B, P, S)` and its target `(B, P, V)`."""
    inputs = {**pad(GUIDED_ROWS, side), "pixel_values": images(6).to(dtype)}
    ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    # A row's first token too: under left padding it would be predicted from padding, where attention is arbitrary.
    inputs["labels"] = ids.masked_fill(attention_mask.cumsum(-1) * attention_mask <= 1, -100)
    pixel_mask = torch.ones(6, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
    pixel_mask[0, IMAGE_SIZE // 2 :] = 0
    pixel_mask[4, :, IMAGE_SIZE // 4 :] = 0
    inputs["image_sizes"] = torch.stack([pixel_mask.amax(2).sum(1), pixel_mask.amax(1).sum(1)], dim=1)
    cells = pixel_mask.unflatten(1, (GRID[0], -1)).unflatten(3, (GRID[1], -1)).amax((2, 4)).flatten(1)
    first_image = (0, 0, 1, 3)

    queries = torch.zeros(4, 6, ids.shape[1], dtype=torch.bool)  # the last slot of each row stays empty
    targets = torch.zeros(4, 6, 3 * NUM_VISUAL, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    slots = [0] * 4
    for row, tokens, image in PHRASES:
        start = ids.shape[1] - len(GUIDED_ROWS[row]) if side == "left" else 0
        queries[row, slots[row], [start + token for token in tokens]] = True
        coverage = torch.rand(NUM_VISUAL, generator=generator, dtype=torch.float64)
        coverage = coverage * (torch.rand(NUM_VISUAL, generator=generator) < 0.6) * cells[first_image[row] + image]
        targets[row, slots[row], image * NUM_VISUAL : (image + 1) * NUM_VISUAL] = coverage.to(dtype)
        slots[row] += 1
    queries[3, 5, 12] = True  # asked without a mask
    assert slots == [0, 2, 5, 2]
    assert (targets.sum(-1) > 0).sum() == len(PHRASES)
    return inputs, queries, targets


def guided_loss(model, inputs, queries, targets, weight: float = WEIGHT, named=None) -> torch.Tensor:
    """Language modeling and guidance as they are used in training, through SDPA and `map_queries`."""
    outputs = model(**inputs, map_queries=queries, use_cache=False)
    maps = outputs.cross_attention_maps[..., : targets.shape[-1]]  # compiled models have room for more images
    losses, named = guidance_losses(maps, targets, named=named)
    return outputs.loss + weight * losses.sum() / named.sum()


def naive_loss(model, inputs, queries, targets, weight: float = WEIGHT, named=None) -> torch.Tensor:
    """The same from its definition: all attention weights of eager attention, and loops. Where phrases are `named`, the sink
    is one more token, covered by what is not there."""
    labels = inputs["labels"]
    text_config, before = {"text_config": "eager"}, model.config.text_config._attn_implementation
    model.set_attn_implementation(text_config)
    outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, output_attentions=True, use_cache=False)
    model.set_attn_implementation({"text_config": before})
    log_probabilities = outputs.logits.to(torch.float64).log_softmax(-1)
    picked = [
        log_probabilities[b, t, labels[b, t + 1]]
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]
    dices = []
    for b, p in np.ndindex(*targets.shape[:2]):
        mask = targets[b, p].to(torch.float64)
        if not (any(mask.tolist()) if named is None else named[b, p]):
            continue
        tokens = [t for t in range(queries.shape[-1]) if queries[b, p, t]]
        for weights in outputs.cross_attentions:
            attention, covered, heads = torch.zeros_like(mask), mask, weights.shape[1]
            for token in tokens:
                for head in range(heads):
                    attention = attention + weights[b, head, token].to(torch.float64) / (heads * len(tokens))
            if named is not None:
                attention = torch.cat([attention, 1 - attention.sum(0, keepdim=True)])
                covered = torch.cat([mask, (mask.sum(0, keepdim=True) == 0).to(mask)])
            area = covered.sum()
            attention = torch.where(attention * area < 1, attention * area, torch.ones_like(covered))
            dices.append(1 - (2 * (attention * covered).sum() + 1e-3) / (attention.sum() + area + 1e-3))
    return -torch.stack(picked).mean() + weight * torch.stack(dices).mean()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of every trainable parameter, zeros where it has none. The gates are one vector `gates`, because a single
    number that is a sum over everything may happen to be close to 0, with no precision left."""
    model.zero_grad()
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable.items()}
    gates = torch.cat([found.pop(name) for name in trainable if name.endswith(".gate")])
    return {**found, "gates": gates}


def step(compute, model, *args, **kwargs) -> tuple[float, dict[str, torch.Tensor]]:
    loss = compute(model, *args, **kwargs)
    return loss.item(), gradients(model, loss)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the expected norm; an expected zero must be met exactly."""
    difference, norm = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def assert_equal_steps(actual, expected, rtol: float) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=rtol)
    assert actual[1].keys() == expected[1].keys()
    errors = {name: relative_error(actual[1][name], expected[1][name]) for name in expected[1]}
    assert all(error <= rtol for error in errors.values()), {k: v for k, v in errors.items() if not v <= rtol}


def blocks(model) -> list[AgeVlmCrossAttention]:
    return [module for module in model.modules() if isinstance(module, AgeVlmCrossAttention)]


def guided_model(gate: float = 0.5, train_vision: bool = False, sink: bool = False, **llama):
    """A tiny AGE-VLM in training mode whose language model is frozen, as in the first stages."""
    model = tiny_age_vlm(gate=gate, llama=llama, cross_attention_sink=sink).train()
    for block in blocks(model):
        block.q_norm.weight.data *= 3  # attention sharp enough that some of it is cut off at 1
    for name, parameter in model.named_parameters():
        parts = ("cross_attn", "multi_modal_projector") + (("vision_tower",) if train_vision else ())
        # The tower's own last norm belongs to its pooled output, which nothing reads.
        parameter.requires_grad_(any(part in name for part in parts) and "vision_tower.layernorm" not in name)
    return model


class EverythingInFloat64(TorchFunctionMode):
    """Llama's norms, rotary embedding, softmax and loss ask for float32 by name; in here they get float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def naive_float64(
    model, inputs, queries, targets, weight: float = WEIGHT, named=None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the naive computation in float64, of a model in any precision, which it leaves as it was."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    model.double()
    with EverythingInFloat64():
        result = step(naive_loss, model, inputs, queries, targets.double(), weight, named)
    model.zero_grad()
    assert len(set(dtypes.values())) == 1
    model.to(next(iter(dtypes.values())))
    return result


def test_the_comparison_covers_what_it_should():
    """The batch makes the maps vary, cuts some off at 1, and has every kind of phrase; every gradient counts."""
    model, (inputs, queries, targets) = guided_model(train_vision=True), guided_batch()
    maps = model(**inputs, map_queries=queries, use_cache=False).cross_attention_maps
    named = targets.sum(-1) > 0
    scaled = (maps * targets.sum(-1, keepdim=True))[:, named]
    assert (scaled > 1).any()
    assert (scaled < 1).any()
    sums = maps[:, named].sum(-1)  # of the phrases in their order: one sees nothing, one with a part of its tokens
    torch.testing.assert_close(sums, torch.tensor([1.0] * 6 + [0.0] + [1.0] * 2).expand_as(sums))
    assert (maps[:, 1, :, NUM_VISUAL // 2 :] == 0).all(), "padding around the image"
    assert (maps[:, 2, 3, NUM_VISUAL:] == 0).all(), "an image that comes later"
    _, whole = step(guided_loss, model, inputs, queries, targets)
    _, without = step(guided_loss, model, inputs, queries, targets, weight=0.0)
    for name, gradient in whole.items():
        assert gradient.norm() > 0, name
        # Guidance alone changes the gradient of everything before the last block's maps, and by far more than any
        # tolerance below but that of bfloat16; values and outputs of the last block come after all maps.
        after_maps = "cross_attn.4." in name and any(p in name for p in ("v_proj", "o_proj"))
        assert (relative_error(without[name], gradient) > 0.01) != after_maps, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("gate", "num_key_value_heads", "train_vision"), [(0.5, 2, True), (0.5, 1, False), (0.0, 4, True), (0.0, 2, False)]
)
def test_equals_the_naive_computation_in_float64(side, gate, num_key_value_heads, train_vision):
    model = guided_model(gate, train_vision, num_key_value_heads=num_key_value_heads).double()
    inputs, queries, targets = guided_batch(side, torch.float64)
    expected = naive_float64(model, inputs, queries, targets)
    with EverythingInFloat64():
        actual = step(guided_loss, model, inputs, queries, targets)
    assert_equal_steps(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_naive_computation_with_sinks_and_objects_that_are_not_there(dtype):
    model, (inputs, queries, targets) = guided_model(sink=True).to(dtype), guided_batch(dtype=dtype)
    named = (targets > 0).any(-1)
    targets[1, 1], targets[2, 3], targets[3, 0] = 0, 0, 0
    expected = naive_float64(model, inputs, queries, targets, named=named)
    with EverythingInFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        actual = step(guided_loss, model, inputs, queries, targets, named=named)
    assert_equal_steps(actual, expected, rtol=1e-9 if dtype == torch.float64 else 1e-4)
    assert all(expected[1][name].abs().max() > 1e-4 for name in expected[1] if name.endswith(".sink"))


def test_behind_shut_gates_guidance_alone_teaches_queries_keys_and_adapter():
    """At gate 0 the language modeling loss reaches nothing but the gates, so that the gradient is guidance's."""
    model, (inputs, queries, targets) = guided_model(gate=0.0), guided_batch()
    expected = naive_float64(model, inputs, queries, targets)
    actual = step(guided_loss, model, inputs, queries, targets)
    assert_equal_steps(actual, expected, rtol=1e-4)
    _, unguided = step(guided_loss, model, inputs, queries, targets, weight=0.0)
    for name, gradient in actual[1].items():
        if name == "gates":
            assert (gradient != 0).all()
        else:
            assert (unguided[name] == 0).all(), name
            assert (gradient == 0).all() == any(part in name for part in ("v_proj", "o_proj")), name


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("train_vision", [False, True])
def test_equals_the_naive_computation_in_float32_and_under_gradient_checkpointing(use_reentrant, train_vision):
    model, (inputs, queries, targets) = guided_model(train_vision=train_vision), guided_batch()
    expected = naive_float64(model, inputs, queries, targets)
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        assert model.model.language_model.layers[0].gradient_checkpointing
    assert_equal_steps(step(guided_loss, model, inputs, queries, targets), expected, rtol=1e-4)


def root_mean_square(values) -> float:
    return float(np.sqrt(np.mean(np.square(list(values)))))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("gate", [0.5, 0.0])
def test_equals_the_naive_computation_under_bfloat16_autocast(gate, use_reentrant):
    """As near to float64 as bfloat16 allows, and no further from it than the naive computation in the same autocast.

    A gradient has been through some hundred roundings by half an epsilon each, one after another, forwards and
    backwards. Independent errors add up to about sqrt(100) / 2 = 5 epsilons, times the scores (up to ten here) where
    they pass a softmax. That is why 12 epsilons on average and 32 for any one parameter; without guidance, each gradient
    that guidance has a part in is off by more.
    """
    eps = torch.finfo(torch.bfloat16).eps
    model, (inputs, queries, targets) = guided_model(gate), guided_batch()
    expected_loss, expected = naive_float64(model, inputs, queries, targets)
    losses, errors = {}, {}
    for compute in (naive_loss, guided_loss):
        if compute is guided_loss and use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(model, inputs, queries, targets)
        found = gradients(model, loss)
        losses[compute] = loss.item()
        errors[compute] = {name: relative_error(found[name], expected[name]) for name in expected}
    assert losses[guided_loss] == pytest.approx(losses[naive_loss], rel=eps)
    assert losses[guided_loss] == pytest.approx(expected_loss, rel=eps)
    assert max(errors[guided_loss].values()) < 32 * eps, errors[guided_loss]
    guided, naive = root_mean_square(errors[guided_loss].values()), root_mean_square(errors[naive_loss].values())
    assert guided < 12 * eps
    assert guided < 1.5 * naive
    _, without = step(guided_loss, model, inputs, queries, targets, weight=0.0)
    changed = [relative_error(without[name], gradient) for name, gradient in expected.items()]
    assert sum(change > 32 * eps for change in changed) >= 0.75 * len(changed)


# Inductor takes a minute for the whole of even this model. It gets the blocks, which hold all that guidance adds to the
# model; the whole model gets the same capture and the same joint graphs of forward and backward, run by PyTorch.
@pytest.mark.parametrize(("backend", "whole"), [("aot_eager", True), ("inductor", False)])
def test_equals_the_naive_computation_compiled(backend, whole):
    model, (inputs, queries, targets) = guided_model(num_hidden_layers=2), guided_batch()
    expected = naive_float64(model, inputs, queries, targets)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for module in [model] if whole else blocks(model):
        module.compile(backend=backend)
    assert_equal_steps(step(guided_loss, model, inputs, queries, targets), expected, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_text_only_batches_have_no_guidance():
    """In training the model sees a blank visual token then, which the targets know nothing of."""
    model, queries = guided_model(), torch.zeros(1, 2, 9, dtype=torch.bool)
    queries[0, 0, 3:5] = True
    maps = model(**pad(GUIDED_ROWS[:1]), map_queries=queries, use_cache=False).cross_attention_maps
    targets = torch.zeros(1, 2, 0)
    losses, named = guidance_losses(maps, targets)
    assert losses.shape == named.shape == (1, 2)
    assert (losses == 0).all()
    assert not named.any()
    assert not pointing_hits(maps, targets).any()
    assert (attention_iou(maps, targets) == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(model, losses.sum()).values())


def test_a_rows_guidance_does_not_depend_on_the_other_rows():
    """Alone, with its own images and fewer slots, each row has the losses and hits that it has in the batch."""
    model, (inputs, queries, targets) = guided_model(), guided_batch()
    with torch.no_grad():
        maps = model(**inputs, map_queries=queries, use_cache=False).cross_attention_maps
        losses, named = guidance_losses(maps, targets)
        for row, image in ((1, slice(0, 1)), (2, slice(1, 3)), (3, slice(3, 6))):
            length, slots = len(GUIDED_ROWS[row]), int(named[row].sum())
            alone = {name: inputs[name][image] for name in ("pixel_values", "image_sizes")}
            alone |= pad([GUIDED_ROWS[row]])
            num_visual = (image.stop - image.start) * NUM_VISUAL
            asked, wanted = queries[row : row + 1, :slots, -length:], targets[row : row + 1, :slots, :num_visual]
            found = model(**alone, map_queries=asked, use_cache=False).cross_attention_maps
            torch.testing.assert_close(guidance_losses(found, wanted)[0][0], losses[row, :slots])
            torch.testing.assert_close(attention_iou(found, wanted)[0], attention_iou(maps, targets)[row, :slots])
            assert torch.equal(pointing_hits(found, wanted)[0], pointing_hits(maps, targets)[row, :slots])
