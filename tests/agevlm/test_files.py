# SPDX-License-Identifier: Apache-2.0
"""Output folders and files that appear complete or not at all, and what stopped runs leave."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agevlm.files import (
    check_new_folder,
    claim,
    new_file,
    new_folder,
    unfinished_folder,
    unfinished_path,
    update_folder,
)

OUTPUTS = ("missing", "empty", "link", "mount")


@pytest.fixture(params=OUTPUTS)
def output(request, tmp_path, monkeypatch) -> Path:
    """An output folder in a folder of its own: one that is missing, is empty, is a link to an empty folder elsewhere, or is
    an empty mount point, which can be neither renamed nor replaced nor removed."""
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    if request.param == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    elif request.param != "missing":
        out.mkdir()
    if request.param == "mount":
        (out / "lost+found").mkdir()
        for name in ("rename", "replace", "rmdir"):
            monkeypatch.setattr(os, name, busy(getattr(os, name), out))
    return out


def busy(function, mount: Path):
    def refuses(*paths, **kwargs):
        if mount in map(Path, paths):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(mount))
        # Nothing comes from another file system, as `EXDEV` has it.
        if len(paths) == 2 and len({mount in Path(path).parents for path in paths}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(mount))
        return function(*paths, **kwargs)

    return refuses


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != "lost+found")


def fill(partial: Path) -> None:
    (partial / "config.json").write_text("{}")
    (partial / "part").mkdir()
    (partial / "part" / "file").write_text("whole")
    (partial.parent / "scratch").write_text("not needed later")


def test_the_content_appears_in_every_kind_of_output_folder(output):
    check_new_folder(output)
    is_link = output.is_symlink()
    with new_folder(output) as partial:
        fill(partial)
        assert not output.exists() or not (output / "config.json").exists()
    assert names(output) == ["config.json", "part", "part/file"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert output.is_symlink() == is_link
    with pytest.raises(FileExistsError, match="already exists"):
        check_new_folder(output)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), ValueError("wrong"), OSError(errno.EIO, "broken")]
)
def test_a_failure_leaves_what_was_there(output, error):
    before = sorted(output.parent.rglob("*"))

    def fill_and_stop():
        with new_folder(output) as partial:
            fill(partial)
            raise error

    with pytest.raises(type(error)):
        fill_and_stop()
    assert sorted(output.parent.rglob("*")) == before


def test_a_failure_removes_the_parents_that_it_made(tmp_path):
    with pytest.raises(ValueError, match="wrong"), new_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_parts_come_before_the_configuration_that_says_that_they_are_there(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(Path(new).name), replace(old, new)))
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        for name in ("config.json", "a.json", "z.safetensors", "b.txt"):
            (partial / name).touch()
    assert order[-2:] == ["a.json", "config.json"]
    assert sorted(order) == names(tmp_path / "out")


def test_existing_content_is_kept(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    for folder in (tmp_path / "old", tmp_path / "old" / "file"):
        with pytest.raises(FileExistsError, match="already exists"), new_folder(folder):
            pass
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"), new_folder(tmp_path / "dangling"):
        pass
    with pytest.raises(NotADirectoryError, match=r"old/file is a file"):
        check_new_folder(tmp_path / "old" / "file" / "out")
    assert names(tmp_path) == ["dangling", "old", "old/file"]
    assert (tmp_path / "old" / "file").read_text() == "mine"


def test_a_place_without_permission_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=f"no permission to write in {tmp_path}"):
        check_new_folder(tmp_path / "a" / "out")


def test_an_update_replaces_parts_of_the_same_names_only(tmp_path):
    folder = tmp_path / "report"
    with update_folder(folder) as partial:
        fill(partial)
    (folder / "mine").write_text("mine")
    (folder / "part" / "stale").touch()
    with update_folder(folder) as partial:
        (partial / "config.json").write_text("new")
        (partial / "part").mkdir()
    assert names(tmp_path) == ["report", "report/config.json", "report/mine", "report/part"]
    assert (folder / "config.json").read_text() == "new"
    with pytest.raises(ZeroDivisionError), update_folder(folder) as partial:
        (partial / "config.json").write_text(f"{1 / 0}")
    assert (folder / "config.json").read_text() == "new"
    assert names(folder) == ["config.json", "mine", "part"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "new" / "file.json"
    with pytest.raises(ZeroDivisionError), new_file(file) as partial:
        partial.write_text(f"half {1 / 0}")
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with new_file(file) as partial:
            partial.write_text(text)
        assert file.read_text() == text
    assert names(tmp_path) == ["new", "new/file.json"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(output, umask):
    """Libraries make private files, as `safetensors` does, and private folders, as `tempfile` does."""
    before = os.umask(umask)
    try:
        with new_folder(output) as partial:
            (partial / "folder").mkdir(mode=0o700)
            for name in ("file", "folder/file"):
                os.close(os.open(partial / name, os.O_CREAT, mode=0o600))
            os.close(os.open(partial / "program", os.O_CREAT, mode=0o755))
        with new_file(output / "single") as single:
            os.close(os.open(single, os.O_CREAT, mode=0o600))
    finally:
        os.umask(before)
    for name in ("file", "folder/file", "single"):
        assert (output / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (output / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (output / "program").stat().st_mode & 0o777 == 0o755 & ~umask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(output, number):
    """Whatever the error is, since each library has its own: `safetensors` one that is no `OSError`."""
    before = sorted(output.parent.rglob("*"))
    for error in (
        OSError(number, os.strerror(number)),
        RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})"),
    ):
        with (
            pytest.raises(OSError, match=f"Could not write {output}: .*{os.strerror(number)}.* Make room"),
            new_folder(output),
        ):
            raise error
        assert sorted(output.parent.rglob("*")) == before
    with pytest.raises(RuntimeError, match=r"^other$"), new_folder(output):
        raise RuntimeError("other")


# --- what stopped runs leave ---

WORK = """
import os, sys, time
from agevlm.files import new_folder
sys.argv[0] = "agevlm"
from agevlm.cli import commands, main
def build(**options):
    with new_folder(sys.argv[1]) as partial:
        (partial / "half").touch()
        print("at work", flush=True)
        time.sleep(600)
commands.app = build
main()
"""


def start_work(output: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WORK, output], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_the_next_run_removes_what_a_killed_one_left_and_refuses_beside_a_live_one(kind, tmp_path):
    """SIGTERM leaves nothing; SIGKILL leaves a hidden folder that a run which is alive keeps, and the next one removes."""
    out = tmp_path / "out"
    if kind == "empty":
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    process = start_work(out)
    assert len(sorted(tmp_path.rglob("*"))) > len(before)
    process.terminate()
    assert process.wait(30) == 143
    assert sorted(tmp_path.rglob("*")) == before

    process = start_work(out)
    during = sorted(tmp_path.rglob("*"))
    for refused in (check_new_folder, lambda folder: new_folder(folder).__enter__()):
        with pytest.raises(FileExistsError, match=f"{out}: process {process.pid} is writing there"):
            refused(out)
    assert sorted(tmp_path.rglob("*")) == during
    with new_folder(tmp_path / "other"):
        pass  # another output is nobody's
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert set(during) <= set(tmp_path.rglob("*"))
    with new_folder(out) as partial:
        assert [path.name for path in partial.parent.parent.glob(".*unfinished-*")] == [partial.parent.name]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "other", out]
    assert not list(out.iterdir())


def leave(target: Path, **changes) -> Path:
    """What a process leaves of its work on a target: this one, but for changes of what the file says."""
    with unfinished_folder(target) as work:
        process = json.loads((work / "process.json").read_text())
    assert process["pid"] == os.getpid()
    work.mkdir()
    (work / "process.json").write_text(json.dumps({**process, **changes}))
    return work


def test_a_process_is_known_by_more_than_its_number(tmp_path, caplog):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = leave(tmp_path / "out", pid=ended.pid)
    reused = leave(tmp_path / "out", start="1")  # the number is now that of another process
    zombie_process = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{zombie_process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    zombie = leave(tmp_path / "out", pid=zombie_process.pid)
    elsewhere = leave(tmp_path / "out", pid=ended.pid, host="another machine")
    alive = leave(tmp_path / "out", pid=os.getppid(), start=process_start(os.getppid()))
    with unfinished_folder(tmp_path / "out"):
        assert not any(path.exists() for path in (dead, reused, zombie))
        assert all(path.exists() for path in (elsewhere, alive))
    zombie_process.wait()
    assert f"{elsewhere} is of process {ended.pid} on another machine. If it no longer runs, delete" in caplog.text


def process_start(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "x"}', "\0"])
def test_folders_that_name_no_process_are_not_touched(content, tmp_path):
    for name in (".out.unfinished-mine", ".unfinished-mine", "out.partial", ".out.other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "process.json").write_text(content)
    before = names(tmp_path)
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*before, "out"])


def test_work_that_is_continued_stays_and_is_at_one_process_only(tmp_path):
    out = tmp_path / "out"
    work = unfinished_path(out)
    work.mkdir()
    with claim(work):
        (work / "part").touch()
        check_new_folder(out)  # of the same process
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (work / "process.json").write_text(leave(out, pid=ended.pid).joinpath("process.json").read_text())
    with new_folder(out):
        pass
    assert names(tmp_path) == [".out.unfinished", ".out.unfinished/part", ".out.unfinished/process.json", "out"]
    with claim(work):
        pass
    assert names(work) == ["part"]
    (work / "process.json").write_text(
        leave(out, pid=os.getppid(), start=process_start(os.getppid())).joinpath("process.json").read_text()
    )
    with pytest.raises(FileExistsError, match=f"process {os.getppid()} is writing there"), claim(work):
        pass
