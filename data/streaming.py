# SPDX-License-Identifier: Apache-2.0
"""Data that are read while they train, and never written to disk: an endless stream of rows, mixed and shuffled on the way.

Each part of the data is read in pieces: files, or ranges of rows. In each epoch of a part its pieces have another order, and the
processes and their workers divide them; where there are fewer pieces than those, each reads all of them and takes every `n`-th
row. So each row goes to one of them. A buffer of [`SHUFFLE_BUFFER`] rows then mixes what comes one after another.
"""

from __future__ import annotations

import abc
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.asyn
import torch.utils.data

from ..processing.rows import ORIGIN_COLUMN, import_datasets, row_features
from .formats.source import NOT_DOWNLOADED, BadEntry, Piece, Source
from .prepared import prepared_folder, read_pieces
from .readers import (
    CONVERSATIONS,
    check_images,
    convert_messages,
    find_source,
    from_hub,
    is_url,
    read_saved,
    url_problem,
)

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 1000
"""Rows that wait in each worker, with their images as they are stored, and come in any order."""

_TABLE_PIECE = 100  # rows of a piece where any row can be read at once
_SAMPLED_PIECES = 10
# Another epoch may bring a worker other pieces. After so many without a row for it there are too few.
_EMPTY_EPOCHS = 10


class Pieces(abc.ABC):
    """A part of the data, whose pieces are read from their start to their end.

    Args:
        path: of the data, for people.
        count: of the pieces.
        rows: of all of them, about; None where that is not known.
    """

    path: str
    count: int
    rows: int | None

    @abc.abstractmethod
    def read(self, piece: int) -> Iterator[dict[str, Any]]:
        """Rows with their origin. One that cannot be made has a problem there, and the kind that it is counted in."""

    def sample(self) -> list[dict[str, Any]]:
        """The first rows of some pieces, by which the data are known again."""
        number = min(self.count, _SAMPLED_PIECES)
        chosen = [i * (self.count - 1) // max(1, number - 1) for i in range(number)]
        return [row for piece in chosen for row in itertools.islice(self.read(piece), 1)]


class TablePieces(Pieces):
    """Rows of a data set on disk.

    Args:
        dataset: with images as they are stored.
        convert: makes rows of it, where they are of another format.
    """

    def __init__(self, dataset: datasets.Dataset, convert: Convert | None = None):
        self.dataset, self.convert = dataset, convert
        self.path = "" if convert is None else convert.path  # an error never names it, because its rows are counted
        self.rows = len(dataset)
        self.count = -(-self.rows // _TABLE_PIECE)

    def read(self, piece):
        for number in range(piece * _TABLE_PIECE, min((piece + 1) * _TABLE_PIECE, len(self.dataset))):
            row = self.dataset[number]
            yield row if self.convert is None else self.convert(row, self.convert.path, number)


class SourcePieces(Pieces):
    """Rows of a published format. An index of its annotations may be kept in the cache, the rows are not."""

    def __init__(self, source: Source, skip: bool):
        self.source, self.skip, self.path = source, skip, os.fspath(source.path)
        folder = prepared_folder(source)
        self.work = folder.with_name(f"{folder.name}-index")
        self.work.mkdir(parents=True, exist_ok=True)
        self.pieces: list[Piece] = source.pieces(self.work)
        self.count = len(self.pieces)
        numbers = [None if piece.end is None else piece.end - piece.start for piece in self.pieces]
        self.rows = None if None in numbers else sum(filter(None, numbers))

    def read(self, piece):
        for found in read_pieces(self.source, [self.pieces[piece]], self.work):
            if isinstance(found, BadEntry):
                skip = self.skip or found.kind == NOT_DOWNLOADED
                origin = {
                    "file": found.file,
                    "row": found.row,
                    "problem": found.reason,
                    "skip": skip,
                    "kind": found.kind,
                }
                yield _NO_ROW | {ORIGIN_COLUMN: origin}
            else:
                origin = {"file": found["file"], "row": found["row"], "problem": None, "skip": self.skip}
                yield {name: found[name] for name in _NO_ROW} | {ORIGIN_COLUMN: origin}


class StreamedPieces(Pieces):
    """Rows of the files of a data set, on the Hub or here, that `datasets` streams."""

    def __init__(self, dataset: datasets.IterableDataset, convert: Convert, rows: int | None):
        self.dataset, self.convert, self.path = dataset, convert, convert.path
        self.count, self.rows = dataset.num_shards, rows

    def read(self, piece):
        where = self.convert.path
        if self.count > 1:
            where += f", part {piece + 1} of {self.count}"
        # In batches, because one by one `datasets` would divide the rows among the workers a second time.
        batches = self.dataset.shard(self.count, piece).iter(batch_size=16)
        rows = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        for number, row in enumerate(rows):
            yield self.convert(row, where, number)


class FirstRows(Pieces):
    """The same rows in each epoch: the first of the pieces in an order by `seed`, behind a buffer.

    They are one piece, which all workers read, so that they do not depend on their number.
    """

    count = 1

    def __init__(self, pieces: Pieces, rows: int, seed: int):
        self.pieces, self.seed, self.path = pieces, seed, pieces.path
        self.rows = rows if pieces.rows is None else min(rows, pieces.rows)
        self._most = rows

    def read(self, piece):
        draw = random.Random(self.seed)
        order = draw.sample(range(self.pieces.count), self.pieces.count)
        left = self._most
        for row in shuffled(itertools.chain.from_iterable(map(self.pieces.read, order)), draw):
            left -= "kind" not in row[ORIGIN_COLUMN]  # bad entries are no rows
            yield row
            if not left:
                return

    def sample(self):
        return self.pieces.sample()


_NO_ROW: dict[str, Any] = {"images": [], "messages": [], "grounding": []}


@dataclass
class Convert:
    """Makes rows of those of a data set, as [`~agevlm.data.readers.read_dataset`] does.

    Args:
        path: of the data set, for people.
        format: of its conversations.
        columns: that it has.
        skip: whether bad rows may be left out.
        allow_urls: see [`~agevlm.data.readers.read_rows`].

    Raises:
        ValueError: if a column is missing.
    """

    path: str
    format: str
    columns: Sequence[str]
    skip: bool
    allow_urls: bool

    def __post_init__(self):
        if CONVERSATIONS[self.format] not in self.columns:
            raise ValueError(
                f"{self.path} has no column '{CONVERSATIONS[self.format]}', which the format {self.format} requires, but "
                f"{', '.join(self.columns)}"
            )

    @property
    def used(self) -> list[str]:
        """The columns that rows are made of."""
        return [name for name in (CONVERSATIONS[self.format], "images", "image", "grounding") if name in self.columns]

    def __call__(self, row: dict[str, Any], file: str, number: int) -> dict[str, Any]:
        origin: dict[str, Any] = {"file": file, "row": number, "problem": None, "skip": self.skip}
        try:
            images = row["images"] if "images" in self.columns else [row["image"]] if row.get("image") else []
            images = [] if images is None else images
            if not all(isinstance(image, dict) and image.keys() == {"bytes", "path"} for image in images):
                raise ValueError(f"its images are not stored as images, but as {images!r:.200}; convert the data set")
            for image in images:
                if not self.allow_urls and image["bytes"] is None and is_url(image["path"]):
                    raise ValueError(url_problem(image["path"]))
            messages = convert_messages(row[CONVERSATIONS[self.format]], self.format, len(images))
            made = {"images": images, "messages": messages, "grounding": row.get("grounding") or []}
        except (ValueError, TypeError) as error:
            origin |= {"problem": str(error), "kind": "not of the format"}
            made = _NO_ROW
        return made | {ORIGIN_COLUMN: origin}


def open_pieces(
    path: str,
    format: str,
    *,
    name: str | None = None,
    split: str | None = None,
    images: str | None = None,
    skip: bool = False,
    allow_urls: bool = False,
) -> Pieces:
    """Data of any format that a recipe names, to be streamed.

    Args:
        path, format, name, split, images: as for [`~agevlm.data.readers.read_dataset`].
        skip: whether bad rows may be left out.
        allow_urls: as for [`~agevlm.data.readers.read_dataset`].

    Raises:
        OSError: if there are no such data.
        ValueError: if they cannot be streamed, or are not of the format.
        ImportError: if `datasets` is not installed.
    """
    datasets, place = import_datasets(), Path(path)
    if (source := find_source(path, format, images, split, name)) is not None:
        return SourcePieces(source, skip)
    if place.suffix in (".json", ".jsonl"):
        raise ValueError(f"{path}: a file of rows in JSON is read as a whole; leave `streaming` out of this part.")
    if name is not None and split is None:
        raise ValueError(f"{path}: `name` requires `split`; add it")
    found: Any
    if place.is_dir() and any((place / file).is_file() for file in ("state.json", "dataset_dict.json")):
        found = read_saved(path)
    elif place.suffix == ".parquet" and (place.is_file() or "://" in path):
        found = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        found = found.reshard() if place.is_file() else found  # its groups of rows are pieces
    else:
        found = from_hub(path, *([] if name is None else [name]), streaming=True)
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    if split is None and len(splits) > 1:
        raise ValueError(f"{path} has several splits; name one of them: {', '.join(splits)}")
    if split is not None and split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(splits)}")
    found = next(iter(splits.values())) if split is None else splits[split]
    columns = found.column_names or list(next(iter(found), {}))
    convert = Convert(path if split is None else f"{path} ({split})", format, columns, skip, allow_urls)
    found = found.with_format(None).select_columns(convert.used)
    if isinstance(found, datasets.Dataset):
        # Nothing is decoded, and so nothing is fetched.
        return TablePieces(check_images(found, path, allow_urls=True), convert)
    known = (found.info.splits or {}).get(str(found.split))
    rows = _parquet_rows(place) if place.is_file() else None if known is None else known.num_examples
    return StreamedPieces(found.decode(False), convert, rows or None)


def _parquet_rows(file: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(os.fspath(file)).num_rows


def first_rows(pieces: Pieces, rows: int, seed: int) -> datasets.Dataset:
    """A data set in memory of the rows that a stream with `rows: …` would have.

    Raises:
        ValueError: if there are none.
    """
    datasets = import_datasets()
    found = []
    for row in FirstRows(pieces, rows, seed).read(0):
        origin = row[ORIGIN_COLUMN]
        if not (origin["skip"] and origin.pop("kind", None)):
            found.append(row)
    origin = {name: datasets.Value(kind) for name, kind in _ORIGIN.items()}
    features = datasets.Features({**row_features(), ORIGIN_COLUMN: origin})
    if not found:
        raise ValueError(f"{pieces.path} has no good rows.")
    return datasets.Dataset.from_list(found, features=features)


_ORIGIN = {"file": "string", "row": "int64", "problem": "string", "skip": "bool"}


class RowStream(torch.utils.data.IterableDataset):
    """The mixture of data as an endless stream, of which each process and worker reads its share.

    Without weights an epoch has each row once: the next row is of a part with the probability of the part's share of the rows
    that are left. With weights it is of a part with the probability of the part's weight, and each part
    starts again when it is read. The rows of a worker depend on the data, the seed, and the numbers of processes and of workers
    alone.

    Transformers wraps it in accelerate's `IterableDatasetShard`, which expects the rows of all processes in turn and
    takes this one's: the others' are None here.

    Args:
        parts: of the mixture.
        weights: of the parts, of any sum; none by default.

    Raises:
        ValueError: if there are several parts, no weights, and the number of rows of one is unknown.
    """

    def __init__(self, parts: Sequence[Pieces], weights: Sequence[float] | None = None):
        self.parts, self.weights = parts, weights
        self.find_problem: Callable[[dict[str, Any]], str | None] | None = None
        self.begin()
        if weights is None and len(parts) > 1 and (unknown := [part.path for part in parts if part.rows is None]):
            raise ValueError(
                f"{', '.join(unknown)}: the number of rows is not known before it is streamed, so the parts cannot be mixed in "
                "proportion. Give each part a `weight`, or this one `rows`."
            )

    @property
    def rows(self) -> int | None:
        """Of an epoch, about; None where it is not known, or there are weights."""
        numbers = [part.rows for part in self.parts]
        return None if self.weights is not None or None in numbers else sum(numbers)  # type: ignore[arg-type]

    def begin(
        self, seed: int = 0, batch_size: int = 1, processes: int = 1, process: int = 0, skip_batches: int = 0
    ) -> None:
        """Says what the next iteration gives.

        Args:
            seed: of the order.
            batch_size: rows of a batch of a process.
            processes: how many processes train.
            process: which of them this is.
            skip_batches: of this process, which were trained before the run was resumed. Their rows are read again and are
                None.
        """
        self.seed, self.batch_size, self.skip_batches = seed, batch_size, skip_batches
        self.processes, self.process = processes, process

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            fsspec.asyn.reset_lock()  # a forked process would wait for the threads that it does not have
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        left_out: dict[str, list] = {}
        rows = self._share(self.process * workers + number, self.processes * workers, left_out)
        given = len(range(number, self.skip_batches, workers))  # batches of this worker
        for _ in itertools.islice(rows, given * self.batch_size):
            pass
        yield from itertools.repeat(None, given * self.batch_size * self.processes)
        while True:
            yield from itertools.repeat(None, self.process * self.batch_size)
            for row in itertools.islice(rows, self.batch_size):
                if left_out:  # goes with the next row to the process that trains
                    row = row | {ORIGIN_COLUMN: row[ORIGIN_COLUMN] | {LEFT_OUT: left_out.copy()}}
                    left_out.clear()
                yield row
            yield from itertools.repeat(None, (self.processes - 1 - self.process) * self.batch_size)

    def _share(self, reader: int, readers: int, left_out: dict[str, list]) -> Iterator[dict[str, Any]]:
        """The endless rows of one of several that read."""
        draw = random.Random(f"{self.seed} {reader}")

        def epochs(number: int) -> Iterator[Iterator[dict[str, Any]]]:
            part = self.parts[number]
            for epoch in itertools.count():
                order = list(range(part.count))
                random.Random(f"{self.seed} {number} {epoch}").shuffle(order)  # the same for all who read
                shared = part.count < readers
                rows = itertools.chain.from_iterable(map(part.read, order if shared else order[reader::readers]))
                yield self._good(itertools.islice(rows, reader, None, readers) if shared else rows, left_out)

        parts = [epochs(number) for number in range(len(self.parts))]
        if self.weights is not None:
            yield from shuffled(_mixed([_endless(part) for part in parts], self.weights, draw), draw)
        else:
            sizes = [(part.rows or 1) / readers for part in self.parts]
            epochs_of_all = zip(*parts, strict=True)
            yield from _endless(shuffled(_mixed(epoch, sizes, draw, once=True), draw) for epoch in epochs_of_all)

    def _good(self, rows: Iterable[dict[str, Any]], left_out: dict[str, list]) -> Iterator[dict[str, Any]]:
        """The rows that are not left out; the number of the others, and the first, by kind in `left_out`."""
        for row in rows:
            origin = row[ORIGIN_COLUMN]
            problem = origin["problem"]
            if origin["skip"] and problem is None and self.find_problem is not None:
                problem = self.find_problem(row)
            if not origin["skip"] or problem is None:
                yield row
                continue
            kind = origin.get("kind", "cannot be trained on" if origin["problem"] is None else "not of the format")
            add_left_out(left_out, {kind: [1, f"{origin['file']}, row {origin['row']}: {problem}"]})


LEFT_OUT = "left_out"
"""Key in a row's origin: how many rows were left out since the last one, and the first, by kind."""


def add_left_out(found: dict[str, list], more: dict[str, list]) -> None:
    """Adds what was left out to what was found before."""
    for kind, (number, first) in more.items():
        found.setdefault(kind, [0, first])[0] += number


def shuffled(rows: Iterable[dict[str, Any]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Rows through a buffer of [`SHUFFLE_BUFFER`], from which each is drawn."""
    buffer: list[dict[str, Any]] = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
        else:
            place = draw.randrange(SHUFFLE_BUFFER)
            buffer[place], row = row, buffer[place]
            yield row
    draw.shuffle(buffer)
    yield from buffer


def _mixed(
    parts: Sequence[Iterator[dict[str, Any]]], weights: Sequence[float], draw: random.Random, once: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of parts that are drawn by their weights, until all are read. With `once` the weights are the numbers of rows that are
    left, about, so that the parts end together."""
    left = dict(zip(parts, weights, strict=True))
    while left:
        (part,) = draw.choices(list(left), list(left.values()))
        for row in itertools.islice(part, 1):
            yield row
            left[part] = max(left[part] - 1, 1) if once else left[part]
            break
        else:
            del left[part]


def _endless(epochs: Iterable[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of one epoch after another.

    Raises:
        ValueError: if they have none.
    """
    empty = 0
    for rows in epochs:
        empty += 1
        for row in rows:
            empty = 0
            yield row
        if empty == _EMPTY_EPOCHS:
            raise ValueError(
                "The streamed data have fewer good rows than there are processes and workers to read them: leave `streaming` out, "
                "or set training.dataloader_num_workers lower."
            )
