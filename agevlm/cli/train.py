# SPDX-License-Identifier: Apache-2.0
"""`agevlm train`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .options import parse_names, parse_numbers


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a stage, such as those in examples/recipes.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace values: training.max_steps=100 data.0.path=my_rows"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
) -> None:
    """Train a stage as its recipe says. On several GPUs: accelerate launch $(which agevlm) train …"""
    from ..trainer import recipe as recipes

    recipes.train(recipes.load_recipe(recipe, overrides or ()), resume)


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

    numbers = parse_numbers(seeds, "--seeds", int) or []

    from research import runs as experiments

    tables = experiments.ablate(
        model,
        data,
        out,
        command=shlex.join(["agevlm", *sys.argv[1:]]),
        topics=parse_names(topics),
        seeds=numbers,
        steps=steps,
        max_questions=max_questions,
        guidance_weight=guidance_weight,
        workers=workers,
        device=device,
    )
    Console().print(tables)
    Console().print(f"[green]Saved[/green] {out / 'report'}: report.md, its figures, and results.json.")
