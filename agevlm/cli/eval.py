# SPDX-License-Identifier: Apache-2.0
"""`agevlm eval NAME`, a command for each benchmark, and `agevlm similarity`."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..terminal import console, say_saved
from .options import check_maps, check_text, parse_names

Model = Annotated[str, typer.Option(help="Image-text-to-text checkpoint with a chat template: folder or Hub id.")]
BatchSize = Annotated[int, typer.Option(help="Questions or texts that are read together.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


def _option(name: str, kind: Any, default: Any, help: str = "", **limits: Any) -> inspect.Parameter:
    """An option of a command; `kind` is its type, or an annotation that has its help. A default `...` means required."""
    annotation = Annotated[kind, typer.Option(help=help, **limits)] if help else kind
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# What a benchmark asks, and its own options: the fields of its class in `agevlm.evaluation.BENCHMARKS`.
_BENCHMARKS = {
    "pope": (
        "Object hallucination: yes/no questions about what is in COCO images (POPE, arXiv 2305.10355).",
        _option(
            "data",
            str,
            "lmms-lab/POPE",
            "POPE's own JSON file or folder of them; or data set: folder, .parquet file, Hub id.",
        ),
        _option("images", Path | None, None, "Folder of the images that POPE's own files name: COCO's val2014."),
        _option("categories", str | None, None, "Such as random,popular,adversarial; all in the data by default."),
    ),
    "cv-bench": (
        "Spatial questions: counts, sides, depths and distances (CV-Bench, arXiv 2406.16860).",
        _option(
            "data",
            str,
            "nyu-visionx/CV-Bench",
            "Data set: folder, .parquet file, Hub id, or the authors' test_2d.jsonl, test_3d.jsonl.",
        ),
        _option("images", Path | None, None, "Folder that file names in .jsonl files start from; theirs by default."),
        _option("tasks", str | None, None, "Of Count,Relation,Depth,Distance; all by default."),
    ),
    "scenes": (
        "Grounded scenes: what is there, how many, where; and whether an AGE-VLM's phrases point at their objects.",
        _option("data", Path, ..., "Folder of grounded scenes that `agevlm scenes` has written."),
        _option("split", str, "test", "Split of the scenes."),
    ),
    "grounding": (
        "Grounded answers on scenes: points, boxes and whether things are there, with intervals. Of an AGE-VLM.",
        _option("data", Path, ..., "Folder of grounded scenes that `agevlm scenes` has written."),
        _option("split", str, "test", "Split of the scenes; another one than the calibration's."),
    ),
}
# The options of all benchmarks: the arguments of `agevlm.evaluation.evaluate`.
_MODEL_AND_PLACE = (
    _option("model", Model, ...),
    _option("out", Path, ..., "Folder for answers and scores; a run that was stopped resumes in it."),
)
_SETTINGS = (
    _option("limit", int | None, None, "Only the first questions of each kind.", min=1),
    _option(
        "prompt_suffix", str | None, None, "A line to add to each question; '' for none, else the benchmark's own."
    ),
    _option("batch_size", BatchSize, 8),
    _option("max_new_tokens", int | None, None, "Longest answer, in tokens; by default the benchmark's.", min=1),
    _option("device", Device, "auto"),
    _option("dtype", Dtype, "auto"),
)


def _command(name: str) -> Callable[..., None]:
    """The command of a benchmark: its own options, and those of `evaluate`."""
    description, *own = cast(tuple[Any, ...], _BENCHMARKS[name])

    def command(**options: Any) -> None:
        from ..evaluation.benchmark import BENCHMARKS, evaluate

        given = {option.name: options.pop(option.name) for option in own}
        check_text(options["prompt_suffix"] or "", "--prompt-suffix")
        for several in ("categories", "tasks"):
            if several in given:
                given[several] = parse_names(given[several])
        found = evaluate(BENCHMARKS[name](**given), **options)
        console().print(found.rich())

    command.__doc__ = description
    command.__signature__ = inspect.Signature([*_MODEL_AND_PLACE, *own, *_SETTINGS])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


COMMANDS = {name: _command(name) for name in _BENCHMARKS}
"""The commands of `agevlm eval`, by name."""


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of an AGE-VLM, which gets the file grounding.json.")],
    data: Annotated[Path, typer.Option(help="Folder of grounded scenes that `agevlm scenes` has written.")],
    split: Annotated[str, typer.Option(help="Split of the scenes, which no result is measured on.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Only the first scenes.", min=1)] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Choose how a model's maps give points, boxes and the confidence that a thing is there: on validation scenes."""
    from ..evaluation.grounding import calibrate as make_calibration
    from ..inference.generation import load_model
    from ..inference.grounding import CALIBRATION_FILE

    if not model.is_dir():
        raise FileNotFoundError(
            f"no such folder: {model}; name the folder of a model, which the calibration is written to"
        )
    check_maps(str(model))
    vlm, processor = load_model(model, device, dtype)
    found = make_calibration(vlm, processor, data, split, limit=limit, batch_size=batch_size)
    found.save(model)
    facts = found.data
    say_saved(
        model / CALIBRATION_FILE,
        f"{facts['phrases']} phrases, {facts['absent']} of them absent, in {facts['scenes']} scenes; blocks before layers "
        f"{', '.join(map(str, found.layers or ()))}, threshold {found.threshold:g}, point {found.point}.",
    )


def similarity(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Grounded scenes or other rows with images and messages: folder, file or Hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for similarity.png and similarity.json; must not exist yet.")],
    split: Annotated[str | None, typer.Option(help="Which split, where there are several.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first texts.", min=2)] = None,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Of the random images.", min=0)] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Whether hidden states distinguish matching from random images: cosine similarities, histogram, overlap, AUROC."""
    from ..data.readers import read_rows
    from ..evaluation.benchmark import rich_table
    from ..evaluation.similarity import measure_similarity, text_pairs
    from ..files import check_new_folder, new_folder
    from ..inference.generation import load_model
    from ..plots import draw_similarity

    check_new_folder(out)  # before the model is loaded
    rows = read_rows(data, split)
    text_pairs(rows, limit)
    vlm, processor = load_model(model, device, dtype)
    found = measure_similarity(vlm, processor, rows, limit=limit, batch_size=batch_size, seed=seed)
    summary = found.summary()
    settings = {"model": model, "data": data, "split": split, "limit": limit, "seed": seed}
    values = {name: getattr(found, name).tolist() for name in ("matching", "random", "between")}
    with new_folder(out) as partial:
        title = f"{model}\nAUROC {summary['auroc']:.2f}, overlap {summary['overlap']:.2f}"
        draw_similarity(found.matching, found.random, partial / "similarity.png", title)
        text = json.dumps({**settings, **summary, **values}, indent=1, ensure_ascii=False)
        (partial / "similarity.json").write_text(text + "\n", encoding="utf-8")

    labels = {
        "similarity, matching image": "matching_mean",
        "similarity, random image": "random_mean",
        "matching and random to each other": "between_mean",
        "overlap of the two histograms": "overlap",
        "AUROC": "auroc",
    }
    table = [["", model], *([label, f"{summary[name]:.3f}"] for label, name in labels.items())]
    console().print("Hidden states with an image, and without")
    console().print(rich_table([*table, ["pairs", str(summary["pairs"])]]))
