# SPDX-License-Identifier: Apache-2.0
"""The command line, `agevlm`. Each command is a thin coat over one public function."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(
    help="AGE-VLM: vision-language models that are taught where to look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Check and convert grounding data.", no_args_is_help=True)
app.add_typer(data, name="data")
evaluation = typer.Typer(help="Evaluate models on benchmarks.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")

# Bad rows that `data check` prints.
_BAD_ROWS_SHOWN = 20


@app.callback()
def _commands() -> None:
    pass


def _parse_json(text: str | None, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{option} is not JSON ({error}): write for example '{{\"features_only\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text}.")
    return value


def _parse_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _parse_numbers(text: str | None, option: str, kind: type) -> list | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers with commas between them, got '{text}'.") from error


@app.command()
def build(
    text: Annotated[str, typer.Option(help="Llama-architecture checkpoint: folder, Hub id, or .gguf file.")],
    vision: Annotated[
        str, typer.Option(help="Vision backbone: folder or Hub id, or with --vision-weights a timm name.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist yet.")],
    vision_weights: Annotated[
        Path | None, typer.Option(help="Weight file of the timm model named by --vision.")
    ] = None,
    vision_args: Annotated[
        str | None,
        typer.Option(help='JSON for timm.create_model, as \'{"features_only": true, "out_indices": [3]}\'.'),
    ] = None,
    image_token: Annotated[
        str | None, typer.Option(help="Special token of the tokenizer that stands for an image.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side in pixels of the square that images are fitted into.")] = 768,
    image_mean: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    image_std: Annotated[
        str | None, typer.Option(help="By channel, as 0.5,0.5,0.5; the backbone's own by default.")
    ] = None,
    cross_attention_layers: Annotated[
        str | None, typer.Option(help="Merged indices of the blocks, as 2,7,12,17; four spread evenly by default.")
    ] = None,
    visual_position_embedding: Annotated[
        bool, typer.Option(help="Add a fixed 2-D position signal to the visual tokens.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Assemble an AGE-VLM from a Llama and a vision backbone, and save it with its processor."""
    numbers = {
        "image_mean": _parse_numbers(image_mean, "--image-mean", float),
        "image_std": _parse_numbers(image_std, "--image-std", float),
    }
    layers = _parse_numbers(cross_attention_layers, "--cross-attention-layers", int)
    timm_args = _parse_json(vision_args, "--vision-args")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got '{dtype}'.")

    from .assembly import build_checkpoint, load_timm

    vision_model: Any = vision
    if vision_weights is not None:
        vision_model = load_timm(vision, vision_weights, **timm_args)
        if dtype != "auto":
            import torch

            vision_model.to(getattr(torch, dtype))
    elif timm_args:
        raise ValueError("--vision-args goes with --vision-weights: other backbones bring their own configuration.")
    model, processor = build_checkpoint(
        text,
        vision_model,
        out,
        image_token=image_token,
        image_size=image_size,
        dtype=dtype,
        visual_position_embedding=visual_position_embedding,
        **({} if layers is None else {"cross_attention_layers": layers}),
        **numbers,
    )
    config = model.config.text_config
    added = sum(
        p.numel()
        for layer in model.model.language_model.layers
        if layer.cross_attn
        for p in layer.cross_attn.parameters()
    )
    Console().print(
        f"[green]Saved[/green] {out}: {config.num_hidden_layers} Llama layers, cross-attention before layers "
        f"{', '.join(map(str, config.cross_attention_llama_layers))} ({added / 1e6:.1f} M parameters), "
        f"image token {processor.image_token}."
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a stage, such as those in examples/recipes.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace values: training.max_steps=100 data.0.path=my_rows"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
) -> None:
    """Train a stage as its recipe says. On several GPUs: accelerate launch $(which agevlm) train …"""
    from .trainer import recipes

    recipes.train(recipes.load_recipe(recipe, overrides or ()), resume)


@app.command()
def ablate(
    model: Annotated[Path, typer.Option(help="Folder of an assembled AGE-VLM, as of `agevlm build`.")],
    data: Annotated[Path, typer.Option(help="Folder of grounded scenes that `agevlm scenes` has written.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the runs and the report; a run that was stopped goes on in it.")
    ],
    topics: Annotated[
        str | None, typer.Option(help="What to ablate, as loss,gate; all by default. A wrong name lists them.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Whole numbers with commas between them.")] = "0,1",
    steps: Annotated[int, typer.Option(help="Optimiser steps of all stages together.", min=4)] = 200,
    max_questions: Annotated[int, typer.Option(help="Asked of each kind, in each split.", min=1)] = 300,
    guidance_weight: Annotated[float, typer.Option(help="Weight of the guidance loss.", min=0)] = 1.0,
    workers: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a model in many ways on grounded scenes and compare them: stages, losses, gates, places of the blocks, …"""
    import shlex

    numbers = _parse_numbers(seeds, "--seeds", int) or []

    from .evaluation import experiments

    tables = experiments.ablate(
        model,
        data,
        out,
        command=shlex.join(["agevlm", *sys.argv[1:]]),
        topics=_parse_names(topics),
        seeds=numbers,
        steps=steps,
        max_questions=max_questions,
        guidance_weight=guidance_weight,
        workers=workers,
        device=device,
    )
    Console().print(tables)
    Console().print(f"[green]Saved[/green] {out / 'report'}: report.md, its figures, and results.json.")


def _check_question(question: str) -> str:
    """The question without spaces at its ends, which chat templates may cut off."""
    if not question.strip():
        raise ValueError("The question is empty: write what you want to know about the image.")
    return question.strip()


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the image.")],
    model: Annotated[str, typer.Option(help="AGE-VLM checkpoint: folder or Hub id.")],
    image: Annotated[str, typer.Option(help="Image file or URL.")],
    heatmap: Annotated[
        Path | None, typer.Option(help="PNG to write: where --phrase looks, for each cross-attention block.")
    ] = None,
    phrase: Annotated[
        str | None,
        typer.Option(
            help="Words of the question whose attention --heatmap shows, the last place where they occur; all by default."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
) -> None:
    """Ask a question about an image."""
    from .evaluation.attention_maps import (
        block_titles,
        check_cross_attention,
        draw_heatmaps,
        find_phrase,
        phrase_maps,
    )

    question = _check_question(question)
    if phrase is not None:
        find_phrase(question, phrase)
    if phrase is not None and heatmap is None:
        raise ValueError("--phrase says what --heatmap shows: name the PNG to write with --heatmap.")
    if heatmap is not None and not heatmap.absolute().parent.is_dir():
        raise ValueError(f"--heatmap {heatmap}: there is no folder {heatmap.absolute().parent}.")

    from transformers import AutoConfig

    from .evaluation.answering import Question, load_model, render_question, reply_greedily
    from .processing.image_processing_agevlm import load_image

    picture = load_image(image).convert("RGB")
    if heatmap is not None:
        check_cross_attention(AutoConfig.from_pretrained(model), model)
    vlm, processor = load_model(model)
    asked = Question("question", lambda: picture, question)
    answer = reply_greedily(vlm, processor, [asked], max_new_tokens)[0]["answer"]
    Console().print(answer, markup=False)
    if heatmap is not None:
        text = render_question(processor, question)
        start, end = find_phrase(text, question)
        if phrase is not None:
            offset, start = start, find_phrase(question, phrase)[0]
            start, end = offset + start, offset + start + len(phrase)
        maps = phrase_maps(vlm, processor, text, picture, [(start, end)])[:, 0]
        draw_heatmaps(
            picture, maps, block_titles(vlm), heatmap, caption=f"{question}  {answer}    [{phrase or question}]"
        )


@app.command()
def attention(
    question: Annotated[str, typer.Argument(help="What to ask about the image.")],
    model: Annotated[str, typer.Option(help="AGE-VLM checkpoint: folder or Hub id.")],
    image: Annotated[str, typer.Option(help="Image file or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for attention.png and attention.json; must not exist yet.")],
    answer: Annotated[str | None, typer.Option(help="An answer to look into; by default, the model's own.")] = None,
    phrase: Annotated[
        list[str] | None,
        typer.Option(
            help="Words of the answer or, if they do not occur there, of the question; where they occur several times, the "
            "last one. May be repeated; every word of the answer by default."
        ),
    ] = None,
    predicting: Annotated[
        bool,
        typer.Option(
            "--predicting",
            help="Show what the model looks at while it chooses the answer's words (one token earlier), rather than "
            "once it has read them.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer of the model, in tokens.", min=1)] = 64,
) -> None:
    """Show where words of a question and its answer look in an image: heat maps by block and averaged."""
    from ._files import check_new_folder
    from .evaluation.attention_maps import attend, check_cross_attention, choose_phrases

    question = _check_question(question)
    if answer is not None:
        choose_phrases(question, answer, phrase or None)
    check_new_folder(out)  # before the model is loaded

    from transformers import AutoConfig

    from .evaluation.answering import load_model
    from .processing.image_processing_agevlm import load_image

    picture = load_image(image).convert("RGB")
    check_cross_attention(AutoConfig.from_pretrained(model), model)
    vlm, processor = load_model(model)
    looked = attend(
        vlm, processor, picture, question, answer, phrase or None, predicting=predicting, max_new_tokens=max_new_tokens
    )
    looked.save(out, model=model, image=image, generated=answer is None, predicting=predicting)
    Console().print(looked.answer.strip(), markup=False)
    Console().print(f"[green]Saved[/green] {out}: attention.png, attention.json ({len(looked.phrases)} phrases).")


@app.command()
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
    from ._files import check_new_folder, new_folder
    from .evaluation import similarity as similarities
    from .evaluation.answering import load_model
    from .processing.readers import read_rows

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


@app.command()
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
    from .processing.scenes import build_scenes

    sizes = _parse_numbers(object_size, "--object-size", float) or []
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
        classes=_parse_names(classes),
        zero_shot_classes=zero_shot_classes,
        cooccurrence=cooccurrence,
        object_size=(sizes[0], sizes[1]),
        min_visible=min_visible,
        seed=seed,
    )
    rows = ", ".join(f"{len(split)} in {name}" for name, split in splits.items())
    Console().print(f"[green]Saved[/green] {out}: {rows} (rows, one a conversation).")


@app.command()
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

    from ._files import check_new_folder
    from .processing.masks import add_masks, boxes_from_masks, draw_masks, load_teacher, mask_quality

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


@data.command()
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

    from .processing.grounding import check_dataset
    from .processing.readers import read_json_rows, read_rows

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


@data.command()
def convert(
    file: Annotated[Path, typer.Argument(help=".json or .jsonl file.")],
    format: Annotated[
        Literal["llava", "grit"], typer.Option(help="llava: conversations; grit: captions with boxes (Kosmos-2).")
    ],
    images: Annotated[Path, typer.Option(help="Folder that the paths of images start from.")],
    out: Annotated[Path, typer.Option(help="Folder for the data set; must not exist yet.")],
) -> None:
    """Convert a LLaVA or GRIT file to a data set that holds its images."""
    from .processing import readers

    rows = readers.convert(file, images, out, format=format)
    import pyarrow.compute as pc

    pictures, phrases = (
        pc.sum(pc.list_value_length(rows.data.column(name))).as_py() for name in ("images", "grounding")
    )
    Console().print(f"[green]Saved[/green] {out}: {len(rows)} rows, {pictures} images, {phrases} grounded phrases.")


@evaluation.command()
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
    from .evaluation.pope import evaluate_pope

    _, table = evaluate_pope(
        model,
        out,
        data,
        images,
        categories=_parse_names(categories),
        limit=limit,
        prompt_suffix=prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    Console().print(table)


@evaluation.command()
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
    from .evaluation.cv_bench import PROMPT_SUFFIX, evaluate_cv_bench

    _, table = evaluate_cv_bench(
        model,
        out,
        data,
        images,
        tasks=_parse_names(tasks),
        limit=limit,
        prompt_suffix=PROMPT_SUFFIX if prompt_suffix is None else prompt_suffix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    Console().print(table)


@evaluation.command("scenes")
def eval_scenes(
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
    from .evaluation.scene_benchmark import evaluate_scene_benchmark

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


def main() -> None:
    """Entry point: a user's mistake ends in a message and exit code 2, never in a traceback."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        app()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        Console(stderr=True).print(
            f"[red]agevlm: error:[/red] {type(error).__name__ if not str(error) else ''}", end=""
        )
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("agevlm: interrupted", file=sys.stderr)
        sys.exit(130)
