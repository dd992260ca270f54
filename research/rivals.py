# SPDX-License-Identifier: Apache-2.0
"""The model that AGE-VLM is measured against: Transformers' Llava, from the same parts.

Image tokens stand in the text beside the words, and self-attention does the rest. The language model, the vision tower
and the kind of adapter are AGE-VLM's own, so that only the way in which the image reaches the language model differs.
"""

import math
import re

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Trainer
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from agevlm.modeling_agevlm.modeling_agevlm import (
    AgeVlmForConditionalGeneration,
    AgeVlmImageFeatures,
    AgeVlmModel,
    AgeVlmMultiModalProjector,
    _train_what_learns,
    vision_width,
)
from agevlm.processing.processing_agevlm import AgeVlmProcessor
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.stages import GROUPS, last_block, optimizer_groups, resolve_groups
from agevlm.trainer.trainer import keep_learnt, visual_grid


class ConcatenationModel(LlavaModel):
    """`LlavaModel` with AGE-VLM's way from pixels to tokens: its reading of the tower's output, and its adapter."""

    _vision_tokens = AgeVlmModel._vision_tokens
    _project = AgeVlmModel._project

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config, vision_width(self.vision_tower))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "ConcatenationModel":
        super().train(mode)
        if mode:
            _train_what_learns(self.vision_tower, parent_learns=False)  # a frozen tower stays in evaluation mode
        return self

    def get_image_features(  # type: ignore[override]
        self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor | None = None, **kwargs
    ) -> AgeVlmImageFeatures:
        """The tower's tokens `(N, T, vision_width)` of `(N, 3, H, W)` pixels, and those of the adapter, a list."""
        tokens, grid, _ = self._vision_tokens(pixel_values)
        return AgeVlmImageFeatures(
            last_hidden_state=tokens, pooler_output=list(self._project(tokens, grid)), grid=grid
        )

    def forward(self, *args, mm_encoder_outputs: dict | None = None, **kwargs):
        if mm_encoder_outputs is not None and mm_encoder_outputs["image"].pooler_output is None:
            features = mm_encoder_outputs["image"]
            projected = list(self._project(features.last_hidden_state, features.grid))
            mm_encoder_outputs = {"image": AgeVlmImageFeatures(pooler_output=projected)}
        return super().forward(*args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class ConcatenationForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` on a [`ConcatenationModel`]."""

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ConcatenationModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_age_vlm(cls, model: AgeVlmForConditionalGeneration) -> "ConcatenationForConditionalGeneration":
        """The concatenating model of the same parts; their weights are taken over, not copied.

        The adapter is AGE-VLM's, freshly initialised or trained as it is. The language model must not be trained in both.
        """
        text = model.config.text_config.to_dict()
        for key in ("model_type", "cross_attention_layers", "cross_attention_sink", "architectures"):
            text.pop(key, None)
        config = LlavaConfig(
            vision_config=model.config.vision_config,
            text_config=LlamaConfig(**text),
            image_token_id=model.config.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            projector_hidden_act=model.config.projector_hidden_act,
            tie_word_embeddings=model.config.tie_word_embeddings,
        )
        config.visual_position_embedding = model.config.visual_position_embedding
        with torch.device("meta"):
            new = cls(config)
        new.model.vision_tower = model.model.vision_tower
        new.model.multi_modal_projector = model.model.multi_modal_projector
        # Llama's layers without the blocks: the names of all else agree.
        weights = {
            name: p for name, p in model.model.language_model.state_dict().items() if ".cross_attn." not in name
        }
        new.model.language_model.load_state_dict(weights, assign=True)
        new.model.language_model.rotary_emb = model.model.language_model.rotary_emb
        new.lm_head.weight = model.lm_head.weight
        new.tie_weights()
        new.generation_config = model.generation_config
        new.model.language_model.set_attn_implementation(model.config.text_config._attn_implementation)
        return new.eval()


class ConcatenationProcessor(LlavaProcessor):
    """`LlavaProcessor` with AGE-VLM's images, whose padding Llava has no input for: it is seen as the colour it has."""

    @classmethod
    def from_age_vlm(cls, processor: AgeVlmProcessor, tokens_per_image: int) -> "ConcatenationProcessor":
        """With AGE-VLM's tokenizer, images and chat template; an image is written as `tokens_per_image` tokens."""
        size = processor.image_processor.size
        return cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=round((size["height"] * size["width"] / tokens_per_image) ** 0.5),
            vision_feature_select_strategy="full",
            chat_template=processor.chat_template,
            image_token=processor.image_token,
            num_additional_image_tokens=0,
        )

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        inputs.pop("pixel_attention_mask", None)
        return inputs


def expand_image_tokens(
    batch: dict[str, torch.Tensor], image_token_id: int, tokens_per_image: int, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """A batch with an image token repeated as often as the image has visual tokens.

    Args:
        batch: `input_ids`, `attention_mask` and perhaps `labels`, `(B, S)`, and whatever else, which stays as it is.

    Returns:
        The batch with these at `(B, S')`, padded again: with 0 in `attention_mask` and -100 in `labels`.
    """
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    times = torch.where(batch["input_ids"] == image_token_id, tokens_per_image, 1)
    attended = batch["attention_mask"].bool()
    return {
        **batch,
        **{
            name: pad_sequence(
                [
                    row[used].repeat_interleave(count[used])
                    for row, count, used in zip(batch[name], times, attended, strict=True)
                ],
                batch_first=True,
                padding_value=fill,
                padding_side=padding_side,
            )
            for name, fill in fills.items()
            if name in batch
        },
    }


class ConcatenationTrainer(Trainer):
    """Trains a [`ConcatenationForConditionalGeneration`] by the same arguments as AGE-VLM: in every stage the adapter, from
    the second on the tower's last block. There is no attention to guide."""

    def __init__(self, model: ConcatenationForConditionalGeneration, args: AgeVlmTrainingArguments, **kwargs):
        names = [name for name, _ in model.named_parameters()]
        trained = [GROUPS["adapter"]]
        if "vision_last_block" in resolve_groups(args.stage or "instruct"):
            trained.append(last_block([name for name in names if "vision_tower" in name]))
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if any(re.match(pattern, name) for pattern in trained):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if len(trained) > 1:
            model.model.vision_tower.float()
        super().__init__(model=model, args=args, **kwargs)
        self._tokens_per_image = math.prod(visual_grid(model, kwargs["processing_class"]))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimizer_groups(self.model, self.args.weight_decay, self.args.group_learning_rates)
            self.optimizer: torch.optim.Optimizer = cls(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ready = inputs.get("mm_encoder_outputs")
        tokens = self._tokens_per_image if ready is None else ready["image"].last_hidden_state.shape[1]
        inputs = expand_image_tokens(inputs, self.model.config.image_token_id, tokens)
        return super().compute_loss(model, keep_learnt(inputs), return_outputs, num_items_in_batch)
