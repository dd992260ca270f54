# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A trainer makes its output folder, whatever it is for."""
    monkeypatch.chdir(tmp_path)
