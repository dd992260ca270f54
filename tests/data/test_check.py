# SPDX-License-Identifier: Apache-2.0
"""The check of rows and data sets, and its command."""

import dataclasses
import io
import json

import datasets
import pytest
from command_line import check_refused, run
from PIL import Image
from row_cases import (
    HEIGHT,
    WIDTH,
    changed,
    encoded,
    good_row,
    image_part,
    json_row,
    preference_row,
    rle,
    text_part,
    to_dataset,
    write,
)

from agevlm.data.check import check_dataset, check_row
from agevlm.data.readers import read_rows
from agevlm.data.scene_builder import build_scenes
from agevlm.processing.rows import ROLES, message_text, row_features

# --- check_row ---


def test_valid_rows_have_no_problems():
    assert message_text(good_row()["messages"][3])[16:23] == "The cat"
    assert check_row(good_row()) == []
    assert check_row(preference_row()) == []
    whole = changed(changed(good_row(), ("grounding", 0, "start"), 0), ("grounding", 0, "end"), 17)
    for score in (0, 1, 0.5, None):
        assert check_row(changed(whole, ("grounding", 0, "score"), score)) == []
    assert check_row({"messages": [{"role": "user", "content": "Hello."}]}) == []
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert check_row({"images": None, "grounding": None, "messages": [call, {"role": "tool", "content": "4"}]}) == []


ENTRY = ("grounding", 0)


@pytest.mark.parametrize(
    ("place", "value", "where", "message"),
    [
        (("messages",), [], "messages", "is empty"),
        (("messages",), "Hi.", "messages", "not a list"),
        (("messages",), None, "messages", "is missing"),
        (("messages", 2), "Hi.", "messages[2]", "not a message"),
        (("messages", 2, "role"), "gpt", "messages[2].role", f"is 'gpt'; write one of {', '.join(ROLES)}"),
        (("messages", 2, "role"), [], "messages[2].role", "is []"),
        (("messages", 2, "content"), None, "messages[2].content", "neither a string nor a list"),
        (("messages", 2, "content"), [{"type": "audio"}], "messages[2].content[0]", "the type 'audio'"),
        (("messages", 2, "content"), ["Hi."], "messages[2].content[0]", "the type None"),
        (("messages", 2, "content"), [{"type": "text"}], "messages[2].content[0]", "without text"),
        (("messages", 2), {"role": "tool", "content": [image_part()]}, "messages[2].content[0]", "a tool's message"),
        (("messages", 3, "content", 1), text_part(""), "messages", "show 1 images, but the row has 2"),
        (("messages", 2, "content"), [image_part()], "messages", "show 3 images, but the row has 2"),
        (("images",), "a.png", "images", "is not a list"),
        (("images", 0), {"bytes": encoded()[:900], "path": "a.png"}, "images[0]", "is not readable (a.png)"),
        (("images", 0), {"bytes": encoded(kind="JPEG")[:900], "path": None}, "images[0]", "is not readable"),
        (("images", 0), {"bytes": b"", "path": None}, "images[0]", "is not readable"),
        (("images", 0), "missing.png", "images[0]", "Cannot read image 'missing.png'"),
        (("images", 0), None, "images[0]", "is not readable"),
        (("grounding",), {}, "grounding", "is not a list"),
        (ENTRY, 3, "grounding[0]", "not an entry"),
        ((*ENTRY, "message"), 4, "grounding[0].message", "is 4, but there are 4 messages"),
        ((*ENTRY, "message"), -1, "grounding[0].message", "is -1"),
        ((*ENTRY, "message"), None, "grounding[0].message", "is None"),
        ((*ENTRY, "message"), 0, "grounding[0]", "the text of message 0 has 9 characters"),
        ((*ENTRY, "image"), 2, "grounding[0].image", "is 2, but the row has 2 images"),
        ((*ENTRY, "image"), -1, "grounding[0].image", "is -1"),
        ((*ENTRY, "image"), "0", "grounding[0].image", "is '0'"),
        ((*ENTRY, "image"), 1, "grounding[0]", "before the image is shown"),
        (("grounding", 1, "start"), 10, "grounding[1]", "before the image is shown"),  # in the image's own message
        ((*ENTRY, "end"), 18, "grounding[0]", "has 17 characters"),
        ((*ENTRY, "start"), -1, "grounding[0]", "has the span -1 to 16"),
        ((*ENTRY, "start"), 9.0, "grounding[0]", "has the span 9.0 to 16"),
        ((*ENTRY, "start"), 16, "grounding[0]", "empty or reversed"),
        ((*ENTRY, "end"), 3, "grounding[0]", "empty or reversed"),
        ((*ENTRY, "start"), 8, "grounding[0]", "white space, ' the dog'"),
        ((*ENTRY, "end"), 13, "grounding[0]", "white space, 'the '"),
        ((*ENTRY, "box"), [0, 0, 5], "grounding[0].box", "write four numbers"),
        ((*ENTRY, "box"), [0, 0, 5, "5"], "grounding[0].box", "write four numbers"),
        ((*ENTRY, "box"), [0, 0, 5, float("nan")], "grounding[0].box", "write four numbers"),
        ((*ENTRY, "box"), [0, 0, 5, 10**400], "grounding[0].box", "reaches outside"),
        ((*ENTRY, "box"), [5, 0, 4, 5], "grounding[0].box", "empty or reversed"),
        ((*ENTRY, "box"), [0, 5, 5, 5], "grounding[0].box", "empty or reversed"),
        ((*ENTRY, "box"), [-1, 0, 5, 5], "grounding[0].box", "outside the image of 40 x 30 pixels"),
        ((*ENTRY, "box"), [0, 0, 41, 5], "grounding[0].box", "outside"),
        ((*ENTRY, "box"), [0, 0, 5, 31], "grounding[0].box", "outside"),
        ((*ENTRY, "mask"), rle(WIDTH, HEIGHT), "grounding[0].mask", "its image is 30 high and 40 wide"),
        ((*ENTRY, "mask"), {"size": [10**9] * 2, "counts": "0"}, "grounding[0].mask", "its image is 30 high"),
        ((*ENTRY, "mask"), rle() | {"counts": "12"}, "grounding[0].mask", "do not make up 30 x 40 pixels"),
        ((*ENTRY, "mask"), {"counts": "12"}, "grounding[0].mask", "not a COCO RLE mask"),
        ((*ENTRY, "mask"), [1, 2], "grounding[0].mask", "not a COCO RLE mask"),
        ((*ENTRY, "score"), 1.1, "grounding[0].score", "from 0 to 1"),
        ((*ENTRY, "score"), -0.1, "grounding[0].score", "from 0 to 1"),
        ((*ENTRY, "score"), float("nan"), "grounding[0].score", "from 0 to 1"),
    ],
)
def test_each_defect_is_named(place, value, where, message):
    problems = check_row(changed(good_row(), place, value))
    named = [problem for problem in problems if problem.where == where and message in problem.message]
    assert [problem.severity for problem in named] == ["error"], problems
    # A wrong image also affects the phrase's place and mask. Any other mistake in a phrase is the only problem.
    if place[0] == "grounding" and place[-1] != "image":
        assert len(problems) == 1, problems


@pytest.mark.parametrize(
    ("place", "value", "where", "message"),
    [
        (("prompt",), None, "prompt", "is missing"),
        (("chosen",), "The cat.", "chosen", "not a list"),
        (("rejected",), [], "rejected", "is empty"),
        (("rejected", 0, "role"), "bot", "rejected[0].role", "is 'bot'"),
        (("chosen", 0, "content"), [image_part()], "chosen[0].content[0]", "or an answer"),
        (("rejected", 0, "content"), [image_part()], "rejected[0].content[0]", "or an answer"),
        (("prompt", 1, "content"), "Where?", "prompt", "show 1 images, but the row has 2"),
        (("grounding", 2, "message"), 5, "grounding[2].message", "is 5, but there are 5 messages"),
        (("grounding", 2, "end"), 14, "grounding[2]", "the text of message 4 has 13 characters"),
    ],
)
def test_each_defect_of_preference_data_is_named(place, value, where, message):
    problems = check_row(changed(preference_row(), place, value))
    assert any(problem.where == where and message in problem.message for problem in problems), problems
    assert all(problem.severity == "error" for problem in problems)


def test_all_problems_of_a_row_are_found():
    row = changed(good_row(), ("images", 1), None)
    row = changed(row, ("grounding", 0, "score"), 2)
    row = changed(row, ("grounding", 1, "box"), [3, 0, 2, 5])
    assert [problem.where for problem in check_row(row)] == ["images[1]", "grounding[0].score", "grounding[1].box"]


def test_an_empty_mask_is_a_note_with_a_score_and_an_absent_object_without():
    row = changed(good_row(), ("grounding", 0, "mask"), rle(full=False))
    unsure, absent = (changed(row, ("grounding", 0, "score"), score) for score in (0.2, None))
    (problem,) = check_row(unsure)
    assert (problem.where, problem.severity) == ("grounding[0].mask", "note")
    assert list(check_row(absent)) == []
    report = check_dataset([unsure, absent, absent], progress=False)
    assert (report.phrases_dropped, report.phrases_absent) == (1, 2)


def test_a_phrase_without_box_and_mask_is_a_note():
    (problem,) = check_row(changed(good_row(), ("grounding", 0, "mask"), None))
    assert (problem.where, problem.severity) == ("grounding[0]", "note")
    report = check_dataset([changed(good_row(), ("grounding", 0, "mask"), None)], progress=False)
    assert (report.bad_rows, report.phrases_dropped) == (0, 0)


def test_known_sizes_replace_images():
    row = good_row() | {"images": "ignored"}
    assert check_row(row, image_sizes=[(WIDTH, HEIGHT), (20, 10)]) == []
    assert check_row(row, image_sizes=[(WIDTH, HEIGHT), None]) == []
    places = [problem.where for problem in check_row(row, image_sizes=[(HEIGHT, WIDTH), (20, 9)])]
    assert places == ["grounding[0].mask", "grounding[1].box"]


@pytest.mark.parametrize("kind", ["bytes", "path", "string", "pathlib", "pil"])
def test_all_forms_of_images(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encoded())
    image = {
        "bytes": {"bytes": encoded()},
        "path": {"path": str(tmp_path / "a.png")},
        "string": str(tmp_path / "a.png"),
        "pathlib": tmp_path / "a.png",
        "pil": Image.open(tmp_path / "a.png"),
    }[kind]
    assert check_row(changed(good_row(), ("images", 0), image)) == []
    wrong = changed(good_row(), ("images", 1), image)
    assert check_row(changed(wrong, ("grounding", 1, "box"), [0, 0, 41, 5]))[0].where == "grounding[1].box"


def test_an_opened_image_is_decoded():
    half = Image.open(io.BytesIO(encoded()[:900]))
    assert [problem.where for problem in check_row(changed(good_row(), ("images", 0), half))] == ["images[0]"]


def test_sizes_are_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = {"bytes": encoded(HEIGHT, WIDTH, "JPEG", exif=exif), "path": None}
    assert check_row(changed(good_row(), ("images", 0), turned)) == []


def test_images_without_parts_go_before_the_first_user_message():
    def strings(row):
        return row | {"messages": [{**m, "content": message_text(m)} for m in row["messages"]]}

    assert check_row(strings(good_row())) == []
    listed = [{**m, "content": [text_part(message_text(m))]} for m in good_row()["messages"]]
    assert check_row(good_row() | {"messages": listed}) == []
    # Text before the images cannot attend to them.
    (problem,) = check_row(changed(strings(good_row()), ("grounding", 0), good_row()["grounding"][0] | {"message": 0, "start": 0, "end": 2}))  # fmt: skip
    assert "before the image is shown" in problem.message


# --- check_dataset ---


def test_report_counts():
    rows = [
        good_row(),
        changed(good_row(), ("grounding", 0, "mask"), rle(full=False)),
        changed(good_row(), ("images", 0, "bytes"), encoded()[:900]),
        good_row() | {"grounding": []},
        changed(changed(good_row(), ("grounding", 0, "score"), 3), ("grounding", 1, "score"), 3),
    ]
    for given in (rows, to_dataset(rows)):
        report = check_dataset(given, progress=False)
        counts = {key: value for key, value in dataclasses.asdict(report).items() if key != "problems"}
        assert counts == {
            "rows": 5,
            "rows_with_grounding": 4,
            "phrases": 8,
            "phrases_with_mask": 4,
            "phrases_with_box": 4,
            "phrases_absent": 0,
            "phrases_dropped": 1,
            "bad_rows": 2,
        }
        assert [(p.row, p.where) for p in report.problems] == [
            (1, "grounding[0].mask"),
            (2, "images[0]"),
            (4, "grounding[0].score"),
            (4, "grounding[1].score"),
        ]
        assert str(report.problems[2]).startswith("row 4, grounding[0].score: is 3")


def test_rows_keep_their_images_through_selection():
    rows = [good_row() | {"images": [{"bytes": encoded(), "path": None}] * 2}, good_row()]
    report = check_dataset(to_dataset(rows).select([1, 1, 0]), progress=False)
    assert [problem.row for problem in report.problems] == []  # a box of 20 x 10 fits both
    rows[0]["grounding"][1]["box"] = [0, 0, 40, 30]
    assert check_dataset(to_dataset(rows).select([1, 0, 1]), progress=False).bad_rows == 0
    rows[1]["grounding"][1]["box"] = [0, 0, 40, 30]
    report = check_dataset(to_dataset(rows).select([1, 0, 1]), progress=False)
    assert [problem.row for problem in report.problems] == [0, 2]


def test_preference_data_sets_are_checked():
    messages = row_features()["messages"]
    features = row_features()
    del features["messages"]
    features |= {"prompt": messages, "chosen": messages, "rejected": messages}
    rows = [preference_row(), changed(preference_row(), ("rejected",), [])]
    report = check_dataset(datasets.Dataset.from_list(rows, features=features), progress=False)
    assert [(problem.row, problem.where) for problem in report.problems] == [(1, "rejected")]


def test_data_sets_without_images_and_without_messages():
    assert check_dataset(to_dataset([good_row()]).select_columns(["messages"]), progress=False).bad_rows == 1
    chat = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "Hi."}]}])
    assert check_dataset(chat, progress=False).bad_rows == 0
    with pytest.raises(ValueError, match=r"neither messages nor prompt.* only the columns text; rename"):
        check_dataset(datasets.Dataset.from_dict({"text": ["Hi."]}), progress=False)


def test_built_scenes_are_valid(tmp_path):
    for name, color in (("dog", "red"), ("cat", "blue"), ("hen", "green")):
        disc = Image.new("RGBA", (48, 48))
        disc.paste(color, (4, 4, 44, 44))
        (tmp_path / "cutouts").mkdir(exist_ok=True)
        disc.save(tmp_path / "cutouts" / f"{name}.png")
    (tmp_path / "grounds").mkdir()
    for i in range(3):
        Image.new("RGB", (90, 80), (50 * i,) * 3).save(tmp_path / "grounds" / f"{i}.jpg")
    built = build_scenes(
        tmp_path / "cutouts", tmp_path / "grounds", tmp_path / "scenes", num_train=6, num_validation=2, num_test=2,
        image_size=64, max_objects=2, progress=False,
    )  # fmt: skip
    report = check_dataset(built["train"], progress=False)
    assert report.problems == []
    assert report.rows == len(built["train"])
    assert report.phrases == report.phrases_with_mask > 0


# --- the command line ---


def numbers(printed):
    """The counts of the first table."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {row[0]: int(row[1]) for row in cells if len(row) == 2 and row[1].isdigit()}


def test_check_command_on_good_rows(monkeypatch, capsys, tmp_path, images):
    note = changed(json_row(), ("grounding", 0, "mask"), rle(full=False))
    path = write(tmp_path / "rows.jsonl", [json_row(), note])
    code, printed = run(monkeypatch, capsys, "data", "check", path, "--report", tmp_path / "report.json")
    assert code == 0
    assert "No bad rows" in printed
    assert numbers(printed) == {
        "rows": 2,
        "rows with grounding": 2,
        "phrases": 4,
        "phrases with a mask": 2,
        "phrases with a box": 2,
        "phrases of absent objects": 0,
        "phrases dropped at training: their teacher was not sure": 1,
        "rows with notes, which --report lists": 1,
        "bad rows": 0,
    }
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["phrases_dropped"] == 1
    assert [(problem["row"], problem["severity"]) for problem in report["problems"]] == [(1, "note")]


@pytest.mark.parametrize("stored", [True, False])
def test_check_command_on_bad_rows(monkeypatch, capsys, tmp_path, images, stored):
    bad = changed(json_row(), ("grounding", 0, "box"), [5.0, 0.0, 4.0, 5.0])
    bad = changed(bad, ("grounding", 1, "score"), 3)
    rows = [json_row(), *[bad] * 23, json_row("images/broken.jpg")]
    path = write(tmp_path / "rows.json", rows)
    if stored:
        (images / "broken.jpg").rename(images / "kept.jpg")
        (images / "broken.jpg").write_bytes(encoded())
        read = read_rows(path)
        (images / "broken.jpg").write_bytes(b"no image")
        datasets.DatasetDict({"train": read, "test": read.select([0])}).save_to_disk(tmp_path / "stored")
        path = tmp_path / "stored"
    options = ["--report", tmp_path / "report.json", "--split", "train"]
    code, printed = run(monkeypatch, capsys, "data", "check", path, *options)
    assert code == 1, printed
    assert numbers(printed)["bad rows"] == 24
    assert "grounding[0].box is empty or reversed, [5.0, 0.0, 4.0, 5.0]; write [left, top" in printed
    assert printed.count("(and 1 more)") == 20  # the first twenty bad rows
    assert "and 4 more bad rows; see" in printed
    assert "Traceback" not in printed
    problems = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert len(problems) == 2 * 23 + 1
    assert (problems[-1]["row"], problems[-1]["where"]) == (24, "images[0]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{tmp}/nowhere"], "no such file or folder"),
        (["check", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["check", "{tmp}/rows.json", "--split", "test"], "no split 'test'; it has: train"),
        (["check", "{tmp}/rows.json", "--report", "{tmp}/no/report.json"], "there is no folder"),
        (["check", "{tmp}/broken.json"], "is not JSON"),
        (["check", "{tmp}/images"], "cannot be read|neither messages"),
    ],
)  # fmt: skip
def test_mistakes_of_the_check_command(arguments, message, monkeypatch, capsys, tmp_path, images):
    write(tmp_path / "rows.json", [json_row()])
    (tmp_path / "broken.json").write_text("[{]")
    (images / "broken.jpg").unlink()
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    check_refused(monkeypatch, capsys, tmp_path, message, "data", *arguments)


def test_half_of_a_surrogate_pair_is_no_text():
    """JSON can hold it, and then no data set can."""
    row = good_row()
    for content in ("Where\ud83d?", [text_part("Where\ud83d?")], "Where 😀?"):
        row["messages"][0]["content"] = content
        found = [problem.where for problem in check_row(row) if "surrogate pair" in problem.message]
        assert found == (
            [] if content == "Where 😀?" else [f"messages[0].content{'[0]' if isinstance(content, list) else ''}"]
        )
