# SPDX-License-Identifier: Apache-2.0
"""Rows of published data sets as Arrow files: made in pieces by several processes, kept in a cache, continued after an interruption."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import new_file, new_folder
from ..hub_cards.dataset import tell_step
from ..processing.rows import import_datasets, quiet_datasets, row_features
from ..provenance import describe
from ..resume import digest
from .download import cache_folder
from .formats.source import NOT_DOWNLOADED, BadEntry, Piece, Source
from .pieces import StoppedError, run_pieces, unfinished_work, write_piece

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]

BAD_FILE = "bad.jsonl"
"""The file beside the rows with every bad entry, one a line: `file`, `row`, `kind`, `reason`, `phrase`."""

_COUNTS = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """Rows of a published data set.

    Args:
        folder: of the rows, for `datasets.load_from_disk`, and of [`BAD_FILE`].
        bad: the number of bad entries by kind, and whether only a phrase was left out.
        first_bad: the first bad entry that is an error where none may be left out.
    """

    folder: Path
    bad: Counter[tuple[str, bool]]
    first_bad: BadEntry | None

    def describe_bad(self) -> str:
        """What was left out, for people: numbers by kind, and where each is listed."""
        counts = [
            f"{number} {what} ({', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))})"
            for what, kinds in (
                ("entries", {kind: count for (kind, phrase), count in self.bad.items() if not phrase}),
                ("phrases", {kind: count for (kind, phrase), count in self.bad.items() if phrase}),
            )
            if (number := sum(kinds.values()))
        ]
        return f"{' and '.join(counts) or 'no entries'}; {self.folder / BAD_FILE} lists them"

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The rows, mapped into memory: [`~agevlm.processing.rows.row_features`], `id`, `file`, `row` and the source's columns."""
        datasets = import_datasets()
        with quiet_datasets(datasets):
            return datasets.load_from_disk(os.fspath(self.folder))


def prepared_folder(source: Source) -> Path:
    """Where the cache has the rows of a source. Other files, and files of another size or time, have another folder."""
    key = digest([_settings(source), _image_folders(source)])
    return Path(import_datasets().config.HF_DATASETS_CACHE) / "agevlm" / f"{source.format}-{key}"


def find_prepared(source: Source) -> Prepared | None:
    """The rows of a source in the cache, if they are there."""
    return _load(prepared_folder(source))


def prepare_source(
    source: Source, *, on_bad_row: OnBadRow = "skip", num_proc: int | None = None, progress: bool = True
) -> Prepared:
    """The rows of a source, from the cache or made now. Images in folders stay there; those in archives are copied.

    Finished pieces are kept. After an interruption the next call goes on. Another process that makes the same rows is waited for.

    Args:
        source: what to read.
        on_bad_row: `error`: the first bad entry, or phrase, is an error. `skip`: they are left out and counted.
        num_proc: processes that share the work; by default this one does it. They import the main module, so that a
            script needs `if __name__ == "__main__":`.
        progress: show a progress bar.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the files are not of the format, an entry is bad, or all are.
        ImportError: if a library is not installed.
    """
    from filelock import FileLock, Timeout

    folder = prepared_folder(source)
    if (found := _load(folder)) is None:
        cache_folder()
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"{source.path}: waiting for another process, which prepares the same rows in {folder}")
            lock.acquire()
        try:
            found = _load(folder) or _make(source, folder, False, on_bad_row, num_proc, progress)
        finally:
            lock.release()
    if on_bad_row == "error" and found.first_bad is not None:
        raise bad_entry_error(source, found.first_bad)
    return found


def convert_source(
    source: Source,
    output_dir: str | os.PathLike,
    *,
    on_bad_row: OnBadRow = "error",
    num_proc: int | None = None,
    progress: bool = True,
) -> Prepared:
    """As [`prepare_source`], into a folder of one's own that contains the images, for `datasets.load_from_disk`.

    Args:
        output_dir: folder to write; it appears only when complete.

    Raises:
        FileExistsError: if `output_dir` exists and is not an empty folder, or its unfinished work is of other data, or
            another process is at it.
    """
    return _make(source, Path(output_dir).absolute(), True, on_bad_row, num_proc, progress)


def bad_entry_error(source: Source, bad: BadEntry) -> ValueError:
    """The error of a bad entry where none may be left out."""
    return ValueError(
        f"{bad.file}, entry {bad.row}: {bad.reason}; `agevlm data check --format {source.format}` lists all such "
        "entries, and `on_bad_row: skip` in a recipe's entry of the data (`--on-bad-row skip`) leaves them out"
    )


def read_pieces(source: Source, pieces: list[Piece], work: Path) -> Iterator[dict[str, Any] | BadEntry]:
    """The rows and bad entries of some pieces in their order, as they are stored: `file` names the source as well."""
    for piece in pieces:
        for found in source.read(piece, work):
            if isinstance(found, BadEntry):
                found = replace(found, file=_origin(source, found.file))
            else:
                found = found | {"file": _origin(source, found["file"])}
                if not _is_unicode(found):
                    reason = "half of a surrogate pair is in a text; write the whole character"
                    found = BadEntry(found["file"], found["row"], "half of a character", reason)
            yield found


def source_features(source: Source) -> Features:
    """The columns of a source's rows."""
    from datasets import Features, Value

    further = {"id": "string", "file": "string", "row": "int64"} | source.columns
    return Features({**row_features(), **{name: Value(kind) for name, kind in further.items()}})


def _origin(source: Source, file: str) -> str:
    """What the rows of a file are said to come from: unlike that of any other data set."""
    return f"{source.path}" if file == source.path.name else f"{source.path}, {file}"


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        for message in row["messages"]:
            for part in message["content"]:
                (part["text"] or "").encode()
        (row["id"] or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _settings(source: Source) -> dict[str, Any]:
    """All that finished pieces depend on. Images that were added are not in it, or nobody could add one that an error names and go on."""
    stats = [(os.fspath(file.absolute()), file.stat()) for file in sorted(source.files())]
    size = sum(stat.st_size for _, stat in stats)
    times = digest([file, stat.st_size, stat.st_mtime_ns] for file, stat in stats)
    return {
        "format": source.format,
        "path": os.fspath(source.path),
        "images": None if source.images is None else os.fspath(source.images),
        "split": source.split,
        "files": f"{len(stats)} of {size} bytes, {times}",
        "version": importlib.metadata.version("agevlm"),
    }


def _image_folders(source: Source) -> str:
    """A digest of the times of the folder of images and the folders in it: looking at each image would take minutes."""
    found = level = [source.folder] if source.folder.is_dir() else []
    for _ in range(source.levels):
        inner = []
        for place in level:
            with contextlib.suppress(PermissionError), os.scandir(place) as entries:  # of `lost+found`
                inner += sorted(Path(entry.path) for entry in entries if entry.name[0] != "." and _is_folder(entry))
        found, level = found + inner, inner
    return digest([os.fspath(place.absolute()), place.stat().st_mtime_ns] for place in found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link to itself
        return False


def _load(folder: Path) -> Prepared | None:
    if not (folder / _COUNTS).is_file():
        return None
    counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
    first = counts["first_bad"]
    bad = Counter({(kind, phrase): number for kind, phrase, number in counts["bad"]})
    return Prepared(folder, bad, None if first is None else BadEntry(**first))


# --- the work ---


def _make(
    source: Source, folder: Path, embed: bool, on_bad_row: OnBadRow, num_proc: int | None, progress: bool
) -> Prepared:
    """Makes the rows of a source in a folder.

    Args:
        embed: whether images become a part of the rows.
    """
    import_datasets()
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is error or skip, got {on_bad_row!r}")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"the number of processes is {num_proc}, but must be at least 1")
    settings = _settings(source)
    with unfinished_work(folder, settings) as work:
        (work / "help").mkdir(exist_ok=True)
        pieces = source.pieces(work / "help")
        job = _Job(source, work, embed, on_bad_row)
        missing = [piece for piece in pieces if not job.file(piece).is_file()]
        _run(job, missing, len(pieces), min(num_proc or 1, len(missing)), progress)
        prepared = _join(job, pieces, folder, settings)
        shutil.rmtree(work)
    return prepared


@dataclass(frozen=True)
class _Job:
    """What every process needs to make pieces. It is sent to them."""

    source: Source
    work: Path
    embed: bool
    on_bad_row: OnBadRow

    def file(self, piece: Piece) -> Path:
        return self.work / "pieces" / f"{piece.name}.arrow"

    def make(self, piece: Piece, stopped: Callable[[], bool]) -> tuple[int, int]:
        """Writes a piece; the number of its rows and of its bad entries."""
        counts = [0, 0]
        with contextlib.closing(self._rows(piece, counts, stopped)) as rows:
            write_piece(self.file(piece), source_features(self.source), rows)
        return counts[0], counts[1]

    def _rows(
        self, piece: Piece, counts: list[int], stopped: Callable[[], bool]
    ) -> Generator[dict[str, Any], None, None]:
        # The list of bad entries is whole before the rows are, so that a piece that is there has both.
        with new_file(bad_file(self.file(piece))) as partial, open(partial, "w", encoding="utf-8") as listed:
            for found in read_pieces(self.source, [piece], self.work / "help"):
                if stopped():
                    raise StoppedError
                if isinstance(found, BadEntry):
                    if self.on_bad_row == "error" and found.kind != NOT_DOWNLOADED:
                        raise bad_entry_error(self.source, found)
                    listed.write(json.dumps(asdict(found)) + "\n")
                    counts[1] += 1
                else:
                    counts[0] += 1
                    yield self._own(found) if self.embed else found

    def _own(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its images, which says nothing of this machine's folders."""
        file = row["file"].replace(f"{self.source.path}", self.source.path.name, 1)
        return row | {"images": [_embedded(image) for image in row["images"]], "file": file}


def bad_file(piece: Path) -> Path:
    return piece.with_suffix(".bad.jsonl")


def _embedded(image: dict[str, Any]) -> dict[str, Any]:
    if image["bytes"] is not None:
        return image
    return {"bytes": Path(image["path"]).read_bytes(), "path": Path(image["path"]).name}


def _run(job: _Job, missing: list[Piece], total: int, num_proc: int, progress: bool) -> None:
    """Makes the missing pieces, here or in processes of their own."""
    from rich.markup import escape
    from rich.progress import Progress

    name = escape(job.source.path.name)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task(f"Reading {name}", total=total, completed=total - len(missing))
        rows = bad = 0
        for made in run_pieces(job.make, missing, num_proc, f"{job.source.path}"):
            rows, bad = rows + made[0], bad + made[1]
            bar.update(task, advance=1, description=f"Reading {name} ({rows} rows, {bad} bad entries)")


def _join(job: _Job, pieces: list[Piece], folder: Path, settings: dict[str, Any]) -> Prepared:
    """Makes a folder for `datasets.load_from_disk` of the pieces' files. They are linked, so that nothing is lost or copied."""
    from datasets import Dataset

    features, files = source_features(job.source), [job.file(piece) for piece in pieces]
    with new_folder(folder) as partial:
        bad: Counter[tuple[str, bool]] = Counter()
        first: BadEntry | None = None
        with open(partial / BAD_FILE, "w", encoding="utf-8") as listed:
            for file in files:
                with open(bad_file(file), encoding="utf-8") as lines:
                    for line in lines:
                        entry = BadEntry(**json.loads(line))
                        bad[entry.kind, entry.phrase] += 1
                        first = entry if first is None and entry.kind != NOT_DOWNLOADED else first
                        listed.write(line)
        # `datasets` puts no columns beside a table that has an empty part.
        files = [file for file in files if len(Dataset.from_file(os.fspath(file)))]
        if job.on_bad_row == "error" and first is not None:  # of an earlier run, which skipped it
            raise bad_entry_error(job.source, first)
        with quiet_datasets(import_datasets()):
            Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(partial)
        names = [f"data-{number:05}-of-{len(files):05}.arrow" for number in range(len(files))]
        for file, name in zip(files, names, strict=True):
            try:
                os.link(file, partial / name)
            except OSError:  # of file systems without links
                shutil.copyfile(file, partial / name)
        state = json.loads((partial / "state.json").read_text(encoding="utf-8"))
        fingerprint = digest([settings, _image_folders(job.source), names])
        state |= {"_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint}
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if not files or not len(Prepared(partial, bad, first).dataset):
            shutil.rmtree(job.work)
            reason = (
                "; correct the path"
                if first is None
                else f": all of its {bad.total()} entries are bad; the first: {first.reason}"
            )
            raise ValueError(f"{job.source.path} has no rows of the format {job.source.format}{reason}")
        counts = {
            "bad": [[kind, phrase, number] for (kind, phrase), number in sorted(bad.items())],
            "first_bad": None if first is None else asdict(first),
        }
        (partial / _COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        if job.embed:
            _tell(job.source, partial, bad)
    return Prepared(folder, bad, first)


def _tell(source: Source, folder: Path, bad: Counter[tuple[str, bool]]) -> None:
    """Writes the provenance and the card of a data set of one's own."""
    sources = [{"role": "annotations", **describe(source.path, "data set")}]
    if source.images is not None:
        sources.append({"role": "images", **describe(source.images, "data set")})
    settings = {"format": source.format, "split": source.split, "left out": bad.total()}
    tell_step(folder, {"sources": sources}, "agevlm data convert", settings)
