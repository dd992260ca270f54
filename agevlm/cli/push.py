# SPDX-License-Identifier: Apache-2.0
"""`agevlm push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import console, say

if TYPE_CHECKING:
    from ..hub_cards.push import Push


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Checkpoint with its processor, PEFT adapter, or data set.")
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or NAME alone for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Remove all that the repository has and DIR does not have. Without it, a repository with other content is "
            "refused.",
        ),
    ] = False,
    delta: Annotated[
        bool,
        typer.Option(
            "--delta", help="Push what was trained, some megabytes, and name the parts; loading it needs agevlm."
        ),
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or file of `agevlm eval` for the model's card, beside those in DIR; may be given several times."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would go up, be left out and be removed, and the card.")
    ] = False,
) -> None:
    """Push a checkpoint or a data set to the Hugging Face Hub, with its card, in one commit and without pickles."""
    from ..hub_cards.push import push as push_folder

    done = push_folder(
        folder, repo_id, private=private, replace_content=replace, delta=delta, results=results or (), dry_run=dry_run
    )
    _report(done, dry_run)


def _report(done: "Push", dry_run: bool) -> None:
    from huggingface_hub import RepoCard
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    for path, size in done.sizes.items():
        table.add_row(_in_bytes(size), path)
    left_out: dict[tuple[str, str], list[str]] = {}
    for path, why in done.left_out.items():
        left_out.setdefault((path.split("/")[0], why), []).append(path)
    for (folder, why), paths in left_out.items():
        table.add_row("left out", f"{paths[0] if len(paths) == 1 else f'{folder}/ ({len(paths)} files)'}: {why}")
    for path in done.removed:
        table.add_row("removed", f"{path}: of a former push")
    for path, note in done.notes.items():
        table.add_row("note", f"{path}: {note}")
    console().print(table)
    total = f"{len(done.sizes)} files, {_in_bytes(sum(done.sizes.values()))}"
    if not dry_run:
        say(f"Pushed {total} to {done.repo_id}: {done.url}")
        return
    say(f"\nThe card's metadata:\n{RepoCard(done.card, ignore_metadata_errors=True).data.to_yaml()}\n")
    known = {"new": "would be made", "exists": "exists"}.get(done.repository, "was not asked for")
    say(f"{total}. Nothing was sent: the repository {done.repo_id} {known}.")
    if known == "was not asked for":
        say(done.repository)


def _in_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
