# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization of AGE-VLM with TRL, on preferred and rejected answers about images, with attention guidance
where rows have masks.

    accelerate launch examples/scripts/dpo_agevlm.py \\
        --model_name_or_path my-age-vlm --dataset_name my_preferences --stage instruct \\
        --learning_rate 1e-5 --output_dir output

With LoRA on the language model, beside full training of the adapter and the cross-attention: `--use_peft --lora_r 8` in
place of `--stage`.
"""

from common import run

from agevlm.trainer import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmModelConfig, AgeVlmScriptArguments, parse_script

if __name__ == "__main__":
    run(AgeVlmDPOTrainer, *parse_script((AgeVlmScriptArguments, AgeVlmDPOConfig, AgeVlmModelConfig)))
