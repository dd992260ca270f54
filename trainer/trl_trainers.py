# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT and DPO trainers with stages and attention guidance."""

from dataclasses import dataclass
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from ..processing.collator import (
    AgeVlmDataCollator,
    GuidedPhrase,
    place_images,
    render_conversation,
    row_images,
    row_messages,
)
from .arguments import AgeVlmArgumentsMixin
from .trainer import _TARGETS, GuidanceMixin


@dataclass
class AgeVlmSFTConfig(AgeVlmArgumentsMixin, SFTConfig):
    """TRL's `SFTConfig` with the arguments of [`~agevlm.trainer.arguments.AgeVlmArgumentsMixin`]."""


@dataclass
class AgeVlmDPOConfig(AgeVlmArgumentsMixin, DPOConfig):
    """TRL's `DPOConfig` with the arguments of [`~agevlm.trainer.arguments.AgeVlmArgumentsMixin`]."""


class AgeVlmPreferenceCollator(DataCollatorForVisionPreference):
    """TRL's collator of preferences about images, with the guidance targets of [`AgeVlmDataCollator`].

    `message` of a grounded phrase counts through the prompt and the chosen answer. Phrases are guided in the chosen rows: the
    prompt's would look at the same in the rejected ones.
    """

    def __init__(self, guidance: AgeVlmDataCollator):
        super().__init__(processor=guidance.processor, max_length=guidance.max_length)
        self.guidance = guidance

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for example in examples:
            images = row_images(example)
            conversation = render_conversation(self.processor, place_images(row_messages(example), len(images)))
            rows.append((conversation, self.guidance.guided_phrases(example, images, conversation)))
        # As TRL wants them: it changes what it is given, and takes rows without images for rows with none.
        batch = super().torch_call([{**example, "images": row_images(example)} for example in examples])
        if not any(phrases for _, phrases in rows):
            return batch
        ids = batch["input_ids"]
        offsets = torch.zeros(*ids.shape, 2, dtype=torch.long)
        texts, phrases = [], []
        for i, (conversation, found) in enumerate(rows):
            text, start = conversation.text, conversation.answers[-1][0]
            tokens, spans = [], []
            for piece, shift in ((text[:start], 0), (text[start:], start)):  # TRL tokenizes the two by themselves
                encoded = self.processor.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
                tokens += encoded["input_ids"]
                spans += [(first + shift, last + shift) for first, last in encoded["offset_mapping"]]
            length = min(len(tokens), ids.shape[1])
            if found and ids[i, :length].tolist() != tokens[:length]:
                raise RuntimeError(
                    "TRL has tokenized a prompt and its answer otherwise than expected: cannot place phrases."
                )
            offsets[i, :length] = torch.tensor(spans[:length])
            texts.append(text)
            phrases.append(found)
        rejected: list[list[GuidedPhrase]] = [[] for _ in rows]
        batch.update(
            self.guidance.guidance_inputs(phrases + rejected, offsets, batch["attention_mask"].bool(), texts + texts)
        )
        return batch


class AgeVlmSFTTrainer(GuidanceMixin, SFTTrainer):
    """TRL's `SFTTrainer` for AGE-VLM, with stages and guidance through its fused LM head.

    Arguments are those of `SFTTrainer`; `model` must be a model, not a name, and `args` an [`AgeVlmSFTConfig`].
    """

    def __init__(
        self, model, args: AgeVlmSFTConfig, *, processing_class=None, data_collator=None, peft_config=None, **kwargs
    ):
        first = next(iter(kwargs["train_dataset"])) if kwargs.get("train_dataset") is not None else {}
        if data_collator is None and ("images" in first or "image" in first):  # text alone is TRL's business
            data_collator = self._make_collator(model, processing_class, args, args.assistant_only_loss)
        if peft_config is None:
            self._set_up(model, args)
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        if peft_config is not None:
            self._set_up(self.model, args)


class AgeVlmDPOTrainer(GuidanceMixin, DPOTrainer):
    """TRL's `DPOTrainer` for AGE-VLM, with stages and guidance. Rows may have `grounding`, see [`AgeVlmPreferenceCollator`].

    Arguments are those of `DPOTrainer`; `model` must be a model, not a name, and `args` an [`AgeVlmDPOConfig`].
    """

    own_loss_name = "dpo_loss"

    def __init__(
        self, model, args: AgeVlmDPOConfig, *, processing_class=None, data_collator=None, peft_config=None, **kwargs
    ):
        if data_collator is None:
            data_collator = AgeVlmPreferenceCollator(self._make_collator(model, processing_class, args, False))
        if peft_config is None:
            self._set_up(model, args)
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        if peft_config is not None:
            self._set_up(self.model, args)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("chosen", "rejected") if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in _TARGETS})
