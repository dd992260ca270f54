# SPDX-License-Identifier: Apache-2.0
"""docs/architectures.md says what was found. `WRITE_TABLES=1 pytest tests/attention/test_architectures.py` writes its tables anew."""

import os

import pytest
from architectures_page import NINE, OTHERS, REFUSED, other_rows, row_of, table, write_table
from other_vlms import other_kinds
from tiny_vlms import CONFIGURATIONS

WRITE = os.environ.get("WRITE_TABLES") == "1"


@pytest.mark.minutes
def test_the_page_says_what_nine_architectures_do(shared, alone):
    rows = [row_of(kind, shared, alone) for kind in CONFIGURATIONS]
    if WRITE:
        write_table(NINE, rows)
    assert table(NINE) == rows


@pytest.mark.minutes
def test_the_page_says_what_other_architectures_do():
    """Of those on the page that the installed Transformers has: a newer one may have more."""
    listed = {row.split("`")[1] for heading in (OTHERS, REFUSED) for row in table(heading)}
    kinds = [kind for kind in other_kinds() if WRITE or kind in listed]
    for heading, rows in other_rows(kinds).items():
        if WRITE:
            write_table(heading, rows)
        assert [row for row in table(heading) if row.split("`")[1] in kinds] == rows
    assert len(table(OTHERS)) > 40
