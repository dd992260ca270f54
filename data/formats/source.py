# SPDX-License-Identifier: Apache-2.0
"""What every published format has in common: pieces of work, rows made of their entries, and entries that no row can be made of."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Piece:
    """Entries that one process reads, in order. It is sent to that process, so it holds plain values.

    Args:
        name: unique within the source, a legal file name; pieces are in the order of their rows.
        file: what the entries come from, for people: `00012.tar`, or `instances_train2017.json`.
        start, end: of the entries, where a piece is a part of a file.
        extra: what else the source needs, of values that JSON can hold.
    """

    name: str
    file: str
    start: int = 0
    end: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def cut(file: str, count: int, size: int = 5000) -> list[Piece]:
    """Pieces of `size` entries of a file with `count` entries."""
    return [Piece(f"{start:09}", file, start, min(start + size, count)) for start in range(0, count, size)]


NOT_DOWNLOADED = "not downloaded"
"""The kind of entries whose image was gone when others downloaded it: they are counted, and never an error."""


@dataclass(frozen=True)
class BadEntry:
    """An entry that no row can be made of, or a phrase of an entry whose row does without it.

    Args:
        file: that it stands in.
        row: number of the entry in its file.
        kind: the class that it is counted in, in a few words without values: `missing image`, `empty box`.
        reason: what is wrong with this one and how to fix it.
        phrase: whether only a phrase is left out, and the row is there.
    """

    file: str
    row: int
    kind: str
    reason: str
    phrase: bool = False


class BadEntryError(ValueError):
    """Raised inside a format where an entry or a phrase cannot be read; becomes a [`BadEntry`].

    Args:
        kind: see [`BadEntry`].
        reason: see [`BadEntry`].
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class Source(abc.ABC):
    """A data set in the files that its authors publish.

    Args:
        path: the file or folder of the annotations.
        images: the folder, or the archives, of the images; None where the annotations' own folder has them.
        split: where a source has several.

    Raises:
        FileNotFoundError: if something is missing; says how to get it.
        ValueError: if something that the format needs was not given, or it cannot be used.
    """

    format: ClassVar[str]
    columns: ClassVar[dict[str, str]] = {}
    """Further columns of the rows beside those of the row format and `id`, by name the type: `{"kind": "string"}`."""
    levels: ClassVar[int] = 2
    """How deep the folders are that images lie in: 2 for `coco/train2017`."""

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        self.path = Path(path)
        self.images = None if images is None else Path(images)
        self.split = split
        self.folder = self.path if self.images is None else self.images
        """The folder that the names of images start from. Where images are added, rows are made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes open the same files: what this source has open, such as an index, stays here."""
        return type(self), (self.path, self.images, self.split)

    @abc.abstractmethod
    def files(self) -> Sequence[Path]:
        """All files of annotations, and archives of images: where one has another size or time, rows are made again."""

    @abc.abstractmethod
    def pieces(self, work: Path) -> list[Piece]:
        """The work, in the order of the rows; the same for the same files, however many processes share it.

        Args:
            work: a folder for what helps to read them, such as an index. It is kept until the rows are complete.
        """

    @abc.abstractmethod
    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        """The rows of a piece, one by one, and its bad entries in their places.

        A row has `images` (as `datasets` stores them: `{"path": absolute path, "bytes": None}`, or `{"path": name, "bytes": bytes}` from an
        archive), `messages`, `grounding`, `id` (str or None), `file` and `row` (that it comes from) and the source's `columns`.
        """
