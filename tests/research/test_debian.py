# SPDX-License-Identifier: Apache-2.0
"""Photographs from Debian's packages: the two file formats, the exported folders and the command."""

import io
import re
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from research.assets import debian
from research.assets.debian import STAMPS, export_places, export_stamps, read_resources, unpack_package

pytestmark = pytest.mark.slow


def write_resources(files: dict[str, bytes], version: int = 2, packed: bool = True) -> bytes:
    """A Qt resource file with one folder, `photos`, that holds the files."""
    names, offsets = b"", {}
    for name in ("photos", *files):
        offsets[name] = len(names)
        encoded = name.encode("utf-16-be")
        names += struct.pack(">HI", len(name), 0) + encoded
    data, places = b"", {}
    for name, content in files.items():
        places[name] = len(data)
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        data += struct.pack(">I", len(stored)) + stored
    date = b"" if version == 1 else bytes(8)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + date  # the root: one child, node 1
    tree += struct.pack(">IHII", offsets["photos"], 2, len(files), 2) + date
    for name in files:
        tree += struct.pack(">IHHHI", offsets[name], int(packed), 0, 1, places[name]) + date
    head = 20 if version < 3 else 24
    header = struct.pack(">4s4I", b"qres", version, head, head + len(tree), head + len(tree) + len(data))
    return header + bytes(head - 20) + tree + data + names


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_resource_files_are_read(tmp_path, version, packed):
    files = {"a.webp": b"first" * 50, "b é.webp": b""}
    (tmp_path / "some.rcc").write_bytes(write_resources(files, version, packed))
    assert dict(read_resources(tmp_path / "some.rcc")) == {f"/photos/{name}": text for name, text in files.items()}


def test_other_and_damaged_files_are_refused(tmp_path):
    whole = write_resources({"a": b"text"})
    for content, message in ((b"PK\3\4" + whole, "not a compiled Qt resource"), (whole[:40], "damaged")):
        (tmp_path / "bad.rcc").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_resources(tmp_path / "bad.rcc"))


def png(mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 3), (10, 20, 30, 255)[: len(mode)]).save(buffer, "PNG")
    return buffer.getvalue()


def write_stamps(package):
    """What `tuxpaint-stamps-default` unpacks to; returns the last stamp."""
    for stamps in STAMPS.values():
        for stamp in stamps:
            file = package / "usr/share/tuxpaint/stamps" / f"{stamp}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png())
    return file


def write_places(package):
    """What `gcompris-qt-data` unpacks to; returns the folder of resource files."""
    folder = package / "usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    for resource, names in debian.PHOTOGRAPHS.items():
        suffix = "_background" if resource == "details" else ""
        files = {f"{name}{suffix}.webp": png("RGB") for name in [*names, "unwanted"]}
        (folder / f"{resource}.rcc").write_bytes(write_resources(files))
    return folder


def build_package(tree, file):
    """Packs a folder as a Debian package."""
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: b <b@c>\nDescription: d\n"
    )
    subprocess.run(["dpkg-deb", "--build", tree, file], check=True, capture_output=True)


def test_stamps_become_cutouts_by_class(tmp_path):
    file = write_stamps(tmp_path / "package")
    files = export_stamps(tmp_path / "package", tmp_path / "out")
    assert {name: len(stamps) for name, stamps in STAMPS.items()} == {
        name: len(found) for name, found in files.items()
    }
    assert all(Image.open(file).mode == "RGBA" for found in files.values() for file in found)
    assert (tmp_path / "out/ATTRIBUTION.md").is_file()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(file.name)} is missing"):
        export_stamps(tmp_path / "package", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_places_become_backgrounds(tmp_path):
    folder = write_places(tmp_path / "package")
    files = export_places(tmp_path / "package", tmp_path / "out")
    assert len(files) == sum(map(len, debian.PHOTOGRAPHS.values()))
    assert not any("unwanted" in file.name for file in files)
    (folder / "details.rcc").write_bytes(write_resources({"other": png()}))
    with pytest.raises(FileNotFoundError, match=r"details\.rcc holds no"):
        export_places(tmp_path / "package", tmp_path / "again")


def test_packages_are_unpacked(tmp_path):
    (tmp_path / "tree/usr/share").mkdir(parents=True)
    (tmp_path / "tree/usr/share/text").write_text("hello")
    build_package(tmp_path / "tree", tmp_path / "a.deb")
    assert (unpack_package(tmp_path / "a.deb", tmp_path / "out") / "usr/share/text").read_text() == "hello"
    (tmp_path / "b.deb").write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack_package(tmp_path / "b.deb", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no such file"):
        unpack_package(tmp_path / "c.deb", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_class_is_a_word_of_another():
    """Otherwise "Is there a pepper?" would have two right answers in a scene with a pepper mill."""
    for name in STAMPS:
        words = [other for other in STAMPS if other != name and name in other.split()]
        assert not words, (name, words)


def run_command(*arguments):
    command = [sys.executable, "-m", "research.assets.debian", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_exports_both_packages_and_keeps_what_is_there(tmp_path):
    write_stamps(tmp_path / "stamps")
    build_package(tmp_path / "stamps", tmp_path / f"{debian.PACKAGES[0]}_1_all.deb")
    arguments = tmp_path / "out", "--packages", tmp_path
    done = run_command(*arguments)
    assert done.returncode == 2
    assert f"has no .deb file of {debian.PACKAGES[1]}" in done.stderr
    assert "Traceback" not in done.stderr
    write_places(tmp_path / "places")
    build_package(tmp_path / "places", tmp_path / f"{debian.PACKAGES[1]}_1_all.deb")
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cutouts", "backgrounds"}
    cutouts = {path.name for path in (tmp_path / "out/cutouts").iterdir() if path.is_dir()}
    assert cutouts == set(STAMPS)
    assert len(list((tmp_path / "out/backgrounds").glob("*.png"))) == sum(map(len, debian.PHOTOGRAPHS.values()))
    before = (tmp_path / "out/cutouts").stat().st_mtime_ns
    assert run_command(tmp_path / "out", "--packages", tmp_path / "nowhere").returncode == 0
    assert (tmp_path / "out/cutouts").stat().st_mtime_ns == before


def test_without_apt_the_packages_must_be_given(tmp_path, monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--packages"):
        debian.fetch(tmp_path / "out")
