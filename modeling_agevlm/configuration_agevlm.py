# Copyright 2026 The AGE-VLM contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""AGE-VLM model configuration.

`save_pretrained` copies this file to the Hub with every model. It therefore imports libraries only.
"""

import itertools

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto import AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import auto_docstring


def default_cross_attention_layers(num_hidden_layers: int) -> list[int]:
    """Default `cross_attention_layers`: four blocks spread evenly over a Llama of any depth.

    The blocks precede Llama layers `round(2 + i * L / 4)`. For `L = 16` these are layers 2, 6, 10 and 14 as in the paper,
    or 2, 7, 12 and 17 of the merged stack. Below 12 layers this rule exceeds the depth, so the blocks precede layers
    `i * L // 4`; with fewer than four layers there is one block per layer.
    """
    if num_hidden_layers >= 12:
        before = [round(2 + i * num_hidden_layers / 4) for i in range(4)]
    else:
        count = min(4, num_hidden_layers)
        before = [i * num_hidden_layers // count for i in range(count)]
    return [layer + i for i, layer in enumerate(before)]


@auto_docstring(checkpoint="age-vlm-1b")
@strict
class AgeVlmTextConfig(LlamaConfig):
    r"""
    cross_attention_layers (`list[int]` or `tuple[int, ...]`, *optional*):
        Indices of the gated cross-attention blocks in the merged stack of Llama layers and blocks, as in the paper and
        in Mllama. With 16 Llama layers, `[2, 7, 12, 17]` places the blocks before Llama layers 2, 6, 10 and 14. The list
        must be strictly increasing, with at most one block before each Llama layer. Defaults to four blocks spread
        evenly over the depth. With an empty list the model is a plain Llama.
    cross_attention_sink (`bool`, *optional*, defaults to `False`):
        Whether each block has a learned attention sink: a key with the value zero beside the visual tokens, so that a
        text token can attend to nothing. The blocks of the paper have no sink.

    Raises:
        `huggingface_hub.errors.StrictDataclassClassValidationError`: if the list is out of range or unsorted, or has two
            blocks before one layer.
    """

    model_type = "agevlm_text"
    base_config_key = "text_config"
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "cross_attn.*.q_proj": "colwise",
        "cross_attn.*.k_proj": "colwise",
        "cross_attn.*.v_proj": "colwise",
        "cross_attn.*.o_proj": "rowwise",
    }

    # Llama-3.2-1B
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    cross_attention_layers: list[int] | tuple[int, ...] | None = None
    cross_attention_sink: bool = False

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and "rope_scaling" not in kwargs and "rope_theta" not in kwargs:
            self.rope_parameters = {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        if self.cross_attention_layers is None:
            self.cross_attention_layers = default_cross_attention_layers(self.num_hidden_layers)
        # A list, because JSON has no tuples, and a loaded configuration must equal the saved one.
        self.cross_attention_layers = list(self.cross_attention_layers)
        super().__post_init__(**kwargs)

    @property
    def cross_attention_llama_layers(self) -> list[int]:
        """The Llama layers that follow a cross-attention block, counted without the blocks."""
        return [layer - i for i, layer in enumerate(self.cross_attention_layers or [])]

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        super().validate_architecture()
        layers, before = list(self.cross_attention_layers or []), self.cross_attention_llama_layers
        merged = self.num_hidden_layers + len(layers)
        if any(not 0 <= layer < merged for layer in layers) or any(
            layer >= self.num_hidden_layers for layer in before
        ):
            raise ValueError(
                f"cross_attention_layers={layers} is out of range for {self.num_hidden_layers} Llama layers and "
                f"{len(layers)} blocks. Each index must be in 0..{merged - 1} and have a Llama layer after it."
            )
        if any(b <= a for a, b in itertools.pairwise(layers)):
            raise ValueError(f"cross_attention_layers={layers} must be strictly increasing, without repeats.")
        if len(set(before)) != len(before):
            raise ValueError(
                f"cross_attention_layers={layers} has two blocks before one Llama layer (the blocks precede Llama layers "
                f"{before}). Place at least one Llama layer between two blocks."
            )


@auto_docstring(checkpoint="age-vlm-1b")
@strict
class AgeVlmConfig(PreTrainedConfig):
    r"""
    projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
        Activation between the two linear layers of the adapter.
    visual_position_embedding (`bool`, *optional*, defaults to `False`):
        Whether the adapter adds a fixed 2-D sine-cosine signal to the visual tokens. The features of a convolutional
        tower have little information about absolute positions, which questions such as "where is it?" need.
    image_token_id (`int`, *optional*, defaults to 128002):
        The token that stands for one image in the text. It is never expanded. The default is
        `<|reserved_special_token_0|>` of the Llama 3.2 tokenizers, so that no embedding is resized.

    The defaults give age-vlm-1b: Llama-3.2-1B with blocks at 2, 7, 12 and 17 of the merged stack, and a ConvNeXt-Large of
    timm, trained with CLIP. This tower turns a 768x768 image into 24x24 = 576 tokens of width 1536.

    Example:

    ```python
    >>> from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration

    >>> configuration = AgeVlmConfig()
    >>> model = AgeVlmForConditionalGeneration(configuration)
    >>> configuration = model.config
    ```"""

    model_type = "agevlm"
    # A trainer concatenates the other outputs along their first dimension, which must be the batch.
    keys_to_ignore_at_inference = ["cache", "image_outputs", "cross_attention_maps"]
    sub_configs_defaults = {
        "text_config": AgeVlmTextConfig,
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="timm_wrapper",
            init_kwargs={"architecture": "convnext_large_mlp.clip_laion2b_ft_soup_320", "do_pooling": False},
        ),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 128002
    projector_hidden_act: str = "gelu"
    visual_position_embedding: bool = False
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # The outer configuration decides, because the head belongs to the outer model.
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the vocabulary of {self.text_config.vocab_size} "
                "tokens. Choose an existing token, such as a reserved one, because the embedding is never resized."
            )


AgeVlmConfig.register_for_auto_class()

__all__ = ["AgeVlmConfig", "AgeVlmTextConfig"]
