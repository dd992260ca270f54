# SPDX-License-Identifier: Apache-2.0
"""`AgeVlmTrainer`: Transformers' trainer with AGE-VLM's stages, guidance, batches, optimizer and checkpoints."""

from typing import Any

from torch import nn
from transformers import Trainer

from ..data.features import FeatureStore
from ..data.readers import stored_images
from .arguments import AgeVlmTrainingArguments
from .cards import CardsMixin
from .checkpoints import CheckpointsMixin
from .guards import GuardsMixin
from .guidance import GuidanceMixin
from .heatmaps import HeatmapsMixin
from .optimizer import OptimizerMixin
from .sampling import SamplingMixin
from .stages import StagesMixin


class AgeVlmMixin(
    GuardsMixin, StagesMixin, GuidanceMixin, HeatmapsMixin, OptimizerMixin, SamplingMixin, CardsMixin, CheckpointsMixin
):
    """All that AGE-VLM adds to a trainer of Transformers or TRL."""

    def set_up(self, model: nn.Module, args) -> None:
        """Prepares a model before the trainer wraps it.

        Raises:
            ValueError: if it is no AGE-VLM, or a setting does not fit it.
        """
        self.set_up_stage(model, args)
        self.set_up_guidance(model, args)
        self.set_up_card(model, args)


class AgeVlmTrainer(AgeVlmMixin, Trainer):
    """Transformers' `Trainer` for AGE-VLM: any stage, with or without guidance, on rows with images, messages and grounding.

    ```python
    trainer = AgeVlmTrainer(
        model=model,
        args=AgeVlmTrainingArguments("output", stage="guide", bf16=True),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    ```

    Args:
        model: [`~agevlm.AgeVlmForConditionalGeneration`], or a PEFT model of one.
        args: [`~agevlm.trainer.arguments.AgeVlmTrainingArguments`].
        processing_class: the model's processor; saved with every checkpoint.
        features: features of a frozen vision tower, which are used in place of images (`agevlm features`).
        data_collator: by default [`~agevlm.processing.collator.AgeVlmDataCollator`] with the arguments' settings.
        kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: if the model is no AGE-VLM, a setting does not fit it, or `features` are not of its vision tower or
            that trains.
    """

    def __init__(
        self,
        model,
        args: AgeVlmTrainingArguments,
        *,
        processing_class=None,
        features: FeatureStore | None = None,
        data_collator=None,
        **kwargs,
    ):
        self.set_up(model, args)
        if features is not None:
            features.check(model, processing_class)
        if data_collator is None:
            data_collator = self.make_collator(model, processing_class, args, args.assistant_only_loss, features)
            # The collator reads the images, so that its error names the row of a damaged one.
            for name in kwargs.keys() & {"train_dataset", "eval_dataset"}:
                kwargs[name] = stored_images(kwargs[name])
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                "AgeVlmTrainer does not train with nn.DataParallel, which Transformers uses where one process sees several "
                "GPUs: start it with `accelerate launch`, or show it one with CUDA_VISIBLE_DEVICES."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (
            not return_outputs
            and "labels" in inputs
            and self.label_smoother is None
            and self.compute_loss_func is None
        ):
            inputs = keep_learned(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def keep_learned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with which the head runs only at positions where some row learns its next token: with a vocabulary of a hundred
    thousand and a loss on the answers alone, the others are a large part of a step."""
    shift_labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    learned = (shift_labels != -100).any(0)
    learned[0] |= ~learned.any()  # an empty one would have no loss
    keep = learned.nonzero()[:, 0]
    return {**inputs, "shift_labels": shift_labels[:, keep], "logits_to_keep": keep}
