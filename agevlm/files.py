# SPDX-License-Identifier: Apache-2.0
"""Output folders that appear complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_new_folder(folder: Path) -> None:
    """What `new_folder` refuses, for those who want to know it before hours of work.

    Raises:
        FileExistsError: if `folder` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists; choose another output folder or delete it")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which appears under the name `folder` when the block ends, or not at all if it raises.

    Raises:
        FileExistsError: if `folder` exists and is not an empty folder.
    """
    folder = Path(folder).absolute()
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        partial = Path(parent) / folder.name
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
