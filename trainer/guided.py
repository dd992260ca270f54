# SPDX-License-Identifier: Apache-2.0
"""Trainers of any image-text-to-text model of Transformers with attention guidance: Transformers' own and TRL's SFT."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from ..attention.guidance import AttentionGuidance, GuidanceArguments
from ..data.readers import stored_images
from .arguments import GuidedTrainingArguments


class GuidedTrainer(AttentionGuidance, Trainer):
    """Transformers' `Trainer` for any image-text-to-text model, with guidance, on rows with images, messages and grounding
    ([`agevlm.processing.rows`]).

    ```python
    trainer = GuidedTrainer(
        model=model,
        args=GuidedTrainingArguments("output", guidance_loss="kl"),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    ```

    Args:
        model: of Transformers, whose text model uses SDPA; or a PEFT model of one.
        args: [`~agevlm.trainer.GuidedTrainingArguments`].
        processing_class: the model's processor; saved with every checkpoint.
        data_collator: by default [`~agevlm.attention.GuidedDataCollator`] with the arguments' settings.
        kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: if the model's attention cannot be guided, or a setting does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GuidedTrainingArguments,
        *,
        processing_class=None,
        data_collator=None,
        **kwargs: Any,
    ):
        self.set_up_guidance(model, args)
        if data_collator is None:
            data_collator = self.make_collator(model, processing_class, args, args.assistant_only_loss)
            # The collator reads the images, so that its error names the row of a damaged one.
            for name in kwargs.keys() & {"train_dataset", "eval_dataset"}:
                kwargs[name] = stored_images(kwargs[name])
        args.remove_unused_columns = False  # the collator reads `grounding`
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )


@dataclass
class GuidedSFTConfig(GuidanceArguments, SFTConfig):
    """TRL's `SFTConfig` with the arguments of [`~agevlm.attention.GuidanceArguments`]. `max_length` is None by default, because most
    processors refuse texts whose images are cut."""

    max_length: int | None = None


class GuidedSFTTrainer(AttentionGuidance, SFTTrainer):
    """TRL's `SFTTrainer` for any image-text-to-text model, with guidance, on rows with images.

    It takes the arguments of `SFTTrainer`; `model` must be a model, not a name, and `args` a [`GuidedSFTConfig`].
    `assistant_only_loss` needs no marks in the chat template.

    Raises:
        ValueError: if the model's attention cannot be guided, or a setting does not fit it.
    """

    def __init__(
        self, model: nn.Module, args: GuidedSFTConfig, *, processing_class=None, data_collator=None, **kwargs: Any
    ):
        assistant_only_loss = args.assistant_only_loss
        self.set_up_guidance(model, args)
        if data_collator is None:
            data_collator = self.make_collator(model, processing_class, args, assistant_only_loss)
            # The collator masks the rest; TRL would refuse chat templates without marks that it does not know.
            args.assistant_only_loss = False
        args.remove_unused_columns = False
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        args.assistant_only_loss = assistant_only_loss
