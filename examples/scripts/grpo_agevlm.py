# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimisation of AGE-VLM with TRL's own `GRPOTrainer`: the model learns to give expected answers.

    accelerate launch examples/scripts/grpo_agevlm.py \\
        --model_name_or_path my-age-vlm --dataset_name my_questions --stage instruct \\
        --learning_rate 1e-5 --max_completion_length 32 --output_dir output

Rows have `prompt` (a list of messages), `image` or `images`, and `answer`, the text that is rewarded. With LoRA on the
language model, beside full training of the adapter and the cross-attention: `--use_peft --lora_r 8` in place of `--stage`.
"""

from dataclasses import dataclass, field

from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer, TrlParser, get_peft_config

from agevlm import AgeVlmForConditionalGeneration
from agevlm.data.readers import read_rows
from agevlm.processing.rows import message_text
from agevlm.trainer.stages import PRESETS, freeze, print_trainable
from agevlm.trainer.trl_trainers import AgeVlmModelConfig, AgeVlmScriptArguments


@dataclass
class GRPOScriptArguments(AgeVlmScriptArguments):
    stage: str = field(
        default="instruct", metadata={"help": "What trains, where PEFT does not decide that.", "choices": [*PRESETS]}
    )


def expected_answer(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Reward: 1 for the expected answer, whatever its case and full stop, and 0 for any other."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".!").casefold()

    return [
        float(plain(message_text(completion[-1])) == plain(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def main(script_args: GRPOScriptArguments, training_args: GRPOConfig, model_args: AgeVlmModelConfig) -> None:
    model = AgeVlmForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        groups = freeze(model, script_args.stage)
        if training_args.process_index == 0:
            print_trainable(model, groups, f"Stage {script_args.stage}")
    evaluates = training_args.eval_strategy != "no"

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=expected_answer,
        args=training_args,
        train_dataset=read_rows(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=read_rows(script_args.dataset_name, script_args.dataset_test_split) if evaluates else None,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, AgeVlmModelConfig))
    main(*parser.parse_args_and_config())
