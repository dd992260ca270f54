# SPDX-License-Identifier: Apache-2.0
"""`agevlm scenes`, `agevlm masks` and the commands of `agevlm data`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..files import new_file
from ..terminal import console, say, say_saved
from .options import check_figure, check_folder, parse_names, parse_numbers

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..data.check import Report
    from ..data.mixture import DataPart
    from ..processing.collator import AgeVlmDataCollator

# The number of bad rows that `data check` prints.
_MAX_BAD_ROWS = 20


def scenes(
    cutouts: Annotated[Path, typer.Option(help="Folder of cut-outs: RGBA images, named by their class.")],
    backgrounds: Annotated[Path, typer.Option(help="Folder of photographs, at least three.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set; must not exist yet.")],
    train: Annotated[int, typer.Option(help="Scenes in the split train.")] = 3000,
    validation: Annotated[int, typer.Option(help="Scenes in the split validation.")] = 300,
    test: Annotated[int, typer.Option(help="Scenes in the split test.")] = 300,
    image_size: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 256,
    max_objects: Annotated[int, typer.Option(help="Most classes in a scene.")] = 4,
    questions_per_scene: Annotated[int, typer.Option(help="Most existence questions about a scene.")] = 8,
    classes: Annotated[str | None, typer.Option(help="Class names with commas between them; by default all.")] = None,
    zero_shot: Annotated[
        int, typer.Option(help="Scenes in the split zero_shot, of classes that no other split shows; by default none.")
    ] = 0,
    zero_shot_classes: Annotated[
        int, typer.Option(help="Number of classes reserved for the split zero_shot: more than --max-objects.")
    ] = 0,
    cooccurrence: Annotated[
        float,
        typer.Option(
            help="From 0 (all classes equally frequent and independent) to 1: the inequality of the classes' frequencies, "
            "and the probability that an object comes with a companion. Above 0, POPE's popular and adversarial questions "
            "are asked too."
        ),
    ] = 0.0,
    object_size: Annotated[
        str,
        typer.Option(help="Least and greatest longer side of an object relative to the image's side, at most 0.5."),
    ] = "0.18,0.38",
    min_visible: Annotated[
        float, typer.Option(help="Share of its pixels that each object keeps visible, above 0 and up to 1.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Each seed gives other scenes.")] = 0,
) -> None:
    """Build a grounded-scenes data set: cut-outs on photographs, with questions, answers and exact masks."""
    from ..data.scene_builder import build_scenes

    sizes = parse_numbers(object_size, "--object-size", float) or []
    if len(sizes) != 2:
        raise ValueError(f"--object-size must be two numbers, as 0.18,0.38, got '{object_size}'.")
    splits = build_scenes(
        cutouts,
        backgrounds,
        out,
        num_train=train,
        num_validation=validation,
        num_test=test,
        num_zero_shot=zero_shot,
        image_size=image_size,
        max_objects=max_objects,
        questions_per_scene=questions_per_scene,
        classes=parse_names(classes),
        zero_shot_classes=zero_shot_classes,
        cooccurrence=cooccurrence,
        object_size=(sizes[0], sizes[1]),
        min_visible=min_visible,
        seed=seed,
    )
    rows = ", ".join(f"{len(split)} in {name}" for name, split in splits.items())
    say_saved(out, f"{rows} (rows; each is a conversation).")


def masks(
    dataset: Annotated[Path, typer.Argument(help="Grounding data set: a folder that `save_to_disk` wrote.")],
    teacher: Annotated[
        str, typer.Option(help="sam or grabcut (from boxes), sam3 (from phrases) or grounded-sam (both).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the data set with masks; must not exist yet.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="SAM's .pth file; for sam3 a folder or Hub id; none for grabcut.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Folder or Hub id of grounded-sam's detector: a Grounding DINO or OWL.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least score of an instance (sam3) or box (grounded-sam).")
    ] = None,
    min_score: Annotated[float, typer.Option(help="Least score of a mask.")] = 0.0,
    overwrite: Annotated[bool, typer.Option(help="Replace existing masks.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images that are encoded together.")] = 8,
    save_every: Annotated[int, typer.Option(help="Number of rows after which work is saved.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the models' numbers.")
    ] = "float32",
    preview: Annotated[
        Path | None, typer.Option(help="Figure to write: some rows with their masks.", callback=check_figure)
    ] = None,
) -> None:
    """Add masks from Segment Anything or GrabCut to a grounding data set. Stopped, the same command resumes."""
    import datasets
    import torch

    from ..data.masks import add_masks
    from ..data.teachers import load_teacher, process_state
    from ..files import check_new_folder
    from ..plots import draw_masks

    check_new_folder(out)  # before the models are loaded
    rows, told = _read_saved(dataset)
    masked, outcomes = add_masks(
        rows,
        load_teacher(
            teacher,
            checkpoint,
            detector=detector,
            threshold=threshold,
            device=device,
            dtype=getattr(torch, dtype),
        ),
        out,
        batch_size=batch_size,
        min_score=min_score,
        overwrite=overwrite,
        save_every=save_every,
        **told,
    )
    if not process_state().is_main_process:
        return
    say_saved(
        out,
        f"of {outcomes.total()} phrases {outcomes['masked']} have a new mask, "
        f"{outcomes['rejected']} have none (nothing found, or below --min-score {min_score}), {outcomes['kept']} had one, "
        f"{outcomes['skipped']} have no box.",
    )
    if preview is not None:
        draw_masks(next(iter(masked.values())) if isinstance(masked, datasets.DatasetDict) else masked, preview)


def _read_saved(folder: Path) -> "tuple[Dataset | DatasetDict, dict[str, Any]]":
    """The data set of a folder, and what a data set made from it carries on: `attribution` and `provenance`."""
    from ..data.readers import read_saved
    from ..provenance import describe, read_provenance

    rows, attribution = read_saved(folder), folder / "ATTRIBUTION.md"
    return rows, {
        "attribution": attribution.read_text(encoding="utf-8") if attribution.is_file() else None,
        "provenance": read_provenance(folder) or {"sources": [{"role": "rows", **describe(folder, "data set")}]},
    }


def check(
    path: Annotated[str, typer.Argument(help="Data: folder, file, address or Hub id; or a recipe, a .yaml file.")],
    split: Annotated[str | None, typer.Option(help="The split, if there are several.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub that has several.")] = None,
    format: Annotated[str, typer.Option(help="The format, as in a recipe.")] = "rows",
    images: Annotated[
        str | None, typer.Option(help="Folder or archive of a published data set's images, or its address.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="AGE-VLM checkpoint: folder or Hub id. Each row then also goes through the code that training runs, with its "
            "processor, and is bad if and only if training would stop at it. A recipe's own by default."
        ),
    ] = None,
    allow_urls: Annotated[
        bool,
        typer.Option("--allow-urls", help="Fetch images that the data name by a URL, from public addresses only."),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="JSON file to write: the counts and every problem.", callback=check_folder)
    ] = None,
) -> None:
    """Check the format, phrases and images of every row of a data set, or of a recipe's. Exit code 1: bad rows."""
    from dataclasses import asdict

    from ..data.check import check_part
    from ..data.mixture import DataPart

    if Path(path).suffix in (".yaml", ".yml"):
        if split or name or images or format != "rows":
            raise ValueError("A recipe says the format, split and images of its data: leave these options out.")
        parts = _recipe_parts(path, model, allow_urls)
    else:
        collator = None
        if model is not None:
            from ..hub import load_processor
            from ..processing.collator import AgeVlmDataCollator

            collator = AgeVlmDataCollator(load_processor(model), grid=(1, 1), allow_urls=allow_urls)
        parts = [(DataPart(path, name=name, split=split, format=format, images=images), collator)]
    checked = [(part.path, check_part(part, collator=check, allow_urls=allow_urls)) for part, check in parts]
    if report is not None:
        reports = [{"path": name, **asdict(result)} for name, result in checked]
        written = json.dumps(reports[0] if len(reports) == 1 else reports, indent=1, ensure_ascii=False)
        with new_file(report) as partial:
            partial.write_text(written + "\n", encoding="utf-8")
    for name, result in checked:
        _print_report(result, name if len(checked) > 1 else None, report)
    if any(result.bad_rows for _, result in checked):
        raise typer.Exit(1)


def _recipe_parts(
    recipe: str, model: str | None, allow_urls: bool
) -> "list[tuple[DataPart, AgeVlmDataCollator | None]]":
    """The parts of a recipe's data, each once for each way of training on it, and what collates their rows."""
    from dataclasses import replace

    from ..hub import load_processor
    from ..trainer.bad_rows import row_collator
    from ..trainer.recipe import load_recipe, training_arguments

    loaded = load_recipe(recipe)
    processor = load_processor(model or loaded.model)
    found: dict[str, tuple[DataPart, AgeVlmDataCollator | None]] = {}
    for stage in loaded.split():
        collator = row_collator(processor, training_arguments(stage))
        collator.allow_urls |= allow_urls
        for part in (*stage.data, *stage.eval_data):
            # All rows are checked, however often they are seen and whatever becomes of bad ones.
            part = replace(part, rows=None, weight=None, weight_by=None, on_bad_row="error")
            found.setdefault(repr((part, {**vars(collator), "processor": None})), (part, collator))
    return list(found.values())


def _print_report(checked: "Report", title: str | None, report: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    terminal = console()
    counts = Table(show_header=False, title=None if title is None else Text(title), title_justify="left")
    notes = {problem.row for problem in checked.problems if problem.severity == "note"}
    for label, number in (
        ("rows", checked.rows),
        ("rows with grounding", checked.rows_with_grounding),
        ("phrases", checked.phrases),
        ("phrases with a mask", checked.phrases_with_mask),
        ("phrases with a box", checked.phrases_with_box),
        ("phrases of absent objects", checked.phrases_absent),
        ("phrases dropped at training: their teacher was not sure", checked.phrases_dropped),
        ("rows with notes, which --report lists", len(notes)),
        ("bad rows", checked.bad_rows),
    ):
        counts.add_row(Text(label), f"{number}")
    terminal.print(counts)
    bad: dict[int | None, list[str]] = {}
    for problem in checked.problems:
        if problem.severity == "error":
            bad.setdefault(problem.row, []).append(f"{problem.where} {problem.message}")
    if not bad:
        terminal.print("No bad rows.", style="green")
        return
    table = Table("row", "problem")
    for row, problems in list(bad.items())[:_MAX_BAD_ROWS]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        table.add_row(f"{row}", Text(problems[0] + more))
    terminal.print(table)
    if len(bad) > _MAX_BAD_ROWS:
        say(f"and {len(bad) - _MAX_BAD_ROWS} more bad rows; see {report or '--report'}")


def convert(
    path: Annotated[str, typer.Argument(help="File or folder of the annotations, or its address.")],
    format: Annotated[str, typer.Option(help="The format that the data set is published in, as in a recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set; must not exist yet.")],
    images: Annotated[
        str | None,
        typer.Option(help="Folder or archive of the images, or its address; by default beside the annotations."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split, where the format has several.")] = None,
    num_proc: Annotated[
        int | None, typer.Option(help="Number of processes; by default one for each processor.")
    ] = None,
    on_bad_row: Annotated[
        Literal["error", "skip"], typer.Option(help="Stop at the first bad entry, or leave them out and count them.")
    ] = "error",
) -> None:
    """Convert a published data set to rows that hold their images. Stopped, the same command resumes."""
    import pyarrow.compute as pc

    from ..data.download import local
    from ..data.formats import open_source
    from ..data.prepared import convert_source
    from ..files import check_new_folder

    check_new_folder(out)  # before anything is downloaded
    source = open_source(format, local(path), None if images is None else local(images), split)
    converted = convert_source(
        source, out, on_bad_row=on_bad_row, num_proc=os.cpu_count() if num_proc is None else num_proc
    )
    rows = converted.dataset
    num_images, num_phrases = (
        pc.sum(pc.list_value_length(rows.data.column(name))).as_py() for name in ("images", "grounding")
    )
    left_out = f" Left out: {converted.describe_bad()}." if converted.bad else ""
    say_saved(out, f"{len(rows)} rows, {num_images} images, {num_phrases} grounded phrases.{left_out}")


def phrases(
    dataset: Annotated[Path, typer.Argument(help="Data set with images: a folder that `save_to_disk` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set with phrases; must not exist yet.")],
    chunker: Annotated[
        Literal["rules", "spacy"], typer.Option(help="rules: English, without a model; spacy: a model of spaCy.")
    ] = "rules",
    spacy_model: Annotated[
        str, typer.Option(help="Name or folder of the model for --chunker spacy.")
    ] = "en_core_web_sm",
    roles: Annotated[Literal["all", "user", "assistant"], typer.Option(help="Whose texts get phrases.")] = "all",
    max_phrases: Annotated[int | None, typer.Option(help="Most new phrases of a row; by default all.")] = None,
    num_proc: Annotated[int | None, typer.Option(help="Processes that share the work; by default one.")] = None,
    preview: Annotated[int, typer.Option(help="Number of texts to print with their phrases in brackets.")] = 5,
) -> None:
    """Add the phrases of captions and conversations to a data set, for `agevlm masks` with sam3 or grounded-sam."""
    import datasets

    from ..data.phrases import SpacyChunker, add_phrases, find_phrases, preview_phrases
    from ..files import check_new_folder

    check_new_folder(out)  # before a model is loaded
    rows, told = _read_saved(dataset)
    labeled, counts = add_phrases(
        rows,
        find_phrases if chunker == "rules" else SpacyChunker(spacy_model),
        out,
        roles=("user", "assistant") if roles == "all" else (roles,),
        max_phrases=max_phrases,
        num_proc=num_proc,
        **told,
    )
    for text in preview_phrases(
        next(iter(labeled.values())) if isinstance(labeled, datasets.DatasetDict) else labeled, preview
    ):
        say(text)
    say_saved(
        out,
        f"{counts['phrases']} new phrases in {counts['labeled']} of {counts['rows']} rows, {counts['kept']} were there. "
        f"Without new ones: {counts['text_only']} rows without an image, {counts['several_images']} with several (which one a "
        f"phrase names is unknown), {counts['invalid']} invalid (see `agevlm data check`).",
    )


def prepare(
    recipe: Annotated[Path, typer.Argument(help="YAML file, such as those in examples/recipes.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace values, as for `agevlm train`."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="AGE-VLM whose processor and configuration to prepare with: for a later stage, whose own model does not exist yet, "
            "that of the first. The recipe's own by default."
        ),
    ] = None,
    num_proc: Annotated[
        int | None, typer.Option(help="Number of processes; by default one for each processor.", min=1)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, with a readable .md beside it; by default prepared.json in training.output_dir.",
            callback=check_folder,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that will train.", min=1)] = 1,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(help="Peak of one of them in TFLOPs a second; by default that of an H100 in bfloat16."),
    ] = None,
    utilization: Annotated[
        float | None, typer.Option(help="Share of the peak that training reaches, above 0 and up to 1.")
    ] = None,
) -> None:
    """Download, convert and check all data of a recipe, and say what training will take. Stopped, it resumes. Exit code 1: bad rows."""
    from ..trainer.estimate import GPU_TFLOPS, UTILIZATION
    from ..trainer.prepare import prepare_recipe

    prepared = prepare_recipe(
        recipe,
        overrides or (),
        model=model,
        num_proc=num_proc,
        report=report,
        gpus=gpus,
        gpu_tflops=GPU_TFLOPS if gpu_tflops is None else gpu_tflops,
        utilization=UTILIZATION if utilization is None else utilization,
    )
    prepared.print()
    if prepared.bad_rows:
        raise typer.Exit(1)
