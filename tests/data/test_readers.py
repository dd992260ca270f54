# SPDX-License-Identifier: Apache-2.0
"""Readers of every format, and the command that converts."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets.naming import camelcase_to_snakecase
from fake_hub import fake_hub
from row_cases import (
    LLAVA,
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
from agevlm.data.readers import missing_work, read_dataset, read_json_rows, read_rows
from agevlm.processing.rows import row_features

pytestmark = pytest.mark.usefixtures("own_cache")

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
    assert asked == ["me/mine", "them/none"]  # each once
    for name in ("rows.jsonl", "./mine", "/tmp/no/such/folder", "a/b/c", "them/rows.parquet"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_rows(name)
    assert len(asked) == 2


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
    file = write(tmp_path / "llava.json", LLAVA)
    for call in (lambda: read_rows(tmp_path), lambda: read_dataset(file, "llava", images=tmp_path)):
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
        ({"format": "voc"}, "no format 'voc'; choose one of: rows, llava, cauldron"),
        ({"images": "images"}, "`images` is the folder, or the archive, of the images of a published data set"),
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


@pytest.mark.parametrize("name", [None, "small"])
def test_data_sets_of_the_hub_are_missing_until_they_are_in_the_cache(name, tmp_path, monkeypatch):
    """In the place where `datasets` itself keeps what it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = "some-owner/NameInCamelCase"
    assert missing_work(path, "rows", name=name) == f"Downloading {path}"
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"messages": [[]]}).to_parquet(tmp_path / "hub" / "a.parquet")
    builder = datasets.load_dataset_builder(
        "parquet", name or "default", data_files=str(tmp_path / "hub" / "a.parquet"), cache_dir=str(tmp_path / "cache")
    )
    builder.repo_id, builder.dataset_name = path, camelcase_to_snakecase(path.split("/")[1])
    kept = Path(builder._cache_dir_root, builder._relative_data_dir(with_version=True, with_hash=True))
    kept.mkdir(parents=True)
    assert missing_work(path, "rows", name=name) is None
    assert missing_work(path, "rows", name="another") == f"Downloading {path}"
    assert missing_work(tmp_path / "hub", "rows") is None
