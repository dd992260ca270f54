# SPDX-License-Identifier: Apache-2.0
"""TRL's own trainers on rows with different numbers of images: each row is scored with its images and their sizes."""

import pytest
import torch
from datasets import Dataset, Image, List
from tiny_training import row, tiny_processor, tiny_trainable
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from agevlm import AgeVlmForConditionalGeneration
from agevlm.trainer.stages import freeze

pytestmark = pytest.mark.slow

PLAIN = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
PLAIN |= {"disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}


def with_images(number: int) -> Dataset:
    """Prompts with one, two and no image in turn, each of another size."""
    examples = []
    for i in range(number):
        shown = [row(3 * i + j)["images"][0].resize((20 + 4 * i, 40 - 8 * j)) for j in range((1, 2, 0)[i % 3])]
        examples.append({"prompt": [{"role": "user", "content": f"What is it{'?' * (i + 1)}"}], "images": shown})
    return Dataset.from_list(examples).cast_column("images", List(Image()))


def any_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def log_probabilities(model, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Of all but the first token of a text `(1, S)`, through the whole logits."""
    logits = model(input_ids=ids, **inputs).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "settings"),
    [
        # Scored in parts of 2 rows: by the policy, the policy before the steps, and the reference.
        (GRPOTrainer, GRPOConfig, {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 3}),
        (RLOOTrainer, RLOOConfig, {"beta": 0.1, "steps_per_generation": 3}),
    ],
)
def test_a_row_with_several_images_is_scored_as_it_is_alone(tmp_path, trainer_class, config_class, settings):
    tiny_trainable().save_pretrained(tmp_path / "model")  # where TRL finds the reference model
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "model")
    data, processor = with_images(3), tiny_processor()
    freeze(model, "instruct")
    settings = {
        **PLAIN, **settings, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "num_generations": 2, "max_completion_length": 4,
    }  # fmt: skip
    trainer = trainer_class(
        model=model, args=config_class(str(tmp_path), **settings), train_dataset=data, processing_class=processor,
        reward_funcs=any_reward,
    )  # fmt: skip
    questions = {
        tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"]): (text, images)
        for text, images in zip(map(render, data["prompt"], data["images"]), data["images"], strict=True)
    }
    score, found = trainer._get_per_token_logps_and_entropies, []

    def check(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        scored = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        for ids, mask, actual in zip(input_ids, attention_mask, scored[0], strict=True):
            prompt = tuple(ids[:-logits_to_keep][mask[:-logits_to_keep].bool()].tolist())
            text, images = questions[prompt]
            inputs = dict(processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt"))
            assert inputs["input_ids"][0].tolist() == list(prompt)
            completion = ids[-logits_to_keep:][mask[-logits_to_keep:].bool()]
            alone = torch.cat([inputs.pop("input_ids"), completion[None]], dim=1)
            del inputs["attention_mask"]
            with torch.no_grad():
                expected = log_probabilities(model, alone, **inputs)[0, len(prompt) - 1 :]
            torch.testing.assert_close(actual.detach()[: len(completion)], expected, atol=1e-5, rtol=0)
            found.append(len(images))
        return scored

    trainer._get_per_token_logps_and_entropies = check
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "cross_attn" in name}
    trainer.train()
    assert trainer.state.global_step == 3
    assert set(found) == {0, 1, 2}
    assert len(found) > 3 * 6, "more than the policy is scored"
    assert all(not torch.equal(p, model.get_parameter(name)) for name, p in before.items())


def render(prompt: list[dict], images: list) -> str:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt[0]["content"]}]
    return tiny_processor().apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


def test_kto_trains_on_rows_with_different_numbers_of_images(tmp_path):
    """TRL's trainer of single judgments, whose pairs for the KL term read the same images with another answer."""
    examples = [
        {**example, "completion": [{"role": "assistant", "content": "A dog."}], "label": i % 2 == 0}
        for i, example in enumerate(with_images(4))
    ]
    data = Dataset.from_list(examples).cast_column("images", List(Image()))
    model, seen = tiny_trainable(), []
    freeze(model, "instruct")
    model.model.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    settings = {**PLAIN, "max_steps": 2, "per_device_train_batch_size": 4}
    KTOTrainer(
        model=model, ref_model=tiny_trainable(), args=KTOConfig(str(tmp_path), **settings), train_dataset=data,
        processing_class=tiny_processor(),
    ).train()  # fmt: skip
    assert seen
    for inputs in seen:
        images = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert images == len(inputs["pixel_values"]) == len(inputs["image_sizes"]) == 4
