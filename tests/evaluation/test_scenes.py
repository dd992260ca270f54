# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes as an examination: its numbers, its chances, the command, and runs that were stopped."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import run as run_agevlm
from datasets import Dataset, DatasetDict, List, load_from_disk
from datasets import Image as ImageFeature
from evaluation_cases import age_vlm, cells, entries, llava, results, write_parts_of_scenes

from agevlm import attend
from agevlm.data.scene_builder import KINDS, build_scenes
from agevlm.evaluation import Question, Scenes, answer, answers, evaluate_scenes
from agevlm.evaluation.answers import answer_batch
from agevlm.evaluation.pope import parse_yes_no
from agevlm.evaluation.scenes import score_maps
from agevlm.inference.attention import Phrase
from agevlm.processing.rows import mask_from_rle, mask_to_rle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models as checkpoints, and scenes."""
    place = tmp_path_factory.mktemp("folders")
    for build in (age_vlm, llava):
        for part in build():
            part.save_pretrained(place / build.__name__)
    build_scenes(
        *write_parts_of_scenes(place),
        place / "scenes",
        num_train=4,
        num_validation=2,
        num_test=5,
        image_size=64,
        max_objects=2,
        questions_per_scene=4,
        cooccurrence=0.5,
        progress=False,
    )
    return place


@pytest.fixture
def scenes(folders):
    return load_from_disk(folders / "scenes")


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was printed."""
    return run_agevlm(monkeypatch, capsys, "eval", "scenes", *arguments)


def close(found, expected):
    """Alike but for rounding, which is not the same in batches of another size."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    else:
        assert found == pytest.approx(expected, abs=1e-5)


def coverage(rle: dict) -> np.ndarray:
    """How much of each of 4x4 cells a mask of 64x64 pixels covers."""
    return mask_from_rle(rle).reshape(4, 16, 4, 16).mean((1, 3)).flatten()


def hit_cells(rle: dict) -> np.ndarray:
    return (coverage(rle) > 0) & (coverage(rle) >= coverage(rle).max() / 2)


def scene_objects(dataset: Dataset) -> dict[str, list[dict]]:
    """The masks of all objects of each scene, as its list of objects names them."""
    rows = dataset.remove_columns("images").filter(lambda kind: kind == "objects", input_columns="kind")
    return {str(row["scene"]): [phrase["mask"] for phrase in row["grounding"]] for row in rows}


# --- questions ---


def test_questions_are_those_of_the_rows(scenes):
    dataset = scenes["test"]
    questions = Scenes(dataset).questions()
    assert [q.kind for q in questions] == sorted((q.kind for q in questions), key=KINDS.index)
    questions.sort(key=lambda question: int(question.key.split("/")[1]))
    assert [q.key for q in questions] == [f"{q.kind}/{number}" for number, q in enumerate(questions, 1)]
    assert len(questions) == sum(len(row["answers"]) for row in dataset)
    objects = scene_objects(dataset)
    first = {str(row["scene"]): row["images"][0] for row in reversed(list(dataset))}
    asked = iter(questions)
    for row in dataset:
        for turn, expected in enumerate(row["answers"]):
            question = next(asked)
            assert (question.kind, question.source, question.expected) == (row["kind"], str(row["scene"]), expected)
            assert question.text == "".join(part["text"] or "" for part in row["messages"][2 * turn]["content"])
            assert np.array_equal(question.open_image(), first[question.source])
            named = [p for p in row["grounding"] if p["message"] == 2 * turn and mask_from_rle(p["mask"]).any()]
            assert (question.span is None) == (question.mask is None) == (not named)
            if named:
                assert (question.span, question.mask) == ((named[0]["start"], named[0]["end"]), named[0]["mask"])
                found = [mask["counts"] for mask in question.objects]
                assert sorted(found) == sorted(mask["counts"] for mask in objects[question.source])


def test_a_limit_keeps_the_first_of_each_kind(scenes):
    every, some = Scenes(scenes["test"]).questions(), Scenes(scenes["test"]).questions(2)
    for kind in KINDS:
        assert [q.key for q in some if q.kind == kind] == [q.key for q in every if q.kind == kind][:2]


# --- scores ---


def test_scores_are_those_of_the_answers(scenes):
    options = {"batch_size": 6, "max_new_tokens": 10, "progress": None}
    found = evaluate_scenes(age_vlm(), data=scenes["test"], **options)
    assert set(found.scores) == {*KINDS, "pointing"}
    given = {key: answered["answer"] for key, answered in found.answers.items()}
    assert len(set(given.values())) > 5
    for kind in ("existence", "count", "position"):
        asked = [question for question in found.questions if question.kind == kind]
        if kind == "existence":  # read by POPE's rules, by which anything without a no is a yes
            right = [parse_yes_no(given[question.key]) == question.expected.lower() for question in asked]
        else:
            right = [given[question.key] == question.expected for question in asked]
        row = found.scores[kind]
        assert (row["questions"], row["score"]) == (len(asked), np.mean(right))
        assert row["chance"] == max(Counter(question.expected for question in asked).values()) / len(asked)


def test_a_right_answer_counts_and_a_wrong_one_does_not(scenes):
    """A model that knows the answers scores 1, and a model that always says the same scores chance."""
    benchmark = Scenes(scenes["test"])
    questions = benchmark.questions()

    def score(answer) -> dict:
        return benchmark.score(questions, {question.key: {"answer": answer(question)} for question in questions})

    assert all(row["score"] == 1 for row in score(lambda question: question.expected).values())
    constant = Counter(q.expected for q in questions if q.kind == "count").most_common(1)[0][0]
    scores = score(lambda question: constant)
    assert scores["count"]["score"] == scores["count"]["chance"]
    assert scores["existence"]["yes_ratio"] == 1
    assert scores["existence"]["f1"] == pytest.approx(2 / 3)  # half of the answers are yes

    names = next(question.expected for question in questions if question.kind == "objects")
    given, overlaps = set(names.split(", ")), []
    for question in questions:
        if question.kind == "objects":
            expected = set(question.expected.split(", "))
            right = len(given & expected)
            overlaps.append(0 if not right else 2 / (len(given) / right + len(expected) / right))
    assert score(lambda question: names)["objects"]["score"] == pytest.approx(np.mean(overlaps))


def test_maps_are_scored_against_the_object_and_the_chances_of_pointing(scenes):
    """A 4x4 map on a 40x40 image; the object covers 2 of its cells, another one of the scene covers 4."""
    processor = age_vlm()[1]
    mask, other = np.zeros((2, 40, 40), dtype=bool)
    mask[:20, 10:20] = True
    other[20:, 20:] = True
    rles = [mask_to_rle(mask), mask_to_rle(other)]
    question = Question("q", lambda: None, "", span=(0, 1), mask=rles[0], objects=tuple(rles))
    on, uniform, off = np.zeros((4, 4)), np.full((4, 4), 1 / 16), np.zeros((4, 4))
    on[:2, 1] = 0.5
    off[3, 3] = 1
    maps = torch.from_numpy(np.stack([on, uniform, off])).float().flatten(1)
    scores = score_maps(maps, question, processor, (4, 4))
    # The first of equal cells is at the top left, outside. On average over the blocks, the cell at the bottom right wins.
    assert scores["pointing"] == [1, 0, 0, 0]
    assert scores["mass"] == pytest.approx([1, 2 / 16, 0, 3 / 8])
    # On the area's scale the uniform map is 1/8 everywhere: 2 * 1/8 shared, 2 + 14 * 1/8 in all.
    assert scores["iou"][:3] == pytest.approx([1, 0.25 / 3.75, 0])
    assert (scores["object_share"], scores["any_object"]) == (2 / 16, 2 / 6)
    # The lower half of the cells is padding for an image half as high, which no chance counts.
    rles = [mask_to_rle(mask[:20]), mask_to_rle(other[:20] | mask[:20])]
    wide = replace(question, mask=rles[0], objects=(rles[0],))
    scores = score_maps(maps, wide, processor, (4, 4))
    assert (scores["object_share"], scores["any_object"]) == (2 / 8, 1)


def test_scores_of_maps_are_kept_with_the_answers(monkeypatch, capsys, tmp_path, folders, scenes):
    """Of every question whose phrase is in the image, negations included, and of no other."""
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *command, "--max-new-tokens", 1)[0] == 0
    model, processor = age_vlm()
    questions, found = Scenes(scenes["test"]).questions(), entries(tmp_path / "out")
    objects, kinds = scene_objects(scenes["test"]), set()
    assert [(entry["key"], entry["question"]) for entry in found] == [(q.key, q.text) for q in questions]
    for entry, question in zip(found, questions, strict=True):
        assert ("maps" in entry) == (question.span is not None)
        if question.span is None:
            continue
        kinds.add((question.kind, question.expected))
        phrase = Phrase(question.text[slice(*question.span)], "question", *question.span)
        maps = attend(model, processor, question.open_image(), question.text, "", [phrase]).maps[:, 0]
        maps = np.concatenate([maps, maps.mean(0, keepdims=True)]).reshape(len(maps) + 1, -1)
        target, hits = coverage(question.mask), hit_cells(question.mask)
        scaled = np.minimum(maps * target.sum(), 1)
        expected = {
            "pointing": [float(hits[cell]) for cell in maps.argmax(-1)],
            "iou": (np.minimum(scaled, target).sum(-1) / np.maximum(scaled, target).sum(-1)).tolist(),
            "mass": (maps @ target).tolist(),
            "object_share": hits.mean(),
            "any_object": hits.sum() / np.any([hit_cells(mask) for mask in objects[question.source]], axis=0).sum(),
        }
        close(entry["maps"], expected)
    assert ("negation", "No") in kinds
    assert ("negation", "Yes") not in kinds
    assert ("existence", "No") not in kinds
    mapped = [entry["maps"] for entry in found if "maps" in entry]
    pointing = results(tmp_path / "out")["scores"]["pointing"]
    assert pointing["questions"] == len(mapped)
    for name, chance in (("chance", "object_share"), ("chance_any_object", "any_object")):
        assert pointing[name] == pytest.approx(np.mean([maps[chance] for maps in mapped]))
    assert 0 < pointing["chance"] < pointing["chance_any_object"] < 1
    assert pointing["score"] == pytest.approx(np.mean([maps["pointing"][-1] for maps in mapped]))
    assert pointing["by_block"] == pytest.approx(np.mean([maps["pointing"][:-1] for maps in mapped], axis=0).tolist())


# --- a model in memory, and the command ---


def test_the_command_gives_what_a_model_in_memory_gives(monkeypatch, capsys, tmp_path, folders, scenes):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    code, printed = run(monkeypatch, capsys, *command, "--batch-size", 5, "--max-new-tokens", 12)
    assert code == 0, printed
    model, processor = age_vlm()
    options = {"data": scenes["test"], "batch_size": 1, "max_new_tokens": 12, "progress": None}
    expected = evaluate_scenes((model, processor), **options)
    close(results(tmp_path / "out")["scores"], json.loads(json.dumps(expected.scores)))
    assert [entry["answer"] for entry in entries(tmp_path / "out")] == [
        given["answer"] for given in expected.answers.values()
    ]

    for table in (cells(printed, "│"), cells((tmp_path / "out" / "report.md").read_text(), "|")):
        layers = model.config.text_config.cross_attention_llama_layers
        blocks = [f"before layer {layer}" for layer in layers]
        assert list(table) == [
            *(kind.replace("_", " ") for kind in expected.scores if kind != "pointing"),
            *blocks,
            "mean of all",
        ]
        for kind, row in expected.scores.items():
            if kind != "pointing":
                found = table[kind.replace("_", " ")]
                assert found[:3] == [str(row["questions"]), f"{row['score']:.4f}", f"{row['chance']:.4f}"]
                assert found[3] == (f"{row['f1']:.4f}" if "f1" in row else "–")
        pointing = expected.scores["pointing"]
        for name, *values in [
            *zip(blocks, pointing["by_block"], pointing["mass_by_block"], pointing["iou_by_block"], strict=True),
            ("mean of all", pointing["score"], pointing["mass"], pointing["iou"]),
        ]:
            values += [pointing["chance"], pointing["chance_any_object"]]
            assert table[name] == [str(pointing["questions"]), *(f"{value:.4f}" for value in values)]
    header = "| attention maps | phrases | pointing | mass | IoU | object's share | any object |"
    assert header in (tmp_path / "out" / "report.md").read_text()


def test_a_model_in_memory_can_be_stopped_and_resumed_too(tmp_path, scenes, monkeypatch):
    parts = age_vlm()
    options = {"data": scenes["test"], "limit": 2, "max_new_tokens": 3, "batch_size": 4, "progress": None}
    found = evaluate_scenes(parts, tmp_path / "out", **options)
    assert found.settings["data"] == "in memory"
    monkeypatch.setattr(answers, "answer_batch", None)  # no question remains
    again = evaluate_scenes(parts, tmp_path / "out", **options)
    assert (again.scores, again.answers) == (found.scores, found.answers)
    assert results(tmp_path / "out")["scores"] == found.scores
    with pytest.raises(FileExistsError, match="questions was"):
        evaluate_scenes(parts, tmp_path / "out", **{**options, "data": scenes["train"]})
    with pytest.raises(FileExistsError, match="weights was"):
        evaluate_scenes(age_vlm(seed=1), tmp_path / "out", **options)


def test_other_models_are_asked_as_in_other_benchmarks(monkeypatch, capsys, tmp_path, folders, scenes):
    suffix = "Answer with one word."
    command = ["--model", folders / "llava", "--data", folders / "scenes", "--out", tmp_path / "out"]
    code, printed = run(monkeypatch, capsys, *command, "--prompt-suffix", suffix, "--max-new-tokens", 16)
    assert code == 0, printed
    model, processor = llava()
    questions = Scenes(scenes["test"]).questions()
    asked = [replace(question, text=f"{question.text}\n{suffix}") for question in questions]
    inspect = Scenes(scenes["test"]).inspect
    given = answer(model, processor, asked, max_new_tokens=16, progress=None, inspect=inspect)
    found = entries(tmp_path / "out")
    assert [(entry["question"], entry["answer"]) for entry in found] == [
        (question.text, given[question.key]["answer"]) for question in asked
    ]
    expected = Scenes(scenes["test"]).score(questions, given)
    assert len(expected["pointing"]["by_block"]) == model.config.text_config.num_hidden_layers
    assert expected["pointing"]["questions"] == sum(question.span is not None for question in questions)
    close(results(tmp_path / "out")["scores"], json.loads(json.dumps(expected)))
    assert "attention maps" in printed


def test_a_suffix_is_asked_and_moves_no_phrase(monkeypatch, capsys, tmp_path, folders, scenes):
    suffix = "Is there a dog? Answer dog or cat."
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out", "--limit", 2]
    assert run(monkeypatch, capsys, *command, "--prompt-suffix", suffix, "--max-new-tokens", 4)[0] == 0
    model, processor = age_vlm()
    questions = {question.key: question for question in Scenes(scenes["test"]).questions(2)}
    other_answers = 0
    for entry in entries(tmp_path / "out"):
        question = questions[entry["key"]]
        with_suffix = replace(question, text=f"{question.text}\n{suffix}")
        assert entry["question"] == with_suffix.text
        asked = (answer_batch(model, processor, [one], 4)[0]["answer"] for one in (with_suffix, question))
        expected, without = asked
        assert entry["answer"] == expected
        other_answers += expected != without
        if question.span:
            phrase = Phrase(question.text[slice(*question.span)], "question", *question.span)
            maps = attend(model, processor, question.open_image(), with_suffix.text, "", [phrase]).maps[:, 0]
            close(entry["maps"]["mass"][:-1], (maps.reshape(len(maps), -1) @ coverage(question.mask)).tolist())
    assert other_answers


def test_parts_of_the_scenes(monkeypatch, capsys, tmp_path, folders, scenes):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    options = ["--split", "validation", "--limit", 2, "--max-new-tokens", 2, "--dtype", "bfloat16", "--device", "cpu"]
    code, printed = run(monkeypatch, capsys, *command, *options)
    assert code == 0, printed
    expected = [(question.key, question.text) for question in Scenes(scenes["validation"]).questions(2)]
    assert [(entry["key"], entry["question"]) for entry in entries(tmp_path / "out")] == expected
    assert results(tmp_path / "out")["settings"] == {
        "benchmark": "grounded scenes",
        "data": str(folders / "scenes"),
        "split": "validation",
        "limit": 2,
        "cross_attention_before_layers": age_vlm()[0].config.text_config.cross_attention_llama_layers,
        "model": str(folders / "age_vlm"),
        "dtype": "bfloat16",
        "prompt_suffix": "",
        "max_new_tokens": 2,
    }


# --- runs that were stopped ---


def test_a_stopped_run_resumes(monkeypatch, capsys, tmp_path, folders):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--max-new-tokens", 4]
    command += ["--batch-size", 6]
    assert run(monkeypatch, capsys, *command, "--out", tmp_path / "whole")[0] == 0

    ask, asked = answers.answer_batch, []

    def stopped(model, processor, questions, *arguments):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append([question.text for question in questions])
        return ask(model, processor, questions, *arguments)

    monkeypatch.setattr(answers, "answer_batch", stopped)
    out = tmp_path / "out"
    code, printed = run(monkeypatch, capsys, *command, "--out", out)
    assert (code, "Traceback" in printed) == (130, False)
    assert not (out / "results.json").exists()
    assert len(entries(out)) == 18
    with (out / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "existence/9", "ques')  # the power went off
    before = len(asked)
    asked.append(None)  # so that it does not stop again
    assert run(monkeypatch, capsys, *command, "--out", out)[0] == 0
    for name in ("answers.jsonl", "results.json", "report.md"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    texts = [entry["question"] for entry in entries(out)]
    assert [text for batch in asked[before + 1 :] for text in batch] == texts[18:]  # the others were answered

    again = len(asked)
    assert run(monkeypatch, capsys, *command, "--out", out, "--batch-size", 1)[0] == 0
    assert len(asked) == again
    assert (out / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()


def test_answers_of_other_weights_settings_or_scenes_are_refused(monkeypatch, capsys, tmp_path, folders):
    model, data = tmp_path / "model", tmp_path / "scenes"
    for part in age_vlm():
        part.save_pretrained(model)
    load_from_disk(folders / "scenes").save_to_disk(data)
    command = ["--model", model, "--data", data, "--out", tmp_path / "out", "--max-new-tokens", 1, "--limit", 1]
    assert run(monkeypatch, capsys, *command)[0] == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()

    def refused(message, *options):
        code, printed = run(monkeypatch, capsys, *command, *options)
        assert code == 2, printed
        assert message in printed
        assert "choose another output folder" in printed
        assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before

    refused("split was 'test' and is 'train'", "--split", "train")
    refused("limit was 1 and is 2", "--limit", 2)
    refused("max_new_tokens was 1 and is 2", "--max-new-tokens", 2)
    refused("dtype was 'float32' and is 'bfloat16'", "--dtype", "bfloat16")
    refused("prompt_suffix was '' and is 'x'", "--prompt-suffix", "x")
    refused("model was", "--model", folders / "llava")

    # The same questions about scenes that look otherwise.
    splits = load_from_disk(data)
    other = mask_to_rle(np.eye(64, dtype=bool))
    changed = splits["test"].map(
        lambda row: {"grounding": [{**phrase, "mask": other} for phrase in row["grounding"]]},
        features=splits["test"].features,
    )
    DatasetDict({**splits, "test": changed}).save_to_disk(tmp_path / "changed")
    data.rename(tmp_path / "kept")
    (tmp_path / "changed").rename(data)
    refused("questions was")
    data.rename(tmp_path / "changed")
    (tmp_path / "kept").rename(data)

    trained, _ = age_vlm(seed=1)
    trained.save_pretrained(model)
    refused("weights was")


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{place}/nowhere"], "no such folder: {place}/nowhere; name one that `agevlm scenes` has written"),
        (
            ["--data", "{place}/other"],
            "lacks the columns scene, kind, answers: name one that `agevlm scenes` has written",
        ),
        (["--data", "{place}/backgrounds"], "no split 'test'; it has: train"),
        (["--split", "zero_shot"], "no split 'zero_shot'; it has: train, validation, test"),
        (["--model", "{place}/nowhere"], "nowhere"),
        (["--device", "tpu"], "must be auto, cpu or cuda"),
        (["--limit", "0"], "limit"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, folders, scenes, options, message):
    if not (folders / "other").exists():
        other = scenes["test"].select(range(2)).remove_columns(["scene", "kind", "answers"])
        DatasetDict({"test": other}).save_to_disk(folders / "other")
    common = {"--model": "{place}/age_vlm", "--data": "{place}/scenes", "--out": str(tmp_path / "out")}
    common |= dict(zip(options[::2], options[1::2], strict=True))
    command = [part.format(place=folders) for option in common.items() for part in option]
    code, printed = run(monkeypatch, capsys, *command)
    assert code == 2, printed
    assert message.format(place=folders) in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_image_that_cannot_be_read_is_named(monkeypatch, capsys, tmp_path, folders, scenes):
    undecoded = scenes["test"].cast_column("images", List(ImageFeature(decode=False)))
    rows = [{**row, "images": [{"bytes": b"no image", "path": None}]} for row in undecoded]
    broken = Dataset.from_list(rows, features=scenes["test"].features)
    DatasetDict({"test": broken}).save_to_disk(tmp_path / "scenes")
    for model in ("age_vlm", "llava"):
        command = ["--model", folders / model, "--data", tmp_path / "scenes", "--out", tmp_path / model]
        code, printed = run(monkeypatch, capsys, *command)
        assert code == 2
        assert "question existence/1: cannot identify image" in printed


def test_the_tower_sees_a_scene_once_a_batch(scenes):
    """Several questions about a scene share its features, for their answers and for their maps."""
    model, processor = age_vlm()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    questions = Scenes(scenes["test"]).questions()
    options = {"data": scenes["test"], "batch_size": 7, "max_new_tokens": 1, "progress": None}
    evaluate_scenes((model, processor), **options)
    batches = [questions[start : start + 7] for start in range(0, len(questions), 7)]
    assert seen == [len({question.source for question in batch}) for batch in batches]
    assert sum(seen) < len(questions)
    assert torch.is_grad_enabled()
