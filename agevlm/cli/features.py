# SPDX-License-Identifier: Apache-2.0
"""`agevlm features`."""

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import say_saved


def features(
    recipe: Annotated[Path, typer.Argument(help="YAML file whose `features` names the folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace values: features=outputs/features data.0.path=my_rows"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that go through the vision tower together.", min=1)] = 16,
) -> None:
    """Compute a frozen vision tower's features of a recipe's images, once for all steps. Run again, it adds what is missing."""
    from ..trainer.recipe import cache_features

    for folder, store in cache_features(recipe, overrides or (), batch_size=batch_size).items():
        say_saved(folder, f"features of {len(store)} images.")
