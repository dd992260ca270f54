# SPDX-License-Identifier: Apache-2.0
"""Answers a question about images in ONNX Runtime alone, greedily. Neither torch nor Transformers is imported.

    agevlm export my-age-vlm --out exported
    python examples/export_onnx.py exported "Is there a dog?" street.jpg

It needs `onnxruntime`, `numpy`, `pillow`, `tokenizers` and `jinja2`, and the image processor's default settings (resize and pad).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def render(folder: Path, question: str, num_images: int) -> str:
    """The prompt as the chat template writes it. The marks of the assistant's turns are for training."""
    template = re.sub(r"\{%-? *(end)?generation *-?%\}", "", (folder / "chat_template.jinja").read_text("utf-8"))
    tokens = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    special = {name: tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    messages = [{"role": "user", "content": content}]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)


def preprocess(folder: Path, images: list[Image.Image]) -> dict[str, np.ndarray]:
    """`pixel_values` `(N, 3, H, W)`, each image at the top left, and `sizes` `(N, 2)`, the parts that they fill."""
    settings = json.loads((folder / "processor_config.json").read_text("utf-8"))["image_processor"]
    high, wide = settings["size"]["height"], settings["size"]["width"]
    pixels, sizes = np.zeros((len(images), 3, high, wide), np.float32), np.zeros((len(images), 2), np.int64)
    for i, image in enumerate(images):
        if image.mode[0] in "IF":
            raise ValueError(f"Image {i} has the mode {image.mode}, whose values are not of 8 bits: convert it to L.")
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = Image.merge("RGB", image.split()[:3])
        w, h = image.size
        tall = h * wide >= w * high
        h, w = (high, max(1, (2 * w * high + h) // (2 * h))) if tall else (max(1, (2 * h * wide + w) // (2 * w)), wide)
        values = np.asarray(image.resize((w, h), settings["resample"]), np.float32) * settings["rescale_factor"]
        pixels[i, :, :h, :w] = ((values - settings["image_mean"]) / settings["image_std"]).transpose(2, 0, 1)
        sizes[i] = h, w
    return {"pixel_values": pixels, "sizes": sizes}


def answer(folder: Path, question: str, images: list[Image.Image], max_new_tokens: int = 64) -> tuple[list[int], str]:
    """The tokens that the model writes, the last of which may be the end of the text, and what they say."""
    graphs = json.loads((folder / "graphs.json").read_text("utf-8"))
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("image_encoder", "decoder"))
    ids = np.array([tokenizer.encode(render(folder, question, len(images)), add_special_tokens=False).ids])

    # The graphs take one image at least: without any a blank one, which no token sees.
    shown = images or [Image.new("RGB", (1, 1))]
    visual_tokens, visible = encoder.run(["visual_tokens", "visible"], preprocess(folder, shown))
    # The n-th image token stands for the n-th image.
    places = np.flatnonzero(ids[0] == graphs["image_token_id"])[:, None] if images else graphs["hidden_position"]
    feed: dict[str, Any] = {
        "visual_tokens": visual_tokens.reshape(1, -1, visual_tokens.shape[-1]),
        "visual_positions": np.where(visible, places, graphs["hidden_position"]).reshape(1, -1),
    }
    for tensor in decoder.get_inputs():
        if tensor.name.startswith("past_key_values"):
            _, heads, _, width = tensor.shape
            feed[tensor.name] = np.zeros((1, heads, 0, width), visual_tokens.dtype)

    ends, written = np.atleast_1d(settings.get("eos_token_id") or []), list[int]()
    mask, outputs = np.ones_like(ids), [tensor.name for tensor in decoder.get_outputs()]
    while len(written) < max_new_tokens and not (written and written[-1] in ends):
        found = decoder.run(outputs, {**feed, "input_ids": ids, "attention_mask": mask})
        by_name = dict(zip(outputs, found, strict=True))
        logits = by_name.pop("logits")
        logits[:, settings.get("suppress_tokens") or []] = -np.inf
        written.append(int(logits.argmax()))
        # From now on one token at a time, no new images, and the cache that the last call has returned.
        ids, mask = np.array([written[-1:]]), np.ones((1, mask.shape[1] + 1), np.int64)
        feed["visual_tokens"] = visual_tokens.reshape(1, -1, visual_tokens.shape[-1])[:, :0]
        feed |= {name.replace("present", "past_key_values"): value for name, value in by_name.items()}
    return written, tokenizer.decode(written)


if __name__ == "__main__":
    name, question, *files = sys.argv[1:]
    print(answer(Path(name), question, [Image.open(file) for file in files])[1])
