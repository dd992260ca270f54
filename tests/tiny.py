# SPDX-License-Identifier: Apache-2.0
"""Tiny but real parts for tests, made without any download."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil
from agevlm.processing.processing_agevlm import AgeVlmProcessor

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
IMAGE = "<|reserved_special_token_0|>"

_CORPUS = [
    "What is in this image? There is a brown dog and a white cat on the red sofa.",
    "You are a helpful assistant. Describe this image in detail, please.",
    "What is the capital of France? The capital of France is Paris.",
    "lower newer upper older longer string",
    "user assistant system: How many cats are there? Two cats and one dog.",
]


def tiny_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens made like Llama 3's: it adds a BOS token, its special tokens come
    last in the vocabulary, and offsets include the space before a word. `kwargs` go to the tokenizer's class."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([BOS, EOS, EOT, PAD, *HEADERS, IMAGE])
    add_bos = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), add_bos])
    defaults = {
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **kwargs})


class ProcessorsConfig(PreTrainedConfig):
    """Stands for the model's configuration where only its processors are registered."""

    model_type = "agevlm_processors"


def register_processors() -> None:
    """Makes the Auto classes know the processors, so that they load without remote code."""
    AutoImageProcessor.register(
        ProcessorsConfig,
        image_processor_classes={"torchvision": AgeVlmImageProcessor, "pil": AgeVlmImageProcessorPil},
        exist_ok=True,
    )
    AutoProcessor.register(ProcessorsConfig, AgeVlmProcessor, exist_ok=True)
