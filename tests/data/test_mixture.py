# SPDX-License-Identifier: Apache-2.0
"""Weights of a mixture: groups, shares, what is left out and what is refused. Its formats are in tests/trainer/test_recipe.py."""

from collections import Counter

import datasets
import numpy as np
import pytest
from tiny_training import dataset

from agevlm.data import DataPart, read_mixture
from agevlm.data.mixture import GROUP_COLUMN, WEIGHT_COLUMN

KINDS = ["a", "b", "c", "a"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    whole = dataset(12)
    whole.add_column("kind", [KINDS[i % 4] for i in range(12)]).add_column(
        "flag", [i < 2 for i in range(12)]
    ).save_to_disk(folder / "kinds")
    whole.select(range(5)).save_to_disk(folder / "plain")
    return folder


def groups(mixture: datasets.Dataset) -> dict[int, tuple[int, float]]:
    """Rows and weight of each group."""
    found = Counter(mixture[GROUP_COLUMN])
    weights = dict(zip(mixture[GROUP_COLUMN], mixture[WEIGHT_COLUMN], strict=True))
    return {group: (found[group], pytest.approx(weights[group])) for group in sorted(found)}


def test_without_weights_there_are_no_groups(rows):
    mixture = read_mixture([DataPart(str(rows / "kinds")), DataPart(str(rows / "plain"))])
    assert mixture.column_names == ["images", "messages", "grounding", "row_origin"]


def test_groups_are_parts_and_values(rows):
    parts = [
        DataPart(str(rows / "kinds"), weight=3, weight_by={"kind": {"c": 1, "a": 4}}),
        DataPart(str(rows / "plain"), weight=2),
    ]
    mixture = read_mixture(parts)
    assert groups(mixture) == {0: (3, 0.6), 1: (6, 2.4), 2: (5, 2.0)}
    # The rows have the values, with their images, in the same order.
    expected = [i for i in range(12) if KINDS[i % 4] != "b"] + list(range(5))
    source = dataset(12)
    for row, number in zip(mixture, expected, strict=True):
        assert row["messages"] == source[number]["messages"]
        for image, same in zip(row["images"], source[number]["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(same))


def test_a_single_part_needs_no_weight_of_its_own(rows):
    mixture = read_mixture([DataPart(str(rows / "kinds"), weight_by={"flag": {True: 1, False: 1}})])
    assert groups(mixture) == {0: (2, 0.5), 1: (10, 0.5)}


def test_rows_are_drawn_from_those_of_the_values(rows):
    mixture = read_mixture([DataPart(str(rows / "kinds"), rows=3, weight_by={"kind": {"b": 1}})])
    assert groups(mixture) == {0: (3, 1.0)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"weight": 1}, {}], "has no weight: give a `weight` to every part"),
        ([{"weight_by": {"kind": {"a": 1}}}, {"weight": 1}], "has no weight: give a `weight` to every part"),
        ([{"weight": 0}], "weights are numbers above 0, got 0"),
        ([{"weight_by": {"kind": {"a": True}}}], "weights are numbers above 0, got True"),
        ([{"weight_by": {"kind": {"a": 1, "z": 1, "y": 2}}}], "has no rows whose kind is z or y"),
        ([{"weight_by": {"kind": {"a": 1}, "flag": {True: 1}}}], "weight_by has one column"),
        ([{"weight_by": {}}], "weight_by has one column"),
        ([{"weight_by": {"knid": {"a": 1}}}], "knid"),
        *(
            ([{"weight_by": {name: {"a": 1}}}], f"column {name} does not hold single texts, numbers or truth values")
            for name in ("grounding", "messages", "images")
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(rows, parts, message):
    with pytest.raises(ValueError, match=message):
        read_mixture([DataPart(str(rows / "kinds"), **part) for part in parts])
