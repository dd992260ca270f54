# SPDX-License-Identifier: Apache-2.0
"""The concatenating model that AGE-VLM is compared with: Llava from the same parts."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import IMAGE_SIZE, tiny_llama, tiny_vision
from tiny_training import dataset, picture, row, tiny_processor

from agevlm import AgeVlmTrainingArguments, from_parts, row_features
from agevlm.data import compute_features
from agevlm.evaluation import Question, answer, measure_similarity
from agevlm.inference.generation import render_question
from research.rivals import (
    ConcatenationForConditionalGeneration,
    ConcatenationProcessor,
    ConcatenationTrainer,
    expand_image_tokens,
    tokens_per_image,
)


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture
def llama(processor):
    return tiny_llama(vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id)


@pytest.fixture
def age_vlm(processor, llama):
    """The tiny tower makes 4x4 tokens of an image."""
    torch.manual_seed(0)
    return from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id, visual_position_embedding=True)


@pytest.fixture
def model(age_vlm):
    return ConcatenationForConditionalGeneration.from_age_vlm(age_vlm)


def image(seed: int = 0):
    return picture(np.random.default_rng(seed), IMAGE_SIZE, IMAGE_SIZE)[0]


def read(model, processor, seed: int = 0) -> dict:
    text = render_question(processor, "What is in this image?")
    return dict(
        ConcatenationProcessor.from_age_vlm(processor, model)(images=image(seed), text=text, return_tensors="pt")
    )


@torch.no_grad()
def test_text_alone_is_the_llamas(model, processor, llama):
    inputs = processor.tokenizer("What is the capital of France?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, llama(**inputs).logits)


@pytest.mark.parametrize(("pooling", "tokens"), [(1, 16), (2, 4), (3, 4)])
@torch.no_grad()
def test_an_image_is_as_many_tokens_as_squares_and_changes_the_answer(age_vlm, processor, pooling, tokens):
    model = ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, pooling)
    one, other = read(model, processor), read(model, processor, seed=1)
    assert (one["input_ids"] == processor.image_token_id).sum() == tokens
    assert not torch.allclose(model(**one).logits[0, -1], model(**other).logits[0, -1])


@torch.no_grad()
def test_tokens_are_averaged_over_squares_before_the_adapter(age_vlm):
    model = ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, 2).model
    tokens = torch.randn(2, 15, 12)
    grid = tokens.reshape(2, 3, 5, 12)
    squares = [grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for row in range(2) for column in range(3)]
    expected = model.multi_modal_projector(torch.stack([square.mean((1, 2)) for square in squares], 1), (2, 3))
    torch.testing.assert_close(model.project_vision_tokens(tokens, (3, 5)), expected)


def test_image_tokens_are_repeated_and_rows_padded_again():
    image, pad = 7, 0
    batch = {
        "input_ids": torch.tensor([[5, image, 6, 8], [9, 9, 9, pad]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 6, 8], [9, 9, 9, -100]]),
        "other": 1,
    }
    found = expand_image_tokens(batch, image, 3)
    assert found["input_ids"].tolist() == [[5, 7, 7, 7, 6, 8], [9, 9, 9, 0, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert found["labels"].tolist() == [[-100, -100, -100, -100, 6, 8], [9, 9, 9, -100, -100, -100]]
    assert found["other"] == 1


@torch.no_grad()
def test_features_of_the_tower_give_what_pixels_give(age_vlm, processor, tmp_path):
    model = ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, 2)
    rows = dataset(4)
    store = compute_features(age_vlm, processor, [rows], tmp_path, progress=False)
    pixels = processor.image_processor(rows[0]["images"], return_tensors="pt")["pixel_values"]
    inputs = read(model, processor)
    inputs.pop("pixel_values")
    expected = model(**inputs, pixel_values=pixels).logits
    features = store(rows[0]["images"])
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


@torch.no_grad()
def test_it_saves_and_loads(age_vlm, processor, tmp_path):
    model = ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, 2)
    inputs = read(model, processor)
    model.save_pretrained(tmp_path)
    loaded = ConcatenationForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_the_evaluation_asks_it_as_any_other_model(model, processor):
    reader = ConcatenationProcessor.from_age_vlm(processor, model)
    questions = [Question(str(seed), lambda seed=seed: image(seed), "What is it?") for seed in range(2)]
    answers = answer(model, reader, questions, max_new_tokens=4, progress=None)
    text = render_question(processor, "What is it?")
    for seed in range(2):
        inputs = reader(images=image(seed), text=text, add_special_tokens=False, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[str(seed)]["answer"] == processor.decode(tokens, skip_special_tokens=True).strip()
    rows = Dataset.from_list([row(index) for index in range(4)], features=row_features())
    found = measure_similarity(model, reader, rows, progress=None)
    assert (found.matching < 1).all()  # the image is seen
    assert (found.matching != found.random).any()


def arguments(folder, **kwargs):
    settings = {"stage": ["adapter", "cross_attention"], "max_steps": 2, "per_device_train_batch_size": 2, "seed": 0}
    settings |= {
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return AgeVlmTrainingArguments(str(folder), **{**settings, **kwargs}, report_to="none")


def test_its_trainer_trains_the_adapter_alone(model, processor, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = ConcatenationTrainer(
        model=model, args=arguments(tmp_path), train_dataset=dataset(4), processing_class=processor
    )
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_its_trainer_learns_the_same_from_features_as_from_pixels(processor, tmp_path):
    losses = []
    for ready in (False, True):
        torch.manual_seed(0)
        llama = tiny_llama(vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id)
        age_vlm = from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id)
        rows = dataset(8)
        features = {}
        if ready:
            features["features"] = compute_features(age_vlm, processor, [rows], tmp_path / "features", progress=False)
        trainer = ConcatenationTrainer(
            model=ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, 2),
            args=arguments(tmp_path, max_steps=3),
            train_dataset=rows,
            processing_class=processor,
            **features,
        )
        trainer.train()
        losses.append([entry["lm_loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_its_trainer_refuses_stages_that_train_the_tower(model, processor, tmp_path):
    args = arguments(tmp_path, stage="adapt_vision")
    with pytest.raises(ValueError, match="the stage trains vision_last_block"):
        ConcatenationTrainer(model=model, args=args, train_dataset=dataset(4), processing_class=processor)


def test_tokens_per_image(age_vlm, processor):
    for pooling, expected in ((1, 16), (2, 4), (4, 1)):
        model = ConcatenationForConditionalGeneration.from_age_vlm(age_vlm, pooling)
        assert tokens_per_image(model, processor) == expected
