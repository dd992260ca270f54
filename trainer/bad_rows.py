# SPDX-License-Identifier: Apache-2.0
"""Bad rows of a recipe's data: what `on_bad_row: skip` leaves out before training, and how all rows are checked beforehand.

A row is bad if and only if the collator that trains on it raises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.mixture import DataPart, skip_bad_rows
from ..files import new_file
from ..processing.collator import AgeVlmDataCollator
from ..terminal import say

if TYPE_CHECKING:
    from .arguments import AgeVlmTrainingArguments

SKIPPED_ROWS = "skipped_rows.json"
"""File in the folder of a stage that skips bad rows: `file`, `row` and `reason` of each. A resumed run reads it."""


def row_collator(processor: Any, args: AgeVlmTrainingArguments) -> AgeVlmDataCollator:
    """A collator that raises for the same rows as the one that trains with these arguments, and needs no model."""
    return AgeVlmDataCollator(
        processor,
        grid=(1, 1) if args.guidance_weight else None,
        max_length=args.max_length,
        assistant_only_loss=args.assistant_only_loss,
        guided_fraction=args.guided_fraction,
        seed=args.seed,
        allow_urls=args.allow_urls,
    )


def skip_in_stage(
    parts: Sequence[DataPart],
    datasets: dict[str, Any],
    processor: Any,
    args: AgeVlmTrainingArguments,
    resume: bool = False,
) -> dict[str, list[dict[str, Any]]] | None:
    """Leaves bad rows out of a stage's data sets; see [`~agevlm.data.mixture.skip_bad_rows`].

    Args:
        parts: of all data of the stage.
        datasets: of [`~agevlm.data.mixture.read_mixture`], or None, by name; replaced in place.
        processor: of the model.
        args: made from the stage's `training`.
        resume: leave out what the stopped run left out, if its list is there.

    Returns:
        the rows that were left out, by the names of `datasets`; None if no part skips bad rows.

    Raises:
        ValueError: if no row of a file or of a weighted group is left, or the list of the stopped run is damaged.
    """
    from accelerate.utils import broadcast_object_list

    if all(part.on_bad_row == "error" for part in parts):
        return None
    file = Path(args.output_dir) / SKIPPED_ROWS
    # The first process's, because other machines may not see its files.
    (known,) = broadcast_object_list([_read(file) if resume and file.is_file() else {}])
    if known is None:
        raise ValueError(f"{file} is damaged: delete it, and the rows are looked at again.")
    collator, skipped = row_collator(processor, args), {}
    for name, dataset in datasets.items():
        if dataset is not None:
            datasets[name], skipped[name] = skip_bad_rows(dataset, collator.find_problem, known.get(name))
    return skipped


def _read(file: Path) -> dict[str, list[dict[str, Any]]] | None:
    """The list that `write_skipped` wrote, or None if it is damaged."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        return {name: [{key: row[key] for key in ("file", "row", "reason")} for row in names[name]] for name in names}
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def write_skipped(skipped: dict[str, list[dict[str, Any]]], folder: str | Path) -> int:
    """Writes the list of skipped rows into a stage's folder and says so; returns their number."""
    file, number = Path(folder) / SKIPPED_ROWS, sum(map(len, skipped.values()))
    with new_file(file) as partial:
        partial.write_text(json.dumps(skipped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"Skipped bad rows: {number}, listed in {file}")
    return number
