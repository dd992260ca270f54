# SPDX-License-Identifier: Apache-2.0
"""What a step costs: FLOPs against formulas, memory against what was measured on a GPU and what a training here takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import row, tiny_processor, tiny_trainable
from torch.profiler import ProfilerActivity, profile
from training_runs import SETTINGS

from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmTrainer, AgeVlmTrainingArguments
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.rows import row_features
from agevlm.trainer.estimate import GPU_TFLOPS, UTILIZATION, BatchShape, estimate_step

pytestmark = pytest.mark.slow

GIB = 2**30
# The Llama of age-vlm-1b.
WIDTH, FFN, LAYERS, KEYS, VOCABULARY, VISION_WIDTH, VISUAL = 2048, 8192, 16, 512, 128256, 1536, 576
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * FFN
FIRST_BLOCK = 2  # it precedes this layer
BATCH = BatchShape(rows=8, tokens=256, learned=256, images=8)  # of benchmarks/guidance.py on an H100


def arguments(stage, **settings):
    return AgeVlmTrainingArguments("unused", stage=stage, use_cpu=True, report_to="none", **settings)


def estimate(stage, batch, stored_features=True, devices=1, layers=LAYERS, **settings):
    options = {"image_size": (768, 768), "dtype": torch.bfloat16, "stored_features": stored_features}
    config = AgeVlmConfig(text_config={"num_hidden_layers": layers})
    return estimate_step(config, arguments(stage, bf16=True, **settings), batch, devices=devices, **options)


@pytest.fixture(scope="module")
def aligned():
    return estimate("align", BATCH)


@pytest.fixture(scope="module")
def sizes():
    """The number of weights by name."""
    with torch.device("meta"):
        model = AgeVlmForConditionalGeneration(AgeVlmConfig())
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_flops_of_frozen_layers_are_those_of_the_formulas(aligned):
    """A weight takes 2 FLOPs a token in forward, 2 for the gradient of its input and 2 for its own: a frozen one has not the last, and
    layers before the first block have neither."""
    rows, length, learned, images = BATCH.rows, BATCH.tokens, BATCH.learned, BATCH.images
    tokens, seen = rows * length, images * VISUAL
    after = LAYERS - FIRST_BLOCK
    attention = 4 * rows * length * length * WIDTH
    llama = 2 * LAYER * tokens * (LAYERS + after) + attention * (
        LAYERS + 2.5 * after
    )  # attention is computed again in backward
    blocks = 4 * 3 * 2 * (2 * WIDTH * WIDTH * tokens + 2 * WIDTH * KEYS * seen) + 4 * 3.5 * 4 * tokens * VISUAL * WIDTH
    head = 2 * 2 * VOCABULARY * WIDTH * rows * learned
    adapter = 2 * seen * (2 * VISION_WIDTH * WIDTH + 3 * WIDTH * WIDTH)
    assert aligned.flops == pytest.approx(llama + blocks + head + adapter, rel=0.02)
    assert aligned.visual_tokens == VISUAL


def test_flops_of_a_full_training_are_six_a_weight_and_token():
    rows, length, learned, layers = 8, 128, 127, 4
    tokens = rows * length
    attention = 3.5 * 4 * rows * length * length * WIDTH * layers
    expected = 6 * LAYER * layers * tokens + 6 * VOCABULARY * WIDTH * rows * learned + attention
    expected += 4 * 6 * 2 * WIDTH * WIDTH * tokens  # the blocks run in texts without images too
    cost = estimate("full", BatchShape(rows, length, learned, 0), layers=layers)
    assert cost.flops == pytest.approx(expected, rel=0.03)


def test_what_trains_and_what_is_kept_costs(aligned, sizes):
    numbers = sum(size for name, size in sizes.items() if "multi_modal_projector" in name or "cross_attn" in name)
    assert aligned.gradients == 4 * numbers
    assert aligned.weights["float32"] == pytest.approx(4 * numbers, rel=0.01)
    adapted = estimate("adapt_vision", BATCH, stored_features=False)
    again = estimate(
        "adapt_vision", BATCH, stored_features=False, devices=2, activation_checkpointing=True, optim="muon"
    )
    assert aligned.flops < adapted.flops < again.flops
    assert aligned.activations < adapted.activations
    assert again.activations < 0.9 * adapted.activations
    assert again.buckets == again.gradients
    assert adapted.buckets == 0
    # AdamW has two numbers beside each gradient, Muon one beside those of matrices.
    assert adapted.optimizer == 2 * adapted.gradients
    assert again.optimizer == pytest.approx(again.gradients, rel=0.01)


def test_it_agrees_with_what_was_measured_on_a_gpu(aligned, sizes):
    """benchmarks/guidance.py on an H100: without a tower and an optimizer, all positions learned."""
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks" / "results" / "guidance_h100.json").read_text())
    setting, step = measured["setting"], measured["results"]["unguided (SDPA)"]
    assert (setting["batch_size"], setting["text_tokens"], setting["layers"]) == (BATCH.rows, BATCH.tokens, LAYERS)
    tower = 2 * sum(size for name, size in sizes.items() if "vision_tower" in name)
    assert aligned.memory - aligned.optimizer - tower == pytest.approx(step["peak_bytes"], rel=0.1)
    # Small steps wait for the launches of kernels; of whole steps with the tower, larger ones, docs/training.md tells.
    assert 0.5 * UTILIZATION < aligned.flops / step["seconds"]["median"] / (GPU_TFLOPS * 1e12) < 1.5 * UTILIZATION


def test_memory_is_about_what_a_training_here_takes(tmp_path):
    """Every byte that PyTorch's allocator reports to the profiler, and the weights."""
    llama = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    model, processor = tiny_trainable(llama=llama), tiny_processor()
    rows = Dataset.from_list([row(1)] * 16, features=row_features())
    settings = {**SETTINGS, "stage": "full", "per_device_train_batch_size": 8, "max_steps": 2, "guidance_weight": 0}
    args = AgeVlmTrainingArguments(str(tmp_path), **settings)
    batch = AgeVlmDataCollator(processor)([row(1)] * 8)
    learned = int((batch["labels"][0] != -100).sum())
    shape = BatchShape(8, batch["input_ids"].shape[1], learned, 8)
    config = AgeVlmConfig.from_dict(model.config.to_dict())
    trainer = AgeVlmTrainer(model, args, train_dataset=rows, processing_class=processor)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    weights = sum(p.nbytes for p in model.parameters())
    peak = weights + int(np.cumsum(changes).max())
    found = estimate_step(config, args, shape, image_size=(32, 32))
    assert sum(found.weights.values()) == pytest.approx(weights, rel=0.01)
    assert found.memory == pytest.approx(peak, rel=0.25)
