# SPDX-License-Identifier: Apache-2.0
"""What guidance costs: training steps with `map_queries` and Dice, beside the same step unguided and two naive ways.

    python benchmarks/guidance.py                          # four layers, on the GPU if there is one
    python benchmarks/guidance.py --layers 16 --device cuda

The model has the default configuration's text shape (age-vlm-1b) with random weights: frozen language model in `--dtype`,
adapter and cross-attention in float32, trained under autocast. Each row of the batch has one image of 576 visual tokens,
given as features, so that the vision tower, the same for all, takes no part. A step is forward and backward.

Fewer layers than the sixteen of age-vlm-1b still have four blocks. Guidance then adds as much time and memory as in the full
model, to a step that takes less of both: the ratios are upper bounds of the full model's.

Writes `guidance.json`, `guidance.png` and `guidance.md` to `--output-dir`.
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler logs each start and stop

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, ConvNextConfig
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.attention.losses import guidance_losses
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention, AgeVlmImageFeatures

UNGUIDED, GUIDED = "unguided (SDPA)", "guided (SDPA + map_queries)"
EAGER_BLOCKS, OUTPUT_ATTENTIONS = "naive: eager cross-attention", "naive: output_attentions=True"
TARGETS = {"time": 1.05, "memory": 1.02}
VISION_WIDTH, GRID = 1536, (24, 24)

# ---------------------------------------------------------------------------------------- model and batch


def build_model(device: torch.device, dtype: torch.dtype, **text_config) -> AgeVlmForConditionalGeneration:
    """Random weights; language model frozen in `dtype`, adapter and cross-attention trainable in float32, gates open."""
    vision_config = ConvNextConfig(num_stages=1, hidden_sizes=[VISION_WIDTH], depths=[1])
    text_config = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 128256, **text_config}
    image_token_id = min(128002, text_config["vocab_size"] - 1)
    config = AgeVlmConfig(text_config=text_config, vision_config=vision_config, image_token_id=image_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # or a billion parameters would be made in float32 first
        model = AgeVlmForConditionalGeneration(config)
        torch.set_default_dtype(default)
    model.model.vision_tower = nn.Identity()  # never run: features are given
    model.requires_grad_(False)
    for module in (model.model.multi_modal_projector, *blocks(model)):
        module.float().requires_grad_(True)
    for block in blocks(model):
        block.gate.data.fill_(0.5)
    return model.train()


def blocks(model: nn.Module) -> list[AgeVlmCrossAttention]:
    return [module for module in model.modules() if isinstance(module, AgeVlmCrossAttention)]


def build_batch(config: AgeVlmConfig, batch_size: int, length: int, phrases: int, device: torch.device) -> dict:
    """One image a row at the start of its text, and `phrases` phrases of one to four tokens with an object each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.image_token_id, (batch_size, length), generator=generator)
    ids[:, 1] = config.image_token_id
    queries = torch.zeros(batch_size, phrases, length, dtype=torch.bool)
    targets = torch.zeros(batch_size, phrases, *GRID)
    for b, p in np.ndindex(batch_size, phrases):
        start, width = torch.randint(4, length - 4, (), generator=generator), 1 + (b + p) % 4
        queries[b, p, start : start + width] = True
        top, left = torch.randint(0, GRID[0] - 8, (2,), generator=generator).tolist()
        targets[b, p, top : top + 8, left : left + 6] = 1
    batch = {
        "input_ids": ids,
        "features": torch.randn(batch_size, GRID[0] * GRID[1], VISION_WIDTH, generator=generator),
        "queries": queries,
        "targets": targets.flatten(2),
    }
    return {name: value.to(device) for name, value in batch.items()}


# ---------------------------------------------------------------------------------------- the four ways


def forward(model, batch: dict, **kwargs):
    # Made anew each time: the model writes the adapter's output into the features that it is given.
    features = AgeVlmImageFeatures(last_hidden_state=batch["features"], grid=GRID)
    ids = batch["input_ids"]
    return model(input_ids=ids, labels=ids, mm_encoder_outputs={"image": features}, use_cache=False, **kwargs)


def total_loss(language_modeling: torch.Tensor, maps: torch.Tensor, batch: dict) -> torch.Tensor:
    losses, named = guidance_losses(maps, batch["targets"])
    return language_modeling + losses.sum() / named.sum()


def average(weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Full attention weights `(B, heads, S, V)` to maps `(B, P, V)`."""
    tokens = queries.float()
    return (tokens / tokens.sum(-1, keepdim=True).clamp(min=1)) @ weights.float().mean(1)


def unguided(model, batch: dict) -> torch.Tensor:
    return forward(model, batch).loss


def guided(model, batch: dict) -> torch.Tensor:
    outputs = forward(model, batch, map_queries=batch["queries"])
    return total_loss(outputs.loss, outputs.cross_attention_maps, batch)


def eager_float32(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in float32 that keeps all of its weights; the mask is SDPA's, true where a token may be attended."""
    with torch.autocast(query.device.type, enabled=False):
        key, value = (repeat_kv(states, module.num_key_value_groups).float() for states in (key, value))
        scores = query.float() @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        output = weights @ value
    return output.transpose(1, 2).to(query.dtype), weights


AttentionInterface.register("eager_float32", eager_float32)
AttentionMaskInterface.register("eager_float32", sdpa_mask)


def eager_blocks(model, batch: dict) -> torch.Tensor:
    """SDPA for the language model, eager attention for the blocks, whose weights hooks catch."""
    caught, handles = [], []
    for block in blocks(model):
        block.config = copy.copy(block.config)  # the blocks' own, which was the language model's
        block.config._attn_implementation = "eager_float32"
        handles.append(block.register_forward_hook(lambda module, args, output: caught.append(output[1])))
    try:
        outputs = forward(model, batch)
    finally:
        for block, handle in zip(blocks(model), handles, strict=True):
            block.config = model.config.text_config
            handle.remove()
    return total_loss(outputs.loss, torch.stack([average(w, batch["queries"]) for w in caught]), batch)


def output_attentions(model, batch: dict) -> torch.Tensor:
    """What Transformers offers: eager attention everywhere, and all weights of all layers."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        outputs = forward(model, batch, output_attentions=True)
    finally:
        model.set_attn_implementation({"text_config": before})
    maps = torch.stack([average(weights, batch["queries"]) for weights in outputs.cross_attentions])
    return total_loss(outputs.loss, maps, batch)


ARMS: dict[str, Callable[..., torch.Tensor]] = {
    UNGUIDED: unguided,
    GUIDED: guided,
    EAGER_BLOCKS: eager_blocks,
    OUTPUT_ATTENTIONS: output_attentions,
}


def step(compute: Callable[..., torch.Tensor], model, batch: dict, dtype: torch.dtype) -> float:
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch["input_ids"].device.type, dtype, enabled=dtype != torch.float32):
        loss = compute(model, batch)
    loss.backward()
    return loss.item()


def check_agreement(device: torch.device) -> None:
    """The three guided ways compute one loss and one gradient, in float32 on a small shape.

    Raises:
        AssertionError: if they do not.
    """
    small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = build_model(device, torch.float32, vocab_size=512, num_hidden_layers=4, **small)
    batch = build_batch(model.config, batch_size=2, length=24, phrases=3, device=device)
    results = {}
    for name, compute in ARMS.items():
        loss = step(compute, model, batch, torch.float32)
        results[name] = loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    loss, expected = results[OUTPUT_ATTENTIONS]
    for name in (GUIDED, EAGER_BLOCKS):
        assert abs(results[name][0] - loss) < 1e-4 * loss, name
        for parameter, gradient in expected.items():
            error = (results[name][1][parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-3, f"{name}: the gradient of {parameter} is off by {error:.1e}"
    assert abs(results[UNGUIDED][0] - loss) > 0.1, "guidance has no part in the loss"


# ---------------------------------------------------------------------------------------- measuring


def timed(compute: Callable[..., torch.Tensor], model, batch: dict, dtype: torch.dtype) -> float:
    """Seconds of one step. It synchronizes, because reading the loss waits for the forward only."""
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(compute, model, batch, dtype)
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(compute: Callable[..., torch.Tensor], model, batch: dict, dtype: torch.dtype) -> int:
    """Most bytes of tensors alive at once during a step, weights included.

    On the CPU, from what PyTorch's allocator reports to the profiler: every byte counts exactly once, as on the GPU.
    Resident memory would depend on when malloc gives pages back, which differs by more than the 2% in question.
    """
    model.zero_grad(set_to_none=True)
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(compute, model, batch, dtype)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(compute, model, batch, dtype)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    resident = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(model, batch)}
    return sum(resident.values()) + int(np.cumsum(changes).max())


def tensors(model: nn.Module, batch: dict) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from batch.values()


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def measure(model, batch: dict, dtype: torch.dtype, repeats: int, warmup: int, progress: Progress) -> dict:
    """Rounds in which each way takes a step, each round beginning with another one; ratios are within a round, so that
    what slows the machine for a while slows both sides."""
    names = list(ARMS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = {}
    bar = progress.add_task("memory", total=len(names) * (1 + warmup + repeats))
    step(ARMS[UNGUIDED], model, batch, dtype)  # allocations that stay belong to no arm's memory
    for name in names:
        memory[name] = peak_memory(ARMS[name], model, batch, dtype)
        progress.advance(bar)
    for round_index in range(warmup + repeats):
        progress.update(bar, description="warm-up" if round_index < warmup else "rounds")
        for i in range(len(names)):
            name = names[(round_index + i) % len(names)]
            seconds[name].append(timed(ARMS[name], model, batch, dtype))
            progress.advance(bar)
    results = {}
    for name in names:
        times, base = seconds[name][warmup:], seconds[UNGUIDED][warmup:]
        results[name] = {
            "seconds": summary(times),
            "time_ratio": summary([a / b for a, b in zip(times, base, strict=True)]),
            "peak_bytes": memory[name],
            "memory_ratio": memory[name] / memory[UNGUIDED],
            "all_seconds": times,
        }
    return results


# ---------------------------------------------------------------------------------------- showing


def rows(results: dict) -> list[list[str]]:
    table = []
    for name, result in results.items():
        ratio = result["time_ratio"]
        spread = "" if name == UNGUIDED else f" ({ratio['quartile_1']:.3f}–{ratio['quartile_3']:.3f})"
        table.append(
            [
                name,
                f"{result['seconds']['median'] * 1e3:.1f}",
                f"{ratio['median']:.3f}{spread}",
                f"{result['peak_bytes'] / 2**20:.0f}",
                f"{result['memory_ratio']:.3f}",
            ]
        )
    return table


HEADER = ["training step", "ms (median)", "× unguided (quartiles)", "peak MiB", "× unguided"]


def draw(results: dict, title: str, path: Path) -> None:
    """Bars of both ratios, with quartiles and the targets as lines."""
    from agevlm.plots import new_figure

    figure = new_figure(10, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(results)
    time_ratios = [results[name]["time_ratio"] for name in names]
    medians = [ratio["median"] for ratio in time_ratios]
    quartiles = [
        [r["median"] - r["quartile_1"] for r in time_ratios],
        [r["quartile_3"] - r["median"] for r in time_ratios],
    ]
    panels = [("time", medians, quartiles), ("memory", [results[name]["memory_ratio"] for name in names], None)]
    for axis, (kind, values, errors) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, xerr=errors, color=["#6f6f6f", "#1f77b4", "#b0762f", "#b04f3f"], capsize=3)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], label_type="center", color="white", weight="bold")
        axis.axvline(TARGETS[kind], color="black", linestyle="--", linewidth=1)
        axis.annotate(
            f"target for guided: {TARGETS[kind]}",
            (TARGETS[kind], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        axis.set_xlim(0, max(*values, TARGETS[kind]) * 1.15)
        axis.set_xlabel("step time, × unguided (whiskers: quartiles)" if kind == "time" else "peak memory, × unguided")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="Llama layers; age-vlm-1b has 16")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=256, help="of each row")
    parser.add_argument("--phrases", type=int, default=8, help="of each row, one to four tokens long")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--vocab-size", type=int, default=128256, help="smaller ones only to try the script out")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks_output"))
    args = parser.parse_args()
    least = {"layers": 1, "batch_size": 1, "text_tokens": 9, "phrases": 1, "repeats": 1, "warmup": 0, "vocab_size": 5}
    for name, number in least.items():
        if getattr(args, name) < number:
            parser.error(f"--{name.replace('_', '-')} must be at least {number}, got {getattr(args, name)}")

    console, device, dtype = Console(), torch.device(args.device), getattr(torch, args.dtype)
    console.print("Checking that all guided ways compute the same …")
    check_agreement(device)
    console.print("Building the model …")
    model = build_model(device, dtype, num_hidden_layers=args.layers, vocab_size=args.vocab_size)
    batch = build_batch(model.config, args.batch_size, args.text_tokens, args.phrases, device)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        results = measure(model, batch, dtype, args.repeats, args.warmup, progress)

    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    setting = {
        **{name: value for name, value in vars(args).items() if name != "output_dir"},
        "cross_attention_blocks": len(blocks(model)),
        "visual_tokens": GRID[0] * GRID[1],
        "device_name": device_name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    title = (
        f"{args.layers} of 16 layers, {len(blocks(model))} blocks; {args.batch_size} rows of {args.text_tokens} tokens with "
        f"{args.phrases} phrases and {setting['visual_tokens']} visual tokens; {args.dtype}; {device_name}; "
        f"{args.repeats} rounds"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "guidance.json").write_text(
        json.dumps({"setting": setting, "results": results}, indent=2) + "\n"
    )
    lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *rows(results)]]
    (args.output_dir / "guidance.md").write_text("\n".join([title, "", *lines]) + "\n")
    draw(results, title, args.output_dir / "guidance.png")

    table = Table(*HEADER, title=title)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    guided_result = results[GUIDED]
    found = {"time": guided_result["time_ratio"]["median"], "memory": guided_result["memory_ratio"]}
    for kind, target in TARGETS.items():
        verdict = "[green]within" if found[kind] <= target else "[red]beyond"
        console.print(f"{kind}: {found[kind]:.3f} × unguided, {verdict} {target}[/]")
    console.print(f"Written to {args.output_dir}: guidance.json, guidance.md, guidance.png")


if __name__ == "__main__":
    main()
