# SPDX-License-Identifier: Apache-2.0
"""Runs that diverge, learn nothing or would save or load what is damaged: each stops with a message that says where."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import tiny_processor
from training_runs import SETTINGS, mixed_rows, start_model
from training_steps import KeepGradients, make_trainer, mixed_preferences
from transformers import Trainer, TrainerCallback

from agevlm.processing.rows import row_features
from agevlm.trainer import AgeVlmTrainer, guards
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.checkpoints import save_model
from agevlm.trainer.guards import check_checkpoint
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmSFTConfig, AgeVlmSFTTrainer

pytestmark = pytest.mark.slow

GATE = "model.language_model.cross_attn.0.gate"


class At(TrainerCallback):
    """Does something at the beginning, or the end, of a step, which are counted from 1."""

    def __init__(self, step: int, do, begin: bool = True):
        self.step, self.do, self.begin = step, do, begin

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.begin and state.global_step + 1 == self.step:
            self.do(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.begin and state.global_step == self.step:
            self.do(model)


def fill(value: float):
    """Sets one weight of one parameter that trains."""

    @torch.no_grad()
    def set_weight(model) -> None:
        model.get_parameter(GATE).fill_(value)

    return set_weight


def any_trainer(kind: str, folder, kinds: str = "1212", callbacks=(), **settings):
    common = {**SETTINGS, "stage": "guide", "per_device_train_batch_size": 1, "max_steps": 4, **settings}
    if kind == "dpo":
        return AgeVlmDPOTrainer(
            start_model(), args=AgeVlmDPOConfig(str(folder), **common), ref_model=start_model(),
            train_dataset=mixed_preferences(kinds), processing_class=tiny_processor(), callbacks=list(callbacks),
        )  # fmt: skip
    trainer_class, args_class = {
        "own": (AgeVlmTrainer, AgeVlmTrainingArguments),
        "sft": (AgeVlmSFTTrainer, AgeVlmSFTConfig),
    }[kind]
    if kind == "sft":
        common["assistant_only_loss"] = True
    return trainer_class(
        start_model(), args=args_class(str(folder), **common), train_dataset=mixed_rows(kinds),
        processing_class=tiny_processor(), callbacks=list(callbacks),
    )  # fmt: skip


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- losses ---


@pytest.mark.parametrize(
    ("kind", "filtered"), [("own", False), ("own", True), ("sft", False), ("dpo", False)], ids=str
)
def test_a_diverged_run_stops_at_its_first_loss_that_is_not_finite(kind, filtered, tmp_path, monkeypatch):
    """Also where Transformers is told to log NaN as 0; the default does not."""
    losses, step_of = [], Trainer.training_step

    def recorded(self, *args, **kwargs):
        loss = step_of(self, *args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Trainer, "training_step", recorded)
    filtering = {"logging_nan_inf_filter": True} if filtered else {}
    trainer = any_trainer(kind, tmp_path, learning_rate=1e30, **filtering)
    assert trainer.args.logging_nan_inf_filter == filtered
    with pytest.raises(ValueError, match="Training has diverged") as stopped:
        trainer.train()
    first = next(i for i, loss in enumerate(losses, 1) if not math.isfinite(loss))
    assert first == len(losses), "no step after it"
    assert f"at step {first}: the loss is {losses[-1]}" in str(stopped.value)
    assert [log["step"] for log in trainer.state.log_history] == list(range(1, first))
    assert trainer.state.global_step == first - 1, "the weights have not moved by it"


def test_the_last_good_checkpoint_is_named(tmp_path):
    """A checkpoint right before the step has the weights that the loss came from."""
    settings = {"stage": "guide", "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(
        ValueError, match=r"diverged at step 4: the loss is nan. The last good checkpoint is .*checkpoint-2:"
    ):
        make_trainer(start_model(), "1212", tmp_path, callbacks=[At(4, fill(math.nan))], **settings).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    # Resumed, with what it was stopped for once more: the checkpoint that it started from counts.
    trainer = make_trainer(start_model(), "1212", tmp_path, callbacks=[At(5, fill(math.nan))], **settings)
    with pytest.raises(ValueError, match=r"diverged at step 5: .* The last good checkpoint is .*checkpoint-3:"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match=r"diverged at step 1: the loss is nan\. Start over with a lower learning_rate"
    ):
        make_trainer(start_model(), "1212", tmp_path, callbacks=[At(1, fill(math.nan))], **settings).train()


def test_one_batch_of_a_step_is_enough(tmp_path, monkeypatch):
    compute, calls = AgeVlmTrainer.compute_loss, iter(range(1, 100))

    def poisoned(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (
            math.inf if next(calls) == 4 else 1
        )  # the first batch of the second step

    monkeypatch.setattr(AgeVlmTrainer, "compute_loss", poisoned)
    trainer = make_trainer(
        start_model(), "121212", tmp_path, stage="guide", max_steps=3, per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="diverged at step 2: the loss is inf"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_too_but_for_float16(tmp_path):
    """A scaler of float16 skips such steps by itself."""

    def spoil(model):
        model.get_parameter(GATE).register_hook(lambda gradient: gradient * math.inf)

    trainer = make_trainer(start_model(), "1212", tmp_path, callbacks=[At(2, spoil)], stage="guide", max_steps=2)
    with pytest.raises(ValueError, match=r"diverged at step 2: the gradient's norm is (inf|nan)"):
        trainer.train()
    trainer = make_trainer(
        start_model(),
        "1212",
        tmp_path,
        callbacks=[At(2, spoil)],
        stage="guide",
        max_steps=2,
        optim="sgd",
        learning_rate=0.0,
    )
    trainer.args.fp16 = True  # without a scaler, which CPUs do not have
    trainer.args.max_grad_norm = 0
    trainer.train()
    assert trainer.state.global_step == 2


# --- weights ---


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
def test_weights_that_are_not_finite_are_never_saved(value, tmp_path):
    settings = {"stage": "guide", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(start_model(), "1212", tmp_path, callbacks=[At(4, fill(value), begin=False)], **settings)
    with pytest.raises(
        ValueError, match=rf"Nothing is saved: after step 4, {GATE} has .* checkpoint is .*checkpoint-2"
    ):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values()
    )
    for save in (lambda: save_model(trainer), lambda: trainer.save_model(str(tmp_path / "model"))):
        with pytest.raises(ValueError, match=f"{GATE} has values that are not finite"):
            save()
    assert names(tmp_path) == ["checkpoint-2"]

    plain = Trainer(trainer.model, AgeVlmTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match="not finite"):  # the final model of a trainer of one's own
        save_model(plain)
    trainer.model.get_parameter(GATE).requires_grad_(False)  # what does not train is not looked at
    save_model(trainer)
    assert "model.safetensors" in names(tmp_path)


# --- labels ---


@pytest.mark.parametrize("kind", ["own", "sft", "dpo"])
def test_a_length_that_cuts_every_answer_is_named(kind, tmp_path):
    trainer = any_trainer(kind, tmp_path, max_length=6, per_device_train_batch_size=2, max_steps=2, guidance_weight=0)
    with pytest.raises(
        ValueError, match=r"None of the 4 rows of the first 2 steps .* max_length=6 cuts every answer: raise it"
    ):
        trainer.train()


def without_answers(number: int, others: str = "") -> Dataset:
    rows = [{**row, "messages": row["messages"][:1], "grounding": []} for row in mixed_rows("t" * number)]
    rows += list(mixed_rows(others)) if others else []
    return Dataset.from_list([{name: row[name] for name in row_features()} for row in rows], features=row_features())


def test_rows_without_answers_are_told_after_the_first_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "FIRST_STEPS", 3)

    def trainer(dataset, **settings):
        args = AgeVlmTrainingArguments(
            str(tmp_path),
            **{**SETTINGS, "stage": "guide", "per_device_train_batch_size": 1, "max_steps": 30, **settings},
        )
        return AgeVlmTrainer(start_model(), args, train_dataset=dataset, processing_class=tiny_processor())

    stopped = trainer(without_answers(5))
    with pytest.raises(ValueError, match=r"None of the 3 rows of the first 3 steps .* no assistant turn"):
        stopped.train()
    assert stopped.state.global_step == 2
    trainer(without_answers(5), assistant_only_loss=False, max_steps=1).train()
    # Some steps without a label are no mistake: they have no loss, and no gradient.
    kept, weights = KeepGradients(), start_model().state_dict()
    some = trainer(without_answers(2, "1u"), max_steps=4)
    some.add_callback(kept)
    some.train()
    assert [log["loss"] == 0 for log in some.state.log_history if "loss" in log] == [True, True, False, False]
    assert all(gradient.isfinite().all() for step in kept.steps for gradient in step.values())
    assert not any(gradient.any() for step in kept.steps[:2] for gradient in step.values())
    trained = some.model.state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in weights.items())


def test_an_evaluation_passes_over_batches_without_labels(tmp_path):
    args = AgeVlmTrainingArguments(
        str(tmp_path), **{**SETTINGS, "per_device_eval_batch_size": 1, "guidance_weight": 0}
    )
    losses = []
    for dataset in (without_answers(2, "1u"), mixed_rows("1u")):
        trainer = AgeVlmTrainer(start_model(), args, eval_dataset=dataset, processing_class=tiny_processor())
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])
    fill(math.nan)(trainer.model)
    assert math.isnan(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("kind", ["own", "tokens"])
def test_no_rows_are_told(kind, tmp_path):
    dataset = mixed_rows("1").select([])
    args = AgeVlmTrainingArguments(
        str(tmp_path), **SETTINGS, stage="guide", tokens_per_batch=90 if kind == "tokens" else None
    )
    with pytest.raises(ValueError, match="The data set to train on has no rows"):
        AgeVlmTrainer(start_model(), args, train_dataset=dataset, processing_class=tiny_processor()).train()


@pytest.mark.parametrize(
    ("trainer_class", "args_class"), [(AgeVlmSFTTrainer, AgeVlmSFTConfig), (AgeVlmDPOTrainer, AgeVlmDPOConfig)]
)
def test_no_rows_are_told_by_the_trainers_of_trl(trainer_class, args_class, tmp_path):
    rows = (mixed_rows if trainer_class is AgeVlmSFTTrainer else mixed_preferences)("1").select([])
    with pytest.raises(ValueError, match="no rows"):
        trainer_class(
            start_model(), args=args_class(str(tmp_path), **SETTINGS), train_dataset=rows, processing_class=tiny_processor()
        )  # fmt: skip


# --- resuming ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"stage": "guide", "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(start_model(), "1212", folder, **settings).train()
    return folder / "checkpoint-2"


FILES = [
    "trainer_state.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
]


def resumed(folder, **settings) -> AgeVlmTrainer:
    trainer = make_trainer(start_model(), "1212", folder, **{"stage": "guide", "max_steps": 3, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("file", FILES)
def test_missing_and_damaged_files_of_a_checkpoint_are_named(file, checkpoint, tmp_path):
    copied = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copied)
    check_checkpoint(copied)
    whole = (copied / file).read_bytes()
    for content in (
        whole[: len(whole) // 2],
        whole[:-10],
        b"",
        b"no such thing",
        None,
    ):
        (copied / file).unlink()
        if content is not None:
            (copied / file).write_bytes(content)
        elif file == "training_args.bin":  # which sharded checkpoints lack
            break
        error, says = (FileNotFoundError, "has no") if content is None else (ValueError, "is damaged")
        with pytest.raises(error, match=says) as refused:
            resumed(tmp_path)
        assert file in str(refused.value)
        assert f"Delete {copied}" in str(refused.value)


def test_files_that_are_whole_but_of_something_else_are_refused(checkpoint, tmp_path):
    copied = tmp_path / "checkpoint-2"
    for file, content, says in (
        ("optimizer.pt", {"state": {}, "param_groups": []}, "different number of parameter groups"),
        ("scheduler.pt", [1], "scheduler.pt"),
        ("rng_state.pth", {"python": 1}, "rng_state"),
    ):
        shutil.copytree(checkpoint, copied)
        torch.save(content, copied / file)
        with pytest.raises(ValueError, match="cannot be read, or are not of what trains now") as refused:
            resumed(tmp_path)
        assert says in str(refused.value)
        shutil.rmtree(copied)
    for content in ("[]", "3", '{"global_step": "x"}', "[" * 100_000):
        shutil.copytree(checkpoint, copied)
        (copied / "trainer_state.json").write_text(content)
        with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
            resumed(tmp_path)
        shutil.rmtree(copied)


def test_a_missing_part_of_the_weights_is_named(checkpoint, tmp_path):
    copied = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copied)
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00002\.safetensors"):
        resumed(tmp_path)
    (copied / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        resumed(tmp_path)


def test_a_resumed_run_has_the_settings_of_its_arguments(checkpoint, tmp_path):
    """Learning rates, decay, schedule, and when it logs and saves: not those of the checkpoint, as in Transformers."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    trainer = resumed(
        tmp_path, max_steps=6, learning_rate=0.5, lr_scheduler_type="constant_with_warmup", warmup_steps=4, weight_decay=0.25,
        adam_beta1=0.5, group_learning_rates=None, logging_steps=2, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    logged = [(log["step"], log["learning_rate"]) for log in trainer.state.log_history if "loss" in log]
    assert logged[2:] == [(4, 0.5 * 3 / 4), (6, 0.5)], "steps 3 to 6 of a warm-up of 4"
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.25, 0.0}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, trainer.args.adam_beta2)}
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    first = trainer.optimizer.state_dict()["state"]
    assert {state["step"].item() for state in first.values()} == {6.0}, (
        "what the optimizer has gathered is the checkpoint's"
    )
