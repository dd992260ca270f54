# SPDX-License-Identifier: Apache-2.0
"""Where in an image its tokens lie, for any processor of Transformers, and which share of each token a mask covers.

Processors resize, crop, pad and split images, each in its own way. Nothing here repeats that. Two ramps of gray, as large as the image, go
through the processor: their values in its output tell which place of the image each pixel shows. Only the way from pixels to tokens
needs a rule: tiles of equal tokens, row by row, the flattened patches of Qwen-VL, and the
lines of LLaVA-NeXT.

Places depend on the sizes of images alone, so each size is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F
from transformers import LlavaNextProcessor, PreTrainedModel, ProcessorMixin

from ..processing.collator import mask_coverage
from ..processing.processing_agevlm import AgeVlmProcessor
from .image_tokens import has_cross_attention
from .maps import find_model


def token_coverage(
    processor: ProcessorMixin,
    masks: np.ndarray | torch.Tensor | Sequence[np.ndarray],
    *,
    grid: tuple[int, int] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The share of the area of each token of an image that each mask covers.

    What a token shows beyond the image, where the processor pads, counts as not covered.

    Args:
        processor: of an image-text-to-text model.
        masks: bool `(masks, height, width)`, of the size of the unprocessed image.
        grid: see [`token_boxes`].
        kwargs: see [`token_boxes`].

    Returns:
        float32 `(masks, image tokens)`, each in [0, 1], in the order of the tokens in the sequence.

    Raises:
        ValueError: as [`token_boxes`] does, and if the masks have another shape.
    """
    if isinstance(processor, AgeVlmProcessor) and grid is not None:  # its image processor knows the places exactly
        return torch.stack([mask_coverage(np.asarray(mask), grid, processor.image_processor) for mask in masks])
    stacked = torch.stack([torch.as_tensor(mask) for mask in masks]) if len(masks) else torch.zeros(0, 1, 1)
    if stacked.ndim != 3:
        raise ValueError(f"Masks are (masks, height, width), not {tuple(stacked.shape)}.")
    height, width = stacked.shape[1:]
    stacked = stacked.to(torch.float64)
    places = _find(processor, (height, width), grid, kwargs)
    shares = [
        (_overlaps(tile.rows, height) @ stacked @ _overlaps(tile.columns, width).T).flatten(1) for tile in places.tiles
    ]
    shares.append(stacked.new_zeros(len(stacked), 1))
    return torch.cat(shares, dim=1)[:, places.order].clamp(0, 1).float()


def token_boxes(
    processor: ProcessorMixin,
    image_size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The place of each token of an image.

    Args:
        processor: of an image-text-to-text model.
        image_size: height and width of the unprocessed image.
        grid: rows and columns of the tokens of a tile, for models with layers of cross-attention, whose processors do not know them: see
            [`tile_grid`].
        kwargs: what the processor is called with beyond texts and images, as far as it concerns images.

    Returns:
        float32 `(image tokens, 4)`: left, top, right and bottom in pixels of the unprocessed image, in the order of the tokens in the
        sequence. A box reaches beyond the image where its token also shows padding. Tokens that show only padding, or nothing, have
        boxes of zeros. Boxes overlap where the processor makes several views of an image.

    Raises:
        ValueError: if the order or the number of tokens is not understood, or the processor does more than resize, crop, pad and split.
    """
    places = _find(processor, image_size, grid, kwargs)
    boxes = []
    for tile in places.tiles:
        rows, columns = len(tile.rows), len(tile.columns)
        top, bottom = tile.rows.unbind(1)
        left, right = tile.columns.unbind(1)
        box = torch.stack([left.repeat(rows), top.repeat_interleave(columns)], dim=1)
        box = torch.cat([box, torch.stack([right.repeat(rows), bottom.repeat_interleave(columns)], dim=1)], dim=1)
        boxes.append(box * (box[:, 2:] > box[:, :2]).all(1, keepdim=True))
    return torch.cat([*boxes, torch.zeros(1, 4)])[places.order].float()


def count_image_tokens(
    processor: ProcessorMixin,
    image_sizes: Sequence[tuple[int, int]],
    *,
    grid: tuple[int, int] | None = None,
    **kwargs: Any,
) -> list[int]:
    """The number of tokens of each image of a text, by its height and width.

    The tokens of a text's images follow each other in the order of the images, so that maps `(…, image tokens)` of
    [`attention_maps`] are split by these numbers. `grid` and `kwargs` are those of [`token_boxes`].
    """
    return [len(_find(processor, size, grid, kwargs).order) for size in image_sizes]


def tile_grid(model: PreTrainedModel) -> tuple[int, int] | None:
    """Rows and columns of the visual tokens of a tile, for a model with layers of cross-attention such as Mllama. None for others, whose
    processors know them. Those of AGE-VLM are [`agevlm.trainer.visual_grid`]."""
    if not has_cross_attention(model):
        return None
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size,) * 2


# How resamplers and Q-Formers name what they search the image with.
_LEARNED_QUERIES = ("query", "queries", "query_tokens", "latent_query", "latents")


def check_places(model: torch.nn.Module) -> None:
    """Checks that a model's image tokens have a place in the image.

    Raises:
        ValueError: if learned queries become the image tokens, as in resamplers, perceivers and Q-Formers: each may show anything of the
            image.
    """
    inner = find_model(model)
    text = {id(module) for module in inner.get_decoder().modules()}
    for module in inner.modules():
        names = {name for name, _ in module.named_parameters(recurse=False)} if id(module) not in text else set()
        if found := names.intersection(_LEARNED_QUERIES):
            raise ValueError(
                f"{type(inner).__name__} makes its image tokens of learned queries (`{found.pop()}` of {type(module).__name__}), each of "
                "which may show anything of the image. They have no place in it, so masks cannot guide the attention to them."
            )


# --- from pixels to places ---


@dataclass(frozen=True)
class _Tile:
    """A view of an image, with its tokens row by row. `rows` `(n, 2)` are the top and the bottom of each row, `columns` `(m, 2)` the left and
    the right of each column, float64, in pixels of the image. Both are 0 where a row or column shows only padding."""

    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class _Places:
    """The tiles of an image, and the order of its tokens in the sequence: numbers of the tokens of all tiles, -1 for one without a place."""

    tiles: list[_Tile]
    order: torch.Tensor


@dataclass(frozen=True)
class _Question:
    """What places depend on. `settings` are those of the processor, its image processor and `kwargs`."""

    processor: ProcessorMixin
    settings: str
    size: tuple[int, int]
    grid: tuple[int, int] | None
    kwargs: dict[str, Any] = field(compare=False)


def _find(
    processor: ProcessorMixin, size: Sequence[int], grid: tuple[int, int] | None, kwargs: dict[str, Any]
) -> _Places:
    own = {name: value for name, value in vars(processor).items() if isinstance(value, (bool, int, float, str))}
    settings = repr((own, type(processor.image_processor), vars(processor.image_processor), kwargs))
    height, width = size
    return _measure(_Question(processor, settings, (int(height), int(width)), grid, kwargs))


# How far each ramp leans towards the other. So the rows of a tile are rounded to 8 bits in different places, and their mean is exact.
_LEAN = 0.07


@lru_cache(maxsize=4096)
def _measure(question: _Question) -> _Places:
    height, width = question.size
    x, y = np.linspace(0, 1, width)[None], np.linspace(0, 1, height)[:, None]
    ramps = np.broadcast_arrays((1 - _LEAN) * x + _LEAN * y, _LEAN * x + (1 - _LEAN) * y, 0.0)
    image = np.rint(255 * np.stack(ramps, axis=-1)).astype(np.uint8)
    black, cells, order = _render(question, np.zeros_like(image))
    white, shown = (_render(question, pixels)[0] for pixels in (np.full_like(image, 255), image))
    # Undoes the normalization, whatever it is. Padding is the same in black and white.
    span = white - black
    full = span.abs().amax((0, 2, 3), keepdim=True)
    inside = (span.abs() > 0.99 * full).all(1) & (full > 0).all()
    across, down, none = ((shown - black) / span.where(inside[:, None], 1.0)).double().unbind(1)
    if not (none.abs() < 0.02)[inside].all():
        raise _unknown(question, "it changes the colors of images")
    # The inverse of what the ramps are made of.
    right, below = (
        ((1 - _LEAN) * ramp - _LEAN * other) / (1 - 2 * _LEAN) for ramp, other in ((across, down), (down, across))
    )
    rows, columns = inside.any(2), inside.any(1)
    if not (inside == rows[:, :, None] & columns[:, None]).all():
        raise _unknown(question, _NOT_UNDERSTOOD)
    horizontal = _lines(question, right, inside, width)
    vertical = _lines(question, below.mT, inside.mT, height)
    tiles = [
        _Tile(_intervals(*vertical[i], rows[i], cells[0]), _intervals(*horizontal[i], columns[i], cells[1]))
        for i in range(len(inside))
    ]
    return _Places(tiles, order)


_NOT_UNDERSTOOD = "it does more than resize, crop, pad and split images"
_FEW = 4  # pixels


def _lines(question: _Question, ramps: torch.Tensor, inside: torch.Tensor, length: int) -> list[tuple[float, float]]:
    """For the columns of each tile the slope and the start of the line that gives their places: column `i` lies from `start + slope * i` to
    `start + slope * (i + 1)`, in pixels of a side of the image of `length`.

    Args:
        ramps: `(tiles, rows, columns)`, from 0 in the middle of the image's first pixel to 1 in that of its last one.
        inside: bool, of that shape: which of it is not padding.
        length: of the side of the image.
    """
    columns, rows = inside.any(1), inside.any(2)
    lines = [(0.0, 0.0)] * len(ramps)
    slope_of_most = None
    counts = columns.sum(1).tolist()
    for i in sorted(range(len(ramps)), key=lambda i: (-counts[i], -i)):  # a view of all of the image may come first
        there = columns[i].nonzero()[:, 0].double()
        places = ramps[i][rows[i]][:, columns[i]] * (length - 1) + 0.5
        count = len(there)
        if count == 0:
            continue
        if length == 1:  # a ramp of one pixel tells nothing
            lines[i] = (1 / count, -float(there[0]) / count)
            continue
        # Near the ends of an image filters see less than they would inside, so the places there are not those of the line.
        rough = float(places[:, -1].mean() - places[:, 0].mean()) / max(count - 1, 1)
        margin = round(3 * max(1.0, 1 / max(rough, 1e-6)))
        inner = [slice(min(margin, size // 4), size - min(margin, size // 4)) for size in places.shape]
        places, there = places[inner[0], inner[1]], there[inner[1]] + 0.5
        profile = places.mean(0)
        slope = slope_of_most
        if slope is None or count >= _FEW:  # few pixels tell it badly
            centered = there - there.mean()
            slope = float(centered @ profile / (centered @ centered).clamp(min=1e-9))
        slope_of_most = slope_of_most or slope
        start = float(profile.mean() - slope * there.mean())
        tolerance = 2 / 255 * length + 0.5 + 0.1 * slope * count
        if slope <= 0 or (places - (start + slope * there)).abs().max() > tolerance:
            raise _unknown(question, _NOT_UNDERSTOOD)
        lines[i] = (slope, start)
    return lines


def _intervals(slope: float, start: float, shown: torch.Tensor, cells: int) -> torch.Tensor:
    """`(cells, 2)`: where equal cells of the pixels of a side of a tile begin and end; zeros for cells without a pixel that is `shown`."""
    pixels = len(shown) // cells  # what is left over has no token, as in a convolution
    edges = start + slope * pixels * torch.arange(cells + 1, dtype=torch.float64)
    there = shown[: cells * pixels].view(cells, pixels).any(1)
    return torch.stack([edges[:-1], edges[1:]], dim=1) * there[:, None]


def _overlaps(intervals: torch.Tensor, length: int) -> torch.Tensor:
    """`(intervals, length)`, float64: the share of each interval that each pixel of a side of an image covers."""
    pixels = torch.arange(length, dtype=torch.float64)
    start, end = intervals[:, :1], intervals[:, 1:]
    overlap = (torch.minimum(end, pixels + 1) - torch.maximum(start, pixels)).clamp(min=0)
    return overlap / (end - start).where(end > start, 1.0)


# --- the processor's output ---


def _render(question: _Question, image: np.ndarray) -> tuple[torch.Tensor, tuple[int, int], torch.Tensor]:
    """The tiles `(tiles, 3, height, width)` that a processor makes of an image, rows and columns of the tokens of each, and their order."""
    processor, grid = question.processor, question.grid
    token = getattr(processor, "image_token", None)
    if token is None:
        raise _unknown(question, "it has no `image_token`")
    outputs = processor(text=[token], images=[PIL.Image.fromarray(image)], return_tensors="pt", **question.kwargs)
    pixels = outputs["pixel_values"]
    pixels = torch.stack(list(pixels)) if isinstance(pixels, (list, tuple)) else pixels
    count = int((outputs["input_ids"] == image_token_id(processor)).sum())
    if "image_grid_thw" in outputs:
        return _unflatten(question, pixels, outputs["image_grid_thw"][0].tolist(), count)
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        raise _unknown(question, f"its `pixel_values` have the shape {tuple(pixels.shape)}")
    pixels = pixels.flatten(0, -4).float()
    if "aspect_ratio_mask" in outputs:
        pixels = pixels[outputs["aspect_ratio_mask"].flatten().bool()]
    tiles, _, height, width = pixels.shape
    if type(processor) is LlavaNextProcessor:
        cells = (height // processor.patch_size, width // processor.patch_size)
        order = _llava_next_order(question, tiles, height, cells)
        if len(order) != count:
            raise _unknown(question, f"its {count} tokens are not those of {tiles} tiles of {cells} patches")
        return pixels, cells, order
    if getattr(processor.image_processor, "image_grid_pinpoints", None):
        raise _unknown(question, "it has tokens for the ends of lines among those of the image")
    if grid is None:
        rows = round((count / tiles * height / width) ** 0.5)
        columns = count // (tiles * rows) if rows else 0
        if count <= 1 or rows * columns * tiles != count or height // rows != width // columns:
            advice = ": pass `grid`, see `tile_grid`" if count <= 1 else ""
            raise _unknown(question, f"{count} tokens do not fill {tiles} tiles of {height} x {width} pixels{advice}")
        grid = rows, columns
    return pixels, grid, torch.arange(tiles * grid[0] * grid[1])


def _llava_next_order(question: _Question, tiles: int, side: int, cells: tuple[int, int]) -> torch.Tensor:
    """The order of the tokens of LLaVA-NeXT: a view of the image, then all tiles together line by line, without the lines and columns of
    patches that show padding, and with a token at the end of each line."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    pinpoints = question.processor.image_processor.image_grid_pinpoints
    rows, columns = get_anyres_image_grid_shape(question.size, pinpoints, side)
    view = cells[0] * cells[1]
    numbers = torch.arange(view, view * (1 + rows * columns)).view(rows, columns, *cells).transpose(1, 2)
    lines = unpad_image(numbers.reshape(1, rows * cells[0], columns * cells[1]), question.size)[0]
    return torch.cat([torch.arange(view), F.pad(lines, (0, 1), value=-1).flatten()])


def image_token_id(processor: ProcessorMixin) -> int | None:
    """The token that stands in the sequence for a part of an image. Gemma 3's processor names another one."""
    return getattr(processor.tokenizer, "image_token_id", None) or getattr(processor, "image_token_id", None)


def _unflatten(
    question: _Question, patches: torch.Tensor, thw: list[int], count: int
) -> tuple[torch.Tensor, tuple[int, int], torch.Tensor]:
    """The image of patches in the order of Qwen-VL, in which those of a token follow each other."""
    settings = question.processor.image_processor
    merge, depth = settings.merge_size, settings.temporal_patch_size
    _, height, width = thw
    rows, columns = height // merge, width // merge
    side = round((patches.shape[-1] / (3 * depth)) ** 0.5)
    if count != rows * columns or patches.shape != (height * width, 3 * depth * side * side):
        raise _unknown(
            question,
            f"{count} tokens and patches {tuple(patches.shape)} are not those of a grid {thw} merged by {merge}",
        )
    image = patches.view(rows, columns, merge, merge, 3, depth, side, side)[:, :, :, :, :, 0]
    image = image.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, height * side, width * side)
    return image.float(), (rows, columns), torch.arange(count)


def _unknown(question: _Question, why: str) -> ValueError:
    processor = question.processor
    height, width = question.size
    return ValueError(
        f"Where the image tokens of {type(processor).__name__} lie is not known for an image of {height} x {width} pixels: {why}."
    )
