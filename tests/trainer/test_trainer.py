# SPDX-License-Identifier: Apache-2.0
"""The loss and its gradients against their definition, however a step is split."""

import pytest
from tiny_training import gradients, tiny_processor
from training_runs import SETTINGS, mixed_rows, start_model
from training_steps import (
    KINDS,
    KeepGradients,
    assert_same_gradients,
    by_definition,
    collate,
    mixed_preferences,
    step_gradients,
)

from agevlm.attention.losses import dice_loss
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer.stages import freeze
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer

pytestmark = pytest.mark.slow


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
        train_dataset=mixed_preferences("1u32"),
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
