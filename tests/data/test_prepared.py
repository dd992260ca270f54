# SPDX-License-Identifier: Apache-2.0
"""Rows of published data sets: the same from any number of processes, after interruptions, in little memory; bad entries counted."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import engine_source
import pytest
from engine_source import NOT_DOWNLOADED, read_rows, wanted_row, write_source
from filelock import FileLock
from huggingface_hub import DatasetCard

from agevlm.data.prepared import convert_source, find_prepared, prepare_source, prepared_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


def wanted(numbers):
    return [(number, wanted_row(number)) for number in numbers]


def test_rows_are_made_once_in_the_order_of_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setenv("GENERATED_LOG", str(tmp_path / "log"))
    source = write_source(tmp_path / "a.json", 47)
    assert find_prepared(source) is None
    prepared = prepare_source(source, progress=False)
    assert read_rows(prepared.dataset) == wanted(range(47))
    assert set(prepared.dataset["file"]) == {str(tmp_path / "a.json")}
    assert prepared.folder == prepared_folder(source) == find_prepared(source).folder
    assert (prepared.bad, prepared.first_bad) == ({}, None)
    again = prepare_source(source, progress=False)
    assert read_rows(again.dataset) == wanted(range(47))
    assert len((tmp_path / "log").read_text().splitlines()) == 5
    assert read_rows(datasets.load_from_disk(prepared.folder)) == wanted(range(47))
    assert {path.suffix for path in prepared.folder.parent.iterdir()} == {"", ".lock"}  # no work is left

    source = write_source(tmp_path / "a.json", 48)  # another file
    assert len(prepare_source(source, progress=False).dataset) == 48


def test_two_processes_make_the_rows_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GENERATED_LOG", str(tmp_path / "log"))
    bad = {"3": "missing image", "39": "empty box"}
    source = write_source(tmp_path / "a.json", 60, bad=bad, seconds=0.01)
    both = prepare_source(source, num_proc=2, progress=False)
    alone = convert_source(source, tmp_path / "out", on_bad_row="skip", progress=False)
    workers = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()} - {str(os.getpid())}
    assert len(workers) == 2
    assert read_rows(both.dataset) == read_rows(alone.dataset) == wanted(set(range(60)) - {3, 39})
    assert (both.bad, both.first_bad) == (alone.bad, alone.first_bad)
    listed = [(folder / "bad.jsonl").read_text() for folder in (both.folder, alone.folder)]
    assert listed[0] == listed[1]
    assert [json.loads(line)["row"] for line in listed[0].splitlines()] == [3, 39]


def test_a_converted_data_set_has_a_card_and_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("GENERATED_LOG", str(tmp_path / "log"))
    source = write_source(tmp_path / "a.json", 20, bad={"3": "missing image"})
    converted = convert_source(source, tmp_path / "out", on_bad_row="skip", progress=False)
    card = DatasetCard.load(tmp_path / "out/README.md")
    assert card.data.size_categories == "n<1K"
    assert "# out" in card.text
    assert "| format | generated |" in card.text
    assert "| left out | 1 |" in card.text
    assert "| annotations | a.json |" in card.text
    assert {file.split(",")[0] for file in converted.dataset["file"]} == {"a.json"}
    tables = [file.read_bytes() for file in [*converted.folder.glob("*.arrow"), *converted.folder.glob("*.md")]]
    assert not [content for content in tables if str(tmp_path).encode() in content]


def test_bad_entries_and_phrases(tmp_path, monkeypatch):
    monkeypatch.setenv("GENERATED_LOG", str(tmp_path / "log"))
    bad = {"1": NOT_DOWNLOADED, "12": "missing image", "13": NOT_DOWNLOADED, "25": "missing image"}
    source = write_source(tmp_path / "a.json", 40, bad=bad, phrases={"14": "wrong span"})
    with pytest.raises(ValueError, match=r"a\.json, entry 12: entry 12 is bad; fix it; .*data check --format generated.*on_bad_row: skip"):  # fmt: skip
        prepare_source(source, on_bad_row="error", progress=False)
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # nothing after the first bad one is read
    prepared = prepare_source(source, on_bad_row="skip", progress=False)
    assert read_rows(prepared.dataset) == wanted(set(range(40)) - {1, 12, 13, 25})
    counts = {("missing image", False): 2, (NOT_DOWNLOADED, False): 2, ("wrong span", True): 1}
    assert prepared.bad == counts
    assert prepared.first_bad.row == 12
    assert "4 entries (missing image 2, not downloaded 2) and 1 phrases (wrong span 1); " in prepared.describe_bad()
    with pytest.raises(ValueError, match="entry 12"):  # of the rows in the cache, too
        prepare_source(source, on_bad_row="error", progress=False)

    gone = write_source(tmp_path / "gone.json", 3, bad={"1": NOT_DOWNLOADED})
    assert len(prepare_source(gone, on_bad_row="error", progress=False).dataset) == 2
    phrase = write_source(tmp_path / "phrase.json", 3, phrases={"1": "wrong span"})
    with pytest.raises(ValueError, match="entry 1: its phrase is bad"):
        prepare_source(phrase, on_bad_row="error", progress=False)
    nothing = write_source(tmp_path / "nothing.json", 2, bad={"0": "empty box", "1": "empty box"})
    with pytest.raises(ValueError, match="all of its 2 entries are bad; the first: entry 0 is bad"):
        prepare_source(nothing, progress=False)
    assert {path.suffix for path in prepared.folder.parent.iterdir()} == {"", ".lock"}


def test_work_of_other_data_is_not_continued(tmp_path):
    source = write_source(tmp_path / "a.json", 40, bad={"35": "empty box"})
    with pytest.raises(ValueError, match="entry 35"):
        convert_source(source, tmp_path / "out", progress=False)
    assert (tmp_path / ".out.unfinished").is_dir()
    changed = write_source(tmp_path / "a.json", 30)
    with pytest.raises(FileExistsError, match=r"holds work of other settings \(files was .* delete .*out\.unfinished"):
        convert_source(changed, tmp_path / "out", progress=False)
    for value, message in (({"num_proc": 0}, "at least 1"), ({"on_bad_row": "ignore"}, "error or skip")):
        with pytest.raises(ValueError, match=message):
            convert_source(changed, tmp_path / "other", progress=False, **value)


def test_an_added_image_does_not_stop_work_that_goes_on(tmp_path, monkeypatch):
    # The output may lie among the images, and the error of a missing one says to add it.
    log = tmp_path / "log"
    monkeypatch.setenv("GENERATED_LOG", str(log))
    path = write_source(tmp_path / "a.json", 40, bad={"35": "missing image"}).path
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    with pytest.raises(ValueError, match="entry 35"):
        convert_source(engine_source.Generated(path, photographs), photographs / "out", progress=False)
    (photographs / "35.jpg").touch()
    log.unlink()
    skipped = {"on_bad_row": "skip", "progress": False}
    converted = convert_source(engine_source.Generated(path, photographs), photographs / "out", **skipped)
    assert read_rows(converted.dataset) == wanted(set(range(40)) - {35})
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["z30"]


RUN = """
import signal, sys, datasets
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
if __name__ == "__main__":
    sys.path.insert(0, {fixtures!r})
    datasets.config.HF_DATASETS_CACHE = Path({cache!r})
    from engine_source import Generated
    from agevlm.data.prepared import prepare_source
    prepare_source(Generated({path!r}), num_proc={num_proc}, progress=False)
    import re
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # in KB
"""


def run_script(tmp_path, path, num_proc, **options):
    fixtures, cache = str(Path(engine_source.__file__).parent), str(datasets.config.HF_DATASETS_CACHE)
    script = tmp_path / "script.py"
    script.write_text(RUN.format(fixtures=fixtures, cache=cache, path=str(path), num_proc=num_proc))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(stop, tmp_path, monkeypatch):
    """The parent alone is killed; Ctrl-C of a terminal reaches all processes."""
    log = tmp_path / "log"
    monkeypatch.setenv("GENERATED_LOG", str(log))
    source = write_source(tmp_path / "a.json", 200, bad={"7": "empty box"}, seconds=0.01)
    work = prepared_folder(source).with_name(f".{prepared_folder(source).name}.unfinished")
    process = run_script(tmp_path, source.path, 2, start_new_session=True)
    wait_for(lambda: len(list(work.glob("pieces/*.arrow"))) >= 3)
    (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
    _, printed = process.communicate(timeout=60)
    assert process.returncode != 0
    assert printed.count("KeyboardInterrupt") == (stop == signal.SIGINT)  # of one process
    begun = [line.split() for line in log.read_text().splitlines()]
    wait_for(lambda: not any(is_running(pid) for _, pid in begun))
    finished = {file.stem: file.stat().st_mtime_ns for file in work.glob("pieces/*.arrow")}
    assert 3 <= len(finished) < 20

    log.unlink()
    prepared = prepare_source(source, progress=False)
    assert {line.split()[0] for line in log.read_text().splitlines()} == {f"z{n}" for n in range(0, 200, 10)} - set(
        finished
    )
    assert read_rows(prepared.dataset) == wanted(set(range(200)) - {7})
    assert prepared.bad == {("empty box", False): 1}
    assert not work.exists()


def test_a_process_that_dies_is_named(tmp_path):
    source = write_source(tmp_path / "a.json", 40, dies=25)
    with pytest.raises(OSError, match=r"a\.json: a process .* was killed.* use fewer processes"):
        prepare_source(source, num_proc=2, progress=False)


def test_a_second_process_waits_for_the_first(tmp_path, caplog):
    source = write_source(tmp_path / "a.json", 20)
    folder = prepared_folder(source)
    folder.parent.mkdir(parents=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), thread_local=False)
    lock.acquire()
    caplog.set_level(logging.WARNING)
    second = threading.Thread(target=lambda: prepare_source(source, progress=False))
    second.start()
    wait_for(lambda: "waiting for another process" in caplog.text)
    assert find_prepared(source) is None
    lock.release()
    second.join(60)
    assert read_rows(find_prepared(source).dataset) == wanted(range(20))


@pytest.mark.minutes
@pytest.mark.parametrize("num_proc", [1, 2])
def test_memory_does_not_grow_with_the_rows(tmp_path, num_proc):
    used = {}
    for rows in (10_000, 100_000):
        source = write_source(tmp_path / f"{rows}.json", rows, piece=2_000)
        process = run_script(tmp_path, source.path, num_proc)
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        used[rows] = int(re.search(r"\d+", printed)[0])
        assert len(find_prepared(source).dataset) == rows
    print(used)
    assert used[100_000] < used[10_000] * 1.15


def test_folders_that_cannot_be_looked_into_are_no_hindrance(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "lost+found").mkdir(parents=True, mode=0o000)
    (folder / "loop").symlink_to("loop")
    path = write_source(tmp_path / "a.json", 3).path
    assert len(prepare_source(engine_source.Generated(path, folder), progress=False).dataset) == 3
