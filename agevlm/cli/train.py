# SPDX-License-Identifier: Apache-2.0
"""`agevlm train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, such as those in examples/recipes.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace values: training.max_steps=100 data.0.path=my_rows"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue where a run of the same recipe stopped, at any stage and step.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="With --resume: go on with other settings than the checkpoint's."),
    ] = False,
) -> None:
    """Train as a recipe says, in one stage or several. On several GPUs: accelerate launch $(which agevlm) train …"""
    from ..trainer.recipe import train

    train(recipe, overrides or (), resume=resume, accept_changes=accept_changes)
