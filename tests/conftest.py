# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings
from transformers_tests import pytest_configure  # noqa: F401

# `--hypothesis-profile=many` tries many more inputs, by hand.
settings.register_profile("few", max_examples=50, deadline=None, database=None)
settings.register_profile("many", max_examples=2500, deadline=None, database=None)
settings.load_profile("few")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("minutes"):
            item.add_marker("slow")
