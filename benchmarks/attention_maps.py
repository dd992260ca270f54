# SPDX-License-Identifier: Apache-2.0
"""What `attention_maps` costs: a forward, and a forward and backward, beside plain SDPA and beside eager attention's weights.

    OMP_NUM_THREADS=2 python benchmarks/attention_maps.py

A Llama with random weights in float32 reads rows of 1,000 tokens, of which 576 stand for an image. Maps are those of 12 phrases of one token
each. With eager attention they are cut out of the weights that `output_attentions=True` returns. Both are checked to be the same first.

Writes `attention_maps.json` and `attention_maps.md` to `--output-dir`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler logs each start and stop

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from agevlm.attention import attention_maps

IMAGE = 576
PLAIN, ALL, GUIDED, EAGER = (
    "plain SDPA",
    "`attention_maps`, all layers",
    "`attention_maps`, one layer",
    "eager, `output_attentions=True`",
)


def build(args: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model, token ids `(batch, tokens)`, queries `(batch, phrases, tokens)` and keys `(batch, tokens)`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device)
    ids = torch.randint(3, 1024, (args.batch_size, args.tokens))
    keys = torch.zeros(args.batch_size, args.tokens, dtype=torch.bool)
    keys[:, 1 : 1 + IMAGE] = True
    queries = torch.zeros(args.batch_size, args.phrases, args.tokens, dtype=torch.bool)
    for phrase in range(args.phrases):
        queries[:, phrase, args.tokens - 1 - 20 * phrase] = True
    return model, ids.to(args.device), queries.to(args.device), keys.to(args.device)


def plain(model, ids, queries, keys) -> tuple[torch.Tensor, None]:
    return model(ids, labels=ids, use_cache=False).loss, None


def with_maps(model, ids, queries, keys, layers=None) -> tuple[torch.Tensor, torch.Tensor]:
    with attention_maps(model, queries, keys, layers=layers) as found:
        loss = model(ids, labels=ids, use_cache=False).loss
    return loss, found.maps


def one_layer(model, ids, queries, keys) -> tuple[torch.Tensor, torch.Tensor]:
    return with_maps(model, ids, queries, keys, [model.config.num_hidden_layers // 2])


def eager(model, ids, queries, keys) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(ids, labels=ids, use_cache=False, output_attentions=True)
    rows = queries.int().argmax(-1)  # (batch, phrases)
    maps = []
    for weights in outputs.attentions:
        read = weights.gather(2, rows[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[-1]))
        read = read[..., 1 : 1 + IMAGE]
        maps.append((read / read.sum(-1, keepdim=True)).mean(1))
    return outputs.loss, torch.stack(maps)


WAYS: dict[str, Callable] = {PLAIN: plain, ALL: with_maps, GUIDED: one_layer, EAGER: eager}


def step(name: str, inputs: tuple, backward: bool) -> torch.Tensor | None:
    model = inputs[0]
    model.set_attn_implementation("eager" if name == EAGER else "sdpa")
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        loss, maps = WAYS[name](*inputs)
        if backward:
            (loss if maps is None else loss + maps.square().sum()).backward()
    return maps


def peak(name: str, inputs: tuple, backward: bool) -> int:
    """The most bytes that a step holds beside the weights: PyTorch's own number on a GPU, what its allocator reports on a CPU."""
    device = inputs[1].device
    inputs[0].zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, inputs, backward)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(name, inputs, backward)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def seconds(name: str, inputs: tuple, backward: bool) -> float:
    start = time.perf_counter()
    step(name, inputs, backward)
    if inputs[1].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(inputs: tuple, rounds: int) -> dict[str, dict[str, float]]:
    """By way the ratios to plain SDPA: of the shortest times of interleaved rounds, and of the peak memory."""
    results: dict[str, dict[str, float]] = {name: {} for name in WAYS}
    for kind, backward in (("forward", False), ("step", True)):
        memory = {name: peak(name, inputs, backward) for name in WAYS}  # and a first run, which is not timed
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(rounds):
            order = list(WAYS)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                times[name].append(seconds(name, inputs, backward))
        for name in WAYS:
            results[name][f"{kind} time"] = min(times[name]) / min(times[PLAIN])
            results[name][f"{kind} memory"] = memory[name] / memory[PLAIN]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--phrases", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks_output"))
    args = parser.parse_args()
    inputs = build(args)
    torch.testing.assert_close(step(ALL, inputs, False), step(EAGER, inputs, False), rtol=1e-4, atol=1e-6)
    results = measure(inputs, args.rounds)
    columns = ("forward time", "forward memory", "step time", "step memory")
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{found[c]:.2f}×' for c in columns)} |" for name, found in results.items()]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    (args.output_dir / "attention_maps.json").write_text(
        json.dumps({"settings": settings, "results": results}, indent=2)
    )
    (args.output_dir / "attention_maps.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
