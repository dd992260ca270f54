# SPDX-License-Identifier: Apache-2.0
"""`agevlm eval …` and `agevlm similarity`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import parse_names


def pope(
    model: Annotated[str, typer.Option(help="Image-text-to-text checkpoint with a chat template: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and scores; a run that was stopped goes on in it.")],
    data: Annotated[
        str, typer.Option(help="POPE's own JSON file or folder of them; or data set: folder, .parquet file, Hub id.")
    ] = "lmms-lab/POPE",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images that POPE's own files name: COCO's val2014.")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help="Such as random,popular,adversarial; all in the data by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each category.", min=1)] = None,
    prompt_suffix: Annotated[str, typer.Option(help="A line to add to each question; none by default.")] = "",
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Object hallucination: yes/no questions about what is in COCO images (POPE, arXiv 2305.10355)."""
    from ..evaluation.pope import evaluate_pope

    _, table = evaluate_pope(
        model,
        out,
        data,
        images,
        categories=parse_names(categories),
        limit=limit,
        prompt_suffix=prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    Console().print(table)


def cv_bench(
    model: Annotated[str, typer.Option(help="Image-text-to-text checkpoint with a chat template: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and scores; a run that was stopped goes on in it.")],
    data: Annotated[
        str,
        typer.Option(help="Data set: folder, .parquet file, Hub id, or the authors' test_2d.jsonl, test_3d.jsonl."),
    ] = "nyu-visionx/CV-Bench",
    images: Annotated[
        Path | None, typer.Option(help="Folder that file names in .jsonl files start from; theirs by default.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of Count,Relation,Depth,Distance; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task and source.", min=1)] = None,
    prompt_suffix: Annotated[
        str | None, typer.Option(help="A line to add to each prompt; by default that of the authors, '' for none.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Seeing what is where: counts, sides, depths and distances (CV-Bench, arXiv 2406.16860)."""
    from ..evaluation.cv_bench import PROMPT_SUFFIX, evaluate_cv_bench

    _, table = evaluate_cv_bench(
        model,
        out,
        data,
        images,
        tasks=parse_names(tasks),
        limit=limit,
        prompt_suffix=PROMPT_SUFFIX if prompt_suffix is None else prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    Console().print(table)


def scenes(
    model: Annotated[str, typer.Option(help="Image-text-to-text checkpoint with a chat template: folder or Hub id.")],
    data: Annotated[Path, typer.Option(help="Folder of grounded scenes that `agevlm scenes` has written.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and scores; a run that was stopped goes on in it.")],
    split: Annotated[str, typer.Option(help="Split of the scenes.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each kind.", min=1)] = None,
    prompt_suffix: Annotated[str, typer.Option(help="A line to add to each question; none by default.")] = "",
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Grounded scenes: what is there, how many, where; and of AGE-VLMs, whether phrases look at their objects."""
    from ..evaluation.scene_benchmark import evaluate_scene_benchmark

    _, table = evaluate_scene_benchmark(
        model,
        out,
        data,
        split=split,
        limit=limit,
        prompt_suffix=prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    Console().print(table)


def similarity(
    model: Annotated[
        str, typer.Option(help="AGE-VLM or LLaVA-style checkpoint with a chat template: folder or Hub id.")
    ],
    data: Annotated[
        str, typer.Option(help="Grounded scenes or other rows with images and messages: folder, file or Hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for similarity.png and similarity.json; must not exist yet.")],
    split: Annotated[str | None, typer.Option(help="Which split, where there are several.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first texts.", min=2)] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that are read together.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the random images.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Do hidden states tell matching from random images? Cosine similarities, their histogram, overlap and AUROC."""
    from ..data.readers import read_rows
    from ..evaluation import similarity as similarities
    from ..evaluation.benchmark import load_model
    from ..files import check_new_folder, new_folder

    check_new_folder(out)  # before the model is loaded
    rows = read_rows(data, split)
    similarities.text_pairs(rows, limit)
    vlm, processor = load_model(model, device, dtype)
    found = similarities.similarity(vlm, processor, rows, limit=limit, batch_size=batch_size, seed=seed)
    settings = {"model": model, "data": data, "split": split, "limit": limit, "seed": seed}
    values = {name: getattr(found, name).tolist() for name in ("matching", "random", "between")}
    with new_folder(out) as partial:
        similarities.draw_similarity(found, partial / "similarity.png", model)
        text = json.dumps({**settings, **found.summary(), **values}, indent=1, ensure_ascii=False)
        (partial / "similarity.json").write_text(text + "\n", encoding="utf-8")

    from rich.table import Table

    table = Table("", f"{model}", title="Hidden states with an image, and without")
    for label, name in (
        ("similarity, matching image", "matching_mean"),
        ("similarity, random image", "random_mean"),
        ("matching and random to each other", "between_mean"),
        ("overlap of the two histograms", "overlap"),
        ("AUROC", "auroc"),
        ("pairs", "pairs"),
    ):
        value = found.summary()[name]
        table.add_row(label, f"{value}" if name == "pairs" else f"{value:.3f}")
    Console().print(table)
