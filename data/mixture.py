# SPDX-License-Identifier: Apache-2.0
"""The mixture of data that a recipe trains on: its parts, and how often each is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from ..processing.rows import ORIGIN_COLUMN
from .readers import read_dataset, stored_images

if TYPE_CHECKING:
    from datasets import Dataset

    from .streaming import Pieces, RowStream

GROUP_COLUMN = "sampling_group"
"""Column of a weighted mixture: the number of a row's group, a part or a value of a part."""

WEIGHT_COLUMN = "sampling_weight"
"""Column of a weighted mixture: the share of the batches that the row's group has, of any sum."""


@dataclass
class DataPart:
    """A part of a mixture.

    Args:
        path: a folder that `save_to_disk` wrote, a `.json`, `.jsonl` or `.parquet` file, or the id of a data set on the Hub; or the
            file or folder of a published data set. Files may be at an address, see [`~agevlm.data.download.local`].
        name: configuration of a data set on the Hub, where it has several.
        split: may be left out where there is only one.
        format: `rows` are those of [`agevlm.processing.rows`], TRL's vision format: `messages` and `images`. `llava`
            has `conversations` and `image`, `cauldron` has `texts` and `images`; the others are those of [`agevlm.data.formats`].
        images: the folder or archive of a published data set's images.
        rows: how many rows to take at most, drawn with `training.seed`; all by default.
        weight: share of the batches, beside the other parts' weights. Without weights each row is seen once an epoch.
        weight_by: a column and the weight of each of its values within the part, as `{"kind": {"existence": 0.7, "objects":
            0.3}}`. Rows with other values are left out.
        on_bad_row: `error`, or `skip`: a row that cannot be trained on, such as one with a damaged image, is left out before
            training starts, see [`skip_bad_rows`]. All rows are then read once.
        streaming: read the data while they train, and write no copy of them, see [`agevlm.data.streaming`]. All parts are then
            one stream. Bad rows are left out on the way, and `rows` are the first behind a buffer.
    """

    path: str
    name: str | None = None
    split: str | None = None
    format: str = "rows"
    images: str | None = None
    rows: int | None = None
    weight: float | None = None
    weight_by: dict[str, dict[Any, float]] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    streaming: bool = False


@overload
def read_mixture(
    parts: Sequence[DataPart], seed: int = 0, *, allow_urls: bool = False, in_memory: Literal[True]
) -> Dataset: ...
@overload
def read_mixture(
    parts: Sequence[DataPart], seed: int = 0, *, allow_urls: bool = False, in_memory: bool = False
) -> Dataset | RowStream: ...
def read_mixture(
    parts: Sequence[DataPart], seed: int = 0, *, allow_urls: bool = False, in_memory: bool = False
) -> Dataset | RowStream:
    """The parts, one after another, with the columns `messages`, `grounding`, `images` or `image`, and the rows' origins.

    Only conversations are ever converted; images stay as they are stored, and are decoded when a batch needs them.
    Where parts have weights, each row has its group and the group's weight in two more columns, from which
    [`~agevlm.trainer.sampling.SamplingMixin`] makes batches. Bad rows of parts that skip them are there until
    [`skip_bad_rows`].

    Args:
        parts: of the mixture.
        seed: of the choice of `rows`.
        allow_urls: as for [`~agevlm.data.readers.read_dataset`].
        in_memory: read the rows of parts with `streaming` into memory, which requires `rows`.

    Returns:
        a data set, or a stream where a part has `streaming` and is not read into memory.

    Raises:
        OSError: if a part is missing.
        ValueError: if a part is not of the format it should be of, or its weights do not fit the others or its rows.
        ImportError: if `datasets` is not installed.
    """
    from ..processing.rows import import_datasets

    weighted = any(part.weight is not None or part.weight_by is not None for part in parts)
    if weighted and len(parts) > 1 and (without := [part.path for part in parts if part.weight is None]):
        raise ValueError(f"{', '.join(without)} has no weight: give a `weight` to every part of the data, or to none.")
    for part in parts:
        if part.rows is not None and part.rows < 1:
            raise ValueError(f"{part.path}: rows must be at least 1, got {part.rows}.")
        if part.on_bad_row not in ("error", "skip"):
            raise ValueError(f"{part.path}: on_bad_row is error or skip, got {part.on_bad_row!r}.")
    if not in_memory and any(part.streaming for part in parts):
        return _read_stream(parts, seed, weighted, allow_urls)
    datasets, groups = [], 0
    for part in parts:
        datasets.append(_read_part(part, seed, groups if weighted else None, allow_urls))
        groups += len(_value_weights(part)[1])
    return import_datasets().concatenate_datasets(datasets)


def _read_stream(parts: Sequence[DataPart], seed: int, weighted: bool, allow_urls: bool) -> RowStream:
    from .streaming import FirstRows, RowStream, TablePieces

    pieces: list[Pieces] = []
    weights: list[float] = []
    for part in parts:
        if part.streaming:
            opened = open_part(part, allow_urls=allow_urls)
            pieces.append(opened if part.rows is None else FirstRows(opened, part.rows, seed))
            weights += _value_weights(part)[1].values()
            continue
        dataset = stored_images(_read_part(part, seed, 0 if weighted else None, allow_urls))
        if not weighted:
            pieces.append(TablePieces(dataset))
            continue
        groups = dataset[GROUP_COLUMN][:]
        for group, weight in sorted(dict(zip(groups, dataset[WEIGHT_COLUMN][:], strict=True)).items()):
            chosen = [row for row, other in enumerate(groups) if other == group]
            pieces.append(TablePieces(dataset.select(chosen)))
            weights.append(weight)
    return RowStream(pieces, weights if weighted else None)


def open_part(part: DataPart, *, allow_urls: bool = False) -> Pieces:
    """All rows of a part with `streaming`.

    Raises:
        OSError: if there are no such data.
        ValueError: if they cannot be streamed.
    """
    from .streaming import open_pieces

    if part.weight_by is not None:
        raise ValueError(
            f"{part.path}: weight_by looks at all rows before training, and `streaming` reads them on the way: leave one of "
            "the two out, or make a data set of the rows of each value."
        )
    return open_pieces(
        part.path,
        part.format,
        name=part.name,
        split=part.split,
        images=part.images,
        skip=part.on_bad_row == "skip",
        allow_urls=allow_urls,
    )


def skip_bad_rows(
    dataset: Dataset,
    find_problem: Callable[[dict[str, Any]], str | None],
    known: Sequence[dict[str, Any]] | None = None,
) -> tuple[Dataset, list[dict[str, Any]]]:
    """A mixture without the bad rows of its parts with `on_bad_row: skip`.

    Which rows are bad depends on the data and on `find_problem` alone. Of several processes, each looks at its share of the
    rows, and all leave out the same.

    Args:
        dataset: of [`read_mixture`].
        find_problem: what keeps a row from training, or None, as
            [`~agevlm.processing.collator.AgeVlmDataCollator.find_problem`]. It gets images as they are stored.
        known: what an earlier call returned for the same mixture; no row is read then.

    Returns:
        the rows that are left, and `{"place": int, "file": str, "row": int, "reason": str}` of the others, with their place in the
        mixture.

    Raises:
        ValueError: if no row of a data set or of a weighted group is left.
    """
    import numpy as np
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from rich.progress import track

    origins = dataset.select_columns(ORIGIN_COLUMN).with_format("arrow")[:][ORIGIN_COLUMN].combine_chunks()
    places = np.flatnonzero(origins.field("skip").to_numpy(zero_copy_only=False))
    if not len(places):
        return dataset, []
    reasons: dict[int, str]
    if known is not None and all(_is_at(origins, entry) for entry in known):
        reasons = {entry["place"]: entry["reason"] for entry in known}
    else:
        state, stored = PartialState(), stored_images(dataset)
        share = places[state.process_index :: state.num_processes]
        hidden = not state.is_main_process
        problems = [
            (int(place), find_problem(stored[int(place)]))
            for place in track(share, "Looking for bad rows", disable=hidden, transient=True)
        ]
        reasons = dict(sorted(gather_object([entry for entry in problems if entry[1] is not None])))
    skipped = [{**origins[place].as_py(), "place": place, "reason": reason} for place, reason in reasons.items()]
    left = dataset.select(np.setdiff1d(np.arange(len(dataset)), list(reasons)))
    # A published data set of many files, "PATH, FILE" each, may have one whose rows are all bad.
    counts = Counter(file.partition(", ")[0] for file in origins.field("file").to_pylist())
    for path, number in Counter(entry["file"].partition(", ")[0] for entry in skipped).items():
        if number == counts[path]:
            raise ValueError(f"{path}: all of its {number} rows are bad; the first: {skipped[0]['reason']}")
    if GROUP_COLUMN in dataset.column_names and (gone := set(dataset[GROUP_COLUMN][:]) - set(left[GROUP_COLUMN][:])):
        place = dataset[GROUP_COLUMN][:].index(min(gone))
        raise ValueError(f"All rows of a weighted group are bad; the first: {skipped[0]['file']}, {reasons[place]}")
    return left, [{name: entry[name] for name in ("place", "file", "row", "reason")} for entry in skipped]


def _is_at(origins: Any, entry: dict[str, Any]) -> bool:
    """Whether a skipped row is in its place, and not another one since the data have changed."""
    if not 0 <= entry["place"] < len(origins):
        return False
    origin = origins[entry["place"]].as_py()
    return (origin["file"], origin["row"]) == (entry["file"], entry["row"])


def _read_part(part: DataPart, seed: int, first_group: int | None, allow_urls: bool) -> Dataset:
    """A part; of a weighted mixture with the columns of its groups, which are numbered from `first_group` on."""
    column, weights = _value_weights(part)
    columns = [] if column is None else [column]
    if part.streaming:
        from .streaming import first_rows

        if part.rows is None:
            raise ValueError(f"{part.path}: an evaluation reads the same rows each time: say how many as `rows`.")
        dataset = first_rows(open_part(part, allow_urls=allow_urls), part.rows, seed)
    else:
        dataset = read_dataset(
            part.path,
            part.format,
            name=part.name,
            split=part.split,
            images=part.images,
            columns=columns,
            keep_bad=part.on_bad_row == "skip",
            allow_urls=allow_urls,
        )
    if first_group is not None:
        from datasets import Dataset, concatenate_datasets

        values = [None] * len(dataset) if column is None else dataset[column][:]
        if missing := [str(value) for value in weights if value not in set(values)]:
            raise ValueError(f"{part.path} has no rows whose {column} is {' or '.join(missing)}.")
        number = {value: first_group + i for i, value in enumerate(weights)}
        marks: dict[str, list] = {
            GROUP_COLUMN: [number.get(value, -1) for value in values],
            WEIGHT_COLUMN: [weights.get(value, 0.0) for value in values],
        }
        # Columns side by side, so that images are not copied.
        dataset = concatenate_datasets([dataset.remove_columns(columns), Dataset.from_dict(marks)], axis=1)
        dataset = dataset.select([row for row, group in enumerate(marks[GROUP_COLUMN]) if group >= 0])
    if part.rows is not None and part.rows < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(part.rows))
    return dataset


def _value_weights(part: DataPart) -> tuple[str | None, dict[Any, float]]:
    """The column whose values a part's groups are, if any, and each group's share of all batches by its value."""
    share = 1.0 if part.weight is None else part.weight
    column, weights = None, {None: 1.0}
    if part.weight_by is not None:
        if len(part.weight_by) != 1:
            raise ValueError(
                f"{part.path}: weight_by has one column and the weights of its values, got {part.weight_by}."
            )
        ((column, weights),) = part.weight_by.items()
    for weight in (share, *weights.values()):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight <= 0:
            raise ValueError(f"{part.path}: weights are numbers above 0, got {weight!r}.")
    return column, {value: share * weight / sum(weights.values()) for value, weight in weights.items()}
