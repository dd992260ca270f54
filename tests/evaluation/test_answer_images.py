# SPDX-License-Identifier: Apache-2.0
"""Answers about a folder or a list of images: those of each image alone, in order, and continued after a stop."""

import csv
import json
import os

import pytest
from command_line import run
from evaluation_cases import age_vlm, picture
from web_server import serve

from agevlm.evaluation import answer_images, answers, read_image_list
from agevlm.evaluation.answers import Question, answer_batch

pytestmark = pytest.mark.slow
NAMES = ["a.png", "b.JPG", "inner/c.webp", "d.png"]


@pytest.fixture(scope="module")
def parts():
    return age_vlm()


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "age_vlm"
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(number).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


def alone(parts, file, question="Cat?") -> str:
    """The answer about one image in a batch of its own."""
    from PIL import Image

    model, processor = parts
    load = lambda: Image.open(file).convert("RGB")  # noqa: E731
    return answer_batch(model, processor, [Question("only", load, question)], 5)[0]["answer"]


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_folder_is_answered_in_the_order_of_its_names(parts, images, tmp_path):
    out = tmp_path / "answers.jsonl"
    bad = answer_images(*parts, read_image_list(images, "Cat?"), out, batch_size=3, max_new_tokens=5)
    assert not bad
    expected = ["a.png", "b.JPG", "d.png", "inner/c.webp"]
    assert lines(out) == [
        {"image": name, "question": "Cat?", "answer": alone(parts, images / name)} for name in expected
    ]
    assert len({row["answer"] for row in lines(out)}) > 1
    assert sorted(tmp_path.iterdir()) == [out, images]


def test_lists_name_files_addresses_and_questions(parts, images, tmp_path):
    with serve({"/far.png": (images / "d.png").read_bytes()}) as (port, _):
        rows = [("a.png", "Dog?"), ("inner/c.webp", ""), (f"http://127.0.0.1:{port}/far.png", "")]
        (images / "list.csv").write_text("image,question\n" + "".join(f"{name},{text}\n" for name, text in rows))
        entries = [{"image": name, **({"question": text} if text else {})} for name, text in rows]
        (images / "list.jsonl").write_text("\n\n".join(json.dumps(entry) for entry in entries))
        (images / "list.txt").write_text("\n".join(name for name, _ in rows) + "\n\n")
        read = {kind: read_image_list(images / f"list.{kind}", "Cat?") for kind in ("csv", "jsonl", "txt")}
        assert read["csv"] == read["jsonl"]
        assert [entry.question for entry in read["csv"]] == ["Dog?", "Cat?", "Cat?"]
        assert [entry.question for entry in read["txt"]] == ["Cat?"] * 3
        out = tmp_path / "answers.csv"
        answer_images(*parts, read["csv"], out, max_new_tokens=5)
    with open(out, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["answer"].replace("\r\n", "\n") for row in found] == [
        alone(parts, images / "a.png", "Dog?"),
        alone(parts, images / "inner" / "c.webp"),
        alone(parts, images / "d.png"),
    ]
    assert list(found[0]) == ["image", "question", "answer"]


def test_questions_and_names_may_have_any_line_break(tmp_path):
    rows = [("a,b.png", "Is it\nhere?"), ('"c".png', "Or\u2028there?\x0c!")]
    with open(tmp_path / "list.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "question"), *rows])
    entries = [json.dumps(dict(zip(("image", "question"), row, strict=True)), ensure_ascii=False) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(entries), encoding="utf-8")
    for kind in ("csv", "jsonl"):
        assert [entry[:2] for entry in read_image_list(tmp_path / f"list.{kind}")] == rows


def test_names_that_are_not_utf_8_are_written_too(parts, tmp_path):
    (tmp_path / "images").mkdir()
    name = os.fsdecode(b"\xff.png")
    picture(0).save(tmp_path / "images" / name)
    for kind in ("jsonl", "csv"):
        out = tmp_path / f"answers.{kind}"
        answer_images(*parts, read_image_list(tmp_path / "images", "Cat?"), out, max_new_tokens=5)
    assert json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))["image"] == name
    assert r"\udcff.png" in (tmp_path / "answers.csv").read_text(encoding="utf-8")


def test_an_image_that_cannot_be_read_costs_no_other_its_answer(parts, images, tmp_path):
    (images / "b.JPG").write_bytes((images / "b.JPG").read_bytes()[:150])
    bad = answer_images(*parts, read_image_list(images, "Cat?"), tmp_path / "x.jsonl", max_new_tokens=5)
    assert list(bad) == [str(images / "b.JPG")]
    rows = lines(tmp_path / "x.jsonl")
    assert [sorted(row) for row in rows] == [
        ["answer", "image", "question"], ["error", "image", "question"], *[["answer", "image", "question"]] * 2
    ]  # fmt: skip
    assert rows[2]["answer"] == alone(parts, images / "d.png")


def test_images_may_become_readable_and_unreadable_between_runs(parts, images, tmp_path, monkeypatch):
    """A run that resumes keeps its answers, tries again what failed, and fails for a row alone what fails now."""
    asked, out = read_image_list(images, "Cat?"), tmp_path / "x.jsonl"
    whole = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(b"")
    batches = []

    def stop(*args):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append([question.source for question in args[2]])
        return answer_batch(*args)

    monkeypatch.setattr(answers, "answer_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        answer_images(*parts, asked, out, batch_size=1, max_new_tokens=5)
    assert batches == [[asked[1].place], [asked[2].place]]
    monkeypatch.setattr(answers, "answer_batch", answer_batch)
    (images / "a.png").write_bytes(whole)
    for lost in (asked[1], asked[3]):  # one that is answered, and one that is not
        os.remove(lost.place)
    bad = answer_images(*parts, asked, out, batch_size=1, max_new_tokens=5)
    assert list(bad) == [asked[3].place]
    assert [row.get("answer") for row in lines(out)] == [
        alone(parts, images / "a.png"), lines(out)[1]["answer"], alone(parts, images / "d.png"), None
    ]  # fmt: skip
    assert lines(out)[3]["error"].startswith("Cannot read image")


def test_an_address_that_fails_later_costs_no_other_its_answer(parts, images, tmp_path):
    with serve({"/far.png": (images / "d.png").read_bytes()}) as (port, requests):
        (images / "list.txt").write_text(f"a.png\nhttp://127.0.0.1:{port}/far.png\nhttp://127.0.0.1:{port}/gone.png")
        bad = answer_images(*parts, read_image_list(images / "list.txt", "Cat?"), tmp_path / "x.csv", max_new_tokens=5)
        assert len(requests) == 2, "each address is asked once"
    assert [(address[-8:], "404" in reason) for address, reason in bad.items()] == [("gone.png", True)]
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        assert [bool(row["error"]) for row in csv.DictReader(file)] == [False, False, True]


def test_no_image_can_be_read(parts, images, tmp_path):
    for file in images.rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 4 images can be read; the first: Cannot read image .*a\.png"):
        answer_images(*parts, read_image_list(images, "Cat?"), tmp_path / "x.jsonl", max_new_tokens=5)
    assert list(tmp_path.iterdir()) == [images]


def test_a_stopped_run_goes_on(parts, images, tmp_path, monkeypatch):
    asked = read_image_list(images, "Cat?")
    answer_images(*parts, asked, tmp_path / "whole.jsonl", batch_size=1, max_new_tokens=5)
    batches = []

    def stop_at(number):
        def answered(model, processor, questions, *rest):
            if len(batches) == number:
                raise KeyboardInterrupt
            batches.append([question.source for question in questions])
            return answer_batch(model, processor, questions, *rest)

        monkeypatch.setattr(answers, "answer_batch", answered)

    out = tmp_path / "stopped.jsonl"
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        answer_images(*parts, asked, out, batch_size=1, max_new_tokens=5)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="max_new_tokens"):
        answer_images(*parts, asked, out, batch_size=1, max_new_tokens=6)
    with pytest.raises(FileExistsError, match="images"):
        answer_images(*parts, asked[:3], out, batch_size=1, max_new_tokens=5)
    stop_at(None)
    answer_images(*parts, asked, out, batch_size=1, max_new_tokens=5)
    assert batches == [[entry.place] for entry in asked]  # none twice
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        answer_images(*parts, asked, out, max_new_tokens=5)
    assert not [file for file in tmp_path.iterdir() if "unfinished" in file.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"image": "a.png"}\n{"image": ', "x.jsonl, line 2: is not JSON"),
        ("x.jsonl", "[1]", "line 1: must be an object"),
        ("x.jsonl", '{"picture": "a.png"}', 'line 1: needs an "image"'),
        ("x.jsonl", '{"image": "a.png", "question": 3}', "must be text"),
        ("x.csv", "picture,question\na.png,Cat?\n", 'no column "image"'),
        ("x.csv", "image\n", "lists no images"),
        ("x.csv", "image\n" + "a" * 200_000, "x.csv, line 1: is not CSV"),
        ("x.txt", "\n \n", "lists no images"),
        ("x.txt", "a.png", "no question about a.png"),
    ],
)
def test_damaged_lists(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_image_list(tmp_path / name)


def test_command(monkeypatch, capsys, parts, checkpoint, images, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ["ask", "--model", checkpoint, "--image", images, "--max-new-tokens", 5]
    code, printed = run(monkeypatch, capsys, *words, "--out", out, "Cat?")
    assert code == 0, printed
    assert "4 answers" in printed
    assert lines(out)[0]["answer"] == alone(parts, images / "a.png")
    for more, message in (
        (["Cat?"], "is a folder"),
        (["--out", out], "no question about a.png"),
        (["--out", tmp_path / "x.json", "Cat?"], "must end with .jsonl or .csv"),
        (["--out", out, "Cat?"], "exists"),
        (["--out", out, "--heatmap", tmp_path / "x.png", "Cat?"], "are for one image"),
        (["--out", tmp_path / "none" / "x.csv", "Cat?"], "there is no folder"),
    ):
        code, printed = run(monkeypatch, capsys, *words, *more)
        assert code == 2, printed
        assert message in printed
    one = ["ask", "--model", checkpoint, "--image", images / "a.png"]
    code, printed = run(monkeypatch, capsys, *one, "--out", tmp_path / "y.csv", "Cat?")
    assert (code, "name a folder of images or a list" in printed) == (2, True)
    code, printed = run(monkeypatch, capsys, *one)
    assert (code, "The question is missing" in printed) == (2, True)
    for file in images.rglob("*.*"):
        file.unlink()
    code, printed = run(monkeypatch, capsys, *words, "--out", tmp_path / "z.csv", "Cat?")
    assert (code, "has no images" in printed) == (2, True)
