# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile installs what it needs and starts a command that is there; the image itself is not built here."""

import fnmatch
import json
import re
import tomllib

from documents import ROOT

from agevlm.cli.commands import app

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_installs_extras_that_exist():
    extras = re.search(r"/source\[([\w,]+)\]", DOCKERFILE)[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert "serve" in extras


def test_everything_that_the_package_needs_is_copied():
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    needed = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    needed |= {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert needed == kept
    assert not [name for name in kept if not fnmatch.filter([path.name for path in ROOT.iterdir()], name)]


def test_its_command_exists():
    words = json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[1])
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1]) == ["agevlm"]
    (command,) = [entry for entry in app.registered_commands if entry.callback.__name__ == words[0]]
    parameters = command.callback.__annotations__
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= set(parameters)
