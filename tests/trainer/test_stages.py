# SPDX-License-Identifier: Apache-2.0
"""What trains in each stage: groups, freezing, types and gates, and settings that do not fit."""

import functools

import numpy as np
import pytest
import torch
from tiny_models import open_gates, tiny_llama
from tiny_training import tiny_processor, tiny_trainable
from training_runs import SETTINGS, start_model
from training_steps import KeepGradients, collate, make_trainer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HfArgumentParser,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)
from trl import TrlParser

from agevlm import AgeVlmForConditionalGeneration, from_parts
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.recipe import load_recipe, training_arguments
from agevlm.trainer.stages import GROUPS, PRESETS, freeze, group_parameters
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmSFTConfig


def convnext(config_class=ConvNextConfig, model_class=ConvNextModel) -> ConvNextModel:
    return model_class(config_class(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 2], layer_scale_init_value=0.3))


def timm(architecture: str, **model_args) -> TimmWrapperModel:
    return TimmWrapperModel(TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args))


CONVNEXT = {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 12)}
VIT = {"img_size": 64, "patch_size": 16, "depth": 2}
SEQUENCE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 64,
    "patch_size": 16,
}
# By hand: the beginning of the names of each tower's last block, and of what no visual token goes through.
TOWERS = {
    "convnext": (convnext, "encoder.stages.3.layers.1.", "layernorm."),
    "convnextv2": (lambda: convnext(ConvNextV2Config, ConvNextV2Model), "encoder.stages.3.layers.1.", "layernorm."),
    "dinov3": (lambda: convnext(DINOv3ConvNextConfig, DINOv3ConvNextModel), "model.stages.3.layers.1.", None),
    "timm convnext": (
        lambda: timm("convnext_femto", **CONVNEXT),
        "timm_model.stages.3.blocks.1.",
        "timm_model.head.",
    ),
    "timm convnext, features only": (
        lambda: timm("convnext_femto", features_only=True, **CONVNEXT),
        "timm_model.stages_3.blocks.1.",
        None,
    ),
    "timm convnext with an MLP": (
        lambda: timm("convnext_large_mlp", **CONVNEXT),
        "timm_model.stages.3.blocks.1.",
        "timm_model.head.",
    ),
    "timm efficientnet": (lambda: timm("test_efficientnet"), "timm_model.blocks.4.0.", None),
    "timm efficientnet, features only": (
        lambda: timm("test_efficientnet", features_only=True),
        "timm_model.blocks.4.0.",
        None,
    ),
    "timm mobilenet": (lambda: timm("mobilenetv3_small_050"), "timm_model.blocks.5.0.", "timm_model.conv_head."),
    "timm vit": (lambda: timm("test_vit", **VIT), "timm_model.blocks.1.", None),
    "timm vit, mean": (
        lambda: timm("test_vit", global_pool="avg", **VIT),
        "timm_model.blocks.1.",
        "timm_model.fc_norm.",
    ),
    "timm vit, attention": (
        lambda: timm("test_vit4", global_pool="map", class_token=False, reg_tokens=0, **VIT),
        "timm_model.blocks.1.",
        "timm_model.attn_pool.",
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SEQUENCE)), "layers.1.", "pooler."),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SEQUENCE)), "encoder.layers.1.", "post_layernorm."),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SEQUENCE)), "encoder.layer.1.", "embeddings.mask_token"),
    "dinov3 vit": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**SEQUENCE, num_register_tokens=2)),
        "model.layer.1.",
        "embeddings.mask_token",
    ),
}


@functools.cache
def tower(name: str) -> TimmWrapperModel:
    torch.manual_seed(0)
    found = TOWERS[name][0]()
    with torch.no_grad():
        for parameter in found.parameters():  # no two tokens are the same, and no register is zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def with_tower(name: str, **llama) -> AgeVlmForConditionalGeneration:
    """A model on a copy of a tower whose batch norms have seen something."""
    vision = type(tower(name))(tower(name).config)
    vision.load_state_dict(tower(name).state_dict())
    for module in vision.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    torch.manual_seed(1)
    vision.train()(torch.randn(4, 3, 64, 64))
    vision.eval()
    processor = tiny_processor()
    tokens = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    model = from_parts(tiny_llama(**tokens, **llama), vision, image_token_id=processor.image_token_id)
    return open_gates(model)


def in_vision(model, prefix: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(f"model.vision_tower.{prefix}")}


@pytest.mark.parametrize("name", TOWERS)
def test_the_last_block_is_found_and_every_parameter_is_in_one_group(name):
    model = with_tower(name)
    groups = group_parameters(model)
    last = in_vision(model, TOWERS[name][1])
    assert last
    assert set(groups["vision_last_block"]) == last
    counted = [parameter for group in GROUPS for parameter in groups[group]]
    assert len(counted) == len(set(counted))
    assert {name for name, _ in model.named_parameters()} == set(counted)


@pytest.mark.parametrize("name", TOWERS)
def test_a_model_leaves_out_what_no_visual_token_goes_through(name, tmp_path):
    model, whole, head = with_tower(name), tower(name).eval(), TOWERS[name][2]
    names = {name for name, _ in whole.named_parameters()}
    removed = names - {name.removeprefix("model.vision_tower.") for name in in_vision(model, "")}
    assert removed == {name for name in names if head is not None and name.startswith(head)}
    assert bool(removed) == (head is not None)
    model.save_pretrained(tmp_path)
    again, info = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}
    # The tokens are those of the whole tower.
    whole.load_state_dict(again.model.vision_tower.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = whole(pixels).last_hidden_state, again.get_image_features(pixels).last_hidden_state
    expected = expected[-1] if isinstance(expected, (list, tuple)) else expected
    expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected[:, -found.shape[1] :]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_all_that_trains_gets_a_gradient_with_images_and_without(name):
    """Or data-parallel processes would wait for each other for ever. So without a stage too, as plain trainers train."""
    model = with_tower(name).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([[5, model.config.image_token_id, 7, 8], [5, 6, 7, 8]])
    trained = {n for n, _ in model.named_parameters()}
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for inputs in ({"input_ids": ids, "pixel_values": pixels}, {"input_ids": ids[1:]}):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found = {n: parameter.grad for n, parameter in model.named_parameters() if parameter.grad is not None}
        assert found.keys() == trained
        assert all(gradient.isfinite().all() for gradient in found.values())
        reached = {n for n, gradient in found.items() if gradient.any()}
        # Text alone moves neither the tower nor the adapter; images move every tensor of both.
        is_visual = {n: "vision_tower" in n or "projector" in n for n in trained}
        assert {n for n in reached if is_visual[n]} == (
            {n for n in trained if is_visual[n]} if "pixel_values" in inputs else set()
        )
    freeze(model, "full")
    assert {n for n, parameter in model.named_parameters() if parameter.requires_grad} == trained


@functools.cache
def trained_for(preset: str | tuple[str, ...]) -> tuple[dict, dict, AgeVlmTrainer]:
    """Weights and buffers before and after three steps with a tower with batch norms."""
    model = with_tower("timm efficientnet, features only")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, "12t3", stage=preset if isinstance(preset, str) else list(preset), max_steps=3)
    trainer.train()
    return before, model.state_dict(), trainer


BY_HAND = {
    "align": ("projector", "cross_attn"),
    "adapt_vision": ("projector", "cross_attn", "blocks.4.0."),
    "guide": ("projector", "cross_attn", "blocks.4.0."),
    "instruct": ("projector", "cross_attn", "blocks.4.0."),
    "self_attention": ("projector", "cross_attn", "blocks.4.0.", ".self_attn.", ".input_layernorm."),
    "full": ("",),
    ("ffn", "embeddings"): (".mlp.", ".post_attention_layernorm.", "lm_head", "embed_tokens", "language_model.norm"),
}


@pytest.mark.parametrize("preset", BY_HAND)
def test_a_stage_changes_its_groups_and_nothing_else(preset):
    before, after, trainer = trained_for(preset)
    names = {name for name, _ in trainer.model.named_parameters()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in names if any(part in name for part in BY_HAND[preset])}
    with_state = {id(parameter) for parameter in trainer.optimizer.state}
    assert with_state == {id(parameter) for name, parameter in trainer.model.named_parameters() if name in changed}
    assert preset in PRESETS or isinstance(preset, tuple)


def test_there_are_no_other_stages():
    assert PRESETS.keys() == {preset for preset in BY_HAND if isinstance(preset, str)}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_a_frozen_tower_stays_in_evaluation_mode_and_keeps_no_graph(checkpointing):
    model = with_tower("timm efficientnet, features only")
    freeze(model, "align")
    model.enable_input_require_grads()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    vision = model.model.vision_tower
    assert not any(module.training for module in vision.modules())
    assert model.model.multi_modal_projector.training
    state, saved = {"within": False}, []
    vision.register_forward_pre_hook(lambda *_: state.update(within=True))
    vision.register_forward_hook(lambda *_: state.update(within=False))
    inputs = collate("13")
    del inputs["map_targets"], inputs["num_dropped_phrases"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(state["within"]), t)[1], lambda t: t):
        outputs = model(**inputs)
    assert saved, "the rest does keep one"
    assert not any(saved)
    outputs.loss.backward()
    assert not any(parameter.grad is not None for parameter in vision.parameters())


def test_where_a_part_of_the_tower_trains_the_rest_stays_in_evaluation_mode():
    model = with_tower("timm efficientnet, features only")
    freeze(model, "guide")
    model.train()
    vision = model.model.vision_tower
    training = {name for name, module in vision.named_modules() if module.training}
    assert {"timm_model.blocks.4.0", "timm_model.blocks.4.0.conv_pwl"} <= training
    assert not any(name.startswith(("timm_model.conv_stem", "timm_model.blocks.3")) for name in training)
    for module in vision.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            assert not module.training


def test_learning_rates_and_weight_decay_reach_the_optimizer():
    rates = {"vision_last_block": 2e-6, "cross_attention": 3e-4}
    model = with_tower("convnext")
    trainer = make_trainer(
        model, stage="self_attention", learning_rate=1e-3, weight_decay=0.1, group_learning_rates=rates
    )
    trainer.create_optimizer()
    found = {id(p): (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(found)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        rate = 2e-6 if "vision_tower" in name else 3e-4 if "cross_attn" in name else 1e-3
        undecayed = "norm" in name or name.endswith(("bias", "gate", "layer_scale_parameter"))
        assert found[id(parameter)] == (rate, 0.0 if undecayed else 0.1), name


def test_only_gates_that_are_exactly_zero_are_opened():
    model = start_model()
    gates = [module.gate for module in model.modules() if isinstance(module, AgeVlmCrossAttention)]
    for gate, value in zip(gates, (0.0, 1e-6, -0.25, 0.0), strict=True):
        gate.data.fill_(value)
    make_trainer(model, stage="align", initial_gate=0.5)
    assert [gate.item() for gate in gates] == pytest.approx([0.5, 1e-6, -0.25, 0.5])
    assert all(gate.requires_grad for gate in gates)


@pytest.mark.parametrize("half", [False, True])
def test_gates_of_20_are_open_and_never_train(half):
    """As if there were none: `tanh` is exactly 1, its gradient exactly 0, and nothing decays them."""
    model = tiny_trainable(gate=0.0).to(torch.bfloat16 if half else torch.float32)
    blocks = [module for module in model.modules() if isinstance(module, AgeVlmCrossAttention)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = KeepGradients()
    trainer = make_trainer(
        model, "12t3", stage="align", initial_gate=20.0, weight_decay=0.5, max_steps=3, bf16=half, callbacks=[kept]
    )
    trainer.train()
    for block in blocks:
        assert block.gate.item() == 20
        assert block.gate.tanh().item() == 1
    for step in kept.steps:
        gates = [gradient for name, gradient in step.items() if name.endswith(".gate")]
        assert len(gates) == len(blocks)
        assert not any(gradient.any() for gradient in gates)
    trained = {n for n in before if ("cross_attn" in n or "projector" in n) and not n.endswith(".gate")}
    after = model.state_dict()
    assert all(not torch.equal(before[name].to(after[name].dtype), after[name]) for name in trained)


@pytest.mark.parametrize("stage", ["align", "guide"])
def test_a_half_model_trains_in_float32_with_its_frozen_part_as_it_was(stage):
    with pytest.raises(ValueError, match=r"bfloat16 and what trains is float32.*bf16=True"):
        make_trainer(start_model().to(torch.bfloat16), stage=stage)
    model = start_model().to(torch.bfloat16)
    trainer = make_trainer(model, stage=stage, bf16=True, max_steps=2)
    trainer.train()
    for name, parameter in model.named_parameters():
        # A tower is of one type.
        widened = parameter.requires_grad or ("vision_tower" in name and stage == "guide")
        assert parameter.dtype == (torch.float32 if widened else torch.bfloat16), name
    assert {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]} == {torch.float32}
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stage": "alignment"},
            "'alignment': choose one of align, adapt_vision, guide, instruct, self_attention, full",
        ),
        ({"stage": ["adapter", "heads"]}, "'heads': choose of adapter, cross_attention, vision, .*vision_last_block"),
        ({"group_learning_rates": {"tower": 1e-4}}, "'tower': choose of adapter"),
        (
            {"stage": "align", "group_learning_rates": {"ffn": 1e-4}},
            "learning rate for 'ffn', but nothing of it trains",
        ),
        ({"guided_layers": [0, 99]}, r"guided_layers has \[99\], but the cross-attention layers are \[0, "),
        ({"guidance_weight": -1.0}, "guidance_weight must be a number of at least 0, got -1.0"),
        ({"guided_fraction": 1.5}, "from 0 to 1, got 1.5"),
        ({"guidance_weight": float("nan")}, "guidance_weight must be a number of at least 0, got nan"),
        ({"initial_gate": float("inf")}, "initial_gate must be a finite number, got inf"),
        ({"guided_layers": [0, 0]}, r"guided_layers must name each layer once, got \[0, 0\]"),
        ({"guidance_loss": "focal"}, "no guidance_loss 'focal': choose one of dice, log_dice, bce, kl"),
        ({"guidance_loss": "kl", "rescale_maps": False}, "leave rescale_maps out, or choose dice, log_dice or bce"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(settings, message):
    model = start_model()
    with pytest.raises(ValueError, match=message):
        make_trainer(model, **settings).create_optimizer()


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("config", [AgeVlmTrainingArguments, AgeVlmSFTConfig, AgeVlmDPOConfig])
def test_command_lines_choose_the_guidance_loss(config, parser, capsys):
    def parse(*flags: str):
        always = ("--output_dir", "unused", "--use_cpu", "True", "--bf16", "False")
        return parser((config,)).parse_args_into_dataclasses([*always, *flags])[0]

    args = parse()
    assert (args.guidance_loss, args.rescale_maps) == ("dice", True)
    for flags in (("--no_rescale_maps",), ("--rescale_maps", "False")):
        args = parse("--guidance_loss", "bce", *flags)
        assert (args.guidance_loss, args.rescale_maps) == ("bce", False)
    with pytest.raises(SystemExit):
        parse("--guidance_loss", "focal")
    assert "invalid choice: 'focal'" in capsys.readouterr().err


def test_recipes_choose_the_guidance_loss(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: here\ndata: [{path: there}]\ntraining: {output_dir: out, stage: guide, guidance_loss: kl, use_cpu: true}"
    )
    assert training_arguments(load_recipe(path)).guidance_loss == "kl"
    args = training_arguments(load_recipe(path, ["training.guidance_loss=bce", "training.rescale_maps=false"]))
    assert (args.guidance_loss, args.rescale_maps) == ("bce", False)
    with pytest.raises(ValueError, match="guidance_loss must be dice or log_dice or bce or kl, got 'focal'"):
        training_arguments(load_recipe(path, ["training.guidance_loss=focal"]))
    with pytest.raises(ValueError, match="rescale_maps must be true or false, got 'no'"):
        training_arguments(load_recipe(path, ["training.rescale_maps=no"]))


def test_another_model_and_another_processor_are_refused():
    args = AgeVlmTrainingArguments("unused", **SETTINGS)
    with pytest.raises(ValueError, match="trains AgeVlmForConditionalGeneration, got LlamaForCausalLM"):
        AgeVlmTrainer(tiny_llama(), args, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="processor as `processing_class`"):
        AgeVlmTrainer(start_model(), args, processing_class=tiny_processor().tokenizer)
