# SPDX-License-Identifier: Apache-2.0
"""What the runs begin with, and the command lines of the evidence and the ablations."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from tiny_laboratory import SIZE, tiny_scenes

from agevlm import mask_from_rle
from agevlm.files import resolve_package_file
from research import ablations, evidence, parts
from research.runs import ARMS, RECIPE

COLUMNS = ["messages", "scene", "kind", "answers"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    tiny_scenes(folder)
    (folder / "exact/ATTRIBUTION.md").write_text("by nobody")
    return folder / "exact"


# --- scenes ---


def test_wide_scenes_are_the_same_scenes(exact, tmp_path):
    parts.widen(exact, tmp_path / "wide")
    before, after = (load_from_disk(folder)["train"] for folder in (exact, tmp_path / "wide"))
    assert before.select_columns(COLUMNS)[:] == after.select_columns(COLUMNS)[:]
    for row, other in zip(before, after, strict=True):
        (image,) = other["images"]
        assert image.size == (SIZE, 40)
        reference = np.asarray(row["images"][0].convert("RGB").resize((SIZE, 40)), dtype=float)
        assert np.abs(np.asarray(image, dtype=float) - reference).mean() < 6
        for entry, squashed in zip(row["grounding"], other["grounding"], strict=True):
            masks = [mask_from_rle(one["mask"]) for one in (entry, squashed)]
            assert masks[1].shape == (40, SIZE)
            assert masks[1].mean() == pytest.approx(masks[0].mean(), abs=0.01)
            if masks[0].any():
                centers = [np.argwhere(mask).mean(0) / mask.shape for mask in masks]
                assert centers[0] == pytest.approx(centers[1], abs=0.03)


def test_the_teacher_has_other_masks_in_training_alone(exact, tmp_path):
    parts.add_teacher(exact, tmp_path / "teacher")
    before, after = load_from_disk(exact), load_from_disk(tmp_path / "teacher")
    assert list(before) == list(after)
    for split in before:
        ours, theirs = (data[split].select_columns("grounding")[:] for data in (after, before))
        assert (ours == theirs) == (split != "train")
        assert after[split].select_columns(COLUMNS)[:] == before[split].select_columns(COLUMNS)[:]
    quality = json.loads((tmp_path / "teacher/mask_quality.json").read_text())
    assert 0 < quality["mean_iou"] < 1
    assert (tmp_path / "teacher/ATTRIBUTION.md").read_text() == "by nobody"
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


# --- the commands ---


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Parts that are empty folders, and runs that are recorded instead of done; returns what was built, run and reported."""
    calls = {"built": [], "run": [], "reported": []}

    def build(folder, *_):
        folder.mkdir()
        calls["built"].append(folder.name)

    def build_teacher(exact, folder):
        build(folder)
        (folder / "mask_quality.json").write_text('{"mean_iou": 0.5}')

    monkeypatch.setattr(parts, "build_model", build)
    monkeypatch.setattr(parts, "build_exact_scenes", build)
    monkeypatch.setattr(parts, "add_teacher", build_teacher)
    monkeypatch.setattr(parts, "widen", lambda exact, folder: build(folder))

    def run_all(variants, seeds, laboratory, workers):
        calls["run"].append((list(variants), seeds, laboratory, workers))
        return dict.fromkeys(variants, ())

    for script in (evidence, ablations):
        monkeypatch.setattr(script, "run_all", run_all)
        monkeypatch.setattr(script, "write_report", lambda *args, **kwargs: calls["reported"].append((args, kwargs)))
    monkeypatch.setattr(evidence, "check_claims", lambda results: [])

    def command(script, *flags):
        monkeypatch.setattr(sys, "argv", ["x", "--output-dir", str(tmp_path / "out"), *flags])
        script.main()

    calls["command"] = command
    return calls


def test_the_evidence_builds_what_its_arms_need_and_runs_them(fake, tmp_path):
    fake["command"](evidence, "--arms", "guided,concatenation", "--seeds", "0,1", "--steps", "8", "--workers", "3")
    assert fake["built"] == ["untrained", "scenes"]
    ((names, seeds, laboratory, workers),) = fake["run"]
    assert (names, seeds, workers) == (["guided", "concatenation"], [0, 1], 3)
    assert laboratory.recipe == RECIPE
    recipe = laboratory.load_recipe(ARMS["guided"], "guided", 1)
    assert [stage.training["max_steps"] for stage in recipe.split()] == [1, 1, 2, 5]
    assert recipe.model == str(tmp_path / "out/untrained")
    fake["command"](evidence)
    assert fake["built"] == ["untrained", "scenes", "teacher"]
    ((_, settings),) = fake["reported"][1:]
    assert settings["notes"] == {"masks of the teacher": {"mean_iou": 0.5}}
    assert fake["run"][1][0] == list(ARMS)


def test_the_ablations_share_the_parts_and_the_runs_of_the_evidence(fake, tmp_path):
    fake["command"](evidence, "--arms", "guided", "--seeds", "0")
    fake["command"](ablations, "--topics", "padding,sink")
    assert fake["built"] == ["untrained", "scenes", "wide"]
    (_, _, first, _), (names, seeds, second, _) = fake["run"]
    assert names == ["guided", "unguided", "padding_masked", "padding_seen", "no_sink", "sink_for_present_only"]
    assert seeds == [0]
    assert first.run_dir("guided", 0) == second.run_dir("guided", 0)
    assert (first.overrides, first.max_questions) == (second.overrides, second.max_questions)
    (results, folder), settings = fake["reported"][1]
    assert folder == tmp_path / "out/ablations"
    assert settings["topics"] == {
        "padding": ["unguided", "padding_masked", "padding_seen"],
        "sink": ["unguided", "no_sink", "sink_for_present_only"],
    }
    assert list(results) == names


def test_parts_of_other_settings_are_refused(fake, monkeypatch, capsys):
    fake["command"](evidence, "--arms", "guided")
    monkeypatch.setitem(parts.SCENES, "num_train", 7)
    with pytest.raises(SystemExit) as caught:
        fake["command"](evidence, "--arms", "guided")
    assert caught.value.code == 2
    assert "scenes.num_train was 1500 and is 7" in capsys.readouterr().err
    assert len(fake["run"]) == 1


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (evidence, ["--arms", "guided,clever"], "there is no arm clever; there are concatenation, unguided, guided"),
        (evidence, ["--seeds", "0;1"], "argument --seeds"),
        (evidence, ["--steps", "3"], "--steps must be at least 4"),
        (ablations, ["--topics", "gates"], "there is no topic gates; there are stages, guided_layers"),
    ],
)
def test_a_mistake_ends_in_a_message(fake, capsys, script, flags, said):
    with pytest.raises(SystemExit) as caught:
        fake["command"](script, *flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not fake["built"]


@pytest.mark.parametrize(("script", "names"), [(evidence, ARMS), (ablations, ablations.TOPICS)])
def test_help_lists_arms_and_topics(fake, capsys, monkeypatch, script, names):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        fake["command"](script, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m {script.__name__}" in shown
    assert ",".join(names) in shown


def test_the_files_of_the_model_are_there(monkeypatch, tmp_path):
    """The demo's tests build a model of the same parts."""
    built = {}
    monkeypatch.setattr(parts, "load_timm", lambda name, weights, **model_args: weights)
    monkeypatch.setattr(parts, "build_checkpoint", lambda *args, **kwargs: built.update(args=args, **kwargs))
    parts.build_model(tmp_path)
    for name in built["args"][:2]:
        assert Path(resolve_package_file(name)).is_file()
    assert "{% generation %}" in built["chat_template"]
