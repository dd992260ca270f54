# SPDX-License-Identifier: Apache-2.0
"""Images that img2dataset (https://github.com/rom1504/img2dataset) downloaded, in its output formats `webdataset` and `files`.

The output is a folder of shards:

    00000.tar            KEY.jpg, KEY.txt and KEY.json of each image that it got (`webdataset`)
    00000/               the same as files (`files`)
    00000.parquet        a row for each image, also of those that it did not get: key, url, caption, status, error_message, width and
                         height now, original_width and original_height, and the columns of `--save_additional_columns`
    00000_stats.json     counts; not read

KEY is a number that img2dataset gives. Images are in the order in which they arrived. Archives are never unpacked.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .building import image_file
from .source import BadEntryError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_BATCH = 500


def shard_names(folder: Path) -> list[str]:
    """The names of the shards in an output of img2dataset, in order; none where it has neither archives nor folders.

    Raises:
        ValueError: if a shard is there as an archive and as a folder, so that each of its images would be there twice.
    """
    archives = {file.stem for file in folder.glob("*.tar")}
    with os.scandir(folder) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._"}
    if both := sorted(archives & folders):
        raise ValueError(
            f"{folder} has {both[0]}.tar and the folder {both[0]}; remove one of them, they hold the same images"
        )
    return sorted(archives | folders)


class Shard:
    """A shard of img2dataset's output. Of its images, only names and places are held.

    Args:
        folder: the output.
        name: of the shard.
    """

    def __init__(self, folder: Path, name: str):
        archive = folder / f"{name}.tar"
        self.is_archive = archive.is_file()
        self.place = archive if self.is_archive else folder / name
        self.table = folder / f"{name}.parquet"
        self.faults: list[BadEntryError] = []
        """What is wrong with the shard as a whole, as far as it was read."""

    def entries(self, columns: Collection[str]) -> Iterator[tuple[str, int, dict[str, Any] | BadEntryError]]:
        """The images that were to be downloaded: file, number in it, and what the table has in some columns.

        A shard without a table has KEY.json of each image that was downloaded, and no trace of the others.
        """
        if self.columns() is not None:
            for number, row in read_table(self.table, columns):
                yield self.table.name, number, row
            return
        for number, (key, kinds) in enumerate(self._members.items()):
            if kinds.keys() & {"json", *_IMAGES}:
                yield self.place.name, number, self._annotation(key)

    def columns(self) -> list[str] | None:
        """The names of the table's columns, None if there is no whole table."""
        import pyarrow as pa
        import pyarrow.parquet

        if not self.table.is_file():
            return None
        try:
            return pa.parquet.read_schema(self.table).names
        except pa.ArrowInvalid as error:
            reason = f"{self.table.name} is not whole ({error}); run img2dataset again, which completes the shard"
            self.faults.append(BadEntryError("broken table", reason))
            return None

    def image(self, key: Any) -> dict[str, Any]:
        """An image as `datasets` stores it: the path of a file, or what an archive has.

        Raises:
            BadEntryError: if there is none.
        """
        members = self._members.get(key, {})
        kind = next((kind for kind in members if kind in _IMAGES), None)
        if kind is None:
            raise BadEntryError(
                "missing image", f"{self.place} has no image {key}; download the shard again or remove the entry"
            )
        if self.is_archive:
            return {"path": f"{key}.{kind}", "bytes": self._bytes(*members[kind])}
        return image_file(self.place, f"{key}.{kind}")

    def _annotation(self, key: str) -> dict[str, Any] | BadEntryError:
        place = self._members[key].get("json")
        if place is None:
            return BadEntryError(
                "no annotation", f"the image {key} has no {key}.json; download the shard again or remove it"
            )
        try:
            text = self._bytes(*place) if self.is_archive else (self.place / f"{key}.json").read_bytes()
            return {**json.loads(text), "key": key}
        except (ValueError, TypeError, RecursionError) as error:
            return BadEntryError("not JSON", f"{key}.json is not a JSON object ({error}); download the shard again")

    def _bytes(self, start: int, size: int) -> bytes:
        with open(self.place, "rb") as archive:
            archive.seek(start)
            return archive.read(size)

    @functools.cached_property
    def _members(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By key and ending of the name, the place of a member in the archive and its size (of files: zeros)."""
        members: dict[str, dict[str, tuple[int, int]]] = {}
        repeated = 0
        for name, start, size in self._archived() if self.is_archive else self._files():
            key, _, kind = name.rpartition("/")[2].partition(".")
            repeated += kind in members.setdefault(key, {})
            members[key].setdefault(kind, (start, size))
        if repeated:
            self.faults.append(
                BadEntryError(
                    "repeated members",
                    f"{self.place.name} has {repeated} members under names that others have before them, which are read; make it anew",
                )
            )
        return members

    def _files(self) -> Iterator[tuple[str, int, int]]:
        if self.place.is_dir():
            for name in sorted(os.listdir(self.place)):
                yield name, 0, 0

    def _archived(self) -> Iterator[tuple[str, int, int]]:
        """The members that the archive has as a whole."""
        end, length = 0, self.place.stat().st_size
        try:
            with tarfile.open(self.place, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it keeps all that it has read
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if member.isfile() and member.offset_data + member.size <= length:
                        yield member.name, member.offset_data, member.size
        except (tarfile.TarError, ValueError):
            end = length
        # `tarfile` takes a broken header for the end, which is a block of zeros.
        if self._bytes(end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            self.faults.append(
                BadEntryError(
                    "broken archive",
                    f"{self.place.name} breaks off after {end} bytes; download it again: remove it and {self.place.stem}_stats.json, and "
                    "run img2dataset again",
                )
            )


def read_table(
    file: Path, columns: Collection[str], start: int = 0, end: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file, each with its number. Columns that the file lacks are left out.

    Memory does not depend on the file's size: pages are read as they are needed, also where all rows are in one group.

    Raises:
        pyarrow.ArrowInvalid: if it is not a whole parquet file.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as table:
        groups, first, before = [], 0, 0
        for group in range(table.num_row_groups):
            after = before + table.metadata.row_group(group).num_rows
            if after <= start:
                first = after
            elif end is None or before < end:
                groups.append(group)
            before = after
        names = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(_BATCH, row_groups=groups, columns=names):
            if first + len(batch) > start:
                for number, row in enumerate(batch.to_pylist(), first):
                    if number >= start and (end is None or number < end):
                        yield number, row
            first += len(batch)
            if end is not None and first >= end:
                return
