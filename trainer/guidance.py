# SPDX-License-Identifier: Apache-2.0
"""Attention guidance of an AGE-VLM: its own maps and collator for [`~agevlm.attention.AttentionGuidance`]."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..attention.guidance import AttentionGuidance
from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing.collator import AgeVlmDataCollator
from ..processing.processing_agevlm import AgeVlmProcessor
from .stages import base_model

logger = logging.get_logger(__name__)


@torch.no_grad()
def visual_grid(model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor) -> tuple[int, int]:
    """Rows and columns of the visual tokens of an image as the processor prepares it."""
    size = processor.image_processor.size
    blank = torch.zeros(1, 3, size["height"], size["width"], device=model.device)
    return model.model.get_vision_tokens(blank)[1]


def guided_blocks(config: PreTrainedConfig, guided_layers: Sequence[int] | None) -> list[int]:
    """Positions of the guided layers among a model's cross-attention layers; of all where `guided_layers` is None.

    Raises:
        ValueError: if the model lacks one of them.
    """
    layers = list(config.text_config.cross_attention_layers)
    guided = layers if guided_layers is None else guided_layers
    if unknown := [layer for layer in guided if layer not in layers]:
        raise ValueError(f"guided_layers has {unknown}, but the cross-attention layers are {layers}.")
    return [layers.index(layer) for layer in guided]


class GuidanceMixin(AttentionGuidance):
    """Attention guidance of an AGE-VLM, whose blocks compute the maps themselves: the attention on the sink is no part of them."""

    def set_up_guidance(self, model: nn.Module, args) -> None:
        """Prepares a model before the trainer wraps it: a hook takes its attention maps.

        Raises:
            ValueError: if the model has none of `args.guided_layers`, or there is no such guidance loss.
        """
        base = base_model(model)
        self._guided_blocks = guided_blocks(base.config, args.guided_layers)
        super().set_up_guidance(model, args)
        if args.guidance_weight and args.guidance_loss == "dice" and base.config.text_config.cross_attention_sink:
            logger.warning(
                "guidance_loss='dice' with an attention sink: attention can move into the sink, where Dice has almost no "
                "gradient back to the object. Use log_dice or kl, or a model without a sink."
            )

        self._captured: list[torch.Tensor | None] | None = None
        # A model may see several trainers, one after another: their hooks stay, and must not keep them in memory.
        trainer = weakref.ref(self)

        def capture(module: nn.Module, inputs: tuple, output: Any) -> None:
            running = trainer()
            if running is not None and running._captured is not None:
                running._captured.append(output.cross_attention_maps)

        base.base_model.register_forward_hook(capture)

    def check_guidance(self, model: nn.Module, args) -> None:
        """Its layers are checked already."""

    @contextlib.contextmanager
    def recording(
        self, inputs: dict[str, Any], queries: torch.Tensor | None
    ) -> Iterator[Callable[[], torch.Tensor | None]]:
        if queries is not None:
            inputs["map_queries"] = queries
        captured: list[torch.Tensor | None] = []
        self._captured = captured

        def read() -> torch.Tensor | None:
            maps = captured[0] if captured else None
            return None if maps is None else maps[self._guided_blocks]

        try:
            yield read
        finally:
            self._captured = None

    def make_collator(
        self,
        model: nn.Module,
        processor,
        args,
        assistant_only_loss: bool,
        features: Callable[[list], Any] | None = None,
    ) -> AgeVlmDataCollator:
        """The collator with the arguments' settings.

        Raises:
            ValueError: if `processor` is not an AGE-VLM's.
        """
        if not isinstance(processor, AgeVlmProcessor):
            raise ValueError(
                f"Pass the model's processor as `processing_class` (AutoProcessor.from_pretrained), got {processor!r:.80}."
            )
        return AgeVlmDataCollator(
            processor,
            grid=visual_grid(base_model(model), processor) if args.guidance_weight else None,
            max_length=args.max_length,
            assistant_only_loss=assistant_only_loss,
            pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),  # of TRL's configurations
            guided_fraction=args.guided_fraction,
            guide_absent=args.guide_absent and base_model(model).config.text_config.cross_attention_sink,
            seed=args.seed,
            allow_urls=getattr(args, "allow_urls", False),
            features=features,
        )
