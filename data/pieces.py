# SPDX-License-Identifier: Apache-2.0
"""Work in pieces: finished pieces are kept in a hidden folder, and a run that was stopped continues with the others.

Masks of teachers and rows of published data sets are made so. A piece is an Arrow file, which is whole or not there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_new_folder, claim, new_file, unfinished_path
from ..resume import resume_or_refuse

if TYPE_CHECKING:
    from datasets import Features


# Of the images of a batch of rows.
_BATCH_BYTES = 64_000_000


@contextlib.contextmanager
def unfinished_work(output_dir: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The hidden folder of work on `output_dir`, which a next run with the same settings continues.

    Settings are kept there, or compared, and this process is named there. It is removed where the block fails without a piece; who
    ends the block with the result removes it.

    Raises:
        FileExistsError: if `output_dir` cannot become the result, the work is of other settings, or another process is at it.
    """
    check_new_folder(output_dir)
    work = unfinished_path(output_dir)
    if work.is_dir() and any(work.iterdir()) and not (work / "settings.json").is_file():
        raise FileExistsError(f"{work} holds something else: choose another output folder or delete it")
    resume_or_refuse(work / "settings.json", settings)
    with claim(work):
        try:
            yield work
        except BaseException:
            if not any(work.glob("**/*.arrow")):
                shutil.rmtree(work, ignore_errors=True)
            raise


def write_piece(file: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as an Arrow file, which appears when it is whole.

    A thousand rows are in memory at a time, or fewer with large images. Each such batch of a data set takes some 30 KB of memory
    where the data set is opened, so that the hundred rows that `datasets` writes at a time would be gigabytes for millions of rows.
    """
    from datasets.arrow_writer import ArrowWriter

    size = 0
    with (
        new_file(file) as partial,
        ArrowWriter(path=str(partial), features=features, writer_batch_size=1000) as writer,
    ):
        for row in rows:
            writer.write(row)
            size += sum(len(image["bytes"] or b"") for image in row.get("images", ()))
            if size > _BATCH_BYTES:
                writer.write_examples_on_file()
                size = 0
        writer.finalize()


class StoppedError(Exception):
    """Raised in a process whose work is no longer wanted."""


def run_pieces(
    make: Callable[[Any, Callable[[], bool]], Any], pieces: Sequence[Any], num_proc: int, what: str
) -> Iterator[Any]:
    """Makes pieces, here or in processes of their own.

    Args:
        make: makes a piece, and asks its second argument now and then whether to raise [`StoppedError`]. It is sent to the processes.
        pieces: not yet made.
        num_proc: processes.
        what: the pieces are of, for errors.

    Yields:
        what `make` returns, in any order.

    Raises:
        OSError: if a process was killed.
    """
    if num_proc <= 1:
        for piece in pieces:
            yield make(piece, lambda: False)
        return
    # A process that begins anew is safe beside the threads of this one, which a fork is not.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(num_proc, context, _start, (make, stop)) as pool:
        try:
            for future in as_completed([pool.submit(_make_in_pool, piece) for piece in pieces]):
                yield future.result()
        except BaseException as error:  # also interrupts, and the end of a generator that is no longer read
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise OSError(
                    f"{what}: a process that read it was killed, as is done where memory is short; the same command goes on with what is "
                    "finished: use fewer processes (`--num-proc`)"
                ) from error
            raise


# What a process of the pool works on, see `_start`.
_work: tuple[Callable[[Any, Callable[[], bool]], Any], Any]


def _start(make: Callable[[Any, Callable[[], bool]], Any], stop: Any) -> None:
    """Begins a process of the pool."""
    import signal

    global _work
    _work = make, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C: the parent says when to stop
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_in_pool(piece: Any) -> Any:
    make, stop = _work
    return make(piece, stop.is_set)
