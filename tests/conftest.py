# SPDX-License-Identifier: Apache-2.0
import pytest
from hub_server import hub, hub_server  # noqa: F401
from hypothesis import settings
from transformers_tests import pytest_configure  # noqa: F401

# `--hypothesis-profile=many` tries many more inputs, by hand.
settings.register_profile("few", max_examples=50, deadline=None, database=None)
settings.register_profile("many", max_examples=2500, deadline=None, database=None)
settings.load_profile("few")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` for one test, which no other test has filled."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("minutes"):
            item.add_marker("slow")
