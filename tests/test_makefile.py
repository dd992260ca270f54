# SPDX-License-Identifier: Apache-2.0
"""`make` finds a Python that is new enough, whatever it is called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Says whether it is new enough, as the real one would, and makes an environment that says which Python made it.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} -c "import sys; sys.version_info = {version}; $2"; fi
{mkdir} -p "$3/bin"
echo "{name}" > "$3/made_by"
printf '#!/bin/sh\\n' > "$3/bin/pip"
{chmod} +x "$3/bin/pip"
"""


def set_up(
    folder: Path, pythons: dict[str, tuple[int, int]], *arguments: str
) -> tuple[subprocess.CompletedProcess, Path]:
    """Runs make where only these Pythons, with their versions, are in the PATH."""
    (folder / "bin").mkdir()
    for name, version in pythons.items():
        commands = {"python": sys.executable, "mkdir": shutil.which("mkdir"), "chmod": shutil.which("chmod")}
        (folder / "bin" / name).write_text(PYTHON.format(name=name, version=version, **commands))
        (folder / "bin" / name).chmod(0o755)
    venv = folder / "venv"
    command = [shutil.which("make"), "-f", ROOT / "Makefile", f"VENV={venv}", *arguments, f"{venv}/bin/python"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
    environment["PATH"] = str(folder / "bin")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done, venv / "made_by"


@pytest.mark.parametrize(
    ("pythons", "arguments", "chosen"),
    [
        ({"python3.11": (3, 11), "python3": (3, 13)}, [], "python3.11"),
        ({"python3.10": (3, 10), "python3.12": (3, 12)}, [], "python3.12"),
        ({"python3.14": (3, 14), "python3": (3, 9)}, [], "python3.14"),
        ({"python3": (3, 15)}, [], "python3"),
        ({"python": (3, 12), "python3": (3, 8)}, [], "python"),
        ({"python3.11": (3, 11), "python3.13": (3, 13)}, ["PYTHON=python3.13"], "python3.13"),
    ],
)
def test_any_python_that_is_new_enough_is_found(pythons, arguments, chosen, tmp_path):
    done, made_by = set_up(tmp_path, pythons, *arguments)
    assert made_by.is_file(), done.stderr
    assert made_by.read_text().strip() == chosen


@pytest.mark.parametrize(
    ("pythons", "arguments", "named"),
    [
        ({}, [], "PATH has none"),
        ({"python3": (3, 10), "python": (2, 7)}, [], "PATH has none"),
        ({"python3.11": (3, 11), "old": (3, 10)}, ["PYTHON=old"], "old has none"),
        ({"python3.11": (3, 11)}, ["PYTHON=missing"], "missing has none"),
    ],
)
def test_a_python_that_is_too_old_or_missing_is_told(pythons, arguments, named, tmp_path):
    done, made_by = set_up(tmp_path, pythons, *arguments)
    assert done.returncode != 0
    assert not made_by.exists()
    assert "AGE-VLM needs Python 3.11 or newer" in done.stderr
    assert named in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr
