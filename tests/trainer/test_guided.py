# SPDX-License-Identifier: Apache-2.0
"""Guidance of other architectures than AGE-VLM's: tiny models learn to point, with Transformers' trainer and with TRL's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from pointing_rows import pointing_rows
from tiny_processors import tiny_processor
from tiny_vlms import CONFIGURATIONS, tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor

from agevlm.attention import GuidedDataCollator, attention_maps, pointing_hits
from agevlm.trainer import GuidedSFTConfig, GuidedSFTTrainer, GuidedTrainer, GuidedTrainingArguments

pytestmark = pytest.mark.slow

ROWS = 24
SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"


def train(kind: str, trainer: str, output_dir, steps: int = 60, model=None, **settings):
    processor = tiny_processor(kind)
    model = tiny_vlm(kind, processor=processor) if model is None else model
    trainer_class, arguments = {
        "trainer": (GuidedTrainer, GuidedTrainingArguments),
        "sft": (GuidedSFTTrainer, GuidedSFTConfig),
    }[trainer]
    settings = {
        "per_device_train_batch_size": 8, "max_steps": steps, "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        "logging_steps": 10, "report_to": [], "save_strategy": "no", "guidance_loss": "kl", "use_cpu": True,
        "disable_tqdm": True, "assistant_only_loss": True, **settings,
    }  # fmt: skip
    run = trainer_class(
        model, arguments(str(output_dir), **settings), processing_class=processor, train_dataset=pointing_rows(ROWS)
    )
    run.train()
    return run, processor


@torch.no_grad()
def pointing(model, processor) -> float:
    """The share of phrases whose strongest token is the object's, as a mean over layers."""
    batch = GuidedDataCollator(processor)(list(pointing_rows(ROWS)))
    targets, queries = batch.pop("map_targets"), batch.pop("map_queries")
    batch.pop("num_dropped_phrases")
    model.eval()
    with attention_maps(model, queries) as found:
        model(**batch)
    return float(pointing_hits(found.maps, targets).float().mean())


@pytest.mark.parametrize("trainer", ["trainer", pytest.param("sft", marks=pytest.mark.minutes)])
def test_a_guided_model_points_and_an_unguided_one_does_not(trainer, tmp_path):
    guided, processor = train("llava", trainer, tmp_path / "guided", steps=150)
    unguided, _ = train("llava", trainer, tmp_path / "unguided", steps=150, guidance_weight=0.0)
    assert pointing(guided.model, processor) == 1.0
    # Its object is one cell of 16. Words of the question tell nothing else of the place.
    assert pointing(unguided.model, processor) < 0.5
    losses = [run.state.log_history[-2]["lm_loss"] for run in (guided, unguided)]
    assert max(losses) < 0.1, losses
    assert "guidance_loss" not in unguided.state.log_history[-2]


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_every_architecture_is_guided(kind, tmp_path):
    """In a few steps the guidance loss falls by a fifth or more."""
    run, _ = train(kind, "trainer", tmp_path, steps=20, logging_steps=2)
    losses = [log["guidance_loss"] for log in run.state.log_history if "guidance_loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    assert all(log["dropped_phrases"] == 0 for log in run.state.log_history if "dropped_phrases" in log)


def test_lora_is_guided_and_what_is_saved_loads_without_it(tmp_path):
    processor = tiny_processor("llava")
    model = tiny_vlm("llava", processor=processor)
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"], r=4))
    before = {name: p.detach().clone() for name, p in peft.named_parameters() if not p.requires_grad}
    run, _ = train("llava", "trainer", tmp_path / "lora", steps=20, model=peft, learning_rate=1e-2)
    losses = [log["guidance_loss"] for log in run.state.log_history if "guidance_loss" in log]
    assert losses[-1] < losses[0]
    for name, parameter in peft.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    run.save_model(tmp_path / "saved")
    merged = peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert again.config.get_text_config()._attn_implementation == "sdpa"
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is type(processor)


@pytest.mark.minutes
@pytest.mark.parametrize("flags", ["", "--use_peft --lora_target_modules q_proj k_proj"])
def test_the_script(flags, tmp_path):
    processor = tiny_processor("smolvlm")
    for part in (tiny_vlm("smolvlm", processor=processor), processor):
        part.save_pretrained(tmp_path / "model")
    DatasetDict(train=pointing_rows(8)).save_to_disk(tmp_path / "data")
    common = "--assistant_only_loss --max_steps 2 --use_cpu --bf16 false --logging_steps 1 --report_to none"
    done = subprocess.run(
        [
            sys.executable, str(SCRIPTS / "sft_guided.py"), "--model_name_or_path", str(tmp_path / "model"),
            "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), *common.split(), *flags.split(),
        ],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'guidance_loss'" in done.stdout + done.stderr
    assert (tmp_path / "out" / "adapter_config.json").exists() == bool(flags)
    # In a process that cannot import agevlm.
    code = (
        "import sys; sys.modules['agevlm'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"AutoProcessor.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(type(model).__name__)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert loaded.stdout.split()[-1] == "SmolVLMForConditionalGeneration", loaded.stderr[-2000:]


def test_a_model_without_places_is_refused(tmp_path):
    class Resampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.Parameter(torch.zeros(4, 8))

    model = tiny_vlm("llava", processor=tiny_processor("llava"))
    model.model.resampler = Resampler()
    with pytest.raises(ValueError, match="no place in it"):
        train("llava", "trainer", tmp_path, model=model)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reentrant.*use_reentrant"):
        train(
            "llava", "trainer", tmp_path, steps=1,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
