# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT and DPO trainers with stages and attention guidance; GRPO needs no class here: TRL's own trainer works."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, SFTTrainer, apply_chat_template, is_conversational
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig
from ..processing.collator import AgeVlmDataCollator, GuidedPhrase, naming_bad_rows, render_conversation, row_images
from ..processing.processing_agevlm import RenderedChat
from ..processing.rows import PREFERENCE_COLUMNS, place_images, row_messages
from .arguments import AgeVlmArgumentsMixin
from .stages import LORA_TARGET_MODULES, lora_modules_to_save
from .trainer import AgeVlmMixin


@dataclass
class AgeVlmScriptArguments:
    """Where a training script finds its data, by the names of TRL's `ScriptArguments`.

    Args:
        dataset_name (`str`):
            What [`agevlm.data.readers.read_rows`] opens: a folder of `save_to_disk`, a file of rows, or a Hub id.
        dataset_train_split (`str`, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, defaults to `"test"`):
            Split to evaluate on, where `eval_strategy` asks for it.
    """

    dataset_name: str = field(metadata={"help": "Folder of `save_to_disk`, file of rows, or id on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})


@dataclass
class AgeVlmModelConfig(ModelConfig):
    """TRL's `ModelConfig`, whose LoRA is by default on the language model's layers, beside full training of the adapter and
    the cross-attention.

    Raises:
        ValueError: for 4 or 8 bits without LoRA.
    """

    lora_target_modules: list[str] | None = field(
        default_factory=lambda: [LORA_TARGET_MODULES],  # a single one is taken as a pattern
        metadata={"help": "Modules with LoRA: names, or one regular expression."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that train in full beside LoRA: by default the adapter and the cross-attention."},
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError("Weights of 4 or 8 bits do not train: add --use_peft, which trains LoRA beside them.")
        if self.use_peft and self.lora_modules_to_save is None:
            self.lora_modules_to_save = lora_modules_to_save(AgeVlmConfig.from_pretrained(self.model_name_or_path))


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

    Raises:
        ValueError: when called with an inconsistent row; the message names the row and says what is wrong.
    """

    def __init__(self, guidance: AgeVlmDataCollator):
        super().__init__(
            guidance.processor, max_length=guidance.max_length, pad_to_multiple_of=guidance.pad_to_multiple_of
        )
        self.guidance = guidance

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return naming_bad_rows(self._collate, examples)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for example in examples:
            row = {**example, "images": row_images(example)}  # TRL wants an empty list where there are none
            row.pop("image", None)
            if is_conversational(example):  # as TRL would do, which does not hand out the texts
                row["prompt"] = prepare_multimodal_messages(example["prompt"], images=row["images"])
                row["chosen"] = prepare_multimodal_messages(example["chosen"])
                row["rejected"] = prepare_multimodal_messages(example["rejected"])
                row.update(self._render(row))
            rows.append(row)
        batch = super().torch_call(rows)
        offsets = torch.zeros(*batch["input_ids"].shape, 2, dtype=torch.long)
        texts = [_join(row["prompt"], row["chosen"]) for row in rows]
        phrases: list[list[GuidedPhrase]] = [[] for _ in batch["input_ids"]]  # none in the rejected rows
        for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
            if example.get("grounding"):
                conversation = render_conversation(
                    self.processor, place_images(row_messages(example), len(row["images"]))
                )
                if conversation.text != texts[i]:
                    raise ValueError("A row with `grounding` must have no other columns that its chat template reads.")
                phrases[i] = self.guidance.guided_phrases(example, row["images"], conversation)
                spans = torch.tensor(self._offsets(row["prompt"], row["chosen"])[: offsets.shape[1]])
                offsets[i, : len(spans)] = spans
        batch.update(self.guidance.guidance_inputs(phrases, offsets, batch["attention_mask"].bool(), texts + texts))
        return batch

    def _render(self, row: dict[str, Any]) -> dict[str, RenderedChat]:
        """The texts of a row, in which special tokens that someone typed are known."""
        messages = {name: row[name] for name in PREFERENCE_COLUMNS}
        texts = apply_chat_template(row, self.processor)
        chats = {}
        for name in PREFERENCE_COLUMNS:

            def render(values: dict[str, Any], name: str = name) -> str:
                return apply_chat_template({**row, **values}, self.processor)[name]

            typed = self.processor.find_typed_tokens(messages, render) if self.processor.sanitize_chats else ()
            chats[name] = RenderedChat(texts[name], typed)
        return chats

    def _offsets(self, prompt: str, answer: str) -> list[tuple[int, int]]:
        """Characters in `prompt + answer` of each token. TRL tokenizes prompt and answer separately."""
        first, second = self.processor.tokenize(
            [prompt, answer], add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        return first + [(start + len(prompt), end + len(prompt)) for start, end in second]


class AgeVlmSFTTrainer(AgeVlmMixin, SFTTrainer):
    """TRL's `SFTTrainer` for AGE-VLM, with stages and guidance through its fused LM head.

    It takes the arguments of `SFTTrainer`; `model` must be a model, not a name, and `args` an [`AgeVlmSFTConfig`].
    `assistant_only_loss` needs no marks in the chat template. Data without images is left to TRL.

    Raises:
        ValueError: if the model is no AGE-VLM, or a setting does not fit it or the data.
    """

    def __init__(
        self, model, args: AgeVlmSFTConfig, *, processing_class=None, data_collator=None, peft_config=None, **kwargs
    ):
        first = _first_row(kwargs.get("train_dataset"))
        assistant_only_loss = args.assistant_only_loss
        if data_collator is None and _has_images(first):
            if args.completion_only_loss not in (None, "completion" in first):
                raise ValueError(
                    "Leave `completion_only_loss` out: rows with a `completion` learn that, and rows with `messages` have none."
                )
            data_collator = self.make_collator(model, processing_class, args, assistant_only_loss)
            # The collator masks the rest; TRL would refuse chat templates without marks that it does not know.
            args.assistant_only_loss = False
        if peft_config is None:
            self.set_up(model, args)
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        args.assistant_only_loss = assistant_only_loss
        if peft_config is not None:
            self.set_up(self.model, args)


class AgeVlmDPOTrainer(AgeVlmMixin, DPOTrainer):
    """TRL's `DPOTrainer` for AGE-VLM, with stages and guidance. Rows may have `grounding`, see [`AgeVlmPreferenceCollator`].

    It takes the arguments of `DPOTrainer`; `model` must be a model, not a name, and `args` an [`AgeVlmDPOConfig`]. Data
    without images is left to TRL.

    Raises:
        ValueError: if the model is no AGE-VLM, or a setting does not fit it or the data.
    """

    own_loss_name = "dpo_loss"

    def __init__(
        self, model, args: AgeVlmDPOConfig, *, processing_class=None, data_collator=None, peft_config=None, **kwargs
    ):
        if data_collator is None and _has_images(_first_row(kwargs.get("train_dataset"))):
            data_collator = AgeVlmPreferenceCollator(self.make_collator(model, processing_class, args, False))
        if peft_config is None:
            self.set_up(model, args)
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator,
            peft_config=peft_config, **kwargs
        )  # fmt: skip
        if peft_config is not None:
            self.set_up(self.model, args)


def _join(prompt: str, answer: str) -> RenderedChat:
    typed: list[frozenset[int]] = [getattr(text, "plain_characters", frozenset()) for text in (prompt, answer)]
    return RenderedChat(prompt + answer, typed[0] | {place + len(prompt) for place in typed[1]})


def _first_row(dataset) -> dict:
    """
    Raises:
        ValueError: if there is none.
    """
    if dataset is None:
        return {}
    for row in dataset:
        return row
    raise ValueError("The data set to train on has no rows.")


def _has_images(row: dict) -> bool:
    return "images" in row or "image" in row
