# SPDX-License-Identifier: Apache-2.0
"""Data at addresses: downloaded and unpacked once, in spite of interruptions; what is missing is named."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
from command_line import check_refused, run
from huggingface_hub import file_download
from row_cases import LLAVA, encoded, write
from web_server import serve

from agevlm.data.download import local
from agevlm.data.readers import read_dataset

pytestmark = pytest.mark.usefixtures("own_cache")


def archive(files, kind="zip"):
    """The bytes of an archive of files by their names."""
    opened = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(opened, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(fileobj=opened, mode="w:gz") as packed:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return opened.getvalue()


FILES = {"train/a.png": b"first", "train/sub/b.png": b"second", "note.txt": b"x"}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}  # fmt: skip


def test_files_and_archives_are_fetched_once(tmp_path):
    pages = {"/x/a.json": b"[1]", "/x.zip": archive(FILES), "/x.tar.gz": archive(FILES, "tar")}
    with serve(pages) as (port, asked):
        host = f"http://127.0.0.1:{port}"
        for _ in range(2):
            file = Path(local(f"{host}/x/a.json"))
            assert (file.name, file.read_bytes()) == ("a.json", b"[1]")
            for name in ("x.zip", "x.tar.gz"):
                assert contents(local(f"{host}/{name}")) == FILES
                inner = local(f"zip://train::{host}/{name}")
                assert contents(inner) == {"a.png": b"first", "sub/b.png": b"second"}
                assert Path(local(f"zip://train/a.png::{host}/{name}")).read_bytes() == b"first"
        assert sorted(path for path, _ in asked) == sorted(pages)
    kept = [path.name for path in (tmp_path / "cache" / "agevlm" / "downloads").rglob("*")]
    assert not {"x.zip", "x.tar.gz", "incomplete"} & set(kept)  # the archives themselves are gone


def test_paths_are_returned_and_archives_on_disk_are_unpacked_again_where_they_change(tmp_path):
    assert local("no/such/file.json") == "no/such/file.json"
    assert local(tmp_path) == str(tmp_path)
    (tmp_path / "x.zip").write_bytes(archive(FILES))
    assert contents(local(f"zip://train::{tmp_path}/x.zip")) == {"a.png": b"first", "sub/b.png": b"second"}
    (tmp_path / "x.zip").write_bytes(archive({"train/c.png": b"other"}))
    assert contents(local(f"zip://train::{tmp_path}/x.zip")) == {"c.png": b"other"}
    assert (tmp_path / "x.zip").is_file()


def test_what_is_in_the_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(lock, *args, **options):
        raise PermissionError("read only")

    with serve({"/a.json": b"[1]", "/x.zip": archive(FILES)}) as (port, _):
        addresses = [f"http://127.0.0.1:{port}/{name}" for name in ("a.json", "x.zip")]
        found = [local(address) for address in addresses]
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert [local(address) for address in addresses] == found

    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(OSError, match=r"file/agevlm/downloads.* cannot be written .*HF_DATASETS_CACHE"):
        local(addresses[0])


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(ranges, monkeypatch):
    """The server breaks off, and the user presses Ctrl-C while the library waits to try again. A server need not know ranges."""
    content, asked_for = bytes(range(256)) * 400, []

    def page(handler):
        asked_for.append(handler.headers["Range"])
        start = int(re.search(r"\d+", handler.headers["Range"] or "0")[0]) if ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", f"{len(content) - start}")
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[start:50_000] if len(asked_for) == 1 else content[start:])

    def interrupted(seconds):
        raise KeyboardInterrupt

    with serve({"/a.bin": page}) as (port, _):
        address = f"http://127.0.0.1:{port}/a.bin"
        with monkeypatch.context() as patched:
            patched.setattr(file_download.time, "sleep", interrupted)
            patched.setattr(
                file_download.constants, "DOWNLOAD_CHUNK_SIZE", 1000
            )  # what comes is written in such parts
            with pytest.raises(KeyboardInterrupt):
                local(address)
        assert Path(local(address)).read_bytes() == content
    assert asked_for == [None, "bytes=50000-"]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with serve({"/x.zip": archive(FILES), "/broken.zip": b"PK no archive"}) as (port, asked):
        host = f"http://127.0.0.1:{port}"
        with pytest.raises(
            FileNotFoundError, match=rf"{host}/none\.json cannot be downloaded \(.*404.*correct the address"
        ):
            local(f"{host}/none.json")
        for inner in ("val", "../..", "/etc"):
            with pytest.raises(FileNotFoundError, match=r"the archive has no .*, but note\.txt, train; correct"):
                local(f"zip://{inner}::{host}/x.zip")
        with pytest.raises(ValueError, match=r"broken\.zip cannot be unpacked \(neither zip nor tar\): delete it"):
            local(f"{host}/broken.zip")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        count = len(asked)
        assert contents(local(f"{host}/x.zip")) == FILES  # of the cache
        with pytest.raises(OSError, match=r"y\.zip is not in the cache, and HF_HUB_OFFLINE forbids"):
            local(f"{host}/y.zip")
        assert len(asked) == count
    for address, message in (
        ("zip://train", "is not zip://INNER::ARCHIVE"),
        ("zip://::x.zip", "is not zip://INNER::ARCHIVE"),
        ("ftp://host/x.zip", "is not an address that data are read from"),
        ("hf://me/mine/a.json", "is not hf://datasets/OWNER/NAME/FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            local(address)
    with pytest.raises(FileNotFoundError, match=r"no such file: nowhere\.zip"):
        local("zip://a::nowhere.zip")


def test_archives_write_nothing_outside_their_folder(tmp_path):
    before = set(tmp_path.iterdir())
    (tmp_path / "bad.zip").write_bytes(archive({"../evil": b"x", "/evil": b"x", "a": b"y"}))
    (tmp_path / "bad.tar.gz").write_bytes(archive({"a": b"y", "../evil": b"x"}, "tar"))
    assert Path(local(f"zip://a::{tmp_path}/bad.zip")).read_bytes() == b"y"
    with pytest.raises(ValueError, match=r"bad\.tar\.gz cannot be unpacked"):
        local(f"zip://a::{tmp_path}/bad.tar.gz")
    assert not [path for path in tmp_path.rglob("evil") if path.parent.name == "downloads" or path.parent == tmp_path]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "bad.zip", tmp_path / "bad.tar.gz", tmp_path / "cache"}


def test_files_and_folders_of_the_hub(tmp_path, monkeypatch):
    """Of a repository in the cache, as `huggingface_hub` lays it out, without a connection."""
    hub = tmp_path / "hub"
    snapshot = hub / "datasets--me--mine" / "snapshots" / ("0" * 40)
    for name, content in {"a.json": b"[1]", "data/b.json": b"[2]", "images.zip": archive(FILES)}.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    (hub / "datasets--me--mine" / "refs").mkdir()
    (hub / "datasets--me--mine" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Path(local("hf://datasets/me/mine/a.json")).read_bytes() == b"[1]"
    assert Path(local("hf://datasets/me/mine@main/a.json")).name == "a.json"
    assert contents(local("hf://datasets/me/mine/data")) == {"b.json": b"[2]"}
    assert contents(local("hf://datasets/me/mine/images.zip")) == FILES
    assert (snapshot / "images.zip").is_file()
    with pytest.raises(FileNotFoundError, match=r"the Hub's data set me/mine has no c\.json"):
        local("hf://datasets/me/mine/c.json")
    with pytest.raises(
        OSError, match=r"hf://datasets/me/other/a\.json is not in the cache, and the Hub cannot be asked"
    ):
        local("hf://datasets/me/other/a.json")


def test_data_sets_at_addresses_are_read_and_converted(tmp_path, monkeypatch, capsys):
    conversations = write(tmp_path / "llava.json", LLAVA).read_bytes()
    pictures = archive({"deep/a.png": encoded(), "deep/sub/b.png": encoded(20, 10)})
    with serve({"/llava.json": conversations, "/images.zip": pictures}) as (port, _):
        address, images = f"http://127.0.0.1:{port}/llava.json", f"zip://deep::http://127.0.0.1:{port}/images.zip"
        rows = read_dataset(address, "llava", images=images)
        assert [len(row) for row in rows["images"]] == [1, 2, 0, 1]
        assert rows["row_origin"][0]["file"].endswith("/llava.json")
        command = ["data", "convert", address, "--format", "llava", "--images", images, "--num-proc", 1, "--out"]
        code, printed = run(monkeypatch, capsys, *command, tmp_path / "out")
        assert code == 0, printed
        assert "4 rows, 4 images" in printed
        missing = ["data", "check", f"{address}l", "--format", "llava", "--images", images]
        check_refused(monkeypatch, capsys, tmp_path / "out", "cannot be downloaded", *missing)
