# SPDX-License-Identifier: Apache-2.0
"""Output folders that appear complete or not at all."""

import pytest

from agevlm.files import new_folder


def test_new_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failure_leaves_no_folder(tmp_path):
    def fill_and_stop():
        with new_folder(tmp_path / "new") as partial:
            (partial / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_stop()
    assert not list(tmp_path.iterdir())


def test_existing_content_is_kept(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists"), new_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old" / "file").read_text() == "mine"
