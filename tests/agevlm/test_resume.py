# SPDX-License-Identifier: Apache-2.0
"""Resume or refuse: what counts as the same settings and the same model."""

import copy
import json

import pytest
import torch
from torch import nn

from agevlm.resume import differences, digest, fingerprint, refuse_changes, resume_or_refuse

SETTINGS = {"seed": 0, "data": {"rows": 10, "names": ["a", "b"]}, "limit": None}


def test_work_begins_and_resumes_with_the_same_settings(tmp_path):
    file = tmp_path / "new" / "settings.json"
    assert resume_or_refuse(file, SETTINGS) is False
    assert json.loads(file.read_text()) == SETTINGS
    assert [path.name for path in file.parent.iterdir()] == ["settings.json"]
    before = file.read_bytes()
    assert resume_or_refuse(file, copy.deepcopy(SETTINGS)) is True
    assert resume_or_refuse(file, {**SETTINGS, "data": {"names": ("a", "b"), "rows": 10}}) is True  # as JSON has them
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        (
            {"data": {"rows": 20, "names": ["a"]}},
            r"data\.names was \['a', 'b'\] and is \['a'\]; data\.rows was 10 and is 20",
        ),
        ({"device": "cpu"}, "device was None and is 'cpu'"),
        ({"data": {}}, r"data was None and is \{\}; data\.names was"),
    ],
)
def test_other_settings_are_refused_and_named_with_the_fix(tmp_path, changes, message):
    file = tmp_path / "settings.json"
    resume_or_refuse(file, SETTINGS)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=message) as refused:
        resume_or_refuse(file, {**SETTINGS, **changes})
    fix = f"resume it with its own settings, choose another output folder, or delete {tmp_path} to start over"
    assert (
        str(refused.value)
        == f"{tmp_path} holds work of other settings ({differences(SETTINGS, {**SETTINGS, **changes})}); {fix}"
    )
    assert file.read_bytes() == before


def test_nothing_is_refused_where_nothing_differs(tmp_path):
    assert differences(SETTINGS, SETTINGS) == ""
    refuse_changes(SETTINGS, copy.deepcopy(SETTINGS), tmp_path)
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == "a.c was None and is 2"


@pytest.mark.parametrize("content", ["", "no JSON", "[1, 2]", "3"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json is not a file of settings .*delete .* to start over"):
        resume_or_refuse(file, SETTINGS)
    assert file.read_text() == content


def test_a_digest_depends_on_values_and_their_order():
    assert digest([1, {"a": 2, "b": [3]}]) == digest([1, {"b": [3], "a": 2}])
    assert len({digest(parts) for parts in ([1, 2], [2, 1], [12], ["1", "2"], [[1, 2]])}) == 5
    assert len(digest([])) == 16


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_fingerprint_sees_every_value_type_shape_and_name():
    model = network()
    known = fingerprint(model)
    assert known == fingerprint(network()) == fingerprint(copy.deepcopy(model).eval())
    found = {known, fingerprint(network(1))}
    changed = network()
    changed[0].weight.data[-1, -1] += 1  # the last of many
    found.add(fingerprint(changed))
    changed = network()
    changed[1].running_mean[0] = 1  # a buffer
    found.add(fingerprint(changed))
    found.add(fingerprint(network().bfloat16()))
    renamed = nn.Sequential(nn.Identity(), *network())
    found.add(fingerprint(renamed))
    assert len(found) == 6
    reshaped = nn.Linear(1, 6, bias=False), nn.Linear(6, 1, bias=False)
    reshaped[1].weight.data = reshaped[0].weight.data.reshape(1, 6)
    assert fingerprint(reshaped[0]) != fingerprint(reshaped[1])
