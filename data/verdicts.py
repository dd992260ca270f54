# SPDX-License-Identifier: Apache-2.0
"""What training makes of each row of a data set, looked at before it begins, in several processes, and kept in the cache.

Looking at a row means to collate it: its images are decoded, its text is tokenized. A row is looked at once for each data set and each
collator; a second call, and `agevlm train` after `agevlm data prepare`, find what the first has kept.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from ..processing.collator import AgeVlmDataCollator
from ..processing.processing_agevlm import AgeVlmProcessor
from ..processing.rows import import_datasets
from ..resume import digest
from .pieces import StoppedError, run_pieces, write_piece
from .readers import stored_images

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_PIECE = 500  # rows: a minute of one process at most

_COLUMNS = {
    "number": "int64",
    "problem": "string",
    "guidance_problem": "string",
    "tokens": "int32",
    "first_learned": "int32",
    "num_images": "int32",
    "phrases": "int32",
    "masks": "int32",
    "dropped": "int32",
}


@dataclass(frozen=True)
class Verdicts:
    """What was found about some rows of a data set.

    Args:
        table: for each of the rows, in their order:
            - `problem`: what keeps it from training without guidance, and `guidance_problem`: with it; null if nothing does;
            - `tokens`: of its text, cut to `max_length`, and `first_learned`: the place of the first that is learned, `tokens` if
              none is;
            - `num_images`, `phrases`, `masks`: their numbers;
            - `dropped`: phrases with masks that guidance would drop (truncated, before their image, or a doubtful mask).
    """

    table: pa.Table

    def problems(self, guided: bool) -> list[str | None]:
        """Of each row, what keeps it from training."""
        return self.table["guidance_problem" if guided else "problem"].to_pylist()

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers; 0 for rows that could not be collated."""
        return self.table[column].to_numpy()


def find_verdicts(data: str, numbers: np.ndarray, collator: AgeVlmDataCollator) -> Verdicts | None:
    """What is kept about rows, if it is there for all of them.

    Args:
        data: fingerprint of the data set.
        numbers: of the rows in it.
        collator: of training.
    """
    return _select(_known(_folder(data, collator)), numbers)


def look_at_rows(
    dataset: Dataset,
    data: str,
    numbers: np.ndarray,
    collator: AgeVlmDataCollator,
    *,
    num_proc: int = 1,
    progress: bool = True,
    name: str = "rows",
) -> Verdicts:
    """Looks at the rows that nothing is known about, and again at bad ones, whose images may have been replaced since.

    What is found is kept piece by piece, so that a killed run goes on.

    Args:
        dataset: the rows themselves, in the order of `numbers`.
        data, numbers, collator: as for [`find_verdicts`].
        num_proc: processes.
        progress: show a progress bar.
        name: of the data, for the progress bar.

    Raises:
        OSError: if nothing can be written in the cache, or a process was killed.
    """
    import pyarrow.compute as pc
    from rich.markup import escape
    from rich.progress import Progress

    folder = _folder(data, collator)
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    good = known.filter(pc.is_null(known["guidance_problem"]))["number"].to_numpy()
    missing = np.flatnonzero(~np.isin(numbers, good))
    pieces = [missing[start : start + _PIECE] for start in range(0, len(missing), _PIECE)]
    make = functools.partial(_look_at_piece, stored_images(dataset), numbers, collator, folder)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task(f"Checking {escape(name)}", total=len(numbers), completed=len(numbers) - len(missing))
        for looked in run_pieces(make, pieces, min(num_proc, len(pieces)), name):
            bar.advance(task, looked)
    found = _select(_known(folder), numbers)
    assert found is not None
    return found


def _look_at_piece(
    dataset: Dataset,
    numbers: np.ndarray,
    collator: AgeVlmDataCollator,
    folder: Path,
    places: Sequence[int],
    stopped: Callable[[], bool],
) -> int:
    import torch
    from datasets import Features, Value

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the processes are as many as processors

    def verdicts():
        for place in places:
            if stopped():
                raise StoppedError
            yield {"number": int(numbers[place]), **look_at_row(dataset[int(place)], collator)}

    try:
        features = Features({name: Value(kind) for name, kind in _COLUMNS.items()})
        write_piece(folder / f"{digest(int(numbers[place]) for place in places)}.arrow", features, verdicts())
    finally:
        torch.set_num_threads(threads)
    return len(places)


def look_at_row(row: dict[str, Any], collator: AgeVlmDataCollator) -> dict[str, Any]:
    """What [`Verdicts`] has of a row, with images as they are stored."""
    from dataclasses import replace

    guided, unguided = (replace(collator, grid=grid) for grid in ((1, 1), None))
    batch, guidance_problem = guided.try_row(row)
    problem = None
    if batch is None:
        batch, problem = unguided.try_row(row)
    entries = [entry for entry in row.get("grounding") or () if isinstance(entry, dict)]
    found = {
        "problem": problem,
        "guidance_problem": guidance_problem,
        "phrases": len(entries),
        "masks": sum(entry.get("mask") is not None for entry in entries),
        "tokens": 0,
        "first_learned": 0,
        "num_images": 0,
        "dropped": 0,
    }
    if batch is not None:
        learned = (batch["labels"][0] != -100).nonzero()
        tokens = batch["input_ids"].shape[1]
        found |= {
            "tokens": tokens,
            "first_learned": int(learned[0]) if len(learned) else tokens,
            "num_images": len(batch["pixel_values"]) if "pixel_values" in batch else 0,
            "dropped": int(batch.get("num_dropped_phrases", [0])[0]),
        }
    return found


# --- what is kept ---


def _folder(data: str, collator: AgeVlmDataCollator) -> Path:
    cache = Path(import_datasets().config.HF_DATASETS_CACHE)
    return cache / "agevlm" / "verdicts" / digest([data, _settings(collator)])


def _settings(collator: AgeVlmDataCollator) -> dict[str, Any]:
    """All that a verdict depends on beside the row. Whether rows are guided is not part of it: verdicts say both."""
    whole = collator.guided_fraction == 1
    return {
        "processor": _processor_digest(collator.processor),
        "max_length": collator.max_length,
        "assistant_only_loss": collator.assistant_only_loss,
        "guided": None if whole else [collator.guided_fraction, collator.seed],
        "allow_urls": collator.allow_urls,
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "version": importlib.metadata.version("agevlm"),
    }


def _processor_digest(processor: AgeVlmProcessor) -> str:
    images = processor.image_processor.to_dict()
    for name in ("auto_map", "image_processor_type", "processor_class"):
        images.pop(name, None)
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # of its last call
        tokenizer.pop(name, None)
    return digest([tokenizer, images, processor.chat_template, processor.image_token, processor.sanitize_chats])


def _known(folder: Path) -> pa.Table:
    """The latest entry of each row, by its number."""
    import pyarrow as pa

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in _COLUMNS.items()])
    tables = []
    for file in sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_mtime_ns):
        with pa.memory_map(str(file)) as opened:
            tables.append(pa.ipc.open_stream(opened).read_all().cast(schema))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    _, from_end = np.unique(table["number"].to_numpy()[::-1], return_index=True)
    return table.take(len(table) - 1 - from_end)


def _select(known: pa.Table, numbers: np.ndarray) -> Verdicts | None:
    """The entries of these rows; None if one is missing."""
    if not len(numbers):
        return Verdicts(known.slice(0, 0))
    there = known["number"].to_numpy()
    places = np.searchsorted(there, numbers)
    if not len(there) or (places == len(there)).any() or (there[places] != numbers).any():
        return None
    return Verdicts(known.take(places))
