# SPDX-License-Identifier: Apache-2.0
"""The source distribution of the installed Transformers, which has its common tests; the installed package does not."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

CACHE = Path(__file__).resolve().parents[1] / ".cache"
FIX = "Set TRANSFORMERS_SOURCE to an unpacked source distribution or a checkout of that version instead."


def source_distribution() -> Path:
    """The folder with `src` and `tests` of the installed version.

    pip fetches it once, from whatever index it is configured for, into `.cache` at the root of the repository. The
    environment variable `TRANSFORMERS_SOURCE` can name another folder.

    Raises:
        RuntimeError: if there is no such folder and it cannot be fetched.
    """
    version = transformers.__version__
    if "TRANSFORMERS_SOURCE" in os.environ:
        folder = Path(os.environ["TRANSFORMERS_SOURCE"])
        if not (folder / "tests" / "test_modeling_common.py").is_file():
            raise RuntimeError(f"TRANSFORMERS_SOURCE={folder} has no file tests/test_modeling_common.py.")
        return folder
    folder = CACHE / f"transformers-{version}"
    if not folder.is_dir():
        _fetch(version, folder)
    return folder


def _fetch(version: str, folder: Path) -> None:
    from agevlm.files import unfinished_folder  # not above: tests inside of Transformers' tree import no agevlm

    with unfinished_folder(folder) as tmp:
        # pip also builds the package's metadata and so needs its build backend; no option turns that off.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        result = subprocess.run(
            [*command, "--dest", str(tmp), f"transformers=={version}"], capture_output=True, text=True, check=False
        )
        archives = list(tmp.glob("*.tar.gz"))
        if result.returncode != 0 or len(archives) != 1:
            raise RuntimeError(
                f"Cannot fetch the source distribution of transformers {version}, whose common tests are run here.\n"
                f"{result.stderr.strip()}\n{FIX}"
            )
        with tarfile.open(archives[0]) as archive:
            archive.extractall(tmp, filter="data")
        source = next(tmp.glob("transformers-*/tests"), None)
        if source is None:
            raise RuntimeError(f"The source distribution of transformers {version} has no tests. {FIX}")
        try:
            source.parent.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
