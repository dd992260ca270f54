# SPDX-License-Identifier: Apache-2.0
"""Bad rows: what stops training is what `data check --model` finds, is named, and can be skipped."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import run
from PIL import Image
from published_grand import write_grand
from row_cases import LLAVA, changed, encoded, png_header, rle, text_part, turns, write
from tiny_training import tiny_processor, tiny_trainable
from training_runs import SETTINGS

from agevlm.data import DataPart, read_mixture, skip_bad_rows
from agevlm.data.check import check_part
from agevlm.data.readers import read_dataset
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.trainer import AgeVlmTrainer, AgeVlmTrainingArguments
from agevlm.trainer.bad_rows import row_collator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of all kinds, and a model with its processor."""
    folder = tmp_path_factory.mktemp("bad")
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.png").write_bytes(encoded())
    (images / "sub" / "b.png").write_bytes(encoded(20, 10))
    (images / "001.jpg").write_bytes(encoded(kind="JPEG"))
    (images / "truncated.jpg").write_bytes(encoded(kind="JPEG")[:500])
    (images / "huge.png").write_bytes(png_header(9600, 10_000))
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(images / "float.tiff")
    Image.fromarray(np.full((30, 40), 70_000, np.int32)).save(images / "range.tiff")
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("Hello.")
    (images / "folder.png").mkdir()
    tiny_trainable().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_trainable()


def good():
    question = [{"type": "image", "text": None}, text_part("Where is the dog?")]
    return {
        "images": ["images/a.png"],
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [text_part("The dog is on the left.")]},
        ],
        "grounding": [
            {"message": 0, "start": 9, "end": 16, "image": 0, "box": [0, 0, 20, 10], "mask": rle(), "score": None}
        ],
    }


def image(name):
    return good() | {"images": [f"images/{name}"]}


ENTRY = ("grounding", 0)
BAD = {
    "truncated": image("truncated.jpg"),
    "96 megapixels": image("huge.png"),
    "mode F": image("float.tiff"),
    "beyond 16 bits": image("range.tiff"),
    "empty file": image("empty.png"),
    "text file": image("text.png"),
    "folder": image("folder.png"),
    "missing file": image("nope.png"),
    "NUL in a path": image("a\0.png"),
    "URL": good() | {"images": ["https://127.0.0.1:1/a.png"]},
    "no image": good() | {"images": []},
    "image in an answer": changed(good(), ("messages", 1, "content"), [{"type": "image"}, text_part("The dog.")]),
    "empty conversation": good() | {"messages": [], "images": [], "grounding": []},
    "no role": changed(good(), ("messages", 0, "role"), None),
    "a number for a content": changed(good(), ("messages", 1, "content"), 3),
    "a part of another type": changed(good(), ("messages", 0, "content"), [{"type": "video"}, {"type": "image"}]),
    "a text without text": changed(good(), ("messages", 1, "content"), [{"type": "text", "text": None}]),
    "half of a character": changed(good(), ("messages", 1, "content"), [text_part("The \ud800 dog.")]),
    "span outside": changed(good(), (*ENTRY, "end"), 99),
    "span before": changed(good(), (*ENTRY, "start"), -1),
    "no such message": changed(good(), (*ENTRY, "message"), 2),
    "no start": changed(good(), (*ENTRY, "start"), None),
    "no such image": changed(good(), (*ENTRY, "image"), 1),
    "damaged mask": changed(good(), (*ENTRY, "mask"), rle() | {"counts": "0"}),
    "gigantic mask": changed(good(), (*ENTRY, "mask"), {"size": [100_000, 100_000], "counts": "PPigPZ9"}),
    "mask of another size": changed(good(), (*ENTRY, "mask"), rle(10, 10)),
    "a word for a message": changed(good(), (*ENTRY, "message"), "first"),
}
# Mistakes that training does not meet.
NOTED = {
    "unknown role": changed(good(), ("messages", 0, "role"), "bot"),
    "box outside": changed(good(), (*ENTRY, "box"), [0, 0, 400, 10]),
    "score": changed(good(), (*ENTRY, "score"), 3),
    "good": good(),
}


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))  # in ASCII, also half a character
    return path


def train_one_step(model, mixture, path):
    args = AgeVlmTrainingArguments(str(path), **{**SETTINGS, "stage": "guide", "max_steps": 1})
    trainer = AgeVlmTrainer(model, args, train_dataset=mixture, processing_class=tiny_processor())
    trainer.train()


def problem_of(action, *arguments):
    """The message of a mistake, or None."""
    try:
        action(*arguments)
    except ValueError as error:
        return str(error)
    return None


def test_a_check_with_a_model_finds_what_stops_training(folder, model, monkeypatch, capsys):
    """For each kind: row 1 of a file. The check sees all kinds in one file."""
    stopped = []
    for kind, row in {**BAD, **NOTED}.items():
        path = lines(folder / "one.jsonl", [good(), row])
        problem = problem_of(
            lambda path=path: train_one_step(model, read_mixture([DataPart(str(path))]).select([1]), folder / "out")
        )
        if problem is not None:
            stopped.append(kind)
            for part in (str(path), "row 1", "on_bad_row: skip", "data check"):
                assert part in problem, (kind, problem)
    assert stopped == list(BAD)

    path = lines(folder / "all.jsonl", [*BAD.values(), *NOTED.values()])
    report = folder / "report.json"
    code, printed = run(monkeypatch, capsys, "data", "check", path, "--model", folder / "model", "--report", report)
    assert code == 1, printed
    problems = json.loads(report.read_text())["problems"]
    assert {p["row"] for p in problems if p["severity"] == "error"} == set(range(len(BAD)))
    noted = {[*BAD, *NOTED][p["row"]] for p in problems if p["severity"] == "note"}
    assert set(NOTED) - noted == {"good"}

    path = write(folder / "passes.jsonl", [good(), *NOTED.values()])
    assert run(monkeypatch, capsys, "data", "check", path, "--model", folder / "model")[0] == 0
    assert run(monkeypatch, capsys, "data", "check", path)[0] == 1  # its format is wrong nevertheless
    train_one_step(model, read_mixture([DataPart(str(path))]), folder / "out")


def other_formats(folder):
    """Parts of each other format with their bad rows, and what is in the way of reading or training."""
    bad_turns = turns("What is this?", "A <image> dog.", "<image>")
    llava = [*LLAVA, {"image": "a.png", "conversations": bad_turns}, {"image": "truncated.jpg", "conversations": turns("<image>?", "A dog.")}]  # fmt: skip
    llava += [{"image": "a.png", "conversations": [{"from": "bot", "value": "<image>"}]}, {"conversations": []}]
    yield (
        DataPart(str(write(folder / "llava.json", llava)), format="llava", images=str(folder / "images")),
        {4, 5, 6, 7},
    )

    text = datasets.Value("string")
    features = datasets.Features(
        images=datasets.List(datasets.Image()), texts=datasets.List({"user": text, "assistant": text})
    )
    turn, picture = {"user": "What is this?", "assistant": "A dog."}, {"bytes": encoded(), "path": None}
    broken = {"bytes": encoded(kind="JPEG")[:500], "path": "kept_name.jpg"}
    rows = [([picture], [turn]), ([broken], [turn]), ([picture] * 2, [turn]), ([], [])]
    columns = {"images": [images for images, _ in rows], "texts": [texts for _, texts in rows]}
    path = folder / "cauldron.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    yield DataPart(str(path), format="cauldron"), {1, 3}

    stored = datasets.Dataset.from_list([good() | {"images": [{"bytes": encoded(), "path": None}]}] * 3).to_list()
    stored[1] = changed(stored[1], (*ENTRY, "end"), 99)
    stored[2]["images"] = [broken]
    path = folder / "stored.parquet"
    features = (
        read_dataset(write(folder / "typed.json", [good()]))
        .select_columns(["images", "messages", "grounding"])
        .features
    )
    datasets.Dataset.from_list(stored, features=features).to_parquet(path)
    yield DataPart(str(path)), {1, 2}


def test_every_format_is_checked_as_it_trains(folder, model):
    collator = AgeVlmDataCollator(tiny_processor(), grid=(1, 1))
    for part, expected in other_formats(folder):
        report = check_part(part, collator=collator, progress=False)
        assert {p.row for p in report.problems if p.severity == "error"} == expected, part
        assert report.bad_rows == len(expected)
        with pytest.raises(ValueError, match=r"(row|entry) \d"):
            train_one_step(model, read_mixture([part]), folder / "out")
        part.on_bad_row = "skip"
        mixture = read_mixture([part])
        rows = [origin["row"] for origin in mixture["row_origin"]]
        stopped = set(range(report.rows)) - set(rows)  # bad entries of published data are no rows
        for place, number in enumerate(rows):
            try:
                collator([mixture[place]] if number not in expected else [{**mixture[place : place + 1]}])
            except Exception:
                stopped.add(number)
        assert stopped == expected, part


def recipe(folder, path, **changes):
    values = {
        "model": str(folder / "model"),
        "data": [{"path": str(path), "on_bad_row": "skip"}],
        "training": {
            "output_dir": str(path.parent / "out"), "stage": "guide", "max_steps": 6, "save_steps": 2, "use_cpu": True,
            "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.01,
        },
    } | changes  # fmt: skip
    file = path.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def mixed(folder, tmp_path):
    """A file with bad rows among good ones, whose images have absolute paths."""
    rows = [image("a.png"), BAD["truncated"], image("001.jpg"), BAD["span outside"], BAD["no role"], good(), good()]
    rows = [row | {"images": [str(folder / name) for name in row["images"]]} for row in rows]
    return write(tmp_path / "mixed.jsonl", rows)


def test_skipped_rows_are_left_out_and_listed(folder, mixed, tmp_path, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "train", recipe(folder, mixed))
    assert code == 0, printed
    file = tmp_path / "out" / "skipped_rows.json"
    assert f"Skipped bad rows: 3, listed in {file}" in printed
    skipped = json.loads(file.read_text())
    assert [(row["file"], row["row"]) for row in skipped["train_dataset"]] == [(str(mixed), n) for n in (1, 3, 4)]
    for row, reason in zip(
        skipped["train_dataset"], ("truncated.jpg", "span (9, 99)", "message 0 is not"), strict=True
    ):
        assert reason in row["reason"]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["metrics"]["skipped_rows"] == 3

    # The same as training on the good rows alone, to the last bit.
    lines = mixed.read_text().splitlines()
    alone = tmp_path / "alone" / "good.jsonl"
    alone.parent.mkdir()
    alone.write_text("\n".join(lines[n] for n in (0, 2, 5, 6)))
    assert run(monkeypatch, capsys, "train", recipe(folder, alone))[0] == 0
    weights = [(place / "out" / "model.safetensors").read_bytes() for place in (tmp_path, alone.parent)]
    assert weights[0] == weights[1]


def test_a_resumed_run_skips_the_same_rows_without_looking_again(folder, mixed, tmp_path, monkeypatch, capsys):
    file = recipe(folder, mixed)
    assert run(monkeypatch, capsys, "train", file)[0] == 0
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "training.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoint-6").rename(tmp_path / "later")
    monkeypatch.setattr(AgeVlmDataCollator, "find_problem", lambda *_: pytest.fail("a row is looked at again"))
    code, printed = run(monkeypatch, capsys, "train", file, "--resume")
    assert code == 0, printed
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole

    (tmp_path / "out" / "skipped_rows.json").write_text("[1]")
    code, printed = run(monkeypatch, capsys, "train", file, "--resume")
    assert code == 2
    assert "skipped_rows.json is damaged" in printed


def test_by_default_training_stops_and_says_how_to_go_on(folder, mixed, tmp_path, monkeypatch, capsys):
    """Also in a worker process, whose traceback PyTorch puts into the message."""
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    path = write(tmp_path / "rows.jsonl", [rows[0], rows[1]])
    file = recipe(folder, path, data=[{"path": str(path)}])
    code, printed = run(monkeypatch, capsys, "train", file, "training.dataloader_num_workers=1")
    assert code == 2
    assert f"agevlm: error: {path}, row 1: Cannot read image '{folder}/images/truncated.jpg'" in printed
    assert "`on_bad_row: skip`" in printed
    assert "Traceback" not in printed
    code, printed = run(monkeypatch, capsys, "data", "check", file)  # a whole recipe
    assert code == 1
    assert "truncated.jpg" in printed
    assert run(monkeypatch, capsys, "data", "check", file, "--split", "train")[0] == 2


def test_data_without_good_rows_are_refused(folder, mixed, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "bad.jsonl", [json.loads(mixed.read_text().splitlines()[1])] * 2)
    code, printed = run(monkeypatch, capsys, "train", recipe(folder, path))
    assert code == 2
    assert f"{path}: all of its 2 rows are bad; the first: Cannot read image" in printed
    with pytest.raises(ValueError, match="on_bad_row is error or skip, got 'ignore'"):
        read_mixture([DataPart(str(path), on_bad_row="ignore")])


def test_a_file_without_good_rows_is_left_out_where_the_data_set_has_others(tmp_path):
    """GranD has a file for each image."""
    path, images = write_grand(tmp_path)
    mixture = read_mixture([DataPart(str(path), format="grand", images=str(images), on_bad_row="skip")])
    first = mixture[0]["row_origin"]["file"]
    bad = [row["file"] == first for row in mixture["row_origin"]]
    assert 0 < sum(bad) < len(mixture)
    problems = iter(["its image is damaged" if is_bad else None for is_bad in bad])
    left, skipped = skip_bad_rows(mixture, lambda row: next(problems))
    assert len(left) == len(mixture) - sum(bad)
    assert {row["file"] for row in skipped} == {first}


def test_rows_of_parts_that_stop_stay(folder, mixed):
    """Only the parts that say so are looked at."""
    seen = []

    def find_problem(row):
        seen.append(row["row_origin"]["row"])
        return "bad" if row["row_origin"]["row"] == 2 else None

    path = write(mixed.parent / "more.jsonl", [good() | {"images": [str(folder / "images" / "a.png")]}] * 4)
    parts = [DataPart(str(path)), DataPart(str(path), on_bad_row="skip", rows=3)]
    left, skipped = skip_bad_rows(read_mixture(parts, seed=1), find_problem)
    drawn = [row["row_origin"]["row"] for row in read_mixture(parts, seed=1).select(range(4, 7))]
    assert seen == drawn
    assert [row["row_origin"]["row"] for row in left] == [0, 1, 2, 3, *(row for row in drawn if row != 2)]
    assert [row["row"] for row in skipped] == [row for row in drawn if row == 2]
    untouched = read_mixture(parts[:1])
    assert skip_bad_rows(untouched, find_problem)[0] is untouched


def test_the_collator_of_the_check_raises_for_the_same_rows(folder):
    args = AgeVlmTrainingArguments(str(folder / "out"), **SETTINGS, max_length=2)
    collator = row_collator(tiny_processor(), args)
    whole = read_mixture([DataPart(str(write(folder / "one.jsonl", [good()])))])
    assert "truncat" in collator.find_problem(whole[0])  # its image token is cut off
    args = AgeVlmTrainingArguments(str(folder / "out"), **SETTINGS, guidance_weight=0.0)
    outside = write(folder / "one.jsonl", [BAD["span outside"]])
    assert row_collator(tiny_processor(), args).find_problem(read_mixture([DataPart(str(outside))])[0]) is None


def test_errors_name_the_row_in_the_batch_and_its_files():
    collator = AgeVlmDataCollator(tiny_processor(), grid=(4, 4))
    fine = {**good(), "images": [{"bytes": encoded(), "path": None}]}
    float_image = {"bytes": None, "path": None}
    with pytest.raises(ValueError, match="row 2 of the batch: it has an image that is neither a file nor bytes"):
        collator([fine, fine, {**fine, "images": [float_image]}])
    named = {"bytes": encoded(kind="JPEG")[:500], "path": "kept_name.jpg"}
    with pytest.raises(ValueError, match=r"row 1 of the batch: .*\(images: kept_name\.jpg\)"):
        collator([fine, {**fine, "images": [named]}])
    assert torch.is_tensor(collator([fine])["pixel_values"])
