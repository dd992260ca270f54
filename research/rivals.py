# SPDX-License-Identifier: Apache-2.0
"""The model that AGE-VLM is compared with: Transformers' Llava, from the same parts.

Image tokens stand in the text beside the words, and self-attention reads both. The language model, the vision tower and the kind of
adapter are AGE-VLM's, so that only the way in which the image reaches the language model differs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Trainer
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from agevlm.data import FeatureStore
from agevlm.modeling_agevlm.modeling_agevlm import (
    AgeVlmForConditionalGeneration,
    AgeVlmImageFeatures,
    AgeVlmModel,
    AgeVlmMultiModalProjector,
    remove_pooling_head,
    vision_width,
)
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.processing_agevlm import AgeVlmProcessor
from agevlm.trainer import (
    AgeVlmTrainingArguments,
    CheckpointsMixin,
    GuardsMixin,
    OptimizerMixin,
    SamplingMixin,
    visual_grid,
)
from agevlm.trainer.stages import resolve_groups
from agevlm.trainer.trainer import keep_learned


class ConcatenationModel(LlavaModel):
    """`LlavaModel` with AGE-VLM's reading of the tower's output and AGE-VLM's adapter.

    Squares of `config.pooling` by `config.pooling` tokens of the tower are averaged into one visual token, at the right and bottom
    edges over the tokens that are there.
    """

    get_vision_tokens = AgeVlmModel.get_vision_tokens

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        # Convolutional towers have no attention, and refuse the implementations that the text model is asked to use.
        self.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
        remove_pooling_head(self.vision_tower)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config, vision_width(self.vision_tower))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "ConcatenationModel":
        """The tower stays in evaluation mode: its batch norms must not follow small batches."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def pooled_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the visual tokens that a `grid` of the tower's tokens gives."""
        rows, columns = (math.ceil(side / self.config.pooling) for side in grid)
        return rows, columns

    def project_vision_tokens(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The tower's tokens `(N, T, vision_width)` to visual tokens `(N, T', D)`, one for each square of `pooling`."""
        squares = tokens.unflatten(1, grid).movedim(-1, 1)
        pooled = nn.functional.avg_pool2d(squares, self.config.pooling, ceil_mode=True).flatten(2).transpose(1, 2)
        return self.multi_modal_projector(
            pooled.to(self.multi_modal_projector.layernorm.weight.dtype), self.pooled_grid(grid)
        )

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> AgeVlmImageFeatures:  # type: ignore[override]
        """The tower's tokens `(N, T, vision_width)` of `(N, 3, H, W)` pixels, and the visual tokens, a list of `(T', D)`."""
        tokens, grid, _ = self.get_vision_tokens(pixel_values)
        return AgeVlmImageFeatures(
            last_hidden_state=tokens, pooler_output=list(self.project_vision_tokens(tokens, grid)), grid=grid
        )

    def forward(self, *args, mm_encoder_outputs: dict | None = None, **kwargs):
        if mm_encoder_outputs is not None and mm_encoder_outputs["image"].pooler_output is None:
            tower = mm_encoder_outputs["image"]
            visual = list(self.project_vision_tokens(tower.last_hidden_state, tower.grid))
            mm_encoder_outputs = {"image": AgeVlmImageFeatures(pooler_output=visual)}
        return super().forward(*args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


class ConcatenationForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` on a [`ConcatenationModel`]."""

    def __init__(self, config: LlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ConcatenationModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_age_vlm(
        cls, model: AgeVlmForConditionalGeneration, pooling: int = 1
    ) -> "ConcatenationForConditionalGeneration":
        """The concatenating model of the same parts; it takes over their weights and the adapter's, and does not copy them.

        Args:
            model: its language model must not be trained in both.
            pooling: side of the squares of the tower's tokens that become one visual token.
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
        config.pooling = pooling
        with torch.device("meta"):
            new = cls(config)
        new.model.vision_tower = model.model.vision_tower
        new.model.multi_modal_projector = model.model.multi_modal_projector
        # The names of Llama's own parameters agree.
        parameters = model.model.language_model.state_dict().items()
        llama = {name: value for name, value in parameters if not name.startswith("cross_attn.")}
        new.model.language_model.load_state_dict(llama, assign=True)
        new.model.language_model.rotary_emb = model.model.language_model.rotary_emb
        new.lm_head.weight = model.lm_head.weight
        new.tie_weights()
        new.generation_config = model.generation_config
        new.model.language_model.set_attn_implementation(model.config.text_config._attn_implementation)
        return new.eval()


class ConcatenationProcessor(LlavaProcessor):
    """`LlavaProcessor` with AGE-VLM's images. Llava has no input for their padding, and sees it in the color that it has."""

    tokens_per_image: int

    @classmethod
    def from_age_vlm(
        cls, processor: AgeVlmProcessor, model: ConcatenationForConditionalGeneration
    ) -> "ConcatenationProcessor":
        """With AGE-VLM's tokenizer, images and chat template; an image becomes as many tokens as `model` has of it."""
        new = cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            chat_template=processor.chat_template,
            image_token=processor.image_token,
        )
        new.tokens_per_image = tokens_per_image(model, processor)
        return new

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.tokens_per_image

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        inputs.pop("image_sizes", None)
        return inputs


def tokens_per_image(model: ConcatenationForConditionalGeneration, processor: AgeVlmProcessor) -> int:
    """The number of visual tokens of an image as the processor prepares it."""
    return math.prod(model.model.pooled_grid(visual_grid(model, processor)))


def expand_image_tokens(batch: dict[str, Any], image_token_id: int, tokens_per_image: int) -> dict[str, Any]:
    """A batch, padded on the right, with each image token repeated as often as an image has visual tokens.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, `(B, S)`, and other inputs, which stay as they are.

    Returns:
        The batch with these three at `(B, S')`, padded again: with 0 in `attention_mask` and -100 in `labels`.
    """
    times = torch.where(batch["input_ids"] == image_token_id, tokens_per_image, 1)
    attended = batch["attention_mask"].bool()

    def expand(values: torch.Tensor, fill: int) -> torch.Tensor:
        rows = [
            row[used].repeat_interleave(count[used]) for row, count, used in zip(values, times, attended, strict=True)
        ]
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {**batch, **{name: expand(batch[name], fill) for name, fill in fills.items()}}


class ConcatenationTrainer(GuardsMixin, SamplingMixin, OptimizerMixin, CheckpointsMixin, Trainer):
    """Trains the adapter of a [`ConcatenationForConditionalGeneration`], on the same batches and by the same arguments as
    [`~agevlm.trainer.AgeVlmTrainer`] trains an AGE-VLM. There is no cross-attention to train, and no attention to guide.

    Args:
        processing_class: the [`~agevlm.AgeVlmProcessor`] of the AGE-VLM that the model comes from.
        features: of the frozen tower, see [`~agevlm.data.FeatureStore`].

    Raises:
        ValueError: if `args.stage` trains a part of the tower or of the language model, or `features` are not of its tower.
    """

    def __init__(
        self,
        model: ConcatenationForConditionalGeneration,
        args: AgeVlmTrainingArguments,
        *,
        processing_class: AgeVlmProcessor,
        features: FeatureStore | None = None,
        **kwargs,
    ):
        if other := set(resolve_groups(args.stage or "align")) - {"adapter", "cross_attention"}:
            raise ValueError(
                f"Only the adapter trains here, but the stage trains {', '.join(sorted(other))}: set "
                "training.stage=[adapter,cross_attention]."
            )
        model.requires_grad_(False)
        model.model.multi_modal_projector.float().requires_grad_(True)
        if features is not None:
            features.check(model, processing_class)
        collator = AgeVlmDataCollator(
            processing_class,
            max_length=args.max_length,
            assistant_only_loss=args.assistant_only_loss,
            features=features,
        )
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self._tokens_per_image = tokens_per_image(model, processing_class)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "image_sizes"}
        inputs = expand_image_tokens(inputs, self.model.config.image_token_id, self._tokens_per_image)
        return super().compute_loss(model, keep_learned(inputs), return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # which has no part of guidance
            logs["lm_loss"] = logs["loss"]
        super().log(logs, start_time)
