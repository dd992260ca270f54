# SPDX-License-Identifier: Apache-2.0
"""Heat maps of validation rows reach the trackers, and are those of the model that was evaluated."""

import numpy as np
import pytest
import torch
from figures import drawn_figures
from peft import LoraConfig, get_peft_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import dataset, tiny_processor, tiny_trainable
from transformers.integrations import TrackioCallback, WandbCallback

from agevlm import AgeVlmSFTConfig, AgeVlmSFTTrainer, AgeVlmTrainer, AgeVlmTrainingArguments
from agevlm.inference.replies import record_maps
from agevlm.trainer import heatmaps

pytestmark = pytest.mark.slow
QUIET = {"disable_tqdm": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}


def trainer(tmp_path, model=None, sft=False, eval_dataset=None, **args):
    settings = {"stage": "guide", "use_cpu": True, "per_device_train_batch_size": 2, **QUIET, **args}
    config, kind = (AgeVlmSFTConfig, AgeVlmSFTTrainer) if sft else (AgeVlmTrainingArguments, AgeVlmTrainer)
    return kind(
        model=model or tiny_trainable(),
        args=config(str(tmp_path / "out"), **settings),
        train_dataset=dataset(4),
        eval_dataset=eval_dataset if eval_dataset is not None else dataset(8),
        processing_class=tiny_processor(),
    )


def logged(tmp_path) -> dict[str, list[int]]:
    """By name of the images in TensorBoard's files the steps."""
    (file,) = (
        (tmp_path / "runs").rglob("events*") if (tmp_path / "runs").exists() else (tmp_path / "out").rglob("events*")
    )
    found = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}


@pytest.mark.parametrize("sft", [False, True])
def test_tensorboard_has_the_images_of_each_evaluation(tmp_path, sft):
    trainer(tmp_path, sft=sft, report_to="tensorboard", eval_heatmaps=1 + (not sft), max_steps=2 - sft).train()
    expected = {"eval/heatmap_0": [1]} if sft else {"eval/heatmap_0": [1, 2], "eval/heatmap_1": [1, 2]}
    assert logged(tmp_path) == expected


def test_figures_show_the_maps_of_the_evaluated_model(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    made: list = []
    draw = heatmaps.draw_heatmaps
    monkeypatch.setattr(heatmaps, "draw_heatmaps", lambda *args, **kw: (made.append((args, kw)), draw(*args, **kw)))
    data = dataset(8)
    run = trainer(tmp_path, report_to="tensorboard", eval_heatmaps=1, eval_dataset=data, max_steps=1)
    run.train()
    assert len(drawn) == 1
    (image, maps, titles, *_), options = made[0]
    row = data[0]
    assert image.size == row["images"][0].size
    assert options["labels"] == ["brown dog", "dog"]
    assert titles[0] == "mask"
    assert titles[-1] == "average"
    assert maps.shape[:2] == (2, 2 + 4)
    # By other means: all tokens of the row, read by the trained model.
    batch = run.data_collator([row])
    with record_maps(run.model) as recorded, torch.no_grad():
        run.model.eval()(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}
        )
    for number, query in enumerate(batch["map_queries"][0]):
        expected = recorded[0][:, 0, query].mean(1).unflatten(-1, (4, 4))
        rows, columns = maps.shape[-2:]
        np.testing.assert_allclose(maps[number, 1:-1], expected[:, :rows, :columns], atol=1e-5)
        np.testing.assert_allclose(maps[number, -1], expected.mean(0)[:rows, :columns], atol=1e-5)
        target = batch["map_targets"][0, number].unflatten(-1, (4, 4))
        np.testing.assert_allclose(maps[number, 0], (target / target.sum())[:rows, :columns], atol=1e-5)


def test_a_model_with_lora(tmp_path):
    model = get_peft_model(tiny_trainable(), LoraConfig(target_modules=["q_proj"]))
    run = trainer(tmp_path, model, report_to="tensorboard", eval_heatmaps=1, stage=None, max_steps=1)
    run.train()
    assert logged(tmp_path) == {"eval/heatmap_0": [1]}


def test_several_data_sets_have_names_of_their_own(tmp_path):
    run = trainer(
        tmp_path,
        report_to="tensorboard",
        eval_heatmaps=1,
        max_steps=1,
        eval_dataset={"a": dataset(4), "b": dataset(4)},
    )
    run.train()
    assert logged(tmp_path) == {"eval_a/heatmap_0": [1], "eval_b/heatmap_0": [1]}


@pytest.mark.parametrize("settings", [{"eval_heatmaps": 0}, {"guidance_weight": 0.0}, {"report_to": "none"}])
def test_nothing_is_drawn_that_nobody_asked_for(tmp_path, monkeypatch, settings):
    drawn = drawn_figures(monkeypatch)
    trainer(tmp_path, **{"report_to": "tensorboard", "max_steps": 1, **settings}).train()
    assert not drawn


def test_without_matplotlib_training_goes_on(tmp_path, monkeypatch):
    def draw(*args, **kwargs):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(heatmaps, "draw_heatmaps", draw)
    run = trainer(tmp_path, report_to="tensorboard", max_steps=1)
    assert run.train().global_step == 1
    assert logged(tmp_path) == {}


def test_trackio_and_wandb_get_the_file(tmp_path):
    """By their own classes of images; what they do with them is theirs."""
    Image.new("RGB", (9, 7), "red").save(tmp_path / "0.png")
    for kind, module in ((TrackioCallback, "_trackio"), (WandbCallback, "_wandb")):
        callback = kind()
        library, sent = getattr(callback, module), []

        class Recorder:
            Image = staticmethod(library.Image)
            log = staticmethod(sent.append)

        setattr(callback, module, Recorder)
        heatmaps._log_image(callback, "eval/heatmap_0", str(tmp_path / "0.png"), 3)
        assert sent == []  # no run has begun
        callback._initialized = True
        heatmaps._log_image(callback, "eval/heatmap_0", str(tmp_path / "0.png"), 3)
        (entry,) = sent
        assert entry["train/global_step"] == 3
        assert isinstance(entry["eval/heatmap_0"], library.Image)


def test_arguments():
    with pytest.raises(ValueError, match="eval_heatmaps"):
        AgeVlmTrainingArguments("out", eval_heatmaps=-1)
