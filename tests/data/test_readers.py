# SPDX-License-Identifier: Apache-2.0
"""Readers of every format, and the command that converts."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from command_line import check_refused, run
from fake_hub import fake_hub
from PIL import Image
from row_cases import (
    CAPTION,
    GRIT,
    HEIGHT,
    LLAVA,
    WIDTH,
    encoded,
    good_row,
    image_part,
    json_row,
    preference_row,
    text_part,
    to_dataset,
    turns,
    write,
)

from agevlm.data.check import check_dataset
from agevlm.data.readers import DESCRIBE, convert, read_dataset, read_grit, read_json_rows, read_llava, read_rows
from agevlm.processing.rows import message_text, row_features

# --- LLaVA and GRIT ---


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
        (changed_llava(image=3), "entry 1: the image is 3"),
        (changed_llava(image=None), "entry 1: conversations has 1 <image>, but `image` has 0"),
        (changed_llava(image=["a.png", "a.png"]), "entry 1: conversations has 1 <image>, but `image` has 2"),
        (changed_llava(conversations=None), "entry 1: conversations is missing"),
        (changed_llava(conversations=[]), "entry 1: conversations is missing"),
        (changed_llava(conversations=["Hi."]), r"entry 1: conversations\[0\] must be"),
        (
            changed_llava(conversations=[{"from": "bot", "value": "Hi."}]),
            r"conversations\[0\] must be .* human, gpt, system",
        ),
        (changed_llava(conversations=[{"from": [], "value": "Hi."}]), r"conversations\[0\] must be"),
        (changed_llava(conversations=[{"from": "gpt", "value": None}]), r"conversations\[0\] must be"),
        ([LLAVA[0], "Hi."], "entry 1 is not an object"),
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


def test_a_byte_order_mark_is_ignored(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_llava(path, images, progress=False)) == 4


def test_missing_file_and_folder(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_llava(tmp_path / "nowhere.json", images)
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        read_llava(write(tmp_path / "llava.json", LLAVA), tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_grit(tmp_path, images, suffix):
    read = read_grit(write(tmp_path / f"grit.{suffix}", GRIT), images, progress=False)
    assert read["id"][:] == ["001", "7", "8"]
    first = read[0]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert first["messages"][0]["content"] == [image_part(), text_part(DESCRIBE)]
    assert message_text(first["messages"][1]) == CAPTION
    phrases = [(CAPTION[entry["start"] : entry["end"]], entry["box"]) for entry in first["grounding"]]
    # pixels of the file, 40 x 30, whatever `width` and `height` are
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
        (changed_grit(image="broken.jpg"), r"broken\.jpg is not a readable image"),
        (changed_grit(caption=" "), "caption is missing"),
        (changed_grit(caption=None), "caption is missing"),
        (changed_grit(ref_exps=None), "ref_exps is missing"),
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
        (changed_grit(ref_exps=[[0, 5, 1, 0, 1.0005, 1]]), "has the box"),  # no part of it is inside the image
    ],
)
def test_grit_mistakes(tmp_path, images, entries, message):
    with pytest.raises(ValueError, match=rf"grit\.json, entry 1: .*{message}"):
        read_grit(write(tmp_path / "grit.json", entries), images, progress=False)


def test_a_changed_file_is_read_again(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    assert len(read_llava(path, images, progress=False)) == 4
    write(path, LLAVA[:2])
    assert len(read_llava(path, images, progress=False)) == 2


def test_converted_data_contain_the_images(tmp_path, images, capfd):
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
    # of another program: paths, without the information that they are images
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
    asked = fake_hub(monkeypatch, "me/mine")

    def load_dataset(name):
        return datasets.DatasetDict({"train": to_dataset([good_row()]), "test": to_dataset([good_row()]).select([])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows("me/mine", "train")) == 1
    with pytest.raises(ValueError, match="me/mine has no split 'val'; it has: train, test"):
        read_rows("me/mine", "val")
    with pytest.raises(
        FileNotFoundError, match="no such file or folder: them/none, and the Hub has no data set of this name"
    ):
        read_rows("them/none")
    assert asked == ["me/mine", "me/mine", "them/none"]
    for name in ("rows.jsonl", "./mine", "/tmp/no/such/folder", "a/b/c", "them/rows.parquet"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_rows(name)
    assert len(asked) == 3


def test_the_hub_cannot_be_reached(monkeypatch):
    fake_hub(monkeypatch, down=True)
    for options in ({}, {"name": "small", "split": "train"}):
        with pytest.raises(FileNotFoundError, match="no such file or folder: nope, and the Hub cannot be asked"):
            read_dataset("nope", **options)


def test_a_copy_in_the_cache_is_read_where_the_hub_cannot_be_reached(monkeypatch):
    """Without the minutes in which `datasets` would try again and again."""
    fake_hub(monkeypatch, down=True)
    seen = []

    def load_dataset(*args, **options):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.DatasetDict({"train": to_dataset([good_row()])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows("me/mine")) == 1
    assert seen == [True]
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("images", ["photo.jpg", {"path": "photo.jpg"}, 3])
def test_images_of_a_row_must_be_a_list(tmp_path, images):
    rows = [{"images": [], "messages": []}, {"images": images, "messages": []}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(
        ValueError, match=r"rows\.json has rows .*: row 1: images is .*, but must be a list, \[\] for none"
    ):
        read_rows(tmp_path / "rows.json")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv is not a \.json, \.jsonl or \.parquet file"):
        read_rows(tmp_path / "rows.csv")


def test_import_is_light():
    code = (
        "import sys, agevlm.data.readers, agevlm.cli.commands;"
        "print(sorted({'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for call in (lambda: read_rows(tmp_path), lambda: read_llava(tmp_path, tmp_path)):
        with pytest.raises(ImportError, match="pip install datasets"):
            call()


# --- read_dataset ---


def test_all_formats_become_rows(tmp_path, images):
    picture = {"path": str(images / "a.png"), "bytes": None}
    features = row_features()
    answers = turns("<image>\nWhat is this?", "Noise.")
    llava = {"image": [picture], "conversations": [answers], "topic": ["a"]}
    cauldron = {"images": [[picture]], "texts": [[{"user": "What is this?", "assistant": "Noise.", "source": "x"}]]}
    llava = datasets.Dataset.from_dict(llava).cast_column("image", datasets.Image())
    cauldron = datasets.Dataset.from_dict(cauldron).cast_column("images", features["images"])
    llava.save_to_disk(tmp_path / "llava")
    cauldron.save_to_disk(tmp_path / "cauldron")
    to_dataset([good_row()]).save_to_disk(tmp_path / "rows")
    file = write(tmp_path / "llava.json", [{"id": 1, "image": "a.png", "conversations": answers}])
    wanted = [
        {"role": "user", "content": [image_part(), text_part("What is this?")]},
        {"role": "assistant", "content": [text_part("Noise.")]},
    ]
    read = [
        read_dataset(tmp_path / "llava", "llava", columns=["topic"]),
        read_dataset(tmp_path / "cauldron", "cauldron"),
        read_dataset(file, "llava", images=images),
    ]
    assert [sorted(part.column_names) for part in read] == [
        ["image", "messages", "row_origin", "topic"],
        ["images", "messages", "row_origin"],
        ["grounding", "images", "messages", "row_origin"],
    ]
    for part in read:
        assert part.features["messages"] == features["messages"]
        assert part[0]["messages"] == wanted
    assert read[0][0]["image"].size == read[1][0]["images"][0].size == (40, 30)
    assert read[0]["topic"][:] == ["a"]
    rows = read_dataset(tmp_path / "rows")[0]
    assert (rows["messages"], rows["grounding"]) == (good_row()["messages"], good_row()["grounding"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "grit"}, "`images` is the folder of the images of a .json or .jsonl file"),
        ({"images": "images"}, "`images` is the folder of the images of a .json or .jsonl file"),
        (
            {"format": "cauldron"},
            "no column 'texts', which the format cauldron requires, but images, messages, grounding",
        ),
        ({"name": "default"}, "`name` requires `split`"),
        ({"columns": ["kind", "messages"]}, "has no column kind"),
    ],
)
def test_arguments_that_do_not_fit_together(tmp_path, arguments, message):
    to_dataset([good_row()]).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / "rows", **arguments)


# --- the command line ---


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
        (["convert", "--format", "coco", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "coco"),
        (["convert", "--format", "grit", "{tmp}/no.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "no.json"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/no", "--out", "{tmp}/out"], "no such"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "entry 0"),
        (["convert", "--format", "grit", "{tmp}/rows.json", "--images", "{tmp}/images", "--out", "{tmp}/images"], "already exists"),
    ],
)  # fmt: skip
def test_mistakes_of_the_convert_command(arguments, message, monkeypatch, capsys, tmp_path, images):
    write(tmp_path / "rows.json", [json_row()])
    (images / "broken.jpg").unlink()
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    check_refused(monkeypatch, capsys, tmp_path, message, "data", *arguments)
