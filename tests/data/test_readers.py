# SPDX-License-Identifier: Apache-2.0
"""Grounding data: the check of rows, the readers, and their commands."""

import copy
import dataclasses
import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from agevlm import cli
from agevlm.data.check import check_dataset, check_row
from agevlm.data.readers import DESCRIBE, convert, read_grit, read_json_rows, read_llava, read_rows
from agevlm.data.scene_builder import build_scenes
from agevlm.processing.rows import ROLES, mask_to_rle, message_text, place_images, row_features

WIDTH, HEIGHT = 40, 30


def encoded(width=WIDTH, height=HEIGHT, kind="PNG", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def rle(height=HEIGHT, width=WIDTH, full=True):
    mask = np.zeros((height, width), dtype=bool)
    mask[1 : height // 2, 2 : width // 2] = full
    return mask_to_rle(mask)


def image_part():
    return {"type": "image", "text": None}


def text_part(text):
    return {"type": "text", "text": text}


def good_row():
    """Two images, the second in a later turn, and a phrase for each."""
    return {
        "images": [{"bytes": encoded(), "path": None}, {"bytes": encoded(20, 10), "path": None}],
        "messages": [
            {"role": "system", "content": [text_part("Be brief.")]},
            {"role": "user", "content": [image_part(), text_part("Where is "), text_part("the dog?")]},
            {"role": "assistant", "content": [text_part("Left.")]},
            {"role": "user", "content": [text_part("And a cat here? "), image_part(), text_part("The cat.")]},
        ],
        "grounding": [
            {"message": 1, "start": 9, "end": 16, "image": 0, "box": None, "mask": rle(), "score": 0.5},
            {"message": 3, "start": 16, "end": 23, "image": 1, "box": [0, 0, 20, 10], "mask": None, "score": None},
        ],
    }


def preference_row():
    row = good_row()
    messages = row.pop("messages")
    answers = {
        "chosen": [{"role": "assistant", "content": [text_part("The grey cat.")]}],
        "rejected": [{"role": "assistant", "content": [text_part("None.")]}],
    }
    entry = {"message": 4, "start": 4, "end": 12, "image": 1, "box": [0, 0, 5, 5], "mask": None, "score": None}
    return row | {"prompt": messages} | answers | {"grounding": [*row["grounding"], entry]}


def changed(row, place, value):
    """A copy of a row with the value at a place, a tuple of keys, replaced."""
    row = copy.deepcopy(row)
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return row


# --- check_row ---


def test_rows_in_order_have_no_problems():
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
        (("messages",), "Hi.", "messages", "no list"),
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
        (("images", 0), {"bytes": encoded()[:900], "path": "a.png"}, "images[0]", "no readable image (a.png)"),
        (("images", 0), {"bytes": encoded(kind="JPEG")[:900], "path": None}, "images[0]", "no readable image"),
        (("images", 0), {"bytes": b"", "path": None}, "images[0]", "no readable image"),
        (("images", 0), "missing.png", "images[0]", "no readable image (missing.png)"),
        (("images", 0), None, "images[0]", "no readable image"),
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
    # Another image has consequences for a phrase's place and mask; what is wrong with a phrase else stands alone.
    if place[0] == "grounding" and place[-1] != "image":
        assert len(problems) == 1, problems


@pytest.mark.parametrize(
    ("place", "value", "where", "message"),
    [
        (("prompt",), None, "prompt", "is missing"),
        (("chosen",), "The cat.", "chosen", "no list"),
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


def test_an_empty_mask_with_a_score_is_a_note_and_one_without_names_what_is_not_there():
    row = changed(good_row(), ("grounding", 0, "mask"), rle(full=False))
    doubted, absent = (changed(row, ("grounding", 0, "score"), score) for score in (0.2, None))
    (problem,) = check_row(doubted)
    assert (problem.where, problem.severity) == ("grounding[0].mask", "note")
    assert list(check_row(absent)) == []
    report = check_dataset([doubted, absent, absent], progress=False)
    assert (report.phrases_dropped, report.phrases_absent) == (1, 2)


def test_a_phrase_that_waits_for_a_teacher_is_a_note():
    (problem,) = check_row(changed(good_row(), ("grounding", 0, "mask"), None))
    assert (problem.where, problem.severity) == ("grounding[0]", "note")
    report = check_dataset([changed(good_row(), ("grounding", 0, "mask"), None)], progress=False)
    assert (report.bad_rows, report.phrases_dropped) == (0, 0)


def test_known_sizes_stand_in_for_images():
    row = good_row() | {"images": "not looked at"}
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


# --- images in the text ---


def test_images_without_parts_go_before_the_first_user_message():
    def strings(row):
        return row | {"messages": [{**m, "content": message_text(m)} for m in row["messages"]]}

    assert check_row(strings(good_row())) == []
    listed = [{**m, "content": [text_part(message_text(m))]} for m in good_row()["messages"]]
    assert check_row(good_row() | {"messages": listed}) == []
    # What is said before that cannot look at them.
    (problem,) = check_row(changed(strings(good_row()), ("grounding", 0), good_row()["grounding"][0] | {"message": 0, "start": 0, "end": 2}))  # fmt: skip
    assert "before the image is shown" in problem.message
    with pytest.raises(ValueError, match="show 0 images, but the row has 1"):
        place_images([{"role": "assistant", "content": "Hello."}], 1)


def test_placing_agrees_with_trl():
    from trl.data_utils import prepare_multimodal_messages

    messages = [
        {"role": r, "content": t} for r, t in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    ]
    structured = place_images(messages, 2)
    pictures = [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]
    ours = prepare_multimodal_messages(structured, images=pictures)
    theirs = prepare_multimodal_messages(messages, images=pictures)
    assert [m["role"] for m in ours] == [m["role"] for m in theirs]
    for our, their in zip(ours, theirs, strict=True):
        # TRL's text parts have no key for an image, ours may say `text: None`
        assert [(p["type"], p.get("image"), p.get("text")) for p in our["content"]] == [
            (p["type"], p.get("image"), p.get("text")) for p in their["content"]
        ]
    assert messages[1]["content"] == "u"
    assert [message_text(m) for m in structured] == [m["content"] for m in messages]


# --- check_dataset ---


def to_dataset(rows):
    return datasets.Dataset.from_list(rows, features=row_features())


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


def test_built_scenes_are_in_order(tmp_path):
    for name, colour in (("dog", "red"), ("cat", "blue"), ("hen", "green")):
        disc = Image.new("RGBA", (48, 48))
        disc.paste(colour, (4, 4, 44, 44))
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


# --- readers ---


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded())
    (folder / "sub" / "b.png").write_bytes(encoded(20, 10))
    (folder / "001.jpg").write_bytes(encoded(kind="JPEG"))
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def write(path, entries):
    lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(lines + "\n" if path.suffix == ".jsonl" else json.dumps(entries), encoding="utf-8")
    return path


def turns(*values):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]


LLAVA = [
    {"id": "x1", "image": "a.png", "conversations": turns("<image>\nWhat is this?", "Noise.\u2028Really.")},
    {"id": 2, "image": ["a.png", "sub/b.png"], "conversations": turns("Is <image> like\n<image>\n\nthis?", "No.", "Hm", "")},
    {"conversations": [{"from": "system", "value": "Be brief."}, *turns("What is\n\n2 + 2?", "4")]},
    {"image": "sub/b.png", "conversations": turns("What is this?\n<image>", "Noise.")},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava(tmp_path, images, suffix):
    read = read_llava(write(tmp_path / f"llava.{suffix}", LLAVA), images, progress=False)
    assert read.features == datasets.Features({**row_features(), "id": datasets.Value("string")})
    assert read["id"][:] == ["x1", "2", None, None]
    assert [[image.size for image in row] for row in read["images"]] == [
        [(40, 30)],
        [(40, 30), (20, 10)],
        [],
        [(20, 10)],
    ]
    assert read[0]["messages"] == [
        {"role": "user", "content": [image_part(), text_part("What is this?")]},
        {"role": "assistant", "content": [text_part("Noise.\u2028Really.")]},
    ]
    expected = [text_part("Is "), image_part(), text_part(" like"), image_part(), text_part("this?")]
    assert read[1]["messages"][0]["content"] == expected
    assert read[2]["messages"][:2] == [
        {"role": "system", "content": [text_part("Be brief.")]},
        {"role": "user", "content": [text_part("What is\n\n2 + 2?")]},
    ]
    assert read[3]["messages"][0]["content"] == [text_part("What is this?"), image_part()]
    stored = read.with_format("arrow")[0]["images"][0].as_py()
    assert stored == [{"bytes": None, "path": str(images / "a.png")}]
    assert check_dataset(read, progress=False).problems == []


def changed_llava(**changes):
    return [LLAVA[0], {key: value for key, value in (LLAVA[0] | changes).items() if value is not None}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (changed_llava(image="c.png"), r"entry 1: there is no image .*c\.png; add it"),
        (changed_llava(image=3), "entry 1: the image is named 3"),
        (changed_llava(image=None), "entry 1: 1 <image> in its conversations, but 0 in `image`"),
        (changed_llava(image=["a.png", "a.png"]), "entry 1: 1 <image> in its conversations, but 2"),
        (changed_llava(conversations=None), "entry 1: it has no conversations"),
        (changed_llava(conversations=[]), "entry 1: it has no conversations"),
        (changed_llava(conversations=["Hi."]), r"entry 1: conversations\[0\] is not"),
        (changed_llava(conversations=[{"from": "bot", "value": "Hi."}]), r"conversations\[0\] .* human, gpt, system"),
        (changed_llava(conversations=[{"from": [], "value": "Hi."}]), r"conversations\[0\] is not"),
        (changed_llava(conversations=[{"from": "gpt", "value": None}]), r"conversations\[0\] is not"),
        ([LLAVA[0], "Hi."], "entry 1: is not an object"),
        ([], "has no entries"),
        ({"id": 1}, "is not a list of entries"),
    ],
)
def test_llava_mistakes(tmp_path, images, entries, message):
    with pytest.raises(ValueError, match=rf"llava\.json.* {message}|llava\.json {message}"):
        read_llava(write(tmp_path / "llava.json", entries), images, progress=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[{]", "a.json is not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "must be named .jsonl"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl, line 3, is not JSON"),
        ("a.json", b'["\xff"]', "a.json is not UTF-8"),
        ("a.txt", b"[]", "a.txt is neither .json nor .jsonl"),
    ],
)
def test_files_that_are_not_json(tmp_path, images, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (read_llava, read_grit):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, images)


def test_a_byte_order_mark_is_passed_over(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_llava(path, images, progress=False)) == 4


def test_missing_file_and_folder(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_llava(tmp_path / "nowhere.json", images)
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        read_llava(write(tmp_path / "llava.json", LLAVA), tmp_path / "nowhere")


CAPTION = "a dog and two cats"
GRIT = [
    {"key": "001", "caption": CAPTION, "width": 4000, "height": 3000, "clip_similarity": 0.3,
     "ref_exps": [[0.0, 5.0, 0.25, 0.5, 0.75, 1.0, 0.97], [10, 18, 0, 0, 0.5, 0.5, 0.9], [10, 18, 0.5, 0.5, 1.0004, 1, 0.8]]},
    {"key": 7, "image": "sub/b.png", "caption": "  noise ", "ref_exps": [[1, 8, 0.1, 0.2, 0.3, 0.4]]},
    {"key": 8, "file_name": "a.png", "caption": "noise", "ref_exps": []},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_grit(tmp_path, images, suffix):
    read = read_grit(write(tmp_path / f"grit.{suffix}", GRIT), images, progress=False)
    assert read["id"][:] == ["001", "7", "8"]
    first = read[0]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert first["messages"][0]["content"] == [image_part(), text_part(DESCRIBE)]
    assert message_text(first["messages"][1]) == CAPTION
    phrases = [(CAPTION[entry["start"] : entry["end"]], entry["box"]) for entry in first["grounding"]]
    # pixels of the file, 40 x 30, not of the width and height of the original
    assert phrases == [("a dog", [10, 15, 30, 30]), ("two cats", [0, 0, 20, 15]), ("two cats", [20, 15, 40, 30])]
    assert {(e["message"], e["image"], e["mask"], e["score"]) for e in first["grounding"]} == {(1, 0, None, None)}
    (second,) = read[1]["grounding"]
    assert message_text(read[1]["messages"][1])[second["start"] : second["end"]] == "noise"
    np.testing.assert_allclose(second["box"], [2, 2, 6, 4], rtol=1e-6)
    assert read[2]["grounding"] == []
    assert check_dataset(read, progress=False).problems == []


def test_grit_boxes_are_of_the_upright_image(tmp_path, images):
    exif = Image.Exif()
    exif[0x0112] = 8
    (images / "001.jpg").write_bytes(encoded(HEIGHT, WIDTH, "JPEG", exif=exif))
    read = read_grit(write(tmp_path / "grit.json", GRIT[:1]), images, progress=False)
    assert read[0]["images"][0].size == (WIDTH, HEIGHT)
    assert read[0]["grounding"][0]["box"] == [10, 15, 30, 30]


def changed_grit(**changes):
    return [GRIT[0], GRIT[0] | changes]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (changed_grit(key="002"), r"there is no image .*002\.jpg"),
        (changed_grit(image="broken.jpg"), r"broken\.jpg is no readable image"),
        (changed_grit(caption=" "), "it has no caption"),
        (changed_grit(caption=None), "it has no caption"),
        (changed_grit(ref_exps=None), "it has no ref_exps"),
        (changed_grit(ref_exps=[[0, 5, 0, 0, 1]]), r"ref_exps\[0\] is \[0, 5, 0, 0, 1\]; write"),
        (changed_grit(ref_exps=[[0, 5, 0, 0, 1, None]]), r"ref_exps\[0\] is"),
        (changed_grit(ref_exps=[5]), r"ref_exps\[0\] is 5"),
        (changed_grit(ref_exps=[[0, 19, 0, 0, 1, 1]]), "has the span 0 to 19, but the caption has 18 characters"),
        (changed_grit(ref_exps=[[5, 5, 0, 0, 1, 1]]), "has the span 5 to 5"),
        (changed_grit(ref_exps=[[0.5, 5, 0, 0, 1, 1]]), "has the span 0.5 to 5"),
        (changed_grit(ref_exps=[[-1, 5, 0, 0, 1, 1]]), "has the span -1 to 5"),
        (changed_grit(ref_exps=[[1, 2, 0, 0, 1, 1]]), "the caption is blank"),
        (changed_grit(ref_exps=[[0, 5, 0, 0, 10, 20]]), r"has the box \[0, 0, 10, 20\]; .* from 0 to 1"),
        (changed_grit(ref_exps=[[0, 5, -0.1, 0, 1, 1]]), "has the box"),
        (changed_grit(ref_exps=[[0, 5, 0.5, 0, 0.5, 1]]), "has the box"),
        (changed_grit(ref_exps=[[0, 5, 0, 0.5, 1, 0.4]]), "has the box"),
        (changed_grit(ref_exps=[[0, 5, 1, 0, 1.0005, 1]]), "has the box"),  # nothing is left inside the image
    ],
)
def test_grit_mistakes(tmp_path, images, entries, message):
    with pytest.raises(ValueError, match=rf"grit\.json, entry 1: .*{message}"):
        read_grit(write(tmp_path / "grit.json", entries), images, progress=False)


def test_a_changed_file_is_read_anew(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    assert len(read_llava(path, images, progress=False)) == 4
    write(path, LLAVA[:2])
    assert len(read_llava(path, images, progress=False)) == 2


def test_convert_holds_the_images(tmp_path, images, capfd):
    path = write(tmp_path / "grit.json", GRIT)
    convert(path, images, tmp_path / "out", format="grit", progress=False)
    assert capfd.readouterr() == ("", "")
    for file in images.rglob("*.*"):
        file.unlink()
    read = read_rows(tmp_path / "out")
    assert [row[0].size for row in read["images"]] == [(40, 30), (20, 10), (40, 30)]
    assert read.with_format("arrow")[1]["images"][0].as_py()[0]["bytes"] == encoded(20, 10)
    with pytest.raises(FileExistsError):
        convert(path, images, tmp_path / "out", format="grit", progress=False)
    with pytest.raises(ValueError, match="no format 'coco'; choose one of: llava, grit"):
        convert(path, images, tmp_path / "new", format="coco")
    with pytest.raises(ValueError, match="there is no image"):
        convert(path, images, tmp_path / "new", format="grit", progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {"grit.json", "images", "out"}


# --- read_rows ---


def json_row(image="images/a.png", **changes):
    row = good_row()
    return row | {"images": [image, {"path": "images/sub/b.png"}]} | changes


def test_rows_from_folders(tmp_path):
    rows = to_dataset([good_row(), good_row()])
    rows.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "single")
    assert read_rows(tmp_path / "one")["messages"][:] == rows["messages"][:]
    assert len(read_rows(tmp_path / "one", "train")) == 2
    assert len(read_rows(str(tmp_path / "two"), "test")) == 1
    assert len(read_rows(tmp_path / "single")) == 2
    with pytest.raises(ValueError, match="two has several splits; name one of them: train, test"):
        read_rows(tmp_path / "two")
    with pytest.raises(ValueError, match="two has no split 'validation'; it has: train, test"):
        read_rows(tmp_path / "two", "validation")
    with pytest.raises(ValueError, match="one has no split 'test'; it has: train"):
        read_rows(tmp_path / "one", "test")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_from_json(tmp_path, images, suffix, monkeypatch):
    monkeypatch.chdir("/")  # paths are relative to the file
    chat = [{"role": "user", "content": "A cat and a dog?"}, {"role": "assistant", "content": [text_part("Yes.")]}]
    entry = {"message": 0, "start": 2, "end": 5, "image": 1, "box": [0, 0, 5, 5]}
    path = write(
        tmp_path / f"rows.{suffix}",
        [json_row(kind="first"), json_row(str(images / "a.png"), messages=chat, grounding=[entry])],
    )
    assert check_dataset(read_json_rows(path), progress=False).problems == []
    read = read_rows(path)
    assert read.features == datasets.Features({**row_features(), "kind": datasets.Value("string")})
    assert [image.size for image in read[0]["images"]] == [(40, 30), (20, 10)]
    assert read[0]["messages"] == good_row()["messages"]
    assert read[0]["grounding"] == good_row()["grounding"]
    assert read[1]["messages"][0]["content"] == [image_part(), image_part(), text_part("A cat and a dog?")]
    assert read[1]["grounding"] == [entry | {"mask": None, "score": None}]
    assert read["kind"][:] == ["first", None]
    assert check_dataset(read, progress=False).problems == []


def test_preference_rows_from_json(tmp_path, images):
    row = preference_row() | {"images": ["images/a.png", "images/sub/b.png"]}
    read = read_rows(write(tmp_path / "rows.json", [row]))
    assert {"prompt", "chosen", "rejected"} < set(read.column_names)
    assert read[0]["chosen"] == row["chosen"]
    assert check_dataset(read, progress=False).problems == []


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "Hi."},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"text": "Hi."}]}]},
        {"messages": []},
        {"grounding": 3},
        {"grounding": [{"message": "first"}]},
        {"grounding": [{"message": 10**30}]},
        {"images": "a.png"},
        {"images": [3]},
    ],
)
def test_json_rows_that_fit_no_data_set(tmp_path, change):
    path = write(tmp_path / "rows.json", [json_row(), json_row(**change)])
    with pytest.raises(ValueError, match=r"rows that do not fit the row format: .*`agevlm data check .*rows\.json`"):
        read_rows(path)
    assert check_dataset(read_json_rows(path), progress=False).problems[-1].row == 1


def test_rows_from_parquet(tmp_path, images):
    to_dataset([good_row()]).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet")[0]["messages"] == good_row()["messages"]
    # written by others: paths, and no word that they are images
    bare = datasets.Dataset.from_list([{"images": [str(images / "a.png")], "messages": good_row()["messages"]}])
    bare.to_parquet(tmp_path / "bare.parquet")
    assert read_rows(tmp_path / "bare.parquet")[0]["images"][0].size == (40, 30)
    datasets.Dataset.from_list([{"images": 3}]).to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match="its column images does not hold lists of images"):
        read_rows(tmp_path / "wrong.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"damaged\.parquet cannot be read as a data set"):
        read_rows(tmp_path / "damaged.parquet")


def test_rows_from_a_folder_of_files(tmp_path):
    (tmp_path / "mine").mkdir()
    to_dataset([good_row()]).to_parquet(tmp_path / "mine" / "train.parquet")
    to_dataset([good_row()] * 2).to_parquet(tmp_path / "mine" / "test.parquet")
    assert len(read_rows(tmp_path / "mine", "test")) == 2


def test_rows_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name == "them/none":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} does not exist")
        return datasets.DatasetDict({"train": to_dataset([good_row()]), "test": to_dataset([good_row()]).select([])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows("me/mine", "train")) == 1
    with pytest.raises(ValueError, match="me/mine has no split 'val'; it has: train, test"):
        read_rows("me/mine", "val")
    with pytest.raises(FileNotFoundError, match="them/none"):
        read_rows("them/none")
    assert asked == ["me/mine", "me/mine", "them/none"]
    for name in ("rows.jsonl", "./mine", "/tmp/no/such/folder", "a/b/c", "them/rows.parquet"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_rows(name)
    assert len(asked) == 3


def test_other_files_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv is none of \.json, \.jsonl or \.parquet"):
        read_rows(tmp_path / "rows.csv")


def test_import_is_light():
    code = (
        "import sys, agevlm.data.readers, agevlm.cli;"
        "print(sorted({'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for call in (lambda: read_rows(tmp_path), lambda: read_llava(tmp_path, tmp_path), lambda: check_row(good_row())):
        with pytest.raises(ImportError, match="pip install datasets"):
            call()


# --- the command line ---


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["agevlm", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(cli.main())
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out + captured.err


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
        "phrases of something that is not there": 0,
        "phrases dropped at training, their teacher was not sure": 1,
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


@pytest.mark.parametrize("format", ["llava", "grit"])
def test_convert_command(monkeypatch, capsys, tmp_path, images, format):
    path = write(tmp_path / "in.json", LLAVA if format == "llava" else GRIT)
    out = tmp_path / "out"
    code, printed = run(
        monkeypatch, capsys, "data", "convert", "--format", format, path, "--images", images, "--out", out
    )
    assert code == 0, printed
    counts = "4 rows, 4 images, 0 grounded" if format == "llava" else "3 rows, 3 images, 4 grounded"
    assert counts in printed
    code, printed = run(monkeypatch, capsys, "data", "check", out)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{tmp}/nowhere"], "no such file or folder"),
        (["check", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["check", "{tmp}/rows.json", "--split", "test"], "no split 'test'; it has: train"),
        (["check", "{tmp}/rows.json", "--report", "{tmp}/no/report.json"], "there is no folder"),
        (["check", "{tmp}/broken.json"], "is not JSON"),
        (["check", "{tmp}/images"], "cannot be read|neither messages"),
        (["convert", "--format", "coco", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "coco"),
        (["convert", "--format", "grit", "{tmp}/no.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "no.json"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/no", "--out", "{tmp}/out"], "no such"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "entry 0"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/images"], "already exists"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(arguments, message, monkeypatch, capsys, tmp_path, images):
    write(tmp_path / "rows.json", [json_row()])
    (tmp_path / "broken.json").write_text("[{]")
    (images / "broken.jpg").unlink()
    before = sorted(tmp_path.rglob("*"))
    code, printed = run(monkeypatch, capsys, "data", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2, printed
    assert any(part in printed for part in message.split("|")), printed
    assert "Traceback" not in printed
    assert sorted(tmp_path.rglob("*")) == before
