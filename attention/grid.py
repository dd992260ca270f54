# SPDX-License-Identifier: Apache-2.0
"""Maps of image tokens as pictures: cells that lie over an image, whatever the tokens' order, size and overlap."""

import math
from dataclasses import dataclass

import torch
from transformers import ProcessorMixin

from ..processing.processing_agevlm import AgeVlmProcessor
from .coverage import token_boxes


@dataclass(frozen=True)
class ImageGrid:
    """Equal cells over an image, row by row from its top left; those at the right and at the bottom may reach beyond it.

    `rows` and `columns` are their numbers, `cell` their width and height in pixels of the image, `shares` float32 `(image tokens, rows *
    columns)` the part of each token's attention that each cell shows.
    """

    rows: int
    columns: int
    cell: tuple[float, float]
    shares: torch.Tensor

    def show(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps `(..., image tokens)` as `(..., rows, columns)`."""
        return (maps.float() @ self.shares.to(maps.device)).unflatten(-1, (self.rows, self.columns))


def image_grid(
    processor: ProcessorMixin, image_size: tuple[int, int], grid: tuple[int, int] | None = None
) -> ImageGrid:
    """The cells of an image: about as large as its smallest tokens. A token that shows only padding is in none.

    Args:
        processor: of the model.
        image_size: height and width of the unprocessed image.
        grid: as for [`token_boxes`]; of an AGE-VLM rows and columns of an image's visual tokens.
    """
    height, width = image_size
    own = isinstance(processor, AgeVlmProcessor)
    boxes = own_boxes(processor, grid, image_size) if own else token_boxes(processor, image_size, grid=grid).double()
    sides = boxes[:, 2:] - boxes[:, :2]
    cell_width, cell_height = sides[(sides > 0).all(1)].amin(0).tolist()
    if own:  # exact: cells are the tokens, of which the last ones may be cut by the end of the image
        columns, rows = math.ceil(width / cell_width - 1e-6), math.ceil(height / cell_height - 1e-6)
    else:
        columns, rows = max(1, round(width / cell_width)), max(1, round(height / cell_height))
        cell_width, cell_height = width / columns, height / rows
    across = _shares(boxes[:, [0, 2]], width, cell_width, columns)
    down = _shares(boxes[:, [1, 3]], height, cell_height, rows)
    shares = (down[:, :, None] * across[:, None]).flatten(1)
    return ImageGrid(rows, columns, (cell_width, cell_height), shares.float())


def own_boxes(processor: AgeVlmProcessor, grid: tuple[int, int] | None, image_size: tuple[int, int]) -> torch.Tensor:
    """The boxes of an AGE-VLM's visual tokens, as [`token_boxes`], float64: its image processor knows them exactly.

    Args:
        grid: rows and columns of an image's visual tokens.
    """
    assert grid is not None
    (rows, columns), size = grid, processor.image_processor.size
    height, width = processor.image_processor.get_resized_size(*image_size)
    # In pixels of the resized image, whose beginning the image is; what lies behind it is padding.
    row, column = torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64)
    top, left = row.repeat_interleave(columns) * size["height"] / rows, column.repeat(rows) * size["width"] / columns
    boxes = torch.stack([left, top, left + size["width"] / columns, top + size["height"] / rows], dim=1)
    there = (left < width) & (top < height)
    scale = torch.tensor([image_size[1] / width, image_size[0] / height] * 2, dtype=torch.float64)
    return boxes * scale * there[:, None]


def _shares(intervals: torch.Tensor, length: int, cell: float, cells: int) -> torch.Tensor:
    """`(intervals, cells)`: which part of each interval, as far as it is in the image, lies in each cell."""
    start, end = intervals.clamp(0, length).unbind(1)
    edges = torch.arange(cells + 1, dtype=torch.float64) * cell
    edges[-1] = edges[-1].clamp(min=length)
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    inside = (end - start)[:, None]
    return torch.where(inside > 0, overlap.clamp(min=0) / inside.clamp(min=1e-9), 0.0)
