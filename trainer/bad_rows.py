# SPDX-License-Identifier: Apache-2.0
"""Bad rows of a recipe's data: what `on_bad_row: skip` leaves out before training, and how all rows are checked beforehand.

A row is bad if and only if the collator that trains on it raises.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.mixture import DataPart, read_mixture, skip_bad_rows
from ..data.streaming import RowStream
from ..data.verdicts import find_verdicts
from ..files import new_file
from ..processing.collator import AgeVlmDataCollator
from ..processing.rows import ORIGIN_COLUMN
from ..terminal import say

if TYPE_CHECKING:
    from datasets import Dataset

    from .arguments import AgeVlmTrainingArguments

SKIPPED_ROWS = "skipped_rows.json"
"""File in the folder of a stage that skips bad rows: `place` in the mixture, `file`, `row` and `reason` of each. A resumed run
reads it."""


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


@dataclass(frozen=True)
class PartRows:
    """The rows of a part that a stage trains on.

    Args:
        dataset: of them.
        data: fingerprint of the data set in which they are numbered.
        numbers: of the rows.
    """

    dataset: Dataset
    data: str
    numbers: np.ndarray


def read_part(part: DataPart, args: AgeVlmTrainingArguments) -> PartRows:
    """The rows of a part as [`~agevlm.data.mixture.read_mixture`] has them, whatever other parts it has and how often each is seen.

    Raises:
        OSError, ValueError, ImportError: as `read_mixture`.
    """

    def read(part: DataPart) -> Dataset:
        return read_mixture([part], args.seed, allow_urls=args.allow_urls)

    if part.weight_by is not None:
        chosen = read(dataclasses.replace(part, weight=1.0))
        return PartRows(chosen, chosen._fingerprint, np.arange(len(chosen)))
    whole = read(dataclasses.replace(part, rows=None, weight=None))
    if part.rows is None or part.rows >= len(whole):
        return PartRows(whole, whole._fingerprint, np.arange(len(whole)))
    # They are numbered in the whole part, so that stages that take more or fewer of them share what is known.
    chosen = read(dataclasses.replace(part, weight=None))
    return PartRows(chosen, whole._fingerprint, chosen._indices.column(0).to_numpy())


def skip_in_stage(
    data: Mapping[str, Sequence[DataPart]],
    datasets: dict[str, Any],
    processor: Any,
    args: AgeVlmTrainingArguments,
    resume: bool = False,
) -> dict[str, list[dict[str, Any]]] | None:
    """Leaves bad rows out of a stage's data sets; see [`~agevlm.data.mixture.skip_bad_rows`]. A stream leaves them out on the way.

    Args:
        data: the parts of each of `datasets`.
        datasets: of [`~agevlm.data.mixture.read_mixture`], or None, by name; replaced in place.
        processor: of the model.
        args: made from the stage's `training`.
        resume: leave out what the stopped run left out, if its list is there.

    Returns:
        the rows that were left out, by the names of `datasets`; None if no part skips bad rows.

    Raises:
        ValueError: if no row of a data set or of a weighted group is left, or the list of the stopped run is damaged.
    """
    from accelerate.utils import broadcast_object_list

    if all(part.on_bad_row == "error" for parts in data.values() for part in parts):
        return None
    file = Path(args.output_dir) / SKIPPED_ROWS
    # The first process's, because other machines may not see its files.
    (known,) = broadcast_object_list([_read(file) if resume and file.is_file() else {}])
    if known is None:
        raise ValueError(f"{file} is damaged: delete it, and the rows are looked at again.")
    collator, skipped = row_collator(processor, args), {}
    for name, dataset in datasets.items():
        if isinstance(dataset, RowStream):
            dataset.find_problem = collator.find_problem
        elif dataset is not None:
            bad = known[name] if name in known else _find_kept(data[name], dataset, collator, args)
            datasets[name], skipped[name] = skip_bad_rows(dataset, collator.find_problem, bad)
    return skipped


def _find_kept(
    parts: Sequence[DataPart], mixture: Dataset, collator: AgeVlmDataCollator, args: AgeVlmTrainingArguments
) -> list[dict[str, Any]] | None:
    """The bad rows of a mixture, if `agevlm data prepare` has looked at all of its rows."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if any(part.streaming for part in parts):  # of an evaluation: they have just been read
        return None

    def find() -> list[dict[str, Any]] | None:
        bad, start, origins = [], 0, mixture.select_columns(ORIGIN_COLUMN)
        for part in parts:
            rows = read_part(part, args)
            if part.on_bad_row == "skip":
                if (verdicts := find_verdicts(rows.data, rows.numbers, collator)) is None:
                    return None
                for place, reason in enumerate(verdicts.problems(collator.grid is not None), start):
                    if reason is not None:
                        origin = origins[place][ORIGIN_COLUMN]
                        bad.append({"place": place, "file": origin["file"], "row": origin["row"], "reason": reason})
            start += len(rows.numbers)
        return bad

    # The first process's, because other machines may not see its cache.
    (kept,) = broadcast_object_list([find() if PartialState().is_main_process else None])
    return kept


def _read(file: Path) -> dict[str, list[dict[str, Any]]] | None:
    """The list that `write_skipped` wrote, or None if it is damaged."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: [{key: row[key] for key in ("place", "file", "row", "reason")} for row in names[name]]
            for name in names
        }
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def write_skipped(skipped: dict[str, list[dict[str, Any]]], folder: str | Path) -> int:
    """Writes the list of skipped rows into a stage's folder and says so; returns their number."""
    file, number = Path(folder) / SKIPPED_ROWS, sum(map(len, skipped.values()))
    with new_file(file) as partial:
        partial.write_text(json.dumps(skipped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"Skipped bad rows: {number}, listed in {file}")
    return number


def say_left_out(left_out: dict[str, Any]) -> int:
    """Says which rows of a stream were left out on the way, as [`~agevlm.trainer.sampling.SamplingMixin.left_out`] counts them; returns
    their number."""
    for kind, found in left_out.items():
        say(f"Left out on the way: {found['rows']} rows, {kind}; the first: {found['first']}")
    return sum(found["rows"] for found in left_out.values())
