# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that have only what was trained: the run is the same to the last bit, resumed or not, and so are its models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_vision
from tiny_training import dataset, tiny_processor
from training_runs import SETTINGS, mixed_rows, start_model, train
from training_steps import make_trainer, mixed_preferences
from transformers import Trainer

from agevlm import AgeVlmForConditionalGeneration
from agevlm.build import build_checkpoint
from agevlm.deltas import TRAINED_FILE, load_trained, load_trained_into
from agevlm.parts import PARTS_FILE
from agevlm.trainer import recipe as recipes
from agevlm.trainer.checkpoints import save_model
from agevlm.trainer.stages import LORA_TARGET_MODULES
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmSFTConfig, AgeVlmSFTTrainer

pytestmark = pytest.mark.slow

# The first step's rate is 0: nothing has moved in the first checkpoint.
SAVING = {
    "stage": "guide", "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, "warmup_steps": 1,
    "initial_gate": 0.5, "per_device_train_batch_size": 2,
}  # fmt: skip


def check_same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize("trainer", ["own", "sft"])
def test_a_resumed_run_ends_as_one_that_saves_whole_models(trainer, tmp_path):
    whole = train(tmp_path / "whole", "12t3", trainer=trainer, dropout=0.1, **SAVING)["weights"]
    straight = train(tmp_path / "delta", "12t3", trainer=trainer, dropout=0.1, save_trained_only=True, **SAVING)
    check_same(straight["weights"], whole)
    for step in (1, 2):
        resumed = train(
            tmp_path / "delta", "12t3", trainer=trainer, dropout=0.1, save_trained_only=True,
            resume=str(tmp_path / "delta" / f"checkpoint-{step}"), **SAVING,
        )  # fmt: skip
        check_same(resumed["weights"], whole)
    # A whole checkpoint is resumed with deltas, and a delta with whole checkpoints.
    for source, save_trained_only in (("whole", True), ("delta", False)):
        checkpoint = tmp_path / source / "checkpoint-2"
        resumed = train(
            tmp_path / "other", "12t3", trainer=trainer, dropout=0.1, save_trained_only=save_trained_only,
            resume=str(checkpoint), **SAVING,
        )  # fmt: skip
        check_same(resumed["weights"], whole)
    checkpoint = tmp_path / "delta" / "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists()
    before = start_model().state_dict()
    names = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert names == load_file(checkpoint / TRAINED_FILE).keys()
    model = start_model()
    load_trained_into(model, tmp_path / "delta" / "checkpoint-4")
    check_same(model.state_dict(), whole)


def test_preferences_are_trained_and_saved_so_too(tmp_path):
    args = AgeVlmDPOConfig(str(tmp_path), **{**SETTINGS, **SAVING, "max_steps": 1}, save_trained_only=True)
    trainer = AgeVlmDPOTrainer(
        start_model(), args=args, train_dataset=mixed_preferences("12"), processing_class=tiny_processor(),
        ref_model=start_model(),
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "checkpoint-1" / PARTS_FILE).is_file()


def test_the_best_checkpoint_is_loaded(tmp_path, monkeypatch):
    worse = iter([0.9, 0.5, 0.4, 0.3])
    evaluate = AgeVlmTrainer.evaluate

    def scripted(self, *args, **kwargs):
        return {**evaluate(self, *args, **kwargs), "eval_pointing_accuracy": next(worse)}

    monkeypatch.setattr(AgeVlmTrainer, "evaluate", scripted)
    trainer = make_trainer(
        start_model(), "12t3", tmp_path, **SAVING, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="pointing_accuracy", greater_is_better=True, save_trained_only=True,
    )  # fmt: skip
    trainer.train()
    best = load_file(tmp_path / "checkpoint-1" / TRAINED_FILE)
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in best.items())
    last = load_file(tmp_path / "checkpoint-4" / TRAINED_FILE)
    assert any(not torch.equal(best[name], value) for name, value in last.items() if "vision_tower" in name)
    save_model(trainer)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} >= {TRAINED_FILE, PARTS_FILE, "config.json"}
    assert not (tmp_path / "model.safetensors").exists()


def test_what_cannot_be_saved_so_is_refused_before_it_trains(tmp_path, monkeypatch):
    settings = {**SETTINGS, **SAVING, "stage": None, "initial_gate": None, "save_trained_only": True}
    with pytest.raises(ValueError, match="This is a PEFT model"):
        AgeVlmSFTTrainer(
            start_model(), AgeVlmSFTConfig(str(tmp_path), **settings), train_dataset=mixed_rows("12"),
            processing_class=tiny_processor(), peft_config=LoraConfig(r=2, target_modules=LORA_TARGET_MODULES),
        )  # fmt: skip
    unknown = start_model()
    del unknown.config.parts
    with pytest.raises(ValueError, match="does not say which parts"):
        make_trainer(unknown, "12", tmp_path, **SAVING, save_trained_only=True)
    prepare = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="save_trained_only needs the whole weights"):
        make_trainer(start_model(), "12", tmp_path, **SAVING, save_trained_only=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint made from parts in folders, the parts, and rows."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = tiny_processor().tokenizer
    tiny_llama(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    tiny_vision().save_pretrained(folder / "vision")
    build_checkpoint(str(folder / "text"), str(folder / "vision"), folder / "model", image_size=32)
    dataset(8).save_to_disk(folder / "rows")
    return folder


def recipe(start: Path, out: Path, **training) -> dict:
    stages = [
        {"name": "align", "training": {"stage": "align", "max_steps": 2, "initial_gate": 0.5}},
        {"name": "guide", "training": {"stage": "guide", "max_steps": 2}},
    ]
    common = {"learning_rate": 0.01, "report_to": "none", "save_strategy": "steps", "save_steps": 1}
    return {
        "model": str(start / "model"),
        "data": [{"path": str(start / "rows")}],
        "training": {"output_dir": str(out), **common, **training},
        "stages": stages,
    }


def run(values: dict, folder: Path, **kwargs) -> None:
    file = folder / "recipe.json"  # which is YAML as well
    file.write_text(json.dumps(values))
    recipes.train(file, **kwargs)


def test_the_stages_of_a_recipe_are_deltas(start, tmp_path):
    run(recipe(start, tmp_path / "whole"), tmp_path)
    values = recipe(start, tmp_path / "delta", save_trained_only=True)
    with pytest.raises(ValueError, match=r"the next stage cannot load the text model.*model_args.text_model"):
        run(values, tmp_path)
    assert not (tmp_path / "delta").exists()
    given = {"text_model": str(start / "text"), "vision_model": str(start / "vision")}
    values["model_args"] = given
    run(values, tmp_path)
    for stage in ("1_align", "2_guide"):
        whole = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole" / stage).state_dict()
        folder = tmp_path / "delta" / stage
        assert not list(folder.rglob("model.safetensors"))
        check_same(load_trained(folder, **given).state_dict(), whole)
    # The last stage again, resumed in the middle, with the parts at another place.
    for file in (folder / "config.json", *(folder / "checkpoint-2").iterdir()):
        file.unlink()
    (folder / "checkpoint-2").rmdir()
    moved = {}
    for name, path in given.items():
        moved[name] = str(shutil.copytree(path, tmp_path / name))
    run({**values, "model_args": moved}, tmp_path, resume=True)
    check_same(load_trained(folder, **moved).state_dict(), whole)
