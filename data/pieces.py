# SPDX-License-Identifier: Apache-2.0
"""Work in pieces: finished pieces are kept in a hidden folder, and a run that was stopped continues with the others.

Masks of teachers and rows of published data sets are made so. A piece is an Arrow file, which is whole or not there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_new_folder, claim, new_file, unfinished_path
from ..resume import resume_or_refuse

if TYPE_CHECKING:
    from datasets import Features


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
    """Writes rows as an Arrow file, which appears when it is whole. A few rows are in memory at a time."""
    from datasets.arrow_writer import ArrowWriter

    with new_file(file) as partial, ArrowWriter(path=str(partial), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
