# SPDX-License-Identifier: Apache-2.0
"""What trains in which stage: groups of parameters, and presets of groups, as data (paper, section on training stages)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor

from ..attention.guidance import AnyTrainer
from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig
from ..modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention, AgeVlmForConditionalGeneration
from ..terminal import console

GROUPS: dict[str, str] = {
    "adapter": r"model\.multi_modal_projector\.",
    "cross_attention": r"model\.language_model\.cross_attn\.",
    "vision": r"model\.vision_tower\.",
    "self_attention": r"model\.language_model\.layers\.\d+\.(self_attn|input_layernorm)\.",
    "ffn": r"model\.language_model\.layers\.\d+\.(mlp|post_attention_layernorm)\.",
    "embeddings": r"(lm_head|model\.language_model\.(embed_tokens|norm))\.",
}
"""Name of a group -> regular expression of its parameters' names, from their beginning. Each parameter is in one. Besides,
`vision_last_block` is the part of `vision` that [`last_block`] finds."""

PRESETS: dict[str, tuple[str, ...]] = {
    "align": ("adapter", "cross_attention"),
    "adapt_vision": ("adapter", "cross_attention", "vision_last_block"),
    "guide": ("adapter", "cross_attention", "vision_last_block"),
    "instruct": ("adapter", "cross_attention", "vision_last_block"),
    "self_attention": ("adapter", "cross_attention", "vision_last_block", "self_attention"),
    "full": ("adapter", "cross_attention", "vision", "self_attention", "ffn", "embeddings"),
}
"""Name of a stage -> the groups that train in it. `align` to `instruct` are the paper's stages 1 to 4, which leave
self-attention and FFN frozen; `self_attention` is its open variant."""

LORA_TARGET_MODULES = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""`LoraConfig(target_modules=...)`: the language model's own linear layers. PEFT's `"all-linear"` would also put LoRA on those
of the vision tower, the adapter and the cross-attention."""


def lora_modules_to_save(config: AgeVlmConfig) -> list[str]:
    """`LoraConfig(modules_to_save=...)`: what trains in full beside LoRA, as in every stage: the adapter and the blocks.

    The blocks are listed one by one, because PEFT refuses a `ModuleDict`.
    """
    blocks = config.text_config.cross_attention_llama_layers
    return ["multi_modal_projector", *(f"cross_attn.{layer}" for layer in blocks)]


# A numbered stage or block of a tower, as timm and Transformers name them: `stages.3.blocks.2`, `encoder.stages.3.layers.2`,
# `blocks.6.0`, `stages_3.blocks.2`, `encoder.layer.11`.
_BLOCK = re.compile(
    r"model\.vision_tower\.(?:\w+\.)*?((?:stages?|blocks|layers?)[._]\d+(?:\.(?:(?:blocks|layers?)\.)?\d+)*)\."
)


def last_block(names: Sequence[str]) -> str:
    """Regular expression of a vision tower's last block, from its parameters' names.

    Raises:
        ValueError: if the tower has no numbered blocks.
    """
    prefixes = {match.group(): match.group(1) for name in names if (match := _BLOCK.match(name))}
    if not prefixes:
        raise ValueError(
            "The vision tower has no numbered blocks, so that the group 'vision_last_block' is empty: train 'vision' as a "
            "whole, or leave it frozen."
        )
    return re.escape(max(prefixes, key=lambda prefix: [int(n) for n in re.findall(r"\d+", prefixes[prefix])]))


def group_parameters(model: AgeVlmForConditionalGeneration) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each group, by name.

    Raises:
        ValueError: if a group's pattern matches nothing, or a parameter is in no group.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    patterns = {**GROUPS, "vision_last_block": last_block([name for name in parameters if "vision_tower" in name])}
    groups = {
        group: {name: parameter for name, parameter in parameters.items() if re.match(pattern, name)}
        for group, pattern in patterns.items()
    }
    if empty := [group for group, members in groups.items() if not members]:
        raise ValueError(f"No parameter of this {type(model).__name__} is in the group(s) {', '.join(empty)}.")
    if strays := parameters.keys() - {name for members in groups.values() for name in members}:
        raise ValueError(f"In no group of parameters: {', '.join(sorted(strays)[:5])}.")
    return groups


@dataclass
class TrainableGroup:
    """A group that trains: its name, tensors and numbers in them."""

    name: str
    tensors: int
    parameters: int


def resolve_groups(preset: str | Sequence[str]) -> tuple[str, ...]:
    """The groups of a preset; a list of group names stands for itself.

    Raises:
        ValueError: if there is no such preset or group.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(
                f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}, or a list of groups."
            )
        return PRESETS[preset]
    known = (*GROUPS, "vision_last_block")
    for group in preset:
        if group not in known:
            raise ValueError(f"There is no group of parameters '{group}': choose of {', '.join(known)}.")
    return tuple(preset)


def freeze(model: AgeVlmForConditionalGeneration, preset: str | Sequence[str]) -> list[TrainableGroup]:
    """Lets exactly the groups of a preset train, in float32, and freezes all else in the type it has.

    Float32, because the steps of a fine-tuning are smaller than bfloat16 can add: a bfloat16 model then trains under
    `bf16=True`, and its frozen part stays in bfloat16. If any part of a vision tower trains, the whole tower is float32,
    because types cannot change inside a tower.

    Args:
        preset: one of [`PRESETS`], or a list of group names.

    Raises:
        ValueError: if the preset, or a group of it, does not exist, matches nothing in this model or is quantized.
    """
    groups = group_parameters(model)
    model.requires_grad_(False)
    resolved = []
    for group in resolve_groups(preset):
        members = {id(parameter): parameter for parameter in groups[group].values()}.values()  # tied ones count once
        if any(is_quantized(parameter) for parameter in members):
            raise ValueError(
                f"The group '{group}' has weights of 4 or 8 bits, which do not train: train LoRA beside them."
            )
        for parameter in members:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if group.startswith("vision"):
            model.model.vision_tower.float()
        resolved.append(TrainableGroup(group, len(members), sum(parameter.numel() for parameter in members)))
    return resolved


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a parameter keeps integers and scales. Those of torchao and quanto say that their type is floating point."""
    return not parameter.is_floating_point() or type(parameter) not in (nn.Parameter, DTensor)


def print_trainable(model: nn.Module, groups: Sequence[TrainableGroup], title: str) -> None:
    """Prints what trains, with counts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    table = Table(title=title, title_justify="left")
    table.add_column("trains")
    for name in ("tensors", "parameters", "of the model"):
        table.add_column(name, justify="right")
    counted = sum(group.parameters for group in groups)
    for name, tensors, number in [
        *((group.name, group.tensors, group.parameters) for group in groups),
        ("all", sum(group.tensors for group in groups), counted),
    ]:
        table.add_row(name, str(tensors), f"{number:,}", f"{number / total:.1%}")
    console().print(table)


def open_gates(model: AgeVlmForConditionalGeneration, gate: float) -> None:
    """Sets gates of exactly 0, as a freshly assembled model has them, to `gate`, and PEFT's copies of them too."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AgeVlmCrossAttention):
                module.gate.copy_(torch.where(module.gate == 0, gate, module.gate))


def base_model(model: Any) -> AgeVlmForConditionalGeneration:
    """The model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class StagesMixin(AnyTrainer):
    """What trains: `args.stage`, `args.initial_gate`, and the types and memory formats that it needs."""

    def set_up_stage(self, model: nn.Module, args) -> None:
        """Prepares a model before the trainer wraps it.

        Raises:
            ValueError: if the model is no AGE-VLM, or `stage` or its precision do not fit it.
        """
        base = base_model(model)
        if not isinstance(base, AgeVlmForConditionalGeneration):
            raise ValueError(
                f"{type(self).__name__} trains AgeVlmForConditionalGeneration, got {type(base).__name__}."
            )
        if base is model and getattr(base, "is_quantized", False):
            method = base.hf_quantizer.quantization_config.quant_method
            raise ValueError(
                f"The model is quantized ({getattr(method, 'value', method)}), and trains beside LoRA only: leave `stage` out, and "
                "give the trainer `get_peft_model(model, LoraConfig(target_modules=LORA_TARGET_MODULES, "
                "modules_to_save=lora_modules_to_save(model.config)))`, or load the model without quantization."
            )
        if args.stage is not None:
            if base is not model:
                raise ValueError(
                    "With PEFT, `stage` must be left out: PEFT freezes all but its adapters and the modules named in "
                    "LoraConfig(modules_to_save=lora_modules_to_save(model.config))."
                )
            groups = freeze(base, args.stage)
            if args.process_index == 0 and not args.disable_tqdm:
                print_trainable(base, groups, f"Stage {args.stage}" if isinstance(args.stage, str) else "Groups")
        elif base is not model:  # PEFT leaves `modules_to_save` in the model's type; for the reason see `freeze`
            for parameter in base.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if args.initial_gate is not None:
            open_gates(base, args.initial_gate)
        half = {p.dtype for p in base.parameters() if not p.requires_grad} & {torch.bfloat16, torch.float16}
        full = any(p.dtype == torch.float32 for p in base.parameters() if p.requires_grad)
        if half and full and not (args.bf16 or args.fp16):
            raise ValueError(
                f"The frozen part of the model is {half.pop()} and what trains is float32: train with `bf16=True`, or load "
                "the model in float32."
            )
        if args.device.type == "cpu" and args.world_size == 1:  # FSDP2 refuses it
            # Several times faster for the convolutions of towers, whose values keep their meaning.
            base.model.vision_tower.to(memory_format=torch.channels_last)
