# SPDX-License-Identifier: Apache-2.0
"""An exported decoder beside the eager model: time of a prompt and of a token, and size of the files.

    agevlm export demo_output/checkpoint --out exported
    python benchmarks/export.py demo_output/checkpoint exported

Both compute in float32 with the same number of threads, on one row of `--tokens` tokens with one image. First the tokens that they
write are compared. Each round times both, in turn; what is printed are medians of the ratios within a round, with quartiles.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import DynamicCache

from agevlm.inference import load_model
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmImageFeatures


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def eager(model, ids: torch.Tensor, features: AgeVlmImageFeatures, new_tokens: int) -> tuple[float, float, list[int]]:
    """Seconds of the prompt, seconds of a token, and the tokens."""
    cache = DynamicCache(config=model.config.text_config)

    def step(**inputs) -> int:
        return int(model(**inputs, cache=cache, logits_to_keep=1).logits[0, -1].argmax())

    prompt, token = timed(lambda: step(input_ids=ids, mm_encoder_outputs={"image": features}))
    tokens = [token]
    decoding, _ = timed(
        lambda: [tokens.append(step(input_ids=torch.tensor([tokens[-1:]]))) for _ in range(new_tokens)]
    )
    return prompt, decoding / new_tokens, tokens


def exported(session, feed: dict[str, np.ndarray], new_tokens: int) -> tuple[float, float, list[int]]:
    names = [output.name for output in session.get_outputs()]
    feed = dict(feed)

    def step() -> int:
        found = dict(zip(names, session.run(names, feed), strict=True))
        token = int(found.pop("logits").argmax())
        feed.update({name.replace("present", "past_key_values"): value for name, value in found.items()})
        feed["input_ids"], feed["visual_tokens"] = np.array([[token]]), feed["visual_tokens"][:, :0]
        feed["attention_mask"] = np.ones((1, feed["attention_mask"].shape[1] + 1), np.int64)
        return token

    prompt, token = timed(step)
    decoding, tokens = timed(lambda: [step() for _ in range(new_tokens)])
    return prompt, decoding / new_tokens, [token, *tokens]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time and size of an exported decoder beside the eager model.")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="written by agevlm export for ONNX, without --maps")
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_model(args.model, device="cpu", dtype="float32")
    graphs = json.loads((args.folder / "graphs.json").read_text("utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(args.folder / graphs["graphs"]["decoder"]["file"], options)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (1, args.tokens), generator=generator)
    ids[0, 1] = model.config.image_token_id
    size = processor.image_processor.size
    features = model.get_image_features(torch.randn(1, 3, size["height"], size["width"], generator=generator))
    feed = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones(ids.shape, np.int64),
        "visual_tokens": features.pooler_output.numpy(),
        "visual_positions": np.ones(features.pooler_output.shape[:2], np.int64),
    }
    for tensor in session.get_inputs():
        if tensor.name.startswith("past_key_values"):
            feed[tensor.name] = np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float32)

    ratios = []
    for number in range(args.rounds + 1):
        pair = [
            lambda: eager(model, ids, features, args.new_tokens),
            lambda: exported(session, feed, args.new_tokens),
        ]
        order = (0, 1) if number % 2 else (1, 0)
        found = {i: pair[i]() for i in order}
        if found[0][2] != found[1][2]:
            raise SystemExit("the exported decoder writes other tokens than the model")
        if number:  # the first round warms up
            ratios.append([found[1][i] / found[0][i] for i in (0, 1)])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75], axis=0)
    for i, what in enumerate((f"prompt of {args.tokens} tokens", "each further token")):
        print(f"{what}: {middle[i]:.2f} ({low[i]:.2f}–{high[i]:.2f}) of the eager model's time")
    weights = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors"))
    graphs_size = sum(file.stat().st_size for file in args.folder.glob("*.onnx*"))
    print(f"files: {graphs_size / weights:.2f} of the checkpoint's {weights / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
