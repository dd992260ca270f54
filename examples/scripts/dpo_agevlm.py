# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of AGE-VLM with TRL, on conversations about images, with attention guidance where rows have masks.

    accelerate launch examples/scripts/sft_agevlm.py \\
        --model_name_or_path my-age-vlm --dataset_name my_data --stage instruct --assistant_only_loss \\
        --learning_rate 1e-4 --output_dir output

With LoRA on the language model, beside full training of the adapter and the cross-attention: `--use_peft --lora_r 8` in
place of `--stage`.
"""

from transformers import AutoProcessor
from trl import TrlParser, get_peft_config

from agevlm import AgeVlmForConditionalGeneration
from agevlm.data.readers import read_rows
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmModelConfig, AgeVlmScriptArguments


def main(script_args: AgeVlmScriptArguments, training_args: AgeVlmDPOConfig, model_args: AgeVlmModelConfig) -> None:
    model = AgeVlmForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    evaluates = training_args.eval_strategy != "no"

    trainer = AgeVlmDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=read_rows(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=read_rows(script_args.dataset_name, script_args.dataset_test_split) if evaluates else None,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    parser = TrlParser((AgeVlmScriptArguments, AgeVlmDPOConfig, AgeVlmModelConfig))
    main(*parser.parse_args_and_config())
