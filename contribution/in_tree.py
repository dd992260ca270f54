# SPDX-License-Identifier: Apache-2.0
"""Pytest plug-in of the run inside Transformers' tree: what the source distribution lacks, and that nothing else is tested."""

import sys
from pathlib import Path

import pytest
import transformers
from transformers_tests import create_stubs
from transformers_tests import pytest_configure as pytest_configure  # the marks


def pytest_sessionstart(session: pytest.Session) -> None:
    if Path.cwd() not in Path(transformers.__file__).parents:
        raise pytest.UsageError(f"Transformers is {transformers.__file__}, not the one of {Path.cwd()}.")
    create_stubs("tests")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "agevlm" in sys.modules:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
        print("\nThe tests imported the package `agevlm`; in-tree only Transformers may be tested.", file=sys.stderr)
