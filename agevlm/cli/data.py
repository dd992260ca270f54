# SPDX-License-Identifier: Apache-2.0
"""`agevlm scenes`, `agevlm masks`, `agevlm data …`: making, masking, checking and converting grounding data."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .options import parse_names, parse_numbers

# Bad rows that `data check` prints.
_BAD_ROWS_SHOWN = 20


def scenes(
    cutouts: Annotated[Path, typer.Option(help="Folder of cut-outs: RGBA images named after what they show.")],
    backgrounds: Annotated[Path, typer.Option(help="Folder of photographs, at least three.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set; must not exist yet.")],
    train: Annotated[int, typer.Option(help="Scenes in the split train.")] = 3000,
    validation: Annotated[int, typer.Option(help="Scenes in the split validation.")] = 300,
    test: Annotated[int, typer.Option(help="Scenes in the split test.")] = 300,
    image_size: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 256,
    max_objects: Annotated[int, typer.Option(help="Most classes in a scene.")] = 4,
    questions_per_scene: Annotated[int, typer.Option(help="Most existence questions about a scene.")] = 8,
    classes: Annotated[str | None, typer.Option(help="Class names with commas between them; all by default.")] = None,
    zero_shot: Annotated[
        int, typer.Option(help="Scenes in the split zero_shot, of classes that no other split shows; none by default.")
    ] = 0,
    zero_shot_classes: Annotated[
        int, typer.Option(help="How many of the classes are kept for the split zero_shot: more than --max-objects.")
    ] = 0,
    cooccurrence: Annotated[
        float,
        typer.Option(
            help="From 0 to 1: how much more frequent some classes are than others, and how often an object brings a "
            "companion. Above 0, POPE's popular and adversarial questions are asked too."
        ),
    ] = 0.0,
    object_size: Annotated[
        str,
        typer.Option(help="Least and greatest longer side of an object, in parts of the image's side, at most 0.5."),
    ] = "0.18,0.38",
    min_visible: Annotated[
        float, typer.Option(help="Part of its pixels that each object keeps visible, above 0 and up to 1.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Other seeds give other scenes.")] = 0,
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
    Console().print(f"[green]Saved[/green] {out}: {rows} (rows, one a conversation).")


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
    overwrite: Annotated[bool, typer.Option(help="Replace masks that are there already.")] = False,
    box_jitter: Annotated[
        float | None,
        typer.Option(
            help="For data with exact masks: ask the teacher from boxes around these, each side moved by up to this part "
            "of the box (0.1), and print how good its masks are."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that are encoded together.")] = 8,
    save_every: Annotated[int, typer.Option(help="Rows after which work is saved.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    preview: Annotated[Path | None, typer.Option(help="PNG to write: some rows with their masks.")] = None,
) -> None:
    """Add masks from Segment Anything or GrabCut to a grounding data set. Run again, it goes on where it stopped."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    if preview is not None and not preview.absolute().parent.is_dir():
        raise ValueError(f"--preview {preview}: there is no folder {preview.absolute().parent}.")
    if not any((dataset / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise FileNotFoundError(f"{dataset} is not a data set that `save_to_disk` of Hugging Face datasets wrote.")

    import datasets
    import torch

    from research.mask_quality import boxes_from_masks, mask_quality

    from ..data.masks import add_masks
    from ..data.teachers import load_teacher
    from ..files import check_new_folder
    from ..plots import draw_masks

    check_new_folder(out)  # before the models are loaded
    attribution = dataset / "ATTRIBUTION.md"
    given = datasets.load_from_disk(dataset)
    loaded, outcomes = add_masks(
        given if box_jitter is None else boxes_from_masks(given, box_jitter),
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
        attribution=attribution.read_text(encoding="utf-8") if attribution.is_file() else None,
    )
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    Console().print(
        f"[green]Saved[/green] {out}: of {outcomes.total()} phrases {outcomes['masked']} got a mask, "
        f"{outcomes['refused']} did not (nothing found, or below --min-score {min_score}), {outcomes['kept']} had one, "
        f"{outcomes['not asked']} have no box to start from."
    )
    if box_jitter is not None:
        from rich.table import Table

        table = Table("split", "phrases", "without a mask", "mean IoU", "median IoU", "IoU below 0.5")
        splits = given.keys() if isinstance(given, datasets.DatasetDict) else [None]
        for split in splits:
            quality = mask_quality(*((loaded, given) if split is None else (loaded[split], given[split])))
            table.add_row(
                split or "",
                f"{quality.phrases}",
                f"{quality.without_mask}",
                f"{quality.mean_iou:.3f}",
                f"{quality.median_iou:.3f}",
                f"{quality.below_half:.1%}",
            )
        Console().print(table)
    if preview is not None:
        draw_masks(next(iter(loaded.values())) if isinstance(loaded, datasets.DatasetDict) else loaded, preview)


def check(
    path: Annotated[str, typer.Argument(help="Data set: folder, .json, .jsonl or .parquet file, or Hub id.")],
    split: Annotated[str | None, typer.Option(help="Which split, where there are several.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file to write: the counts and every problem.")] = None,
) -> None:
    """Check every row of a data set: its form, its phrases, and that its images can be read. Exit code 1: bad rows."""
    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"--report {report}: there is no folder {report.absolute().parent}.")

    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from ..data.check import check_dataset
    from ..data.readers import read_json_rows, read_rows

    as_is = Path(path).suffix in (".json", ".jsonl") and split in (None, "train")
    found = check_dataset(read_json_rows(path) if as_is else read_rows(path, split))
    if report is not None:
        report.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    console = Console()
    counts = Table(show_header=False)
    for label, number in (
        ("rows", found.rows),
        ("rows with grounding", found.rows_with_grounding),
        ("phrases", found.phrases),
        ("phrases with a mask", found.phrases_with_mask),
        ("phrases with a box", found.phrases_with_box),
        ("phrases of something that is not there", found.phrases_absent),
        ("phrases dropped at training, their teacher was not sure", found.phrases_dropped),
        ("bad rows", found.bad_rows),
    ):
        counts.add_row(label, f"{number}")
    console.print(counts)
    bad: dict[int | None, list[str]] = {}
    for problem in found.problems:
        if problem.severity == "error":
            bad.setdefault(problem.row, []).append(f"{problem.where} {problem.message}")
    if not bad:
        console.print("[green]No bad rows.[/green]")
        return
    table = Table("row", "problem")
    for row, problems in list(bad.items())[:_BAD_ROWS_SHOWN]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        table.add_row(f"{row}", Text(problems[0] + more))
    console.print(table)
    if len(bad) > _BAD_ROWS_SHOWN:
        console.print(f"and {len(bad) - _BAD_ROWS_SHOWN} more bad rows; see {report or '--report'}", markup=False)
    raise typer.Exit(1)


def convert(
    file: Annotated[Path, typer.Argument(help=".json or .jsonl file.")],
    format: Annotated[
        Literal["llava", "grit"], typer.Option(help="llava: conversations; grit: captions with boxes (Kosmos-2).")
    ],
    images: Annotated[Path, typer.Option(help="Folder that the paths of images start from.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set; must not exist yet.")],
) -> None:
    """Convert a LLaVA or GRIT file to a data set that holds its images."""
    from ..data import readers

    rows = readers.convert(file, images, out, format=format)
    import pyarrow.compute as pc

    pictures, phrases = (
        pc.sum(pc.list_value_length(rows.data.column(name))).as_py() for name in ("images", "grounding")
    )
    Console().print(f"[green]Saved[/green] {out}: {len(rows)} rows, {pictures} images, {phrases} grounded phrases.")
