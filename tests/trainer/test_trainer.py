# SPDX-License-Identifier: Apache-2.0
"""Trainers: losses and gradients against their definition, what trains in each stage, guidance, logs, and checkpoints."""

import errno
import functools
import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from safetensors import SafetensorError
from tiny_models import open_gates, tiny_llama
from tiny_training import gradients, tiny_processor, tiny_trainable
from torch.nn.functional import cross_entropy
from training_runs import SETTINGS, mixed_row, mixed_rows, start_model, train
from transformers import (
    AutoProcessor,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    HfArgumentParser,
    TimmWrapperConfig,
    TimmWrapperModel,
    Trainer,
    TrainerCallback,
)
from trl import TrlParser

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor, from_parts
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.rows import row_features
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.guidance import visual_grid
from agevlm.trainer.losses import dice_loss, resolve_loss
from agevlm.trainer.recipe import load_recipe, training_arguments
from agevlm.trainer.stages import GROUPS, PRESETS, freeze, group_parameters
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmSFTConfig


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A trainer makes its output folder, whatever it is for."""
    monkeypatch.chdir(tmp_path)


class KeepGradients(TrainerCallback):
    """The gradients of each step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def step_gradients(folder, kinds: str, **settings) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    """Logs and gradients of each step, of a model that does not change."""
    kept = KeepGradients()
    defaults = {"stage": "full", "learning_rate": 0.0, "max_grad_norm": 0.0, "num_train_epochs": 1}
    result = train(folder, kinds, callback=kept, **{**defaults, **settings})
    return [entry for entry in result["logs"] if "loss" in entry], kept.steps


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=f"gradient of {name}")


# ---------------------------------------------------------------------------------------- loss and accumulation

# In batches of 1 to 4 rows, some have no phrase, and of 1 and 2 some have no image.
KINDS = "123tuttutt13"


def collate(kinds: str) -> dict[str, torch.Tensor]:
    return AgeVlmDataCollator(tiny_processor(), grid=(4, 4))(list(mixed_rows(kinds)))


@functools.cache
def by_definition(kinds: str, guidance_weight: float = 1.0) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Both losses of these rows in one batch, and the gradients of their sum."""
    model = start_model().train()
    freeze(model, "full")
    inputs = collate(kinds)
    targets = inputs.pop("map_targets")
    inputs.pop("num_dropped_phrases")
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    lm_loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    named = targets.any(-1)
    guidance = dice_loss(outputs.cross_attention_maps, targets)[:, named].mean()
    (lm_loss + guidance_weight * guidance).backward()
    return lm_loss.item(), guidance.item(), gradients(model)


@pytest.mark.parametrize("trainer", ["own", "sft"])
@pytest.mark.parametrize("batch_size", [12, 4, 3, 2, 1])
def test_loss_and_gradients_are_means_over_the_step_however_it_is_split(batch_size, trainer, tmp_path):
    extra = {"assistant_only_loss": True} if trainer == "sft" else {}
    (logs,), (found,) = step_gradients(
        tmp_path,
        KINDS,
        trainer=trainer,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=12 // batch_size,
        guidance_weight=0.7,
        **extra,
    )
    lm_loss, guidance, expected = by_definition(KINDS, 0.7)
    assert logs["lm_loss"] == pytest.approx(lm_loss, rel=1e-5)
    assert logs["guidance_loss"] == pytest.approx(guidance, rel=1e-5)
    assert logs["loss"] == pytest.approx(lm_loss + 0.7 * guidance, rel=1e-5)
    assert logs["guided_phrases"] == 1 + 2 + 3 + 1 + 3
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("trainer", ["own", "sft"])
def test_the_last_step_of_an_epoch_may_have_fewer_batches(trainer, tmp_path):
    extra = {"assistant_only_loss": True} if trainer == "sft" else {}
    logs, found = step_gradients(
        tmp_path, "12t31u2", trainer=trainer, per_device_train_batch_size=1, gradient_accumulation_steps=4, **extra
    )
    assert len(logs) == len(found) == 2
    for part, log, gradient in zip((range(4), range(4, 7)), logs, found, strict=True):
        model = start_model().train()
        freeze(model, "full")
        inputs = AgeVlmDataCollator(tiny_processor(), grid=(4, 4))(list(mixed_rows("12t31u2").select(part)))
        targets, _ = inputs.pop("map_targets"), inputs.pop("num_dropped_phrases")
        outputs = model(**inputs)
        loss = outputs.loss + dice_loss(outputs.cross_attention_maps, targets)[:, targets.any(-1)].mean()
        loss.backward()
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(gradient, gradients(model))


def preferences(kinds: str) -> Dataset:
    """The same rows, with an answer to reject."""
    rejected = [{"role": "assistant", "content": [{"type": "text", "text": "There is nothing."}]}]
    made = [mixed_row(kind, index) for index, kind in enumerate(kinds)]
    made = [
        {**row, "prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": rejected} for row in made
    ]
    features = row_features()
    messages = features.pop("messages")
    features = Features({**features, "prompt": messages, "chosen": messages, "rejected": messages})
    return Dataset.from_list([{name: row[name] for name in features} for row in made], features=features)


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_dpo_weighs_phrases_alike_however_the_step_is_split(batch_size, tmp_path):
    """The guidance's part, alone: with `beta` 0 DPO's own loss has no gradient."""
    kept = KeepGradients()
    settings = {
        **SETTINGS, "stage": "guide", "beta": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "guidance_weight": 0.7,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size,
    }  # fmt: skip
    trainer = AgeVlmDPOTrainer(
        start_model(),
        args=AgeVlmDPOConfig(str(tmp_path), **settings),
        ref_model=start_model(),
        train_dataset=preferences("1u32"),
        processing_class=tiny_processor(),
        callbacks=[kept],
    )
    trainer.train()

    model = start_model().train()
    freeze(model, "guide")
    inputs = collate("1u32")
    targets = inputs.pop("map_targets")
    inputs = {k: v for k, v in inputs.items() if k not in ("num_dropped_phrases", "labels")}
    guidance = dice_loss(model(**inputs).cross_attention_maps, targets)[:, targets.any(-1)].mean()
    (0.7 * guidance).backward()
    log = trainer.state.log_history[0]
    assert log["guidance_loss"] == pytest.approx(guidance.item(), rel=1e-5)
    assert log["guided_phrases"] == 1 + 3 + 2
    expected = {name: gradient for name, gradient in gradients(model).items() if gradient.any()}
    assert_same_gradients({name: kept.steps[0][name] for name in expected}, expected)


# ---------------------------------------------------------------------------------------- stages


def convnext(config_class=ConvNextConfig, model_class=ConvNextModel) -> ConvNextModel:
    return model_class(config_class(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 2], layer_scale_init_value=0.3))


def timm(architecture: str, **model_args) -> TimmWrapperModel:
    return TimmWrapperModel(TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args))


CONVNEXT = {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 12)}
# By hand: the beginning of the names of each tower's last block, and of its pooling head, which no visual token goes through.
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
    "timm efficientnet": (lambda: timm("test_efficientnet"), "timm_model.blocks.4.0.", None),
    "timm efficientnet, features only": (
        lambda: timm("test_efficientnet", features_only=True),
        "timm_model.blocks.4.0.",
        None,
    ),
    "timm vit": (lambda: timm("test_vit", img_size=64, patch_size=16, depth=2), "timm_model.blocks.1.", None),
}


@functools.cache
def tower(name: str) -> TimmWrapperModel:
    torch.manual_seed(0)
    return TOWERS[name][0]()


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


def pooling_head(model, name: str) -> set[str]:
    return in_vision(model, TOWERS[name][2]) if TOWERS[name][2] else set()


@pytest.mark.parametrize("name", TOWERS)
def test_the_last_block_is_found_and_every_parameter_is_in_one_group(name):
    model = with_tower(name)
    groups = group_parameters(model)
    last = in_vision(model, TOWERS[name][1])
    assert last
    assert set(groups["vision_last_block"]) == last
    counted = [parameter for group in GROUPS for parameter in groups[group]]
    assert len(counted) == len(set(counted))
    assert {name for name, _ in model.named_parameters()} - set(counted) == pooling_head(model, name)


@pytest.mark.parametrize("name", TOWERS)
def test_all_that_trains_gets_a_gradient_with_images_and_without(name):
    """Or data-parallel processes would wait for each other for ever."""
    model = with_tower(name).train()
    freeze(model, "full")
    ids = torch.tensor([[5, model.config.image_token_id, 7, 8], [5, 6, 7, 8]])
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()} - pooling_head(model, name)
    model.requires_grad_(True)  # those that are left out have none even so
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


@functools.cache
def trained_for(preset: str | tuple[str, ...]) -> tuple[dict, dict, AgeVlmTrainer]:
    """Weights and buffers before and after three steps with a tower with batch norms."""
    model = with_tower("timm efficientnet, features only")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, "12t3", stage=preset if isinstance(preset, str) else list(preset), max_steps=3)
    trainer.train()
    return before, model.state_dict(), trainer


def make_trainer(model, kinds: str = "12t3", folder: str | Path = "unused", **settings) -> AgeVlmTrainer:
    callbacks = settings.pop("callbacks", None)
    args = AgeVlmTrainingArguments(
        str(folder), **{**SETTINGS, "per_device_train_batch_size": 2, "learning_rate": 0.01, **settings}
    )
    return AgeVlmTrainer(
        model, args, train_dataset=mixed_rows(kinds), processing_class=tiny_processor(), callbacks=callbacks,
        **({"eval_dataset": mixed_rows(kinds)} if settings.get("eval_strategy") else {}),
    )  # fmt: skip


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


def test_learning_rates_and_weight_decay_reach_the_optimiser():
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
        ({"guidance_weight": -1.0}, "guidance_weight must not be negative, got -1.0"),
        ({"guided_fraction": 1.5}, "from 0 to 1, got 1.5"),
        ({"guidance_loss": "focal"}, "no guidance_loss 'focal': choose one of dice, bce, kl"),
        ({"guidance_loss": "kl", "rescale_maps": False}, "leave rescale_maps out, or choose dice or bce"),
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
    with pytest.raises(ValueError, match="guidance_loss must be dice or bce or kl, got 'focal'"):
        training_arguments(load_recipe(path, ["training.guidance_loss=focal"]))
    with pytest.raises(ValueError, match="rescale_maps must be true or false, got 'no'"):
        training_arguments(load_recipe(path, ["training.rescale_maps=no"]))


def test_another_model_and_another_processor_are_refused():
    args = AgeVlmTrainingArguments("unused", **SETTINGS)
    with pytest.raises(ValueError, match="trains AgeVlmForConditionalGeneration, got LlamaForCausalLM"):
        AgeVlmTrainer(tiny_llama(), args, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="processor as `processing_class`"):
        AgeVlmTrainer(start_model(), args, processing_class=tiny_processor().tokenizer)


# ---------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("trainer", ["own", "sft"])
@pytest.mark.parametrize(("name", "rescale"), [("dice", False), ("bce", True), ("bce", False), ("kl", True)])
def test_every_guidance_loss_is_a_mean_over_the_phrases_of_the_step(name, rescale, trainer, tmp_path):
    extra = {"assistant_only_loss": True} if trainer == "sft" else {}
    (logs,), (found,) = step_gradients(
        tmp_path,
        KINDS,
        trainer=trainer,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        guidance_weight=0.7,
        guidance_loss=name,
        rescale_maps=rescale,
        **extra,
    )
    model = start_model().train()
    freeze(model, "full")
    inputs = collate(KINDS)
    targets, _ = inputs.pop("map_targets"), inputs.pop("num_dropped_phrases")
    outputs = model(**inputs)
    guidance = resolve_loss(name, rescale)(outputs.cross_attention_maps, targets)[:, targets.any(-1)].mean()
    loss = outputs.loss + 0.7 * guidance
    loss.backward()
    assert logs["guidance_loss"] == pytest.approx(guidance.item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize(
    ("name", "rescale"), [("dice", True), ("dice", False), ("bce", True), ("bce", False), ("kl", True)]
)
def test_every_guidance_loss_teaches_where_to_look(name, rescale, tmp_path):
    """From a quarter of the phrases that point at their object to all, of the rows that are learnt."""
    trainer = make_trainer(
        start_model(), "1" * 8, tmp_path, stage="guide", guidance_loss=name, rescale_maps=rescale, max_steps=20,
        learning_rate=0.02, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["pointing_accuracy"] <= 0.5
    assert logs[-1]["pointing_accuracy"] == 1
    assert logs[-1]["attention_iou"] > logs[0]["attention_iou"] + 0.15
    assert logs[-1]["guidance_loss"] < logs[0]["guidance_loss"] - 0.1


@pytest.mark.parametrize("guided", [[1], [2, 3]])
def test_guided_layers_alone_have_their_queries_and_keys_guided(guided, tmp_path):
    """With closed gates, so that nothing else connects the blocks."""
    model = tiny_trainable(gate=0.0)
    layers = list(model.config.text_config.cross_attention_layers)
    kept = KeepGradients()
    trainer = make_trainer(
        model, "123t", tmp_path, stage="align", guided_layers=[layers[i] for i in guided], callbacks=[kept],
        learning_rate=0.0, max_steps=1, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    moved = {name for name, gradient in kept.steps[0].items() if gradient.any()}
    blocks = [f"model.language_model.cross_attn.{i}." for i in model.config.text_config.cross_attention_llama_layers]
    projections = {
        f"{block}{part}.weight" for block in blocks for part in ("q_proj", "k_proj", "q_norm", "k_norm", "layernorm")
    }
    expected = {name for name in projections if any(name.startswith(blocks[i]) for i in guided)}
    assert moved & projections == expected
    # The values of a block with a closed gate do not count; its gate learns from the language modelling loss.
    assert not any("v_proj" in name or "o_proj" in name for name in moved)


def test_a_fraction_of_the_rows_is_guided_and_always_the_same(tmp_path):
    def guided(fraction: float, **settings) -> list[bool]:
        trainer = make_trainer(start_model(), "1" * 60, guided_fraction=fraction, **settings)
        rows = list(trainer.train_dataset)
        found = ["map_targets" in trainer.data_collator([row]) for row in rows]
        # The same in any company.
        together = trainer.data_collator(rows[::-1])
        if any(found):
            assert together["map_targets"].any(-1).any(-1).tolist() == found[::-1]
        return found

    half = guided(0.5)
    assert 15 <= sum(half) <= 45, "a coin tossed 60 times"
    assert guided(0.5) == half
    assert guided(0.5, seed=1) != half
    assert all(more or not less for less, more in zip(half, guided(0.8), strict=True))
    assert not any(guided(0.0))
    assert all(guided(1.0))


@pytest.mark.parametrize("stage", ["guide", "full", ["adapter"]])
def test_gradient_checkpointing_of_either_kind_changes_no_gradient(stage, tmp_path):
    settings = {"stage": stage, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    (plain_log,), (plain,) = step_gradients(tmp_path, "12t3", **settings)
    for reentrant in (False, True):
        (log,), (found,) = step_gradients(
            tmp_path, "12t3", **settings, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        assert log["guided_phrases"] == 6
        assert log["guidance_loss"] == pytest.approx(plain_log["guidance_loss"], rel=1e-5)
        assert_same_gradients(found, plain)


def test_a_compiled_model_is_guided_as_well(tmp_path):
    settings = {"stage": "guide", "per_device_train_batch_size": 4}
    (plain_log,), (plain,) = step_gradients(tmp_path, "12t3", **settings)
    # Without a code generator, which would take a minute here; the graphs are the same.
    (log,), (found,) = step_gradients(
        tmp_path, "12t3", **settings, torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert log["guided_phrases"] == 6
    assert log["guidance_loss"] == pytest.approx(plain_log["guidance_loss"], rel=1e-5)
    assert_same_gradients(found, plain)


def test_reentrant_checkpointing_keeps_the_gradient_of_the_first_block_that_trains(tmp_path):
    """Nothing before it trains, which is where such checkpointing loses gradients without a word."""
    settings = {"stage": ["cross_attention"], "per_device_train_batch_size": 2}
    _, (plain,) = step_gradients(tmp_path, "12", **settings)
    _, (found,) = step_gradients(
        tmp_path, "12", **settings, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    assert_same_gradients(found, plain)


def test_guidance_that_would_teach_nothing_is_refused(tmp_path):
    model = start_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="attention maps came without a gradient"):
        make_trainer(model, "1212", tmp_path, max_steps=1).train()
    make_trainer(model, "tutu", tmp_path, max_steps=1).train()  # no phrase, no guidance


@pytest.mark.parametrize(("sink", "kinds"), [(False, "12t3u1"), (True, "a1a2a3")])
def test_an_evaluation_logs_what_a_computation_by_hand_gives(sink, kinds, tmp_path):
    """With sinks there are phrases that name nothing in their image, which are to look at the sink alone."""
    model = start_model(cross_attention_sink=sink)
    trainer = make_trainer(
        model, kinds, tmp_path, stage="guide", max_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
        per_device_eval_batch_size=2, metric_for_best_model="pointing_accuracy", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "eval_loss" in log)
    hits, dices, overlaps, absent = [], [], [], []
    model.eval()
    for row in mixed_rows(kinds):
        batch = AgeVlmDataCollator(tiny_processor(), grid=(4, 4), guide_absent=sink)([row])
        if "map_targets" not in batch:
            continue
        inputs = {k: v for k, v in batch.items() if k not in ("map_targets", "num_dropped_phrases", "labels")}
        with torch.no_grad():
            maps = model(**inputs).cross_attention_maps[:, 0].double().numpy()
        for p, target in enumerate(batch["map_targets"][0].double().numpy()):
            attention, looked, covered = maps[:, p].mean(0), maps[:, p], target
            if sink:
                looked = np.concatenate([looked, 1 - looked.sum(-1, keepdims=True)], axis=-1)
                covered = np.append(target, not target.any())
            scaled = np.minimum(looked * covered.sum(), 1)
            shared = (scaled * covered).sum(-1)
            dices.append(1 - ((2 * shared + 1e-3) / (scaled.sum(-1) + covered.sum() + 1e-3)).mean())
            if not target.any():
                absent.append(attention.sum())
                continue
            hits.append(target[attention.argmax()] >= target.max() / 2)
            scaled = np.minimum(attention * target.sum(), 1)
            overlaps.append(np.minimum(scaled, target).sum() / np.maximum(scaled, target).sum())
    assert logged["eval_guided_phrases"] == len(dices) == (3 * 2 + 1 + 2 + 3 if sink else 1 + 2 + 3 + 1)
    assert len(absent) == (3 if sink else 0)
    assert logged["eval_dropped_phrases"] == 0
    assert 0 < np.mean(hits) < 1
    assert logged["eval_pointing_accuracy"] == pytest.approx(np.mean(hits), abs=1e-5)
    assert logged["eval_guidance_loss"] == pytest.approx(np.mean(dices), abs=1e-5)
    assert logged["eval_attention_iou"] == pytest.approx(np.mean(overlaps), abs=1e-5)
    if sink:
        assert logged["eval_absent_attention"] == pytest.approx(np.mean(absent), abs=1e-5)
    else:
        assert "eval_absent_attention" not in logged
    assert trainer.state.best_metric == logged["eval_pointing_accuracy"]


def test_without_sinks_phrases_that_name_nothing_are_dropped(tmp_path):
    metrics = make_trainer(start_model(), "aa", tmp_path, stage="guide").evaluate(mixed_rows("a2a"))
    assert metrics["eval_guided_phrases"] == 1 + 2 + 1
    assert metrics["eval_dropped_phrases"] == 2
    assert "eval_absent_attention" not in metrics


def test_phrases_that_name_nothing_weigh_as_the_others_however_the_step_is_split(tmp_path):
    logs = []
    for batch_size in (4, 2, 1):
        trainer = make_trainer(
            start_model(cross_attention_sink=True), "aaaa", tmp_path, stage="guide", max_steps=1, guidance_weight=0.7,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
        )  # fmt: skip
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
        assert logs[-1]["guided_phrases"] == 8
        assert logs[-1]["loss"] == pytest.approx(logs[-1]["lm_loss"] + 0.7 * logs[-1]["guidance_loss"], rel=1e-4)
        for name in ("loss", "guidance_loss", "absent_attention", "attention_iou", "grad_norm"):
            assert logs[-1][name] == pytest.approx(logs[0][name], rel=1e-4), name


def test_evaluations_of_several_data_sets_and_predictions_do_not_mix(tmp_path):
    trainer = make_trainer(start_model(), "12t3", tmp_path, stage="guide", max_steps=1, per_device_eval_batch_size=2)
    trainer.predict(mixed_rows("3333"))
    metrics = trainer.evaluate({"one": mixed_rows("11"), "two": mixed_rows("2t2")})
    assert metrics["eval_one_guided_phrases"] == 2
    assert metrics["eval_two_guided_phrases"] == 4


@pytest.mark.parametrize("kinds", ["ut1u", "3333"])
def test_predictions_are_the_logits_alone(kinds, tmp_path):
    """Of batches with and without images and phrases, one after another."""
    model, collator = start_model(), AgeVlmDataCollator(tiny_processor(), assistant_only_loss=False)
    trainer = make_trainer(model, "12", tmp_path, stage="guide", per_device_eval_batch_size=2)
    predictions = trainer.predict(mixed_rows(kinds)).predictions
    for prediction, row in zip(predictions, mixed_rows(kinds), strict=True):
        with torch.no_grad():
            logits = model(**collator([row])).logits[0].numpy()
        np.testing.assert_allclose(prediction[: len(logits)], logits, atol=1e-4)


def test_training_logs_every_step_also_where_the_last_thing_was_an_evaluation(tmp_path):
    """The model is in evaluation mode then, while what is logged is of training."""
    trainer = make_trainer(
        start_model(), "1t2t", tmp_path, stage="guide", num_train_epochs=2, logging_strategy="epoch",
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [(log["step"], log["guided_phrases"]) for log in logs] == [(2, 3), (4, 3)]
    assert all(0 < log["loss"] - log["lm_loss"] < 1 for log in logs), "means over the steps, both of them"


# ---------------------------------------------------------------------------------------- checkpoints


def test_each_checkpoint_has_the_processor_and_the_weights(tmp_path):
    model = start_model()
    trainer = make_trainer(model, "12t3", tmp_path, stage="guide", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    for step in (1, 2):
        processor = AutoProcessor.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert isinstance(processor, AgeVlmProcessor)
        assert processor.chat_template == tiny_processor().chat_template
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("trainer_class", [AgeVlmTrainer, AgeVlmDPOTrainer])
def test_a_model_that_trains_on_padding_is_saved_to_look_at_it(trainer_class, tmp_path):
    processor, model = tiny_processor(), start_model()
    processor.image_processor.return_pixel_mask = False
    assert visual_grid(model, processor) == (4, 4)
    own = trainer_class is AgeVlmTrainer
    seen = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output.cross_attention_maps)), with_kwargs=True
    )
    settings = {**SETTINGS, "stage": "guide", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_class(
        model,
        args=(AgeVlmTrainingArguments if own else AgeVlmDPOConfig)(str(tmp_path), **settings),
        train_dataset=mixed_rows("1212") if own else preferences("1212"),
        processing_class=processor,
        **({} if own else {"ref_model": start_model()}),
    )
    trainer.train()
    assert all(kwargs.get("pixel_values") is not None for kwargs, _ in seen)
    assert all(kwargs.get("pixel_attention_mask") is None for kwargs, _ in seen)
    # The rows' images are wider than high: all of the last row of tokens is padding.
    maps = seen[0][1].unflatten(-1, (4, 4))
    named = maps.sum((-1, -2)) > 0
    assert named.any()
    assert (maps[named][:, -1] > 0).all()
    loaded = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2").image_processor
    assert loaded.return_pixel_mask is False


def test_the_best_checkpoint_is_kept_under_its_name_and_loaded(tmp_path, monkeypatch):
    worse_after_the_second = iter([0.5, 0.9, 0.4, 0.3])
    evaluate = AgeVlmTrainer.evaluate

    def scripted(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        metrics["eval_pointing_accuracy"] = next(worse_after_the_second)
        return metrics

    monkeypatch.setattr(AgeVlmTrainer, "evaluate", scripted)
    trainer = make_trainer(
        start_model(), "12t3", tmp_path, stage="guide", max_steps=4, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="pointing_accuracy",
        greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for name in ("checkpoint-2", "checkpoint-4"):
        state = (tmp_path / name / "trainer_state.json").read_text()
        assert ".unfinished" not in state
        assert f'"best_model_checkpoint": "{best}"' in state
    loaded = AgeVlmForConditionalGeneration.from_pretrained(best).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trainer.model.state_dict().items())


def out_of_space(error: Exception):
    def write(*args, **kwargs):
        raise error

    return write


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {
    "weights": ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left on device")),
    "processor": ("agevlm.AgeVlmProcessor.save_pretrained", NO_SPACE),
    # What PyTorch's writer says where the disk is full.
    "optimiser": ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")),
    "state": ("transformers.trainer_callback.TrainerState.save_to_json", NO_SPACE),
}


@pytest.mark.parametrize("file", FAILURES)
def test_a_failed_save_is_told_as_such_and_leaves_nothing(file, tmp_path, monkeypatch):
    where, error = FAILURES[file]

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(where, out_of_space(error))

    settings = {"stage": "guide", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(OSError, match=r"Could not save .*checkpoint-2: .*resume from the last"):
        make_trainer(start_model(), "12t3", tmp_path, callbacks=[Fill()], **settings).train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    trainer = make_trainer(start_model(), "12t3", tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3]


def test_checkpoints_are_uploaded_under_their_name_when_they_are_whole(tmp_path, monkeypatch):
    uploaded = []

    def upload(self, folder):
        uploaded.append((Path(folder), sorted(os.listdir(folder))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", upload)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = make_trainer(
        start_model(), "12t3", tmp_path, stage="guide", max_steps=1, save_strategy="steps", save_steps=1,
        push_to_hub=True, hub_model_id="someone/something",
    )  # fmt: skip
    trainer.train()
    (folder, files), = uploaded  # fmt: skip
    assert folder == tmp_path / "checkpoint-1"
    assert files == sorted(os.listdir(folder))


def test_a_trainer_that_is_done_is_forgotten_by_its_model(tmp_path):
    """A model goes through several stages: the trainers of the former ones must hold neither memory nor maps."""
    model = start_model()
    first = make_trainer(model, "1212", tmp_path / "first", stage="guide", max_steps=1)
    first.train()
    gone = weakref.ref(first)
    second = make_trainer(model, "1212", tmp_path / "second", stage="guide", max_steps=1)
    second.train()
    assert first._captured is None
    assert second.state.log_history[0]["guided_phrases"] == 3
    del first
    gc.collect()
    assert gone() is None
