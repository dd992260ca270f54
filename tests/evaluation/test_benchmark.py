# SPDX-License-Identifier: Apache-2.0
"""The runner of benchmarks and its commands: models of folders and in memory, options, runs that were stopped."""

import inspect
import json
from dataclasses import dataclass, fields

import datasets
import pytest
from command_line import run
from evaluation_cases import (
    age_vlm,
    cv_rows,
    entries,
    llava,
    picture,
    pope_rows,
    pope_table,
    results,
    some_questions,
    write_lines,
)  # fmt: skip
from rich.console import Console

from agevlm.cli.eval import COMMANDS
from agevlm.evaluation import BENCHMARKS, CvBench, Pope, Scenes, answers, evaluate, evaluate_pope, similarity
from agevlm.evaluation.benchmark import markdown_table
from agevlm.inference.grounding import trained_fingerprint


@dataclass(frozen=True)
class Lengths:
    """A benchmark of one's own: how long answers are."""

    unit: str = "characters"
    title = "lengths"
    prompt_suffix = "Be brief."
    max_new_tokens = 3
    inspect = None
    draw = None

    def settings(self, config):
        return {"unit": self.unit, "model_type": config.model_type}

    def questions(self, limit=None):
        return some_questions(5)[:limit]

    def score(self, questions, answers):
        return {"all": {"length": sum(len(answers[q.key]["answer"]) for q in questions)}}

    def tables(self, scores, settings):
        return [[["", settings["unit"]], ["all", str(scores["all"]["length"])]]]


@pytest.mark.parametrize("build", [age_vlm, llava])
def test_a_benchmark_of_ones_own_on_a_model_in_memory_and_in_a_folder(tmp_path, folders, build):
    model, processor = build()
    found = evaluate(Lengths(), (model, processor), limit=4, progress=None)
    assert [q.text.split("\n")[-1] for q in found.questions] == ["Be brief."] * 4
    assert found.scores == {"all": {"length": sum(len(given["answer"]) for given in found.answers.values())}}
    assert found.settings == {
        "benchmark": "lengths",
        "unit": "characters",
        "model_type": model.config.model_type,
        "limit": 4,
        "model": type(model).__name__,
        "dtype": "float32",
        "prompt_suffix": "Be brief.",
        "max_new_tokens": 3,
    }
    saved = evaluate(Lengths(), folders / build.__name__, tmp_path / "out", limit=4, device="cpu", progress=None)
    assert (saved.scores, saved.answers) == (found.scores, found.answers)
    assert saved.settings == {**found.settings, "model": str(folders / build.__name__)}
    assert results(tmp_path / "out")["scores"] == found.scores
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith(f"# lengths: {folders / build.__name__}\n\n- benchmark: lengths\n")
    assert report.endswith(f"|  | characters |\n| --- | ---: |\n| all | {found.scores['all']['length']} |\n")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(saved.rich())
    assert f"lengths: {folders / build.__name__}" in "".join(capture.get().splitlines())
    assert str(found.scores["all"]["length"]) in capture.get()
    # The model in memory resumes nothing that another one has begun: its name is another.
    with pytest.raises(FileExistsError, match="model was"):
        evaluate(Lengths(), (model, processor), tmp_path / "out", limit=4, progress=None)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_results_say_of_which_weights_they_are(tmp_path, folders, dtype):
    """Whatever they are loaded in: a calibration that was made for the folder says the same."""
    evaluate(Lengths(), folders / "age_vlm", tmp_path / "out", limit=1, device="cpu", dtype=dtype, progress=None)
    assert results(tmp_path / "out")["weights"] == trained_fingerprint(age_vlm()[0])
    evaluate(Lengths(), age_vlm(), tmp_path / "memory", limit=1, progress=None)
    assert "weights" not in results(tmp_path / "memory")


def test_the_named_functions_are_entries_of_the_table(pope_files):
    model = age_vlm()
    options = {"limit": 1, "max_new_tokens": 2, "progress": None}
    found = evaluate_pope(model, None, *pope_files, categories=["random"], **options)
    again = evaluate(BENCHMARKS["pope"](*pope_files, ["random"]), model, **options)
    assert (found.scores, found.settings) == (again.scores, again.settings)
    assert list(found.scores) == ["random", "mean"]
    with pytest.raises(ValueError, match="there is no category 'rare'"):  # before a model is loaded
        evaluate_pope("nowhere", None, *pope_files, categories=["rare"])
    with pytest.raises(TypeError, match="max_tokens"):
        evaluate_pope(model, None, *pope_files, max_tokens=3)


def test_a_benchmark_without_questions():
    with pytest.raises(ValueError, match="lengths has no questions"):
        evaluate(Lengths(), age_vlm(), limit=0)


def test_commands_have_the_options_of_their_benchmark_and_of_the_runner():
    assert COMMANDS.keys() == BENCHMARKS.keys()
    shared = inspect.signature(evaluate).parameters
    for name, command in COMMANDS.items():
        options = inspect.signature(command).parameters
        own = {field.name: field.default for field in fields(BENCHMARKS[name])}
        assert options.keys() == {*own, *shared} - {"benchmark", "progress"}
        for option, parameter in options.items():
            expected = own[option] if option in own else shared[option].default
            if name in ("scenes", "grounding") and option == "data":
                expected = inspect.Parameter.empty
            assert option == "out" or parameter.default == expected, (name, option)


def test_tables_in_markdown():
    table = [["kind", "score", "chance"], ["existence", "0.5", "0.4"], ["count", "1.0", "0.3"]]
    assert markdown_table(table).splitlines() == [
        "| kind | score | chance |",
        "| --- | ---: | ---: |",
        "| existence | 0.5 | 0.4 |",
        "| count | 1.0 | 0.3 |",
    ]


def test_options_of_the_commands(monkeypatch, capsys, tmp_path, folders, pope_files, cv_files):
    files, images = pope_files
    common = ["--model", folders / "age_vlm", "--max-new-tokens", 2, "--limit", 1]
    options = ["--categories", "random, popular", "--prompt-suffix", "Answer with one word.", "--dtype", "bfloat16"]
    out = tmp_path / "pope_out"
    code, printed = run(
        monkeypatch, capsys, "eval", "pope", *common, *options, "--data", files, "--images", images, "--out", out
    )
    assert code == 0, printed
    found = entries(out)
    assert [entry["key"] for entry in found] == ["popular/1", "random/1"]
    assert found[1]["question"] == "Is there a dog in the image?\nAnswer with one word."
    assert results(out)["settings"]["dtype"] == "bfloat16"

    options = ["--tasks", "Count", "--prompt-suffix", "", "--data", cv_files]
    code, printed = run(monkeypatch, capsys, "eval", "cv-bench", *common, *options, "--out", tmp_path / "cv_out")
    assert code == 0, printed
    found = entries(tmp_path / "cv_out")
    assert [entry["question"] for entry in found] == [row["prompt"] for row in cv_rows()[:2]]
    assert "–" in printed  # there is no accuracy where nothing was asked
    assert results(tmp_path / "cv_out")["scores"]["overall"]["accuracy"] is None


def test_a_stopped_command_goes_on(monkeypatch, capsys, tmp_path, folders, pope_files):
    files, images = pope_files
    command = ["pope", "--model", folders / "age_vlm", "--data", files, "--images", images, "--max-new-tokens", 5]
    assert run(monkeypatch, capsys, "eval", *command, "--out", tmp_path / "whole")[0] == 0

    answer_batch, calls = answers.answer_batch, []

    def stopped(model, processor, questions, *arguments):
        calls.append(len(questions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(model, processor, questions, *arguments)

    monkeypatch.setattr(answers, "answer_batch", stopped)
    code, printed = run(monkeypatch, capsys, "eval", *command, "--out", tmp_path / "out", "--batch-size", 2)
    assert (code, "Traceback" in printed) == (130, False)
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(monkeypatch, capsys, "eval", *command, "--out", tmp_path / "out", "--batch-size", 3)[0] == 0
    assert calls == [2, 2, 2, 3, 3, 2]  # four of twelve were answered
    for name in ("answers.jsonl", "results.json", "report.md"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_folder_of_other_files_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match=f"{out} already exists; choose another output folder"):
            evaluate(Lengths(), "nowhere", out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "answers.jsonl").write_text("")  # of a run that was stopped at once
    evaluate(Lengths(), age_vlm(), tmp_path, limit=1, progress=None)
    assert (tmp_path / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pope", "--model", "{models}/no_template"], "has no chat template"),
        (["pope", "--model", "{models}/text_only"], "Can't load image processor for '{models}/text_only'"),
        (["pope", "--model", "{models}/nowhere"], "nowhere"),
        (["pope", "--model", "{models}/age_vlm", "--categories", "rare"], "there is no category 'rare'"),
        (["pope", "--model", "{models}/age_vlm", "--device", "tpu"], "must be auto, cpu or cuda"),
        (["pope", "--model", "{models}/llava"], "model was '{models}/age_vlm' and is '{models}/llava'"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, folders, pope_files, arguments, message):
    files, images = pope_files
    common = ["--data", files, "--images", images, "--out", tmp_path / "out", "--max-new-tokens", 1, "--limit", 1]
    if "was" in message:
        assert run(monkeypatch, capsys, "eval", "pope", "--model", folders / "age_vlm", *common)[0] == 0
    code, printed = run(monkeypatch, capsys, "eval", *(part.format(models=folders) for part in arguments), *common)
    assert code == 2, printed
    assert message.format(models=folders) in printed.replace("\n", " ")
    assert "Traceback" not in printed


NO_TEXTS = [3, 2.5, None, True, [], ["no"], {"no": 1}, "", " ", "\ud800"]


@pytest.mark.parametrize("value", NO_TEXTS, ids=ascii)
def test_a_field_that_is_no_text_is_named_with_its_file_and_row(pope_files, cv_files, value):
    files, images = pope_files
    file, rows = files / "coco_pope_random.json", pope_rows("random")
    for field in ("image", "text", "label"):
        write_lines(file, [*rows[:2], {**rows[2], field: value}, rows[3]])
        with pytest.raises(ValueError, match=rf"coco_pope_random\.json, row 3: its {field} must be a text, got "):
            Pope(file, images).questions()
    file = cv_files / "test_2d.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for field in ("prompt", "filename", "task", "source", "answer", "choices"):
        wrong = [value] if field == "choices" else value
        write_lines(file, [rows[0], {**rows[1], field: wrong}, *rows[2:]])
        with pytest.raises(ValueError, match=rf"test_2d\.jsonl, row 2: its {field} must be "):
            CvBench(cv_files).questions()


@pytest.mark.parametrize("content", ["", "\n\n", "[" * 100_000, "{", "3", "\x00", '{"text": 1}'])
def test_files_that_hold_no_questions_end_the_command_with_a_message(monkeypatch, capsys, tmp_path, folders, content):
    for command, name in (("pope", "coco_pope_random.json"), ("cv-bench", "test_2d.jsonl")):
        (tmp_path / name).write_text(content)
        arguments = ["--data", tmp_path / name, "--images", tmp_path, "--model", folders / "age_vlm"]
        code, printed = run(monkeypatch, capsys, "eval", command, *arguments, "--out", tmp_path / "out")
        assert (code, "Traceback" in printed) == (2, False)
        assert str(tmp_path / name) in printed
        assert not (tmp_path / "out").exists()


def test_tables_without_rows_or_images(pope_files, tmp_path):
    table = pope_table(pope_files[1])
    table.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet"):
        Pope(tmp_path / "empty.parquet").questions()
    columns = {**table.select_columns(["question", "answer", "category"]).to_dict(), "image": [None] * len(table)}
    without = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    without.to_parquet(tmp_path / "without.parquet")
    with pytest.raises(ValueError, match=r"question adversarial/1: .*without\.parquet, row 1: has no image"):
        Pope(tmp_path / "without.parquet").questions()[0].open_image()
    numbers = table.remove_columns("answer").add_column("answer", [1] * len(table))
    numbers.to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"numbers\.parquet, row 1: its label must be a text, got 1"):
        Pope(tmp_path / "numbers.parquet").questions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": None}, "not iterable"),
        ({"answers": ["Yes", "No"]}, "IndexError"),
        ({"answers": ["Maybe"]}, "must be yes or no, got 'Maybe'"),
        ({"kind": "color"}, "its kind is 'color'"),
        ({"kind": None}, "its kind is None"),
        ({"messages": []}, "IndexError"),
        ({"messages": [{"role": "user", "content": None}]}, "is no text"),
        ({"grounding": None}, "not iterable"),
        ({"grounding": [{"message": 0, "start": 0, "end": 2, "mask": {"size": [4, 4], "counts": "!"}}]}, "RLE"),
    ],
)
def test_a_row_that_is_no_scene_is_named(changes, message):
    from agevlm.data.scene_builder import scene_features

    row = dict.fromkeys(scene_features()) | {"kind": "existence", "scene": 0, "answers": ["Yes"], "grounding": []}
    row["messages"] = [{"role": "user", "content": "Dog?"}, {"role": "assistant", "content": "Yes"}]

    class Rows(list):  # as a data set, for values that Arrow would not hold
        select_columns = remove_columns = lambda self, name: self

    assert len(Scenes(Rows([row])).questions()) == 1
    with pytest.raises(ValueError, match=rf"the data, row 1: is not a grounded scene \(.*{message}.*agevlm scenes"):
        Scenes(Rows([row, row | changes])).questions()


def test_a_row_without_the_row_format_is_named_by_similarity():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
    rows = datasets.Dataset.from_list([{"images": [picture(0)], "messages": said} for said in (turns, None)])
    with pytest.raises(ValueError, match="row 1 of the data is not in the row format"):
        similarity.text_pairs(rows)
