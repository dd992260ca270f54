# SPDX-License-Identifier: Apache-2.0
"""What batching brings to a server: throughput and latency at several numbers of clients, beside one request at a time.

    python benchmarks/serving.py                               # random weights in the demo model's shape, on the CPU
    python benchmarks/serving.py --model demo_output/checkpoint

Both arms are the same server (`agevlm serve`), asked over HTTP with streaming: one batches up to 16 requests, the other answers
one after another. Each client asks its next question when its last answer is whole. Every question has an image that was not seen before. Answers have 8 to 32
tokens, the same in both arms. In each round both arms run with each number of clients, and rounds begin with another arm.

The default model has the shape of the demo's: SmolLM2-135M (30 layers, 576 wide), EfficientNet-Lite0 at 224 pixels, 4 blocks of
cross-attention. Its weights are random, and its tokenizer writes bytes. It never ends an answer by itself.

Writes `serving.json`, `serving.png` and `serving.md` to `--output-dir`.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import platform
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TimmWrapperConfig, TimmWrapperModel

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor, from_parts
from agevlm.inference import load_model
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE
from agevlm.serving import Batcher
from agevlm.serving.server import build_app

BATCHED, SINGLE = "batched", "one at a time"
ARMS = {BATCHED: {"max_batch_size": 16}, SINGLE: {"max_batch_size": 1, "turn": 10**9}}
NAME = "./benchmark"  # no name of the Hub
MEASURES = {
    "tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "p95_seconds": "p95 latency (s)",
    "p95_first_seconds": "p95 first text (s)",
}


def build_model() -> tuple[Any, AgeVlmProcessor]:
    """Random weights in the shape of the demo's model, with a tokenizer of bytes."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=49149, eos_token_id=None,
        initializer_range=0.1,
    )  # fmt: skip
    # Every token stands for a text, and texts are read byte by byte.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        "".join(word) for word in itertools.islice(itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4), 48893)
    ]
    vocab = {text: number for number, text in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "<image>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", chat_template=DEFAULT_CHAT_TEMPLATE
    )
    processor = AgeVlmProcessor(AgeVlmImageProcessor(size={"height": 224, "width": 224}), fast, image_token="<image>")
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="efficientnet_lite0", do_pooling=False))
    model = from_parts(LlamaForCausalLM(llama), tower, image_token_id=processor.image_token_id)
    for name, buffer in model.named_buffers():
        if name.endswith("gate"):
            buffer.fill_(0.5)
    return model.eval(), processor


@contextlib.contextmanager
def server(model: Any, processor: Any, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    with Batcher(model, processor, **settings) as batcher, socket.create_server(("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(uvicorn.Config(build_app(batcher, processor, NAME), log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
        finally:
            running.should_exit = True
            thread.join()


def question(number: int) -> dict[str, Any]:
    """A request of its own: an image of noise, a question of some length, an answer of 8 to 32 tokens."""
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (160, 224, 3), dtype=np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    things = " and a ".join(f"{rng.integers(1000)}" for _ in range(rng.integers(1, 6)))
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"Is there a {things}?"},
    ]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": int(rng.integers(8, 33)),
        "temperature": 0,
        "stream": True,
    }


def ask(client: httpx.Client, url: str, number: int) -> dict[str, Any]:
    """One request: its text, its tokens, and the seconds to its first piece of text and to its end."""
    body = question(number)
    start, first, text, tokens = time.perf_counter(), None, "", 0
    with client.stream("POST", url, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if piece := chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - start
                text += piece
            if "usage" in chunk:
                tokens = chunk["usage"]["completion_tokens"]
    return {"text": text, "tokens": tokens, "first": first, "seconds": time.perf_counter() - start}


def load(url: str, clients: int, requests: int, seed: int) -> dict[str, float]:
    """All clients at once, each with so many requests one after another."""
    with httpx.Client(timeout=None) as client, ThreadPoolExecutor(clients) as pool:

        def one(client_number: int) -> list[dict[str, Any]]:
            return [ask(client, url, seed + client_number * requests + number) for number in range(requests)]

        start = time.perf_counter()
        found = [answer for answers in pool.map(one, range(clients)) for answer in answers]
        seconds = time.perf_counter() - start
    return {
        "tokens_per_second": sum(answer["tokens"] for answer in found) / seconds,
        "requests_per_second": len(found) / seconds,
        "p95_seconds": float(np.percentile([answer["seconds"] for answer in found], 95)),
        "p95_first_seconds": float(np.percentile([answer["first"] for answer in found], 95)),
    }


def check_agreement(model: Any, processor: Any, count: int = 4) -> None:
    """Both arms say the same. They add numbers in another order, which may turn a choice between two equally likely tokens."""
    texts = {}
    for name, settings in ARMS.items():
        with (
            server(model, processor, **settings) as url,
            httpx.Client(timeout=None) as client,
            ThreadPoolExecutor(count) as pool,
        ):
            texts[name] = [found["text"] for found in pool.map(lambda n: ask(client, url, n), range(count))]
    equal = sum(one == other for one, other in zip(*texts.values(), strict=True))
    assert equal >= count - 1, f"only {equal} of {count} answers are equal"
    assert len(set(texts[SINGLE])) == count, "the answers do not depend on the questions"


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def measure(model: Any, processor: Any, counts: list[int], rounds: int, requests: int, say: Any) -> dict[str, Any]:
    """By number of clients: each measure of both arms, and its ratio within a round."""
    found: dict[int, dict[str, list[dict[str, float]]]] = {count: {name: [] for name in ARMS} for count in counts}
    for number in range(rounds):
        for count in counts:
            for name in list(ARMS) if number % 2 == 0 else reversed(ARMS):
                # Few clients have more requests each, so that there is a 95th percentile.
                each = max(requests, -(-4 // count))
                with server(model, processor, **ARMS[name]) as url:
                    found[count][name].append(load(url, count, each, seed=10_000 * (number + 1)))
                shown = ", ".join(f"{MEASURES[key]} {value:.2f}" for key, value in found[count][name][-1].items())
                say(f"round {number + 1}, {count} clients, {name}: {shown}")
    return {
        str(count): {
            measure: {
                **{name: summary([one[measure] for one in arms[name]]) for name in ARMS},
                "ratio": summary(
                    [one[measure] / other[measure] for one, other in zip(arms[BATCHED], arms[SINGLE], strict=True)]
                ),
            }
            for measure in MEASURES
        }
        for count, arms in found.items()
    }


HEADER = ["clients", *MEASURES.values()]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Of each measure the medians of both arms and the ratio."""
    table = []
    for count, measures in results.items():
        cells = []
        for measure in measures.values():
            ratio = measure["ratio"]
            spread = f"{ratio['quartile_1']:.2f}–{ratio['quartile_3']:.2f}"
            cells.append(
                f"{measure[BATCHED]['median']:.2f} / {measure[SINGLE]['median']:.2f} = {ratio['median']:.2f}× ({spread})"
            )
        table.append([count, *cells])
    return table


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    from agevlm.plots import new_figure

    figure = new_figure(9, 3.4)
    axes = figure.subplots(1, 2)
    for axis, key in zip(axes, ("tokens_per_second", "p95_seconds"), strict=True):
        for shift, name in ((-0.2, BATCHED), (0.2, SINGLE)):
            bars = axis.bar(
                [number + shift for number in range(len(results))],
                [measures[key][name]["median"] for measures in results.values()],
                0.38,
                label=name,
                color="#1f77b4" if name == BATCHED else "#8c8c8c",
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(results)), list(results))
        axis.set_xlabel("clients")
        axis.set_ylabel(MEASURES[key])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; random weights in the demo's shape by default")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=1, help="of each client in a round, and at least 4 in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks_output"))
    args = parser.parse_args()

    console, device = Console(), torch.device(args.device)
    if args.model is None:
        model, processor = build_model()
        model = model.to(device)
    else:
        model, processor = load_model(args.model, args.device)
    parameters = sum(weight.numel() for weight in model.parameters())
    console.print("Checking that both arms say the same …")
    check_agreement(model, processor)
    results = measure(model, processor, args.clients, args.rounds, args.requests, console.print)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    setting = {
        **{name: value for name, value in vars(args).items() if name != "output_dir"},
        "parameters": parameters,
        "dtype": str(model.dtype),
        "device_name": device_name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    title = f"{parameters / 1e6:.0f}M parameters; {model.dtype}; {device_name}; {args.rounds} rounds"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"setting": setting, "results": results}, indent=2)
    (args.output_dir / "serving.json").write_text(content + "\n")
    lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *rows(results)]]
    (args.output_dir / "serving.md").write_text(
        "\n".join([f"{title}; {BATCHED} / {SINGLE} = ratio (quartiles)", "", *lines]) + "\n"
    )
    draw(results, title, args.output_dir / "serving.png")
    table = Table(*HEADER, title=title)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"Written to {args.output_dir}: serving.json, serving.md, serving.png")


if __name__ == "__main__":
    main()
