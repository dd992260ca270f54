# SPDX-License-Identifier: Apache-2.0
"""Tiny rows, processor and model for training: each image has one bright square, which the conversation names."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tiny import IMAGE, tiny_tokenizer
from tiny_models import IMAGE_SIZE, tiny_age_vlm

from agevlm import AgeVlmForConditionalGeneration, AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.processing.grounding import mask_to_rle, row_features
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE, add_image_support

WORDS = ("dog", "cat", "sofa", "image")


def tiny_processor() -> AgeVlmProcessor:
    tokenizer = tiny_tokenizer()
    return AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        image_token=IMAGE,
        chat_template=add_image_support(DEFAULT_CHAT_TEMPLATE, IMAGE),
    )


def tiny_trainable(seed: int = 0, gate: float = 1.0, **kwargs) -> AgeVlmForConditionalGeneration:
    """A model that fits `tiny_processor`, with 4x4 visual tokens an image."""
    processor = tiny_processor()
    llama = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    return tiny_age_vlm(gate, seed, llama=llama, image_token_id=processor.image_token_id, **kwargs)


def picture(rng: np.random.Generator, height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """An image with one bright rectangle, and the rectangle's mask."""
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + height // 2, left : left + width // 2] = True
    pixels[mask] = rng.integers(150, 255, 3, dtype=np.uint8)
    return Image.fromarray(pixels), mask


def entry(message: int, text: str, word: str, image: int, mask: np.ndarray | None, box: list | None = None) -> dict:
    """Grounding of the first place in `text` that reads `word`."""
    start = text.index(word)
    rle = None if mask is None else mask_to_rle(mask)
    return {
        "message": message, "start": start, "end": start + len(word), "image": image,
        "box": box, "mask": rle, "score": None,
    }  # fmt: skip


def row(index: int, num_images: int = 1) -> dict:
    """Two turns about `num_images` images, with a phrase of the question and one of the answer grounded in each image."""
    rng = np.random.default_rng(index)
    pictures = [picture(rng, 24 + 8 * (index % 3), 40) for _ in range(num_images)]
    word = WORDS[index % len(WORDS)]
    question, answer = f"What is the brown {word}?", f"There is a {word} in this image{', please' * (index % 4)}."
    content = [{"type": "image", "text": None}] * num_images + [{"type": "text", "text": question}]
    grounding = []
    for j, (_, mask) in enumerate(pictures):
        grounding += [entry(0, question, f"brown {word}", j, mask), entry(1, answer, word, j, mask)]
    return {
        "images": [image for image, _ in pictures],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "grounding": grounding,
    }


def rows(number: int) -> list[dict]:
    """Rows with one, no and two images in turn; rows 3, 7, … have no grounding."""
    made = [row(i, (1, 0, 2, 1)[i % 4]) for i in range(number)]
    for ungrounded in made[3::4]:
        ungrounded["grounding"] = []
    return made


def dataset(number: int) -> Dataset:
    return Dataset.from_list(rows(number), features=row_features())


def preferences(number: int) -> Dataset:
    """Rows for DPO: prompt, chosen, rejected; images; grounding of the prompt and the chosen answer."""
    made = []
    for i in range(number):
        source = row(i)
        wrong = {"role": "assistant", "content": [{"type": "text", "text": "There is nothing."}]}
        made.append(
            {
                "images": source["images"],
                "prompt": source["messages"][:1],
                "chosen": source["messages"][1:],
                "rejected": [wrong],
                "grounding": source["grounding"],
            }
        )
    features = row_features()
    messages = features.pop("messages")
    for name in ("prompt", "chosen", "rejected"):
        features[name] = messages
    return Dataset.from_list(made, features=features)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
