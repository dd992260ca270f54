# SPDX-License-Identifier: Apache-2.0
"""A frozen vision tower keeps the statistics of its batch norms, whoever calls `model.train()`."""

import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig, get_peft_model
from tiny_models import open_gates, tiny_llama
from tiny_training import row, tiny_processor
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperModel
from trl import GRPOConfig, GRPOTrainer

from agevlm import from_parts
from agevlm.trainer.stages import LORA_TARGET_MODULES, freeze, lora_modules_to_save

pytestmark = pytest.mark.slow


def frozen_in(stage: str, lora: bool) -> nn.Module:
    """A model whose tower has batch norms, and is frozen but for its last block in the stage `guide`."""
    torch.manual_seed(0)
    processor = tiny_processor()
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False)).eval()
    llama = tiny_llama(vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id)
    model = open_gates(from_parts(llama, tower, image_token_id=processor.image_token_id))
    if not lora:
        freeze(model, stage)
        return model
    modules = lora_modules_to_save(model.config)
    return get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, modules_to_save=modules))


def run_grpo(model: nn.Module, folder) -> None:
    prompt = [{"role": "user", "content": "What is it?"}]
    data = Dataset.from_list([{"prompt": prompt, "image": row(i)["images"][0]} for i in range(2)])
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(str(folder), **settings),
        train_dataset=data.cast_column("image", Image()),
        reward_funcs=lambda completion_ids, **kwargs: [float(ids[0] % 7) for ids in completion_ids],
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert trainer.model.training


def run_loop(model: nn.Module, folder) -> None:
    image_token_id = tiny_processor().image_token_id
    ids = torch.tensor([[5, image_token_id, 7, 8]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(2):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        model.train(step == 0)


@pytest.mark.parametrize("run", [run_grpo, run_loop])
@pytest.mark.parametrize(("stage", "lora"), [("align", False), ("guide", False), ("align", True)])
def test_no_buffer_changes(run, stage, lora, tmp_path):
    model = frozen_in(stage, lora)
    (tower,) = (module for module in model.modules() if isinstance(module, TimmWrapperModel))
    buffers = {name: value.clone() for name, value in tower.named_buffers()}
    assert sum(name.endswith("running_mean") for name in buffers) > 5
    weights = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    run(model, tmp_path)
    for name, value in tower.named_buffers():
        assert torch.equal(value, buffers[name]), name
    adapter = {n: value for n, value in model.named_parameters() if n in weights and "multi_modal_projector" in n}
    assert any(not torch.equal(value, weights[name]) for name, value in adapter.items()), "images were read"

    tower.train()(torch.randn(2, 3, 64, 64))
    assert any(not torch.equal(value, buffers[name]) for name, value in tower.named_buffers()), "what would happen"
