# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with AGE-VLM: against TRL's own collators, against losses written out, with PEFT, and the scripts."""

import copy
import json
import math
import os
import runpy
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Image
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_models import tiny_age_vlm
from tiny_quantized import INT8, NF4, WIDE, dequantized, load_quantized, quantized
from tiny_training import dataset, preferences, row, rows, tiny_processor, tiny_trainable
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from agevlm.attention.losses import dice_loss
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.stages import LORA_TARGET_MODULES, freeze, lora_modules_to_save
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import (
    AgeVlmDPOConfig,
    AgeVlmDPOTrainer,
    AgeVlmModelConfig,
    AgeVlmPreferenceCollator,
    AgeVlmSFTConfig,
    AgeVlmSFTTrainer,
)

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"
PLAIN = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
PLAIN |= {"logging_steps": 1, "disable_tqdm": True}
# A step of plain SGD at a learning rate of 1 moves each parameter by its gradient.
SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, **PLAIN}
WEIGHT = 2.0
EVERYTHING = ["adapter", "cross_attention", "vision", "self_attention", "ffn", "embeddings"]
MODULES_TO_SAVE = lora_modules_to_save(tiny_trainable().config)


def lora(**kwargs) -> LoraConfig:
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_dropout": 0.0, "target_modules": LORA_TARGET_MODULES}
    return LoraConfig(**{**defaults, "modules_to_save": MODULES_TO_SAVE, **kwargs})


def collator(**kwargs) -> AgeVlmDataCollator:
    return AgeVlmDataCollator(tiny_processor(), grid=(4, 4), **kwargs)


def preference_collator(**kwargs) -> AgeVlmPreferenceCollator:
    return AgeVlmPreferenceCollator(collator(assistant_only_loss=False, **kwargs))


def inputs_of(batch: dict) -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}


def log_probabilities(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of each token of the text but the first, `(B, S - 1)`, through the whole logits; and the attention maps."""
    outputs = model(**inputs_of(batch), map_queries=batch.get("map_queries"), use_cache=False)
    found = outputs.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return found, outputs.cross_attention_maps


def mean_dice(maps: torch.Tensor, batch: dict) -> torch.Tensor:
    targets = batch["map_targets"]
    named = (targets > 0).any(-1)
    return torch.stack([dice_loss(maps[:, b, p], targets[b, p]).mean() for b, p in named.nonzero().tolist()]).mean()


def sft_loss(model, batch: dict, weight: float) -> torch.Tensor:
    found, maps = log_probabilities(model, batch)
    return -found[batch["labels"][:, 1:] != -100].mean() + weight * mean_dice(maps, batch)


def dpo_loss(model, reference, batch: dict, beta: float, weight: float) -> torch.Tensor:
    found, maps = log_probabilities(model, batch)
    with torch.no_grad():
        expected, _ = log_probabilities(reference, batch)
    ratios = ((found - expected) * batch["completion_mask"][:, 1:]).sum(-1)
    chosen, rejected = ratios.chunk(2)
    loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    return loss + weight * mean_dice(maps, batch)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def train(trainer_class, config_class, folder, model, data, settings: dict, **kwargs):
    """Runs a trainer; returns it, and how far it moved each parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_class(
        model=model,
        args=config_class(str(folder), **settings),
        train_dataset=data,
        processing_class=tiny_processor(),
        **kwargs,
    )
    before = before if kwargs.get("peft_config") is None else {}
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()} | before
    trainer.train()
    return trainer, {n: start[n] - p.detach() for n, p in trainer.model.named_parameters()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error, scale = (actual[name] - value).norm().item(), value.norm().item()
        assert error <= 2e-4 * scale + 2e-6, f"{name}: {error} of {scale}"


# ---------------------------------------------------------------------------------------- supervised fine-tuning


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "accumulated", "assistant_only"),
    [
        (AgeVlmTrainer, AgeVlmTrainingArguments, 1, True),
        (AgeVlmSFTTrainer, AgeVlmSFTConfig, 1, True),
        (AgeVlmSFTTrainer, AgeVlmSFTConfig, 1, False),
        (AgeVlmSFTTrainer, AgeVlmSFTConfig, 2, True),
    ],
)
def test_a_step_of_sft_is_that_of_the_loss_written_out(
    tmp_path, trainer_class, config_class, accumulated, assistant_only
):
    """On rows with one, no and two images and one without grounding; for every parameter of the model. So the fused LM head
    takes the step of the whole logits, and both trainers take the same."""
    batch = collator(assistant_only_loss=assistant_only)(rows(4))
    assert (batch["map_targets"] > 0).any(-1).sum(1).tolist() == [2, 0, 2, 0]
    model = tiny_trainable().train()
    loss = sft_loss(model, batch, WEIGHT)
    expected = gradients(model, loss)
    settings = {**SGD, "guidance_weight": WEIGHT, "stage": EVERYTHING, "assistant_only_loss": assistant_only}
    settings |= {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer, moved = train(trainer_class, config_class, tmp_path, tiny_trainable(), dataset(4), settings)
    assert_close(moved, expected)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["lm_loss"] + WEIGHT * log["guidance_loss"], rel=1e-4)
    assert log["guided_phrases"] == 4
    assert log["dropped_phrases"] == 0


@pytest.mark.parametrize(
    "settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}]
)
def test_guidance_adds_exactly_its_gradient_to_any_loss(tmp_path, settings):
    """Label smoothing runs a second forward without a gradient; the maps must come from the first."""
    settings = {**SGD, "per_device_train_batch_size": 4, "stage": EVERYTHING, **settings}
    moved = [
        train(
            AgeVlmSFTTrainer,
            AgeVlmSFTConfig,
            tmp_path,
            tiny_trainable(),
            dataset(4),
            {**settings, "guidance_weight": w},
        )[1]
        for w in (WEIGHT, 0.0)
    ]
    model, batch = tiny_trainable().train(), collator()(rows(4))
    expected = gradients(model, WEIGHT * mean_dice(log_probabilities(model, batch)[1], batch))
    assert sum(gradient.norm() > 0 for gradient in expected.values()) > 50
    for name, gradient in expected.items():
        error = (moved[0][name] - moved[1][name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("assistant_only", [True, False])
def test_batches_of_messages_are_those_of_trl(assistant_only):
    expected = DataCollatorForVisionLanguageModeling(tiny_processor(), assistant_only_loss=assistant_only)
    expected = expected(copy.deepcopy(rows(4)))
    actual = collator(assistant_only_loss=assistant_only)(rows(4))
    assert ((actual["labels"] == -100) & (actual["attention_mask"] == 1)).any() == assistant_only
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def completions(number: int) -> list[dict]:
    """Rows with `prompt` and `completion`, of different lengths; every third prompt shows two images."""
    examples = [row(i, 1 + (i % 3 == 2)) for i in range(number)]
    return [
        {
            "images": r["images"],
            "prompt": r["messages"][:1],
            "completion": r["messages"][1:],
            "grounding": r["grounding"],
        }
        for r in examples
    ]


def test_completions_are_learned_as_trl_learns_them(tmp_path):
    expected = DataCollatorForVisionLanguageModeling(tiny_processor(), completion_only_loss=True)
    expected = expected(copy.deepcopy(completions(4)))
    trainer, _ = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path, tiny_trainable(), Dataset.from_list(completions(4)), SGD
    )
    actual = trainer.data_collator(completions(4))
    tokenizer, labels = tiny_processor().tokenizer, expected.pop("labels")
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    for ours, theirs, example in zip(actual["labels"], labels, completions(4), strict=True):
        answer = example["completion"][0]["content"][0]["text"] + tokenizer.eos_token
        assert tokenizer.decode(ours[ours != -100]) == answer
        # TRL also learns what the template writes after the end of a turn, which is never generated.
        assert tokenizer.decode(theirs[theirs != -100]) == answer + "\n"
        assert torch.equal(ours[ours != -100], theirs[ours != -100])
    assert trainer.state.log_history[0]["guided_phrases"] > 0


def test_settings_that_do_not_fit_the_rows_are_refused(tmp_path):
    def start(data, **settings):
        args = AgeVlmSFTConfig(str(tmp_path), **{**PLAIN, **settings})
        processor = tiny_processor()
        return AgeVlmSFTTrainer(model=tiny_trainable(), args=args, train_dataset=data, processing_class=processor)

    for data, completion_only in ((dataset(2), True), (Dataset.from_list(completions(2)), False)):
        with pytest.raises(ValueError, match="Leave `completion_only_loss` out"):
            start(data, completion_only_loss=completion_only)
    assert start(dataset(2), pad_to_multiple_of=32).data_collator(rows(2))["input_ids"].shape[1] % 32 == 0


def test_answers_are_learned_with_templates_that_do_not_mark_them(tmp_path):
    """TRL alone refuses those that it does not know, and it knows none with image support."""
    processor = tiny_processor()
    for mark in ("{% generation %}", "{% endgeneration %}"):
        processor.chat_template = processor.chat_template.replace(mark, "")
    args = AgeVlmSFTConfig(str(tmp_path), assistant_only_loss=True, **PLAIN)
    trainer = AgeVlmSFTTrainer(model=tiny_trainable(), args=args, train_dataset=dataset(4), processing_class=processor)
    assert trainer.args.assistant_only_loss
    assert torch.equal(trainer.data_collator(rows(4))["labels"], collator()(rows(4))["labels"])


def test_text_alone_is_left_to_trl(tmp_path):
    """In a data set of text, so that a language model's data can be learned as well."""
    talk = (
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "assistant", "content": "Paris."}],
    )
    settings = {**SGD, "guidance_weight": WEIGHT, "stage": ["self_attention"]}
    data = Dataset.from_list([{"messages": talk[0] + talk[1]}] * 8)
    _, moved = train(AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path, tiny_trainable(), data, settings)
    assert any(change.any() for change in moved.values())
    wrong = [{"role": "assistant", "content": "A cat."}]
    data = Dataset.from_list([{"prompt": talk[0], "chosen": talk[1], "rejected": wrong}] * 8)
    _, moved = train(
        AgeVlmDPOTrainer, AgeVlmDPOConfig, tmp_path, tiny_trainable(), data, settings, ref_model=tiny_trainable(seed=5)
    )
    assert any(change.any() for change in moved.values())


# ---------------------------------------------------------------------------------------- preferences


def mixed_preferences(number: int) -> list[dict]:
    """Preferences with one, no and two images, answers of different lengths, the longer one being now this, now that."""
    examples = []
    for i in range(number):
        source, (rejected,) = row(i, (1, 0, 2)[i % 3]), copy.deepcopy(list(preferences(1)["rejected"][0]))
        rejected["content"][0]["text"] *= 1 + 2 * (i % 2)
        question, answer = source["messages"]
        examples.append({"images": source["images"], "prompt": [question], "chosen": [answer], "rejected": [rejected]})
        examples[-1]["grounding"] = source["grounding"]
    return examples


def guided_tokens(batch: dict, index: int) -> list[str]:
    decode = tiny_processor().tokenizer.decode
    queries = batch["map_queries"][index][(batch["map_targets"][index] > 0).any(-1)]
    return [decode(batch["input_ids"][index][tokens]).strip() for tokens in queries]


def test_batches_of_preferences_are_those_of_trl():
    expected = DataCollatorForVisionPreference(tiny_processor())(copy.deepcopy(mixed_preferences(6)))
    given = mixed_preferences(6)
    actual = preference_collator()(given)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert actual.keys() - expected.keys() == {"map_queries", "map_targets", "num_dropped_phrases"}
    assert given[0]["prompt"] == mixed_preferences(1)[0]["prompt"], "rows are not changed"


def test_phrases_of_preferences_are_found_in_the_chosen_rows():
    examples = mixed_preferences(6)
    batch = preference_collator()(examples)
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 4
    for i, example in enumerate(examples):
        words = []
        for entry in example["grounding"]:
            message = [*example["prompt"], *example["chosen"]][entry["message"]]
            text = next(part["text"] for part in message["content"] if part["type"] == "text")
            words.append(text[entry["start"] : entry["end"]])
        assert guided_tokens(batch, i) == list(dict.fromkeys(words)), i  # a phrase in two images is one
        tokens = batch["map_queries"][i].any(0)
        assert not tokens[lengths[i] :].any()
    assert not batch["map_queries"][6:].any(), "rejected rows"
    assert not batch["map_targets"][6:].any()
    assert batch["num_dropped_phrases"].tolist() == [0]
    # Targets are those that the collator of conversations makes.
    talks = [{**r, "messages": r["prompt"] + r["chosen"]} for r in examples]
    assert torch.equal(batch["map_targets"][:6], collator()(talks)["map_targets"])


def test_phrases_that_truncation_cuts_off_are_dropped_and_counted():
    examples = mixed_preferences(6)
    whole = preference_collator()(examples)
    last = whole["map_queries"][0].nonzero()[:, 1].max().item()
    cut = preference_collator(max_length=last)(examples)  # leaves out the last token of the first row's last phrase
    assert guided_tokens(cut, 0) == guided_tokens(whole, 0)[:-1]
    counts = [(batch["map_targets"] > 0).any(-1).sum().item() for batch in (whole, cut)]
    assert cut["num_dropped_phrases"].item() == counts[0] - counts[1] > 0


def test_a_single_image_column_and_rows_without_grounding():
    examples = [{**r, "image": r["images"][0]} for r in mixed_preferences(6)[::3]]
    expected = preference_collator()(examples)
    actual = preference_collator()([{k: v for k, v in r.items() if k != "images"} for r in examples])
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (
        not {"map_queries", "map_targets"} & preference_collator()([{**r, "grounding": []} for r in examples]).keys()
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_of_dpo_is_that_of_the_loss_written_out(tmp_path, accumulated):
    model, reference, batch = (
        tiny_trainable().train(),
        tiny_trainable(seed=5),
        preference_collator()(mixed_preferences(4)),
    )
    loss = dpo_loss(model, reference, batch, 0.1, WEIGHT)
    expected = gradients(model, loss)
    settings = {**SGD, "guidance_weight": WEIGHT, "stage": EVERYTHING, "beta": 0.1}
    settings |= {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    data = Dataset.from_list(mixed_preferences(4), features=preferences(1).features)
    trainer, moved = train(
        AgeVlmDPOTrainer, AgeVlmDPOConfig, tmp_path, tiny_trainable(), data, settings, ref_model=reference
    )
    assert_close(moved, expected)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["dpo_loss"] + WEIGHT * log["guidance_loss"], rel=1e-4)
    assert all(p.grad is None for p in reference.parameters())
    assert all(
        torch.equal(p, q) for p, q in zip(reference.parameters(), tiny_trainable(seed=5).parameters(), strict=True)
    )


def test_dpo_learns_what_is_preferred(tmp_path):
    settings = {**PLAIN, "max_steps": 20, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "stage": "instruct"}
    trainer, _ = train(
        AgeVlmDPOTrainer,
        AgeVlmDPOConfig,
        tmp_path,
        tiny_trainable(),
        preferences(8),
        settings,
        ref_model=tiny_trainable(),
    )
    logs = [log for log in trainer.state.log_history if "dpo_loss" in log]
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert sum(log["rewards/margins"] for log in logs[-5:]) / 5 > 0.2
    assert logs[-1]["dpo_loss"] < logs[0]["dpo_loss"]


def test_precomputed_references_are_refused(tmp_path):
    """By TRL, for any data with images."""
    args = AgeVlmDPOConfig(str(tmp_path), precompute_ref_log_probs=True, **PLAIN)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True.* not supported for vision datasets"):
        AgeVlmDPOTrainer(
            model=tiny_trainable(), args=args, train_dataset=preferences(2), processing_class=tiny_processor()
        )


# ---------------------------------------------------------------------------------------- PEFT


def lora_layers(model) -> list[str]:
    return [
        name.removeprefix("base_model.model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


def test_the_default_pattern_is_the_language_model_alone():
    model = get_peft_model(tiny_trainable(), lora())
    own = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert set(lora_layers(model)) == {f"language_model.layers.{i}.{name}" for i in range(6) for name in own}
    surprise = get_peft_model(tiny_trainable(), lora(target_modules="all-linear", modules_to_save=None))
    strays = set(lora_layers(surprise)) - set(lora_layers(model))
    for part in ("vision_tower", "multi_modal_projector", "cross_attn"):
        assert any(part in name for name in strays), "what the pattern is there for"
    whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert whole == {
        f"base_model.model.{n.replace(part, f'{part}.modules_to_save.default')}"
        for n, _ in tiny_trainable().named_parameters()
        for part in MODULES_TO_SAVE
        if f".{part}." in n
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_guidance_reaches_lora_and_the_modules_beside_it(tmp_path, checkpointing):
    """LoRA starts as nothing: the loss is that of the model itself, and so is the gradient of what trains in full."""
    model, batch = tiny_trainable().train(), collator(assistant_only_loss=False)(rows(4))
    loss = sft_loss(model, batch, WEIGHT)
    expected = gradients(model, loss)
    settings = {**SGD, "per_device_train_batch_size": 4, "gradient_checkpointing": checkpointing}
    trainer, moved = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path, tiny_trainable(), dataset(4), {**settings, "guidance_weight": WEIGHT},
        peft_config=lora(),
    )  # fmt: skip
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    whole = {n: change for n, change in moved.items() if "modules_to_save" in n}
    names = {n: n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in whole}
    assert_close(whole, {n: expected[name] for n, name in names.items()})
    assert not any(change.any() for n, change in moved.items() if "lora_" not in n and n not in whole)
    _, unguided = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path, tiny_trainable(), dataset(4), {**settings, "guidance_weight": 0.0},
        peft_config=lora(),
    )  # fmt: skip
    last_block = max(tiny_trainable().config.text_config.cross_attention_llama_layers)
    for name, change in moved.items():
        if "lora_B" in name:
            assert change.any(), name
            before_a_block = int(name.split("layers.")[1].split(".")[0]) < last_block
            same = torch.allclose(change, unguided[name], atol=1e-6 + 1e-4 * change.abs().max().item())
            assert same != before_a_block, name


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_saved_loaded_merged_and_generates(tmp_path, tied):
    model = tiny_trainable() if not tied else tied_model()
    model.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    settings = {**SGD, "max_steps": 2, "learning_rate": 0.1, "guidance_weight": WEIGHT}
    trainer, _ = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path / "out", base, dataset(4), settings, peft_config=lora()
    )
    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists(), "the adapter alone"
    trained, batch = trainer.model.eval(), inputs_of(collator()(rows(4)))
    question = {k: v[:1] for k, v in batch.items()}  # of the first row, which has the first image
    with torch.no_grad():
        logits, start = trained(**batch).logits, model(**batch).logits
    assert (logits - start).abs().max() > 0.1
    tokens = trained.generate(**question, max_new_tokens=5, do_sample=False)

    loaded = [  # both ways that the README names
        AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval(),
        PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).eval(),
    ]
    merged = loaded[1].merge_and_unload()
    assert type(merged).__name__ == "AgeVlmForConditionalGeneration"
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert plain.config.tie_word_embeddings == model.config.tie_word_embeddings
    for again in (loaded[0], merged, plain.eval()):
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits, logits, atol=1e-3, rtol=1e-4)
        assert torch.equal(again.generate(**question, max_new_tokens=5, do_sample=False), tokens)
    assert AutoProcessor.from_pretrained(tmp_path / "adapter").image_token == tiny_processor().image_token


def tied_model():
    processor = tiny_processor()
    llama = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    return tiny_age_vlm(llama={**llama, "tie_word_embeddings": True}, image_token_id=processor.image_token_id)


def test_what_trains_beside_lora_is_float32_and_its_gates_open(tmp_path):
    model = tiny_trainable(gate=0.0).to(torch.bfloat16)
    args = AgeVlmSFTConfig(str(tmp_path), initial_gate=0.5, **{**SGD, "bf16": True, "learning_rate": 1e-4})
    trainer = AgeVlmSFTTrainer(
        model=model, args=args, train_dataset=dataset(4), processing_class=tiny_processor(), peft_config=lora()
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    gates = {n: p for n, p in trainer.model.named_parameters() if n.endswith(".gate")}
    assert len(gates) == 8, "those that train, and PEFT's copies of before"
    assert all((gate == 0.5).all() for gate in gates.values())
    trainer.train()
    moved = [gate for name, gate in gates.items() if "modules_to_save" in name]
    assert all((gate != 0.5).all() for gate in moved), "steps smaller than bfloat16 can add"


def test_peft_decides_what_trains(tmp_path):
    args = AgeVlmSFTConfig(str(tmp_path), stage="instruct", **PLAIN)
    with pytest.raises(ValueError, match="With PEFT, `stage` must be left out"):
        AgeVlmSFTTrainer(
            model=tiny_trainable(), args=args, train_dataset=dataset(2), processing_class=tiny_processor(), peft_config=lora()
        )  # fmt: skip


def test_dpo_with_lora_refers_to_the_model_without_it(tmp_path):
    reference, batch = tiny_trainable(), preference_collator()(mixed_preferences(4))
    data = Dataset.from_list(mixed_preferences(4), features=preferences(1).features)
    settings = {**SGD, "max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, "beta": 1.0}
    trainer, _ = train(
        AgeVlmDPOTrainer, AgeVlmDPOConfig, tmp_path, tiny_trainable(), data, settings, peft_config=lora()
    )
    assert trainer.ref_model is None
    logs = trainer.state.log_history
    assert logs[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert logs[1]["dpo_loss"] < logs[0]["dpo_loss"]
    found, maps = log_probabilities(trainer.model, batch)
    expected = dpo_loss(trainer.model, reference, batch, 1.0, 1.0)
    inputs = dict(trainer._prepare_inputs(batch))
    trainer._num_phrases = (batch["map_targets"] > 0).any(-1).sum()
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.requires_grad
    assert maps.requires_grad


# ---------------------------------------------------------------------------------------- 4 and 8 bits


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    tiny_trainable(llama=WIDE).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_4_bits_learns_with_guidance_what_it_learns_on_the_stored_values(wide, tmp_path, checkpointing):
    base, original = load_quantized(wide, NF4), AutoModelForImageTextToText.from_pretrained(wide)
    model, batch = dequantized(base, original).train(), collator(assistant_only_loss=False)(rows(4))
    for module in (model.model.multi_modal_projector, model.model.language_model.cross_attn):
        module.to(torch.bfloat16).float()  # as TRL begins
    loss = sft_loss(model, batch, WEIGHT)
    expected = gradients(model, loss)
    settings = {**SGD, "per_device_train_batch_size": 4, "gradient_checkpointing": checkpointing}
    trainer, moved = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path, base, dataset(4), {**settings, "guidance_weight": WEIGHT},
        peft_config=lora(),
    )  # fmt: skip
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    for name, change in moved.items():
        if "modules_to_save" in name:
            value = expected[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")]
            assert (change - value).norm() <= 1e-2 * value.norm() + 1e-5, name
        elif "lora_B" in name:
            assert change.any(), name
        elif "lora_A" not in name:
            assert not change.any(), name


def test_an_adapter_of_4_bits_is_saved_loaded_and_merged(wide, tmp_path):
    settings = {**SGD, "max_steps": 2, "learning_rate": 0.1, "guidance_weight": WEIGHT}
    trainer, _ = train(
        AgeVlmSFTTrainer, AgeVlmSFTConfig, tmp_path / "out", load_quantized(wide, NF4), dataset(4), settings,
        peft_config=lora(),
    )  # fmt: skip
    trainer.save_model(tmp_path / "adapter")
    batch = inputs_of(collator()(rows(4)))
    logits = trainer.model.train()(**batch).logits.detach()
    # In training mode: with weights of 4 bits, some CPUs infer in bfloat16.
    start = load_quantized(wide, NF4).train()
    assert (logits - start(**batch).logits).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(start, tmp_path / "adapter").train()
    torch.testing.assert_close(loaded(**batch).logits, logits, atol=1e-4, rtol=1e-4)
    assert loaded.eval().generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2

    # Merged into the model that was not quantized: what the adapter adds is the same.
    merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(wide), tmp_path / "adapter")
    with torch.no_grad():
        expected = merged(**batch).logits
        merged = merged.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not quantized(again)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    # Merged in 4 bits, the layers are in 4 bits.
    small = PeftModel.from_pretrained(load_quantized(wide, NF4), tmp_path / "adapter").merge_and_unload().train()
    assert quantized(small) == quantized(load_quantized(wide, NF4))
    difference = (small(**batch).logits - logits).norm()
    assert difference < (load_quantized(wide, NF4).train()(**batch).logits - logits).norm()


@pytest.mark.parametrize("bits", [NF4, INT8], ids=["4bit", "8bit"])
def test_a_model_that_peft_has_prepared_trains_with_guidance(wide, tmp_path, bits):
    """`prepare_model_for_kbit_training` makes all that is left out float32, and turns gradient checkpointing on."""
    base = load_quantized(wide, bits, dtype=torch.bfloat16)
    model = get_peft_model(prepare_model_for_kbit_training(base), lora())
    settings = {**SGD, "max_steps": 2, "learning_rate": 0.01, "guidance_weight": WEIGHT}
    trainer, moved = train(AgeVlmTrainer, AgeVlmTrainingArguments, tmp_path, model, dataset(4), settings)
    assert {p.dtype for n, p in model.named_parameters() if "layers" not in n} == {torch.float32}
    assert all(change.any() for name, change in moved.items() if "lora_B" in name or "modules_to_save" in name)
    original = AutoModelForImageTextToText.from_pretrained(wide)
    unquantized = get_peft_model(original, lora())
    other, _ = train(AgeVlmTrainer, AgeVlmTrainingArguments, tmp_path, unquantized, dataset(4), settings)
    for name in ("lm_loss", "guidance_loss"):
        assert trainer.state.log_history[0][name] == pytest.approx(other.state.log_history[0][name], rel=0.2), name


def test_weights_of_4_bits_do_not_train_without_lora(wide, tmp_path):
    with pytest.raises(ValueError, match="add --use_peft"):
        AgeVlmModelConfig(str(wide), load_in_4bit=True)
    with pytest.raises(ValueError, match=r"self_attention.*4 or 8 bits.*LoRA"):
        freeze(load_quantized(wide, NF4), "full")


# ---------------------------------------------------------------------------------------- model cards


class Hub:
    """Stands for the Hub: what would be uploaded."""

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, **kwargs):
        self.files = {path.name for path in Path(folder_path).iterdir()}
        if "README.md" in self.files:  # a checkpoint has none
            self.card = ModelCard.load(Path(folder_path) / "README.md").data.to_dict()
        upload: Future = Future()
        upload.set_result(None)
        return upload


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: found)
    return found


TRAINERS = {
    "own": (AgeVlmTrainer, AgeVlmTrainingArguments, dataset),
    "sft": (AgeVlmSFTTrainer, AgeVlmSFTConfig, dataset),
    "dpo": (AgeVlmDPOTrainer, AgeVlmDPOConfig, preferences),
}


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["whole", "lora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_cards_take_the_arguments_of_transformers_and_of_trl(tmp_path, hub, name, peft_config):
    trainer_class, config_class, data = TRAINERS[name]
    model = tiny_trainable()
    kwargs = {"peft_config": peft_config} if name != "own" else {}
    if name == "dpo" and peft_config is None:
        kwargs["ref_model"] = tiny_trainable()
    if name == "own" and peft_config is not None:
        model = get_peft_model(model, peft_config)
    trainer = trainer_class(
        model=model, args=config_class(str(tmp_path), **SGD), train_dataset=data(2), processing_class=tiny_processor(), **kwargs
    )  # fmt: skip
    both = {"model_name": "Mine", "tags": "vision"}
    own = {"language": "en", "license": "mit", "finetuned_from": "you/theirs", "tasks": "image-text-to-text"}
    trainer.push_to_hub(dataset_name="you/pictures", **both)
    assert {"README.md", "chat_template.jinja", "tokenizer.json"} <= hub.files
    assert hub.card["datasets"] in ("you/pictures", ["you/pictures"])
    assert "vision" in hub.card["tags"]
    rest = {"dataset": ["Pictures", "More"], "dataset_args": ["small", "large"]}
    trainer.push_to_hub(dataset_tags=["you/pictures", "you/more"], **both, **own, **rest)
    assert hub.card["datasets"] == ["you/pictures", "you/more"]
    assert hub.card["language"] in ("en", ["en"])
    assert hub.card["license"] == "mit"
    assert hub.card["base_model"] == "you/theirs"
    assert "vision" in hub.card["tags"]
    trainer.create_model_card()


# ---------------------------------------------------------------------------------------- GRPO


def questions(number: int) -> Dataset:
    examples = [{"prompt": [{"role": "user", "content": "What is it?"}], "image": row(i)["images"][0], "answer": "dog"} for i in range(number)]  # fmt: skip
    return Dataset.from_list(examples).cast_column("image", Image())


def first_half(completion_ids: list[list[int]], **kwargs) -> list[float]:
    """Reward: the share of tokens in the first half of the vocabulary."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["stage", "lora"])
def test_grpo_trains_on_images(tmp_path, peft_config):
    model = tiny_trainable()
    if peft_config is None:
        freeze(model, "instruct")
    generate, shown = model.generate, []

    def spy(*args, **kwargs):
        shown.append(kwargs)
        return generate(*args, **kwargs)

    model.generate = spy
    settings = {
        **PLAIN,
        "max_steps": 12,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
    }
    settings |= {"max_completion_length": 6, "lr_scheduler_type": "constant"}
    trainer, moved = train(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        model,
        questions(4),
        settings,
        reward_funcs=first_half,
        peft_config=peft_config,
    )
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.4
    # Images reach generation: each prompt's own, four times.
    processor = tiny_processor()
    pictures = processor.image_processor([[q["image"]] for q in questions(4)], return_tensors="pt")["pixel_values"]
    for inputs in shown:
        nearest = [(pictures - pixels).abs().amax((1, 2, 3)).min() for pixels in inputs["pixel_values"]]
        assert len(nearest) == 8
        assert max(nearest) == 0
        assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [1] * 8
    # And the loss: without any, the adapter has no gradient, and AdamW without weight decay leaves it.
    assert trainer.args.weight_decay == 0
    for name, change in moved.items():
        if trainer.model.get_parameter(name).requires_grad and ("projector" in name or "cross_attn" in name):
            assert change.any(), name


# ---------------------------------------------------------------------------------------- metrics


METRICS = ("guidance_loss", "pointing_accuracy", "attention_iou", "guided_phrases", "dropped_phrases")


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class", "own_loss"),
    [(AgeVlmSFTTrainer, AgeVlmSFTConfig, "lm_loss"), (AgeVlmDPOTrainer, AgeVlmDPOConfig, "dpo_loss")],
)
def test_trackers_receive_what_is_logged(tmp_path, monkeypatch, tracker, trainer_class, config_class, own_loss):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    folder = tmp_path / "trackio"
    if tracker == "trackio":
        use_trackio_folder(monkeypatch, folder)
    is_sft = trainer_class is AgeVlmSFTTrainer
    settings = {
        **PLAIN,
        "report_to": tracker,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "project": "tiny",
    }
    kwargs = {"eval_dataset": dataset(4) if is_sft else preferences(4)}
    kwargs |= {} if is_sft else {"ref_model": tiny_trainable()}
    data = dataset(4) if is_sft else preferences(4)
    trainer, _ = train(trainer_class, config_class, tmp_path / "out", tiny_trainable(), data, settings, **kwargs)
    trainer.end()
    logs = trainer.state.log_history
    logged = {
        f"train/{m}": [log[m] for log in logs if own_loss in log] for m in (own_loss, *METRICS)
    } | {f"eval/{m}": [log[f"eval_{m}"] for log in logs if f"eval_{own_loss}" in log] for m in (own_loss, *METRICS)}  # fmt: skip
    received = {"tensorboard": read_tensorboard, "trackio": read_trackio}[tracker](tmp_path)
    for name, values in logged.items():
        assert len(values) == (2 if name.startswith("train") else 1)
        assert received[name] == pytest.approx(values, rel=1e-5), name


def read_tensorboard(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def use_trackio_folder(monkeypatch, folder: Path) -> None:
    """Trackio reads its folder's variable once, at its import; this process may have imported it before."""
    import trackio

    old = trackio.utils.TRACKIO_DIR
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and getattr(module, "TRACKIO_DIR", None) == old:
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)


def read_trackio(folder: Path) -> dict[str, list[float]]:
    import trackio

    received: dict[str, list[float]] = {}
    for name in trackio.SQLiteStorage.get_runs("tiny"):
        for log in trackio.SQLiteStorage.get_logs("tiny", name):
            for key, value in log.items():
                received.setdefault(key, []).append(value)
    assert list(folder.glob("trackio/**/*.db")), "written here, not to the user's folder"
    return received


# ---------------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_trainable().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    dataset(8).save_to_disk(folder / "conversations")
    preferences(8).save_to_disk(folder / "preferences")
    questions(8).save_to_disk(folder / "questions")
    return folder


@pytest.mark.parametrize(
    ("script", "data", "flags", "launcher"),
    [
        ("sft", "conversations", "--stage instruct --assistant_only_loss --eval_strategy steps --eval_steps 2 --dataset_test_split train", ""),
        ("sft", "conversations", "--use_peft --lora_r 4", ""),
        ("sft", "conversations", "--stage instruct", "-m accelerate.commands.launch --cpu --num_processes 2"),
        ("dpo", "preferences", "--stage instruct", ""),
        ("grpo", "questions", "--num_generations 2 --max_completion_length 4", ""),
    ],
)  # fmt: skip
def test_scripts(parts, tmp_path, script, data, flags, launcher):
    common = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 false --logging_steps 1 --report_to none"
    done = subprocess.run(
        [
            sys.executable, *launcher.split(), str(SCRIPTS / f"{script}_agevlm.py"),
            "--model_name_or_path", str(parts / "model"), "--dataset_name", str(parts / data),
            "--output_dir", str(tmp_path / "out"), *flags.split(), *common.split(),
        ],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    if script != "grpo":
        assert "'guidance_loss'" in done.stdout + done.stderr
    if "eval" in flags:
        assert "'eval_guidance_loss'" in done.stdout + done.stderr
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == tiny_processor().chat_template
    inputs = collator()(rows(1))
    assert model(**inputs_of(inputs)).logits.isfinite().all()
    assert (tmp_path / "out" / "adapter_config.json").exists() == ("--use_peft" in flags)


@pytest.mark.parametrize(
    ("script", "data", "flags"),
    [
        ("sft", "conversations", "--load_in_4bit"),
        ("sft", "conversations", "--load_in_8bit"),
        ("dpo", "preferences", "--load_in_4bit --use_bnb_nested_quant"),
        ("grpo", "questions", "--load_in_4bit --num_generations 2 --max_completion_length 4"),
    ],
)
def test_scripts_train_quantized_models(parts, wide, tmp_path, monkeypatch, hub, script, data, flags):
    common = "--max_steps 1 --per_device_train_batch_size 2 --use_cpu --bf16 false --logging_steps 1 --report_to none"
    path = SCRIPTS / f"{script}_agevlm.py"
    paths = [
        "--model_name_or_path",
        str(wide),
        "--dataset_name",
        str(parts / data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    peft = ["--use_peft", "--lora_r", "4", "--push_to_hub"]
    monkeypatch.setattr(sys, "argv", [str(path), *paths, *peft, *flags.split(), *common.split()])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runpy.run_path(str(path), run_name="__main__")
    log = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]
    assert math.isfinite(log["loss"])
    if script != "grpo":
        assert log["guidance_loss"] > 0
        assert log["guided_phrases"] > 0
    assert "adapter_model.safetensors" in hub.files
    assert str(parts) not in (tmp_path / "out" / "README.md").read_text()
    bits = {name: True for name in ("load_in_4bit", "load_in_8bit") if name in flags}
    model = PeftModel.from_pretrained(load_quantized(wide, bits), tmp_path / "out")
    assert model(**inputs_of(collator()(rows(1)))).logits.isfinite().all()
    trained = {
        n for n, p in model.named_parameters() if "modules_to_save" in n and not torch.equal(p, original(model, n))
    }
    assert any("projector" in name for name in trained)
    assert any("cross_attn" in name for name in trained)


def original(model, name: str) -> torch.Tensor:
    return model.get_parameter(name.replace("modules_to_save.default", "original_module"))
