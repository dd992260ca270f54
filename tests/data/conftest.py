# SPDX-License-Identifier: Apache-2.0
"""Image files for tests of readers and of the check; the tiny Segment Anything for tests of teachers and of masks."""

import pytest
from row_cases import encoded


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded())
    (folder / "sub" / "b.png").write_bytes(encoded(20, 10))
    (folder / "001.jpg").write_bytes(encoded(kind="JPEG"))
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A `.pth` file like the official ones."""
    from tiny_sam import save_checkpoint

    path = tmp_path_factory.mktemp("sam") / "sam_tiny.pth"
    save_checkpoint(path)
    return path


@pytest.fixture
def tiny_sam_type(monkeypatch):
    """The tiny SAM among the official types, which stay: `load_sam` must find the right one."""
    import segment_anything
    from tiny_sam import build_tiny_sam

    monkeypatch.setitem(segment_anything.sam_model_registry, "tiny", build_tiny_sam)
