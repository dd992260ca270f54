# SPDX-License-Identifier: Apache-2.0
"""From rows to batches for any image-text-to-text model of Transformers, with the phrases and targets of guidance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..processing.collator import RowCollator
from ..processing.processing_agevlm import RenderedChat
from .coverage import count_image_tokens, image_token_id, token_coverage
from .phrases import adds_special_tokens, encode_with_offsets


@dataclass
class GuidedDataCollator(RowCollator):
    """The collator of any model whose processor has a chat template: the batch of [`~agevlm.processing.collator.RowCollator`], made by
    the model's own processor. Tokens of images are not learned.

    `max_length` must leave room for the tokens of the images: most processors refuse texts whose images are cut.

    Args:
        grid: rows and columns of the visual tokens of a tile, for models with layers of cross-attention; see
            [`~agevlm.attention.tile_grid`].
        guided: whether grounded phrases become inputs of guidance.
    """

    grid: tuple[int, int] | None = None
    guided: bool = True

    @property
    def guides(self) -> bool:
        return self.guided

    def encode(self, texts: list[RenderedChat], images: list[list]) -> dict[str, Any]:
        inputs = encode_with_offsets(
            self.processor,
            texts,
            images,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=adds_special_tokens(self.processor, texts[0]),
        )
        inputs["offset_mapping"][inputs["input_ids"] == image_token_id(self.processor)] = 0
        return dict(inputs)

    def count_images(self, text: str) -> int:
        return text.count(self.processor.image_token)

    def cover(self, masks: dict[int, np.ndarray], images: list) -> list[torch.Tensor]:
        targets = []
        for number, image in enumerate(images):
            if number in masks:
                targets.append(token_coverage(self.processor, masks[number][None], grid=self.grid)[0])
            else:
                (count,) = count_image_tokens(self.processor, [(image.height, image.width)], grid=self.grid)
                targets.append(torch.zeros(count))
        return targets
