# SPDX-License-Identifier: Apache-2.0
"""Grounded answers as an examination: planted maps that are right and that know nothing, the calibration, the commands."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from command_line import run
from datasets import load_from_disk
from evaluation_cases import age_vlm, llava, write_parts_of_scenes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from agevlm import build_scenes
from agevlm.evaluation import Grounding, answers, calibrate, evaluate, grounding
from agevlm.evaluation.grounding import _auroc_row, best_grid_iou, fit_logistic, judge, mask_box
from agevlm.inference.generation import load_model
from agevlm.inference.grounding import CALIBRATION_FILE, find_calibration, trained_fingerprint
from agevlm.inference.replies import cross_attention_layers, reply
from agevlm.processing.rows import mask_from_rle, mask_to_rle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models as checkpoints, and scenes of 64 pixels, which the tiny tower sees as 8x8 cells."""
    place = tmp_path_factory.mktemp("folders")
    model, processor = age_vlm()
    processor.image_processor.size = {"height": 64, "width": 64}
    for name, parts in (("age_vlm", (model, processor)), ("llava", llava())):
        for part in parts:
            part.save_pretrained(place / name)
    sizes = {"num_train": 1, "num_validation": 10, "num_test": 10, "image_size": 64, "max_objects": 4}
    build_scenes(*write_parts_of_scenes(place), place / "scenes", questions_per_scene=4, progress=False, **sizes)
    return place


def plant(monkeypatch, scenes: Grounding, block: int | None) -> None:
    """Gives each word of a question that names a class a map: in one block that of its object, all else in one random cell.

    What is not there is spread evenly in that block. With no block, all maps are random: they know nothing.
    """
    rng = np.random.default_rng(0)
    known = {(q.text, q.open_image().tobytes()): q for q in scenes.questions()}

    def planted(model, processor, conversations, **settings):
        settings["max_new_tokens"] = 1
        found = reply(model, processor, conversations, **settings)
        for number, given in enumerate(found):
            maps = torch.zeros_like(given.maps.maps)
            for each in maps:
                each[:, 8 * rng.integers(8) + rng.integers(8)] = 1.0
            text = conversations[number][0]["content"][1]["text"]
            question = known[text, given.images[0].tobytes()]
            start = given.prompt.rindex(text)
            for name in question.choices if block is not None else ():
                if name in text:
                    tokens = given.maps.tokens(start + text.index(name), start + text.index(name) + len(name))
                    target = torch.full((8, 8), 1 / 64)
                    if name in question.names:
                        mask = mask_from_rle(question.objects[question.names.index(name)])
                        target = torch.from_numpy(mask.reshape(8, 8, 8, 8).mean((1, 3))).float()
                    maps[block, tokens] = (target / target.sum()).flatten()
            found[number] = dataclasses.replace(given, text="", maps=dataclasses.replace(given.maps, maps=maps))
        return found

    monkeypatch.setattr(grounding, "reply", planted)
    monkeypatch.setattr(answers, "reply", planted)


# --- boxes and what the scene knows ---


def test_the_best_box_of_whole_cells_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        left, top = rng.integers(0, 30), rng.integers(0, 20)
        box = torch.tensor([left, top, left + rng.integers(1, 20), top + rng.integers(1, 20)], dtype=torch.float64)
        grid = np.zeros((40, 50), bool)
        grid[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        best = 0.0
        for x0, x1 in itertools.combinations(range(0, 60, 10), 2):
            for y0, y1 in itertools.combinations(range(0, 48, 8), 2):
                other = np.zeros_like(grid)
                other[y0:y1, x0:x1] = True
                best = max(best, (grid & other).sum() / (grid | other).sum())
        assert best_grid_iou(box, (10.0, 8.0), (50, 40)) == pytest.approx(best)


def test_a_phrase_is_judged_by_pixels_and_cells(folders):
    """An image of 60x30 pixels, whose cells are of 15x15; rasterized by hand."""
    mask, other = np.zeros((30, 60), bool), np.zeros((30, 60), bool)
    mask[3:17, 18:40], other[20:28, 2:12] = True, True
    question = answers.Question("q", None, "?", objects=(mask_to_rle(mask), mask_to_rle(other)), names=("dog", "key"))
    processor = age_vlm()[1]
    found = judge([37.0, 10.0], [15.0, 0.0, 45.0, 15.0], "dog", question, processor, (4, 4))
    drawn = np.zeros_like(mask)
    drawn[0:15, 15:45] = True
    assert found["box_iou"] == pytest.approx((mask & drawn).sum() / (mask | drawn).sum())
    assert found["iou_whole_image"] == pytest.approx(mask.mean())
    assert found["pixels_share"] == pytest.approx(mask.mean())
    assert found["pixels_any_object"] == pytest.approx(mask.sum() / (mask | other).sum())
    assert found["on_object"] == 1
    assert found["iou_any_object"] == pytest.approx(0.5)  # its own box, and one that does not meet it
    shares = mask.reshape(2, 15, 4, 15).mean((1, 3))
    cells = (shares > 0) & (shares >= shares.max() / 2)
    assert found["pointing"] == cells[0, 2]
    assert found["cells_share"] == pytest.approx(cells.sum() / 8)
    outside = judge([1.0, 29.0], [0.0, 15.0, 15.0, 30.0], "dog", question, processor, (4, 4))
    assert (outside["on_object"], outside["pointing"], outside["box_iou"]) == (0, 0, 0)
    # The same box anywhere, on the pixels that it can begin at.
    draws = [
        (mask[y : y + 15, x : x + 30].sum()) / (mask.sum() + 450 - mask[y : y + 15, x : x + 30].sum())
        for y in range(16)
        for x in range(31)
    ]
    assert found["iou_anywhere"] == pytest.approx(np.mean(draws), rel=0.15)
    assert judge([1.0, 1.0], [0.0, 0.0, 9.0, 9.0], "cat", question, processor, (4, 4)) == {"is_there": False}
    assert mask_box(mask).tolist() == [18, 3, 40, 17]


# --- numbers ---


def test_the_confidence_is_the_logistic_regression_of_another_library():
    rng = np.random.default_rng(0)
    x = rng.normal(3, [0.1, 5, 1, 1], (300, 4)) * [1, 1, 1, 0] + [0, 0, 0, 7]  # the last is the same everywhere
    labels = rng.random(300) < 1 / (1 + np.exp(-(x[:, 1] - 3) / 2 - 8 * (x[:, 0] - 3)))
    features, bias = fit_logistic(torch.from_numpy(x), torch.from_numpy(labels))
    scaled = (x - x.mean(0)) / [*x.std(0)[:3], 1]
    other = LogisticRegression(C=1.0, tol=1e-10).fit(scaled, labels)
    np.testing.assert_allclose([feature["weight"] for feature in features], other.coef_[0], atol=1e-4)
    assert bias == pytest.approx(other.intercept_[0], abs=1e-4)
    assert features[3]["weight"] == 0


@pytest.mark.parametrize(("shift", "above"), [(0.0, False), (2.0, True)])
def test_auroc_and_its_interval(shift, above):
    rng = np.random.default_rng(1)
    there = rng.random(240) < 0.6
    confidence = 1 / (1 + np.exp(-rng.normal(shift * there, 1.0)))
    scenes = np.arange(240) // 6
    rows = [
        {"confidence": float(c), "is_there": bool(t), "scene": str(s)}
        for c, t, s in zip(confidence, there, scenes, strict=True)
    ]
    row = _auroc_row(rows)
    assert row["score"] == pytest.approx(roc_auc_score(there, confidence))
    assert row["above_chance"] == above
    assert (row["phrases"], row["absent"], row["scenes"]) == (240, int((~there).sum()), 40)
    other = np.random.default_rng(7)
    values = []
    for _ in range(200):
        chosen = np.concatenate([np.flatnonzero(scenes == s) for s in other.integers(40, size=40)])
        values.append(roc_auc_score(there[chosen], confidence[chosen]))
    np.testing.assert_allclose([row["low"], row["high"]], np.percentile(values, [2.5, 97.5]), atol=0.03)


# --- from scenes to scores ---


def test_questions_are_one_of_each_kind_about_each_scene(folders):
    scenes = Grounding(folders / "scenes")
    questions = scenes.questions(4)
    assert {q.source for q in questions} == {"0", "1", "2", "3"}
    assert len({(q.kind, q.source) for q in questions}) == len(questions)
    assert {q.choices for q in questions} == {("apple", "car", "cat", "dog", "key")}
    data = load_from_disk(folders / "scenes")["test"]
    for question in questions:
        listed = next(r for r in data if str(r["scene"]) == question.source and r["kind"] == "objects")
        assert sorted(question.names) == sorted(listed["answers"][0].split(", "))


def test_planted_maps_are_found_and_score_as_they_should(folders, monkeypatch):
    """One block points at what a question names, and is spread evenly over what is not there."""
    model, processor = load_model(folders / "age_vlm")
    plant(monkeypatch, Grounding(folders / "scenes", "validation"), block=2)
    found = calibrate(model, processor, folders / "scenes", progress=None)
    assert found.layers == (cross_attention_layers(model.config)[2],)
    assert found.weights == trained_fingerprint(model)
    assert found.data["scenes"] == 10
    assert 0 < found.data["absent"] < found.data["phrases"]
    assert found.data["name"] == "scenes"  # and no folder of this machine
    monkeypatch.setattr(grounding, "find_calibration", lambda model: found)
    plant(monkeypatch, Grounding(folders / "scenes"), block=2)
    scores = evaluate(Grounding(folders / "scenes"), (model, processor), progress=None).scores
    for name in ("pointing", "on_object", "box_iou", "there"):
        assert scores[name]["above_chance"], scores[name]
        assert scores[name]["low"] <= scores[name]["score"] <= scores[name]["high"]
    assert scores["pointing"]["score"] > 0.9
    assert scores["there"]["score"] == 1
    assert scores["box_iou"]["chance"] < scores["box_iou"]["score"] <= scores["box_iou"]["best_on_grid"]


def test_maps_that_know_nothing_are_not_above_chance(folders, monkeypatch):
    model, processor = load_model(folders / "age_vlm")
    plant(monkeypatch, Grounding(folders / "scenes", "validation"), block=None)
    found = calibrate(model, processor, folders / "scenes", progress=None)
    monkeypatch.setattr(grounding, "find_calibration", lambda model: found)
    plant(monkeypatch, Grounding(folders / "scenes"), block=None)
    evaluation = evaluate(Grounding(folders / "scenes"), (model, processor), progress=None)
    for name in ("pointing", "on_object", "there"):
        assert not evaluation.scores[name]["above_chance"], name
    assert [row[0] for row in evaluation.tables[0][1:] if row[-1] == "no"]


def test_scenes_without_absent_things_cannot_calibrate(folders, monkeypatch):
    model, processor = load_model(folders / "age_vlm")
    kinds = ("position", "count")
    data = load_from_disk(folders / "scenes")["validation"].filter(lambda kind: kind in kinds, input_columns="kind")
    with pytest.raises(
        ValueError, match=r"phrases in the yes/no questions .* some that are there and some that are not"
    ):
        calibrate(model, processor, data, progress=None)


# --- the commands ---


def test_calibrate_evaluate_and_ask(monkeypatch, capsys, tmp_path, folders):
    model, out = folders / "age_vlm", tmp_path / "out"
    picture = Grounding(folders / "scenes").questions(1)[0].open_image()
    picture.save(tmp_path / "image.png")
    ask = ["ask", "--model", model, "--image", tmp_path / "image.png", "Is there a dog or a cat?", "--ground"]
    code, printed = run(monkeypatch, capsys, *ask, "--max-new-tokens", 3)
    assert code == 0, printed
    assert "No confidence: the checkpoint has no grounding.json: run `agevlm calibrate" in printed

    code, printed = run(monkeypatch, capsys, "calibrate", model, "--data", folders / "scenes")
    assert code == 0, printed
    assert f"{CALIBRATION_FILE}: " in printed
    assert str(folders) not in (model / CALIBRATION_FILE).read_text()
    evaluation = ["eval", "grounding", "--model", model, "--data", folders / "scenes", "--out", out, "--limit", 5]
    code, printed = run(monkeypatch, capsys, *evaluation)
    assert code == 0, printed
    assert sorted(file.name for file in out.iterdir()) == ["answers.jsonl", "plot.png", "report.md", "results.json"]
    scores = json.loads((out / "results.json").read_text())["scores"]
    assert {"pointing", "on_object", "box_iou", "there", "calibration_error", "yes_no"} <= scores.keys()
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:4]))
    code, printed = run(monkeypatch, capsys, *evaluation)  # goes on
    assert code == 0, printed
    assert json.loads((out / "results.json").read_text())["scores"] == scores
    (model / CALIBRATION_FILE).write_text((model / CALIBRATION_FILE).read_text() + "\n")
    code, printed = run(monkeypatch, capsys, *evaluation)
    assert code == 2
    assert "calibration was" in printed

    options = ["--max-new-tokens", 3, "--heatmap", tmp_path / "heatmap.png", "--boxes", tmp_path / "boxes.png"]
    code, printed = run(monkeypatch, capsys, *ask, *options)
    assert code == 0, printed
    assert "No confidence" not in printed
    assert {file.name for file in tmp_path.iterdir()} >= {"heatmap.png", "boxes.png"}
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if "│" in line]
    assert [row[1:3] for row in rows[:2]] == [["dog", "question"], ["cat", "question"]]
    assert all(row[6] in ("there", "not there") for row in rows)

    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "a.png")
    many = ["ask", "--model", model, "--image", tmp_path / "pictures", "A dog?", "--ground", "--max-new-tokens", 1]
    for suffix in (".jsonl", ".csv"):
        code, printed = run(monkeypatch, capsys, *many, "--out", tmp_path / f"many{suffix}")
        assert code == 0, printed
    (row,) = map(json.loads, (tmp_path / "many.jsonl").read_text().splitlines())
    (phrase, *_) = row["phrases"]
    assert (phrase["text"], phrase["there"]) == ("dog", phrase["confidence"] >= 0.5)
    assert json.dumps(row["phrases"]).replace('"', '""') in (tmp_path / "many.csv").read_text()
    (model / CALIBRATION_FILE).unlink()
    assert find_calibration(load_model(model)[0]).reason


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate {folders}/nowhere --data {folders}/scenes", "no such folder: {folders}/nowhere"),
        ("calibrate {folders}/llava --data {folders}/scenes", "no cross-attention maps to show: choose an AGE-VLM"),
        ("calibrate {folders}/age_vlm --data {folders}/scenes --split other", "other"),
        ("calibrate {folders}/age_vlm --data {folders}/cutouts", "cutouts"),
        ("eval grounding --model {folders}/llava --data {folders}/scenes --out {out}", "maps, which this model has none of"),
        ("ask --model {folders}/age_vlm --image {image} Cat? --boxes {out}.png", "add --ground"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, folders, command, message):
    names = {"folders": folders, "out": tmp_path / "out", "image": folders / "cutouts" / "dog.png"}
    before = sorted(folders.rglob("*"))
    code, printed = run(monkeypatch, capsys, *(part.format(**names) for part in command.split()))
    assert code == 2, printed
    assert message.format(**names) in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())
    assert sorted(folders.rglob("*")) == before
