# SPDX-License-Identifier: Apache-2.0
"""The Space starts with and without the `spaces` package, and what the Hub reads in its folder is there."""

import runpy
import sys
from types import SimpleNamespace

import pytest
from documents import ROOT
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from tiny_laboratory import tiny_checkpoint

pytestmark = pytest.mark.slow

SPACE = ROOT / "examples" / "space"


@pytest.mark.parametrize("on_a_space", [False, True])
def test_it_starts(on_a_space, tmp_path, monkeypatch):
    decorated = []
    spaces = SimpleNamespace(GPU=lambda function: decorated.append(function) or function) if on_a_space else None
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    tiny_checkpoint(tmp_path / "model")
    monkeypatch.setenv("AGEVLM_MODEL", str(tmp_path / "model"))
    names = runpy.run_path(str(SPACE / "app.py"))
    assert len(decorated) == on_a_space
    assert type(names["demo"]).__name__ == "Blocks"
    assert names["demo"].title == "model"


def test_the_hub_can_read_it():
    data = SpaceCard.load(SPACE / "README.md").data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "apache-2.0")
    assert (SPACE / data.app_file).is_file()
    assert len(data.models) == 1
    assert len(data.short_description) <= 60  # of the Hub
    requirements = [Requirement(line) for line in (SPACE / "requirements.txt").read_text().splitlines()]
    assert [(item.name, item.extras) for item in requirements] == [("agevlm", {"app"})]
    project = (ROOT / "pyproject.toml").read_text()
    lowest = next(Requirement(part.strip(' "')) for part in project.split("app = [")[1].split("]")[0].split(","))
    assert lowest.name == "gradio"
    assert lowest.specifier.contains(data.sdk_version)
