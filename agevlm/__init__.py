# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM: attention-guided alignment in efficient vision-language models, for Hugging Face Transformers.

Importing this package imports no torch. Its classes load when they are first touched, and Transformers' Auto classes
learn of them as soon as Transformers' own auto modules are loaded, before or after.
"""

import importlib
from typing import TYPE_CHECKING

from ._auto import register_when_transformers_loads

__version__ = "0.1.0"

# Public name -> the module it lives in. The one list that both lazy loading and `dir()` read.
_EXPORTS = {
    "AgeVlmConfig": "modeling_agevlm.configuration_agevlm",
    "AgeVlmTextConfig": "modeling_agevlm.configuration_agevlm",
    "AgeVlmForConditionalGeneration": "modeling_agevlm.modeling_agevlm",
    "AgeVlmModel": "modeling_agevlm.modeling_agevlm",
    "AgeVlmPreTrainedModel": "modeling_agevlm.modeling_agevlm",
    "AgeVlmTextModel": "modeling_agevlm.modeling_agevlm",
    "AgeVlmImageProcessor": "processing.image_processing_agevlm",
    "AgeVlmImageProcessorPil": "processing.image_processing_agevlm",
    "AgeVlmProcessor": "processing.processing_agevlm",
    "AgeVlmDataCollator": "processing.collator",
    "AgeVlmTrainer": "trainer.trainer",
    "AgeVlmTrainingArguments": "trainer.arguments",
    "AgeVlmSFTTrainer": "trainer.trl_trainers",
    "AgeVlmSFTConfig": "trainer.trl_trainers",
    "AgeVlmDPOTrainer": "trainer.trl_trainers",
    "AgeVlmDPOConfig": "trainer.trl_trainers",
    "build_scenes": "processing.scenes",
    "build_checkpoint": "assembly",
}

if TYPE_CHECKING:
    from .assembly import build_checkpoint as build_checkpoint
    from .modeling_agevlm.configuration_agevlm import AgeVlmConfig as AgeVlmConfig
    from .modeling_agevlm.configuration_agevlm import AgeVlmTextConfig as AgeVlmTextConfig
    from .modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration as AgeVlmForConditionalGeneration
    from .modeling_agevlm.modeling_agevlm import AgeVlmModel as AgeVlmModel
    from .modeling_agevlm.modeling_agevlm import AgeVlmPreTrainedModel as AgeVlmPreTrainedModel
    from .modeling_agevlm.modeling_agevlm import AgeVlmTextModel as AgeVlmTextModel
    from .processing.collator import AgeVlmDataCollator as AgeVlmDataCollator
    from .processing.image_processing_agevlm import AgeVlmImageProcessor as AgeVlmImageProcessor
    from .processing.image_processing_agevlm import AgeVlmImageProcessorPil as AgeVlmImageProcessorPil
    from .processing.processing_agevlm import AgeVlmProcessor as AgeVlmProcessor
    from .processing.scenes import build_scenes as build_scenes
    from .trainer.arguments import AgeVlmTrainingArguments as AgeVlmTrainingArguments
    from .trainer.trainer import AgeVlmTrainer as AgeVlmTrainer
    from .trainer.trl_trainers import AgeVlmDPOConfig as AgeVlmDPOConfig
    from .trainer.trl_trainers import AgeVlmDPOTrainer as AgeVlmDPOTrainer
    from .trainer.trl_trainers import AgeVlmSFTConfig as AgeVlmSFTConfig
    from .trainer.trl_trainers import AgeVlmSFTTrainer as AgeVlmSFTTrainer


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


register_when_transformers_loads()
