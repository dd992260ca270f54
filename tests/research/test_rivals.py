# SPDX-License-Identifier: Apache-2.0
"""The concatenating model that AGE-VLM is measured against: Llava from the same parts."""

import pytest
import torch
from tiny import IMAGE, tiny_tokenizer
from tiny_models import tiny_llama, tiny_vision

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.data.features import image_features
from agevlm.evaluation.scenes import render_question
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.trainer import visual_grid
from research.rivals import (
    ConcatenationForConditionalGeneration,
    ConcatenationProcessor,
    ConcatenationTrainer,
    expand_image_tokens,
)

SIZE = 32  # pixels; the tiny tower makes 4x4 tokens of them


@pytest.fixture
def parts():
    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    torch.manual_seed(0)
    llama = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    age_vlm = from_parts(llama, tiny_vision(), image_token_id=processor.image_token_id, visual_position_embedding=True)
    return ConcatenationForConditionalGeneration.from_age_vlm(age_vlm), processor, llama


def picture(seed: int = 0):
    from PIL import Image

    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def test_text_alone_is_the_llamas(parts):
    model, processor, llama = parts
    inputs = processor.tokenizer("What is the capital of France?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, llama(**inputs).logits)


@torch.no_grad()
def test_an_image_is_as_many_tokens_as_the_tower_gives_and_changes_the_answer(parts):
    model, processor, _ = parts
    reader = ConcatenationProcessor.from_age_vlm(processor, 16)
    text = render_question(processor, "What is in this image?")
    one, other = (reader(images=picture(seed), text=text, return_tensors="pt") for seed in (0, 1))
    assert (one["input_ids"] == processor.image_token_id).sum() == 16
    assert not torch.allclose(model(**one).logits[0, -1], model(**other).logits[0, -1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_image_tokens_are_repeated_and_rows_padded_again(side):
    image, pad = 7, 0
    if side == "right":
        ids, mask = [[5, image, 6, 8], [9, 9, 9, pad]], [[1, 1, 1, 1], [1, 1, 1, 0]]
        expected = [[5, 7, 7, 7, 6, 8], [9, 9, 9, 0, 0, 0]], [[1] * 6, [1, 1, 1, 0, 0, 0]]
        labels = [[-100, -100, -100, -100, 6, 8], [9, 9, 9, -100, -100, -100]]
    else:
        ids, mask = [[5, image, 6, 8], [pad, 9, 9, 9]], [[1, 1, 1, 1], [0, 1, 1, 1]]
        expected = [[5, 7, 7, 7, 6, 8], [0, 0, 0, 9, 9, 9]], [[1] * 6, [0, 0, 0, 1, 1, 1]]
        labels = [[-100, -100, -100, -100, 6, 8], [-100, -100, -100, 9, 9, 9]]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    learnt = torch.tensor([[-100, -100, 6, 8], [-100, 9, 9, 9] if side == "left" else [9, 9, 9, -100]])
    found = expand_image_tokens({**batch, "labels": learnt, "other": 1}, image, 3, side)
    assert found["input_ids"].tolist() == expected[0]
    assert found["attention_mask"].tolist() == expected[1]
    assert found["labels"].tolist() == labels
    assert found["other"] == 1


@torch.no_grad()
def test_ready_made_features_are_as_good_as_pixels(parts):
    model, processor, _ = parts
    reader = ConcatenationProcessor.from_age_vlm(processor, 16)
    inputs = dict(reader(images=picture(), text=render_question(processor, "What is it?"), return_tensors="pt"))
    features = image_features(model, processor, [picture()])
    features.pooler_output = None
    expected = model(**inputs).logits
    inputs.pop("pixel_values")
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


@torch.no_grad()
def test_it_saves_and_loads(parts, tmp_path):
    model, processor, _ = parts
    inputs = ConcatenationProcessor.from_age_vlm(processor, 16)(
        images=picture(), text=render_question(processor, "What is it?"), return_tensors="pt"
    )
    model.save_pretrained(tmp_path)
    loaded = ConcatenationForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("stage", "parts_that_train"), [("align", 1), ("adapt_vision", 2)])
def test_its_trainer_trains_the_adapter_and_then_the_last_block_of_the_tower(parts, tmp_path, stage, parts_that_train):
    model, processor, _ = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = processor.tokenizer(render_question(processor, "What is it?"), return_tensors="pt", add_special_tokens=False)
    pixels = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    row = {**ids, "labels": ids["input_ids"].clone(), "pixel_values": pixels}
    trainer = ConcatenationTrainer(
        model=model,
        args=AgeVlmTrainingArguments(
            output_dir=str(tmp_path),
            stage=stage,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[row, row],
        data_collator=lambda rows: rows[0],
        processing_class=processor,
    )
    assert visual_grid(model, processor) == (4, 4)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    prefixes = {".".join(name.split(".")[:2]) for name in changed}
    assert (
        prefixes == {"model.multi_modal_projector", "model.vision_tower"}
        if parts_that_train == 2
        else {"model.multi_modal_projector"}
    )
    tower = [name for name in changed if "vision_tower" in name]
    assert bool(tower) == (parts_that_train == 2)
    assert not any(".0." in name.split("stages")[-1][:3] for name in tower)
