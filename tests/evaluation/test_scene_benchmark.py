# SPDX-License-Identifier: Apache-2.0
"""Grounded scenes as a benchmark: the command, its numbers, and runs that were stopped."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image, ImageDraw
from test_benchmark import age_vlm, llava

from agevlm import cli
from agevlm.data.features import scene_images
from agevlm.data.scene_builder import KINDS, build_scenes
from agevlm.evaluation import scene_benchmark
from agevlm.evaluation.attention import phrase_maps
from agevlm.evaluation.benchmark import Question, answer, render_question, reply_greedily
from agevlm.evaluation.scenes import evaluate_scenes, scene_questions, score_maps, score_questions
from agevlm.processing.rows import mask_from_rle, mask_to_rle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models as checkpoints, one of them under a name that another had before; and scenes."""
    place = tmp_path_factory.mktemp("folders")
    for build in (age_vlm, llava):
        for part in build():
            part.save_pretrained(place / build.__name__)
    for kind in ("cutouts", "backgrounds"):
        (place / kind).mkdir()
    for number, name in enumerate(("dog", "cat", "apple", "car", "key")):
        cutout = Image.new("RGBA", (40, 40))
        ImageDraw.Draw(cutout).ellipse((2, 2, 38, 38), fill=(50 * number, 255 - 50 * number, 128, 255))
        cutout.save(place / "cutouts" / f"{name}.png")
    for number in range(3):
        Image.new("RGB", (90, 90), (80 * number, 40, 90)).save(place / "backgrounds" / f"{number}.png")
    build_scenes(
        place / "cutouts",
        place / "backgrounds",
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
    monkeypatch.setattr(sys, "argv", ["agevlm", "eval", "scenes", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(cli.main())
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out + captured.err


def entries(out) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().split("\n")[1:-1]]


def scores(out) -> dict:
    return json.loads((out / "results.json").read_text())["scores"]


def cells(text: str, separator: str) -> dict[str, list[str]]:
    """The numbers of all tables, by their row's name."""
    rows = [[cell.strip() for cell in line.split(separator)[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1 and row[1].isdigit()}


def close(found, expected):
    """Alike but for rounding, which is not the same in batches of another size."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    else:
        assert found == pytest.approx(expected, abs=1e-5)


# --- the numbers ---


def test_scores_are_those_of_a_model_in_memory(monkeypatch, capsys, tmp_path, folders, scenes):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    code, printed = run(monkeypatch, capsys, *command, "--batch-size", 5)
    assert code == 0, printed
    model, processor = age_vlm()
    expected, asked = evaluate_scenes(model, processor, scenes["test"], progress=None)
    assert set(expected) == {*KINDS, "pointing"}
    close(scores(tmp_path / "out"), json.loads(json.dumps(expected)))
    assert [entry["answer"] for entry in entries(tmp_path / "out")] == [question.answer for question in asked]
    assert len({question.answer for question in asked}) > 5

    for table in (cells(printed, "│"), cells((tmp_path / "out" / "report.md").read_text(), "|")):
        layers = model.config.text_config.cross_attention_llama_layers
        blocks = [f"before layer {layer}" for layer in layers]
        assert list(table) == [
            *(kind.replace("_", " ") for kind in expected if kind != "pointing"),
            *blocks,
            "mean of all",
        ]
        for kind, row in expected.items():
            if kind != "pointing":
                found = table[kind.replace("_", " ")]
                assert found[:3] == [str(row["questions"]), f"{row['score']:.4f}", f"{row['chance']:.4f}"]
                assert found[3] == (f"{row['f1']:.4f}" if "f1" in row else "–")
        looked = expected["pointing"]
        for name, *values in [
            *zip(blocks, looked["by_block"], looked["mass_by_block"], looked["iou_by_block"], strict=True),
            ("mean of all", looked["score"], looked["mass"], looked["iou"]),
        ]:
            assert table[name] == [
                str(looked["questions"]),
                *(f"{value:.4f}" for value in (*values, looked["chance"])),
            ]


def test_scores_of_maps_are_kept_with_the_answers(monkeypatch, capsys, tmp_path, folders, scenes):
    """Of every question whose phrase is in the image, negations included, and of no other."""
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *command, "--max-new-tokens", 1)[0] == 0
    model, processor = age_vlm()
    images, questions = scene_images(scenes["test"]), scene_questions(scenes["test"])
    found = entries(tmp_path / "out")
    assert [entry["key"] for entry in found] == [f"{q.kind}/{number}" for number, q in enumerate(questions, 1)]
    kinds = set()
    for entry, question in zip(found, questions, strict=True):
        assert entry["question"] == question.text
        assert ("maps" in entry) == bool(question.spans)
        if not question.spans:
            continue
        kinds.add((question.kind, question.expected))
        text = render_question(processor, question.text)
        start, end = (text.index(question.text) + i for i in question.spans[0])
        maps = phrase_maps(model, processor, text, images[question.scene], [(start, end)])[:, 0]
        mask = mask_from_rle(question.masks[0])
        assert mask.any()
        expected = score_maps(np.concatenate([maps, maps.mean(0, keepdims=True)]), mask)
        close(entry["maps"], {name: values.tolist() for name, values in expected.items()})
    assert ("negation", "No") in kinds
    assert ("negation", "Yes") not in kinds
    assert ("existence", "No") not in kinds
    masks = [mask_from_rle(question.masks[0]) for question in questions if question.spans]
    assert scores(tmp_path / "out")["pointing"]["chance"] == pytest.approx(np.mean([mask.mean() for mask in masks]))


def test_other_models_are_asked_as_in_other_benchmarks(monkeypatch, capsys, tmp_path, folders, scenes):
    suffix = "Answer with one word."
    command = ["--model", folders / "llava", "--data", folders / "scenes", "--out", tmp_path / "out"]
    code, printed = run(monkeypatch, capsys, *command, "--prompt-suffix", suffix, "--max-new-tokens", 16)
    assert code == 0, printed
    model, processor = llava()
    images, questions = scene_images(scenes["test"]), scene_questions(scenes["test"])
    asked = [
        Question(str(number), lambda scene=question.scene: images[scene], f"{question.text}\n{suffix}")
        for number, question in enumerate(questions)
    ]
    options = {"settings": {}, "max_new_tokens": 16, "progress": None}
    given = answer(model, processor, asked, tmp_path / "expected.jsonl", **options)
    assert [entry["answer"] for entry in entries(tmp_path / "out")] == list(given.values())
    assert [entry["question"] for entry in entries(tmp_path / "out")] == [question.text for question in asked]
    for question, text in zip(questions, given.values(), strict=True):
        question.answer = text
    expected = score_questions(questions)
    assert "pointing" not in expected
    close(scores(tmp_path / "out"), json.loads(json.dumps(expected)))
    assert "attention maps" not in printed


def test_a_suffix_is_asked_and_moves_no_phrase(monkeypatch, capsys, tmp_path, folders, scenes):
    suffix = "Is there a dog? Answer dog or cat."
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out", "--limit", 2]
    assert run(monkeypatch, capsys, *command, "--prompt-suffix", suffix, "--max-new-tokens", 4)[0] == 0
    model, processor = age_vlm()
    images, questions = scene_images(scenes["test"]), scene_questions(scenes["test"])
    other_answers = 0
    for entry in entries(tmp_path / "out"):
        question = questions[int(entry["key"].split("/")[1]) - 1]
        assert entry["question"] == f"{question.text}\n{suffix}"
        asked = [Question("", lambda: images[question.scene], text) for text in (entry["question"], question.text)]  # noqa: B023
        with_suffix, without = (reply_greedily(model, processor, [one], 4)[0]["answer"] for one in asked)
        assert entry["answer"] == with_suffix
        other_answers += with_suffix != without
        if question.spans:
            text = render_question(processor, entry["question"])
            span = tuple(text.index(question.text) + i for i in question.spans[0])
            maps = phrase_maps(model, processor, text, images[question.scene], [span])[:, 0]
            close(entry["maps"]["mass"][:-1], score_maps(maps, mask_from_rle(question.masks[0]))["mass"].tolist())
    assert other_answers


def test_parts_of_the_scenes(monkeypatch, capsys, tmp_path, folders, scenes):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    options = ["--split", "validation", "--limit", 2, "--max-new-tokens", 2, "--dtype", "bfloat16", "--device", "cpu"]
    code, printed = run(monkeypatch, capsys, *command, *options)
    assert code == 0, printed
    expected, seen = [], {}
    for number, question in enumerate(scene_questions(scenes["validation"]), 1):
        seen[question.kind] = seen.get(question.kind, 0) + 1
        if seen[question.kind] <= 2:
            expected.append((f"{question.kind}/{number}", question.text))
    assert [(entry["key"], entry["question"]) for entry in entries(tmp_path / "out")] == expected
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = results["settings"]
    assert settings.pop("scenes")
    assert settings == {
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
    assert set(results["versions"]) == {"agevlm", "transformers", "torch"}


# --- runs that were stopped ---


def test_a_stopped_run_goes_on(monkeypatch, capsys, tmp_path, folders):
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--max-new-tokens", 4]
    command += ["--batch-size", 6]
    assert run(monkeypatch, capsys, *command, "--out", tmp_path / "whole")[0] == 0

    ask, asked = scene_benchmark.answer_questions, []

    def stopped(model, processor, questions, *args, **kwargs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append([question.text for question in questions])
        ask(model, processor, questions, *args, **kwargs)

    monkeypatch.setattr(scene_benchmark, "answer_questions", stopped)
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

    refused("split was 'test', is 'train'", "--split", "train")
    refused("limit was 1, is 2", "--limit", 2)
    refused("max_new_tokens was 1, is 2", "--max-new-tokens", 2)
    refused("dtype was 'float32', is 'bfloat16'", "--dtype", "bfloat16")
    refused("prompt_suffix was '', is 'x'", "--prompt-suffix", "x")
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
    refused("scenes was")
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
    from datasets import Image as ImageFeature
    from datasets import List

    undecoded = scenes["test"].cast_column("images", List(ImageFeature(decode=False)))
    rows = [{**row, "images": [{"bytes": b"no image", "path": None}]} for row in undecoded]
    broken = Dataset.from_list(rows, features=scenes["test"].features)
    DatasetDict({"test": broken}).save_to_disk(tmp_path / "scenes")
    for model in ("age_vlm", "llava"):
        command = ["--model", folders / model, "--data", tmp_path / "scenes", "--out", tmp_path / model]
        code, printed = run(monkeypatch, capsys, *command)
        assert code == 2
        assert "question existence/1: cannot identify image" in printed


def test_the_tower_sees_an_image_once_a_batch(monkeypatch, capsys, tmp_path, folders, scenes):
    """Several questions about a scene share its features, as in `evaluate_scenes`."""
    seen = []
    ask = scene_benchmark.answer_questions

    def count(model, processor, questions, images, **kwargs):
        hook = model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len({q.scene for q in questions}), len(args[0]))),
            with_kwargs=True,
        )
        ask(model, processor, questions, images, **kwargs)
        hook.remove()

    monkeypatch.setattr(scene_benchmark, "answer_questions", count)
    command = ["--model", folders / "age_vlm", "--data", folders / "scenes", "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *command, "--max-new-tokens", 1, "--batch-size", 7)[0] == 0
    questions = len(scene_questions(scenes["test"]))
    assert len(seen) == -(-questions // 7)
    assert all(scenes == images for scenes, images in seen)
    assert sum(images for _, images in seen) < questions / 2
    assert torch.is_grad_enabled()
