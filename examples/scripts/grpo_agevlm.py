# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimization of AGE-VLM with TRL's own `GRPOTrainer`: the model learns to give expected answers.

    accelerate launch examples/scripts/grpo_agevlm.py \\
        --model_name_or_path my-age-vlm --dataset_name my_questions --stage instruct \\
        --learning_rate 1e-5 --max_completion_length 32 --output_dir output

Rows have `prompt` (a list of messages), `image` or `images`, and `answer`, the text that is rewarded. With LoRA on the
language model, beside full training of the adapter and the cross-attention: `--use_peft --lora_r 8` in place of `--stage`.
"""

from dataclasses import dataclass, field

from common import run
from trl import GRPOConfig, GRPOTrainer

from agevlm import AgeVlmForConditionalGeneration
from agevlm.processing import message_text
from agevlm.trainer import PRESETS, AgeVlmModelConfig, AgeVlmScriptArguments, freeze, parse_script
from agevlm.trainer.stages import print_trainable


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
    def prepare(model: AgeVlmForConditionalGeneration) -> None:
        groups = freeze(model, script_args.stage)
        if training_args.process_index == 0:
            print_trainable(model, groups, f"Stage {script_args.stage}")

    run(GRPOTrainer, script_args, training_args, model_args, prepare, reward_funcs=expected_answer)


if __name__ == "__main__":
    main(*parse_script((GRPOScriptArguments, GRPOConfig, AgeVlmModelConfig)))
