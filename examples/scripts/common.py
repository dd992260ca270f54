# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: loading, data, training and saving."""

import os
from collections.abc import Callable
from typing import Any

from transformers import AutoProcessor, Trainer, TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from agevlm import AgeVlmForConditionalGeneration, read_rows
from agevlm.deltas import load_checkpoint
from agevlm.trainer import AgeVlmScriptArguments


def run(
    trainer_class: Callable[..., Trainer],
    script_args: AgeVlmScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    prepare: Callable[[AgeVlmForConditionalGeneration], Any] | None = None,
    model_class: Any = AgeVlmForConditionalGeneration,
    **trainer_kwargs: Any,
) -> None:
    """Trains a model of a folder or the Hub on the rows of a data set, and saves it.

    Args:
        prepare: called with the model before it trains, where PEFT does not decide what trains.
        model_class: loads the model.
        trainer_kwargs: further arguments of the trainer.
    """
    quantization_config = get_quantization_config(model_args)
    model = load_checkpoint(
        model_class,
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization_config,
        # Quantized weights are made where they stay, on the device of this process.
        device_map=None if quantization_config is None else {"": training_args.device},
    )
    peft_config = get_peft_config(model_args)
    if prepare is not None and peft_config is None:
        prepare(model)
    evaluates = training_args.eval_strategy != "no"
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=read_rows(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=read_rows(script_args.dataset_name, script_args.dataset_test_split) if evaluates else None,
        processing_class=AutoProcessor.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision
        ),
        peft_config=peft_config,
        **trainer_kwargs,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        is_local = os.path.exists(script_args.dataset_name)  # a path of this machine is not for the Hub
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    trainer.end()
