# SPDX-License-Identifier: Apache-2.0
from transformers_tests import pytest_configure  # noqa: F401
