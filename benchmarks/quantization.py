# SPDX-License-Identifier: Apache-2.0
"""What quantization costs and saves: the same questions, the size of the weights and the speed, by back-end, on the CPU.

    python examples/demo.py --steps 0 --test-scenes 200 --output-dir demo_output
    python benchmarks/quantization.py demo_output

The model is the demo's, and the questions are about its held-out scenes. Each back-end answers the same ones, and is compared
with the model in bfloat16 question by question. The intervals are of a bootstrap over scenes, whose questions belong together.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.utils import logging

from agevlm.evaluation.answers import Question
from agevlm.evaluation.benchmark import evaluate, markdown_table, rich_table
from agevlm.evaluation.scenes import Scenes
from agevlm.hub import load_pretrained, load_processor
from agevlm.inference.generation import GREEDY, read_batch, render_question
from agevlm.resume import stored_tensors

BASE = "bfloat16"


def int8_weights() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# The settings of each back-end, and the type of what is left out.
BACK_ENDS: dict[str, tuple[Callable[[], Any] | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    BASE: (None, torch.bfloat16),
    "torchao int8": (int8_weights, torch.bfloat16),
    "quanto int8": (lambda: QuantoConfig(weights="int8"), torch.bfloat16),
    "bitsandbytes 8-bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), torch.bfloat16),
    "bitsandbytes 4-bit": (
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        torch.bfloat16,
    ),
}


def load(folder: Path, name: str) -> PreTrainedModel:
    settings, dtype = BACK_ENDS[name]
    wanted = {} if settings is None else {"quantization_config": settings()}
    return load_pretrained(AutoModelForImageTextToText, folder, dtype=dtype, **wanted).eval()


# --- quality ---


def examine(
    model: PreTrainedModel, processor: ProcessorMixin, scenes: Scenes, limit: int
) -> tuple[dict[str, dict], dict[str, float]]:
    """By question: its scene, its answer, the score that [`Scenes`] gives it, and whether its phrase points at its object;
    and the chance levels of both, as the mean over the questions."""
    found = evaluate(scenes, (model, processor), limit=limit, batch_size=16, progress=None)
    kinds = [row for kind, row in found.scores.items() if kind != "pointing"]
    chance = sum(row["chance"] * row["questions"] for row in kinds) / sum(row["questions"] for row in kinds)
    answers = {
        question.key: {
            "scene": question.source,
            "answer": found.answers[question.key]["answer"],
            "score": scenes.score([question], found.answers)[question.kind]["score"],
            "pointing": found.answers[question.key].get("maps", {}).get("pointing", [None])[-1],
        }
        for question in found.questions
    }
    return answers, {"score": chance, "pointing": found.scores["pointing"]["chance_any_object"]}


def bootstrap(values: np.ndarray, scenes: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """The mean of `values`, and the 95% interval of a bootstrap that draws whole scenes."""
    generator = np.random.default_rng(0)
    _, index = np.unique(scenes, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = generator.integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high}


def compare(answers: dict[str, dict], base: dict[str, dict]) -> dict[str, Any]:
    """Scores and pointing with intervals, and how they differ from those of `base`, question by question."""
    results: dict[str, Any] = {
        "same_answers": float(np.mean([answers[k]["answer"] == base[k]["answer"] for k in base]))
    }
    for name in ("score", "pointing"):
        keys = [key for key in base if base[key][name] is not None]
        scenes = np.array([base[key]["scene"] for key in keys])
        own, other = (np.array([given[key][name] for key in keys], float) for given in (answers, base))
        results[name] = {
            **bootstrap(own, scenes),
            "difference": bootstrap(own - other, scenes),
            "questions": len(keys),
            "scenes": len(np.unique(scenes)),
        }
    return results


# --- size ---


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights and buffers as they are stored, scales included; tied ones count once."""
    tensors = {(t.data_ptr(), t.nbytes): t.nbytes for _, t in stored_tensors(model) if t.nbytes}
    return sum(tensors.values())


def file_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of the safetensors that `save_pretrained` writes; None where Transformers does not save the back-end."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            if "not serializable" not in str(error):
                raise
            return None
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# --- speed ---


@torch.no_grad()
def seconds(model: PreTrainedModel, processor: ProcessorMixin, question: Question, rows: int, tokens: int) -> float:
    """Seconds in which a batch of equal questions gets `tokens` tokens each, the reading of image and question included."""
    prompts = [render_question(processor, question.text)] * rows
    images = [question.open_image()] * rows
    start = time.perf_counter()
    batch = read_batch(model, processor, prompts, images)
    model.generate(**batch.inputs, **GREEDY, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - start


def measure_speed(
    models: dict[str, PreTrainedModel],
    processor: ProcessorMixin,
    question: Question,
    rows: int,
    tokens: int,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Rounds in which each back-end answers once, each round beginning with another one; ratios are within a round."""
    names = list(models)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first is for warming up
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            taken[name].append(seconds(models[name], processor, question, rows, tokens))
    results = {}
    for name in names:
        ratios = [b / a for a, b in zip(taken[name][1:], taken[BASE][1:], strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        results[name] = {
            "tokens_per_second": rows * tokens / statistics.median(taken[name][1:]),
            "ratio": {"median": middle, "quartile_1": low, "quartile_3": high},
            "seconds": taken[name][1:],
        }
    return results


# --- showing ---


def rows_of(results: dict[str, dict[str, Any]], batches: list[int]) -> list[list[str]]:
    def share(found: dict[str, float]) -> str:
        return f"{found['mean']:.3f} ({found['low']:.3f}–{found['high']:.3f})"

    def difference(found: dict[str, float]) -> str:
        return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"

    def ratio(found: dict[str, float]) -> str:
        return f"{found['median']:.2f} ({found['quartile_1']:.2f}–{found['quartile_3']:.2f})"

    header = ["back-end", "right answers", "− bfloat16", "same answers", "pointing", "− bfloat16"]
    header += ["weights, MB", "file, MB", *(f"speed × bfloat16, batch {n}" for n in batches)]
    table = [header]
    for name, found in results.items():
        score, pointing, same = found["score"], found["pointing"], found["same_answers"]
        base = name == BASE
        table.append(
            [
                name,
                share(score),
                "" if base else difference(score["difference"]),
                "" if base else f"{same:.3f}",
                share(pointing),
                "" if base else difference(pointing["difference"]),
                f"{found['weight_bytes'] / 1e6:.0f}",
                "–" if found["file_bytes"] is None else f"{found['file_bytes'] / 1e6:.0f}",
                *("1" if base else ratio(found["speed"][str(n)]["ratio"]) for n in batches),
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder that examples/demo.py has written")
    parser.add_argument("--limit", type=int, default=40, help="questions of each kind")
    parser.add_argument("--tokens", type=int, default=32, help="that are written in a round of the speed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="questions at once in the speed")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed that count")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks_output"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel("ERROR")  # it tells of a cast at every layer of every pass
    console = Console()

    checkpoint, scenes = args.demo / "checkpoint", Scenes(args.demo / "held_out_scenes")
    processor = load_processor(checkpoint)
    models, answers, chances, results = {}, {}, {}, {}
    for name in BACK_ENDS:
        models[name] = load(checkpoint, name)
        start = time.perf_counter()
        answers[name], chances[name] = examine(models[name], processor, scenes, args.limit)
        results[name] = {"weight_bytes": weight_bytes(models[name]), "file_bytes": file_bytes(models[name])}
        console.print(f"{name}: {len(answers[name])} questions in {time.perf_counter() - start:.0f} s")
    for name in BACK_ENDS:
        results[name] = {**compare(answers[name], answers[BASE]), **results[name], "speed": {}}
    question = next(question for question in scenes.questions(1) if question.kind == "existence")
    for rows in args.batches:
        console.print(f"speed of a batch of {rows}")
        speed = measure_speed(models, processor, question, rows, args.tokens, args.rounds)
        for name, found in speed.items():
            results[name]["speed"][str(rows)] = found

    packages = ("torch", "transformers", "torchao", "optimum-quanto", "bitsandbytes")
    setting = {
        "questions_of_each_kind": args.limit,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "device": f"CPU ({platform.machine()}), {torch.get_num_threads()} threads",
        "chance": chances[BASE],
        "kinds": sorted({key.split("/")[0] for key in answers[BASE]}),
        **{name: version(name) for name in packages},
    }
    table = rows_of(results, args.batches)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "quantization.json").write_text(
        json.dumps({"setting": setting, "results": results}, indent=1) + "\n"
    )
    (args.output_dir / "quantization.md").write_text(markdown_table(table) + "\n")
    console.print(rich_table(table))
    console.print(f"Written to {args.output_dir}: quantization.json, quantization.md")


if __name__ == "__main__":
    main()
