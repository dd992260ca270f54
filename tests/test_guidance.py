# SPDX-License-Identifier: Apache-2.0
"""Dice guidance against its definition, in float64, and mask geometry against the image's own."""

import numpy as np
import pytest
import torch

from agevlm import AgeVlmImageProcessor
from agevlm.processing.collator import mask_coverage
from agevlm.trainer.guidance import dice_loss


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


@pytest.mark.parametrize("size", [1, 4, 12])
def test_attention_spread_over_the_mask_has_no_loss_whatever_its_area(size):
    mask = torch.zeros(16)
    mask[:size] = 1
    assert dice_loss(mask / size, mask) == pytest.approx(0, abs=1e-6)
    beside = (1 - mask) / (16 - size)
    assert dice_loss(beside, mask) > 0.99


def test_an_empty_mask_gives_no_nan():
    maps = torch.full((16,), 1 / 16, requires_grad=True)
    dice_loss(maps, torch.zeros(16)).backward()
    assert maps.grad.isfinite().all()


def test_attention_moves_towards_the_mask():
    scores = torch.zeros(16, requires_grad=True)
    mask = torch.zeros(16)
    mask[5:8] = 1
    dice_loss(scores.softmax(-1), mask).backward()
    assert (scores.grad[5:8] < 0).all()
    assert (scores.grad[8:] > 0).all()


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
