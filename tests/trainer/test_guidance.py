# SPDX-License-Identifier: Apache-2.0
"""Guidance: what it teaches, its gradients and its logs, against computations by hand."""

import numpy as np
import pytest
import torch
from tiny_training import gradients, tiny_processor, tiny_trainable
from training_runs import mixed_rows, start_model
from training_steps import KINDS, KeepGradients, assert_same_gradients, collate, make_trainer, step_gradients
from transformers.testing_utils import CaptureLogger

from agevlm.attention.losses import resolve_loss
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer import guidance
from agevlm.trainer.stages import freeze

pytestmark = pytest.mark.slow


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
    """From a quarter of the phrases that point at their object to all, of the rows that are learned."""
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
    # The values of a block with a closed gate do not count; its gate learns from the language modeling loss.
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


def test_absent_phrases_are_guided_where_there_is_a_sink_and_it_is_asked():
    for sink, asked, expected in [(True, True, True), (True, False, False), (False, True, False)]:
        trainer = make_trainer(start_model(cross_attention_sink=sink), "1", guide_absent=asked)
        assert trainer.data_collator.guide_absent == expected


@pytest.mark.parametrize(
    ("sink", "settings"),
    [(True, {}), (False, {}), (True, {"guidance_loss": "log_dice"}), (True, {"guidance_weight": 0.0})],
)
def test_dice_with_a_sink_is_warned_of(sink, settings):
    with CaptureLogger(guidance.logger) as log:
        make_trainer(start_model(cross_attention_sink=sink), "1", **settings)
    assert ("attention can move into the sink" in log.out) == (sink and not settings)


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
    with pytest.raises(ValueError, match="attention maps came without a gradient"):
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
            attention, attended, covered = maps[:, p].mean(0), maps[:, p], target
            if sink:
                attended = np.concatenate([attended, 1 - attended.sum(-1, keepdims=True)], axis=-1)
                covered = np.append(target, not target.any())
            scaled = np.minimum(attended * covered.sum(), 1)
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
