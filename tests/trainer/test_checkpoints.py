# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, what is in them, and that trainers are forgotten."""

import errno
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import tiny_processor
from training_runs import SETTINGS, mixed_rows, start_model
from training_steps import (
    make_trainer,
    mixed_preferences,
)
from transformers import (
    AutoProcessor,
    Trainer,
    TrainerCallback,
)

from agevlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.checkpoints import save_model
from agevlm.trainer.guidance import visual_grid
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer

pytestmark = pytest.mark.slow


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
    processor.image_processor.return_image_sizes = False
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
        train_dataset=mixed_rows("1212") if own else mixed_preferences("1212"),
        processing_class=processor,
        **({} if own else {"ref_model": start_model()}),
    )
    trainer.train()
    assert all(kwargs.get("pixel_values") is not None for kwargs, _ in seen)
    assert all(kwargs.get("image_sizes") is None for kwargs, _ in seen)
    # The rows' images are wider than high: all of the last row of tokens is padding.
    maps = seen[0][1].unflatten(-1, (4, 4))
    named = maps.sum((-1, -2)) > 0
    assert named.any()
    assert (maps[named][:, -1] > 0).all()
    loaded = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2").image_processor
    assert loaded.return_image_sizes is False


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
    "optimizer": ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")),
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


@pytest.mark.parametrize("file", ["weights", "processor", "state of the folder"])
def test_a_failed_save_of_the_model_keeps_the_former_one_and_leaves_nothing(file, tmp_path, monkeypatch):
    where, error = FAILURES.get(file, ("agevlm.files.os.replace", NO_SPACE))
    trainer = make_trainer(start_model(), "12t3", tmp_path / "out", stage="guide", max_steps=1)
    (tmp_path / "out" / "mine").mkdir(parents=True)
    save_model(trainer)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    trainer.train()
    monkeypatch.setattr(where, out_of_space(error))
    with pytest.raises(OSError, match=rf"Could not save the model in {tmp_path / 'out'}: .*make room"):
        save_model(trainer)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    save_model(trainer)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert (tmp_path / "out" / "mine").is_dir()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_what_is_saved_is_for_everyone_and_says_nothing_of_this_computer(umask, tmp_path):
    """Permissions as the umask has them, and no folder in the files of a model that was loaded from one."""
    start_model().save_pretrained(tmp_path / "start")
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "start")
    out, direct = tmp_path / "out", tmp_path / "direct"
    trainer = make_trainer(model, "12t3", out, stage="guide", max_steps=1, save_strategy="steps", save_steps=1)
    before = os.umask(umask)
    try:
        (tmp_path / "ordinary").touch()
        trainer.train()
        save_model(trainer)
        trainer.save_model(str(direct))  # as the scripts do
    finally:
        os.umask(before)
    files = [path for folder in (out, direct) for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "optimizer.pt", "config.json", "tokenizer.json"}
    for file in files:
        assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, file.name
        record = file.name in ("trainer_state.json", "training_args.bin")  # of the run, with its folder
        assert record or str(tmp_path).encode() not in file.read_bytes(), file.name


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
