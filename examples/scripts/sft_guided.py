# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of any image-text-to-text model of Transformers with TRL, with attention guidance where rows have masks.

    accelerate launch examples/scripts/sft_guided.py \\
        --model_name_or_path HuggingFaceTB/SmolVLM-500M-Instruct --dataset_name my_data --assistant_only_loss \\
        --guidance_loss kl --learning_rate 1e-5 --output_dir output

With LoRA: `--use_peft --lora_target_modules q_proj k_proj v_proj o_proj`.
"""

from common import run
from transformers import AutoModelForImageTextToText
from trl import ModelConfig

from agevlm.trainer import AgeVlmScriptArguments, GuidedSFTConfig, GuidedSFTTrainer, parse_script

if __name__ == "__main__":
    parsed = parse_script((AgeVlmScriptArguments, GuidedSFTConfig, ModelConfig))
    run(GuidedSFTTrainer, *parsed, model_class=AutoModelForImageTextToText)
