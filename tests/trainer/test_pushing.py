# SPDX-License-Identifier: Apache-2.0
"""What the trainers push, through the real client to a stand-in of the Hub."""

import pytest
import transformers.utils.hub
from hub_server import HubServer, front_matter
from tiny_training import dataset, preferences, tiny_processor, tiny_trainable

from agevlm.hub_cards.push import push
from agevlm.trainer import (
    AgeVlmDPOConfig,
    AgeVlmDPOTrainer,
    AgeVlmSFTConfig,
    AgeVlmSFTTrainer,
    AgeVlmTrainer,
    AgeVlmTrainingArguments,
)  # fmt: skip

pytestmark = pytest.mark.slow

TRAINERS = {
    "own": (AgeVlmTrainer, AgeVlmTrainingArguments, dataset),
    "sft": (AgeVlmSFTTrainer, AgeVlmSFTConfig, dataset),
    "dpo": (AgeVlmDPOTrainer, AgeVlmDPOConfig, preferences),
}


@pytest.fixture
def trainer_hub(hub: HubServer, monkeypatch) -> HubServer:
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, for this Hub
    return hub


def pickles(files) -> list[str]:
    return [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_pushes_no_pickle(name, trainer_hub, tmp_path):
    trainer_class, config_class, data = TRAINERS[name]
    settings = {
        "hub_model_id": "me/mine",
        "max_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
    }
    args = config_class(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, **settings)
    trainer = trainer_class(
        model=tiny_trainable(), args=args, train_dataset=data(2), processing_class=tiny_processor(),
        **({"ref_model": tiny_trainable()} if name == "dpo" else {}),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    files = trainer_hub.head("me/mine")
    assert pickles(file.name for file in tmp_path.iterdir())  # there was one to leave out
    assert not pickles(files)
    assert not [path for path in files if path.startswith("checkpoint")]
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_agevlm.py"} <= set(files)
    assert front_matter(files["README.md"])["pipeline_tag"] == "image-text-to-text"
    assert push(tmp_path, "me/mine").repository == "exists"  # the command goes on with the same repository
    assert transformers.trainer.hf_api is transformers.utils.hub.hf_api


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_pushing_while_training(strategy, trainer_hub, tmp_path):
    """A checkpoint to resume from is whole where it was asked for; the model beside it has no pickle."""
    args = AgeVlmTrainingArguments(
        str(tmp_path), hub_model_id="me/mine", push_to_hub=True, hub_strategy=strategy, max_steps=1, save_strategy="steps",
        save_steps=1, report_to="none", per_device_train_batch_size=2, use_cpu=True,
    )  # fmt: skip
    trainer = AgeVlmTrainer(
        model=tiny_trainable(), args=args, train_dataset=dataset(2), processing_class=tiny_processor()
    )
    trainer.train()
    trainer._finish_current_push()
    files = set(trainer_hub.head("me/mine"))
    assert "model.safetensors" in files
    assert not pickles(path for path in files if "/" not in path)
    inside = {path for path in files if path.startswith("last-checkpoint/")}
    assert ("last-checkpoint/optimizer.pt" in inside) == (strategy == "checkpoint")
    assert inside in (set(), {f"last-checkpoint/{file.name}" for file in (tmp_path / "checkpoint-1").iterdir()})
