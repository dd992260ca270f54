# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of AGE-VLM with TRL, on conversations about images, with attention guidance where rows have masks.

    accelerate launch examples/scripts/sft_agevlm.py \\
        --model_name_or_path my-age-vlm --dataset_name my_data --stage instruct --assistant_only_loss \\
        --learning_rate 1e-4 --output_dir output

With LoRA on the language model, beside full training of the adapter and the cross-attention: `--use_peft --lora_r 8` in
place of `--stage`.
"""

from common import run

from agevlm.trainer import AgeVlmModelConfig, AgeVlmScriptArguments, AgeVlmSFTConfig, AgeVlmSFTTrainer, parse_script

if __name__ == "__main__":
    run(AgeVlmSFTTrainer, *parse_script((AgeVlmScriptArguments, AgeVlmSFTConfig, AgeVlmModelConfig)))
