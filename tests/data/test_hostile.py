# SPDX-License-Identifier: Apache-2.0
"""Data of others: nothing outside the folder of images is read, nothing is fetched, nothing is unbounded, each mistake is named."""

import json
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import check_refused, run
from datasets import Dataset, Features, Image, List, Value
from grounded_rows import BoxTeacher
from row_cases import LLAVA, encoded, good_row, json_row, read_source, rle, text_part, to_dataset, write
from tiny_training import tiny_processor
from web_server import serve

from agevlm.data import DataPart, add_masks, compute_features, read_mixture
from agevlm.data.check import check_dataset, check_part, check_row
from agevlm.data.formats import open_source
from agevlm.data.prepared import convert_source
from agevlm.data.readers import read_dataset, read_rows, stored_images
from agevlm.evaluation.benchmark_data import read_table
from agevlm.processing import image_processing_agevlm
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.rows import row_features

pytestmark = pytest.mark.usefixtures("own_cache")


# --- files ---


@pytest.fixture
def secret(tmp_path, images):
    """An image outside the folder of images, and links to it and to inside."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").write_bytes(encoded())
    (images / "link.png").symlink_to(tmp_path / "secret" / "a.png")
    (images / "linked").symlink_to(tmp_path / "secret")
    (images / "inside.png").symlink_to("sub/b.png")
    return tmp_path / "secret" / "a.png"


@pytest.mark.parametrize("name", ["{secret}", "../secret/a.png", "sub/../../secret/a.png", "link.png", "linked/a.png"])
def test_converted_data_stay_in_the_folder_of_images(name, tmp_path, images, secret, monkeypatch, capsys):
    name = name.format(secret=secret)
    file = write(tmp_path / "llava.json", [LLAVA[0] | {"image": name}])
    check_refused(
        monkeypatch, capsys, tmp_path, "leads out of the folder of images", "data", "convert", file, "--format", "llava",
        "--images", images, "--out", tmp_path / "out",
    )  # fmt: skip
    part = DataPart(str(file), format="llava", images=str(images))
    with pytest.raises(ValueError, match=r"llava\.json, entry 0: .* leads out of the folder"):
        read_mixture([part])
    assert check_part(part, progress=False).bad_rows == 1


def test_what_stays_in_the_folder_is_converted(tmp_path, images, secret):
    names = ["inside.png", "sub/../a.png", str(images / "a.png")]
    path = write(tmp_path / "llava.json", [LLAVA[0] | {"image": name} for name in names])
    (tmp_path / "other").symlink_to(images)
    for folder in (images, tmp_path / "other"):
        assert len(read_source("llava", path, folder)) == 3
    convert_source(open_source("llava", path, images), tmp_path / "out", progress=False)
    assert [row["images"][0].size for row in read_rows(tmp_path / "out")] == [(20, 10), (40, 30), (40, 30)]


def test_a_users_own_rows_may_name_any_file(tmp_path, secret):
    row = json_row(images=[str(secret), "secret/../secret/a.png"]) | {"grounding": []}
    assert [image.size for image in read_rows(write(tmp_path / "rows.json", [row]))[0]["images"]] == [(40, 30)] * 2


# --- URLs ---


@pytest.fixture
def served(monkeypatch):
    """A server whose address counts as public."""
    is_public = image_processing_agevlm._is_public
    monkeypatch.setattr(
        image_processing_agevlm, "_is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )
    with serve({"/a.png": encoded()}) as (port, asked):
        yield f"http://127.0.0.1:{port}/a.png", asked


def write_parquet(dataset, path):
    """Without the images in it: `datasets` would fetch and embed them."""
    pq.write_table(dataset.data.table, path)
    return path


def one_image_row(image):
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, text_part("Where is the dog?")]},
        {"role": "assistant", "content": [text_part("Left.")]},
    ]
    entry = {"message": 0, "start": 9, "end": 16, "image": 0, "box": [0, 0, 20, 10], "mask": None, "score": None}
    return {"images": [image], "messages": messages, "grounding": [entry]}


def test_urls_in_data_are_fetched_only_where_it_is_allowed(served, tmp_path, monkeypatch, capsys):
    url, asked = served
    stored = to_dataset([one_image_row({"path": url, "bytes": None})])
    (tmp_path / "folder").mkdir()
    paths = [write_parquet(stored, tmp_path / "rows.parquet"), write(tmp_path / "rows.json", [one_image_row(url)])]
    paths.append(write_parquet(stored, tmp_path / "folder" / "train.parquet").parent)
    collate = AgeVlmDataCollator(tiny_processor())
    for path in paths:
        with pytest.raises(ValueError, match=r"row 0: its image 'http://127.* are not fetched: .*--allow-urls"):
            read_rows(path)
        with pytest.raises(ValueError, match="not fetched"):
            read_mixture([DataPart(str(path))])
        code, printed = run(monkeypatch, capsys, "data", "check", path)
        assert code == 1
        assert "not fetched" in printed
    with pytest.raises(ValueError, match="not fetched"):
        collate([one_image_row(url)])
    assert check_row(one_image_row(url))[0].where == "images[0]"
    with pytest.raises(ValueError, match="not fetched"):
        add_masks(stored, BoxTeacher(), tmp_path / "masks", progress=False)
    assert not asked

    for path in paths:
        assert run(monkeypatch, capsys, "data", "check", path, "--allow-urls")[0] == 0
        mixture = read_mixture([DataPart(str(path))], allow_urls=True)
        count = len(asked)
        with pytest.raises(ValueError, match="not fetched"):  # the rows alone fetch nothing
            collate([mixture[0]])
        assert len(asked) == count
        batch = AgeVlmDataCollator(tiny_processor(), allow_urls=True)([mixture[0]])
        assert batch["pixel_values"].shape[0] == 1


def test_features_fetch_no_urls(served, tmp_path):
    from tiny_training import tiny_trainable

    url, asked = served
    stored = to_dataset([one_image_row({"path": url, "bytes": None})])
    with pytest.raises(ValueError, match=r"Row 0: .*not fetched"):
        compute_features(tiny_trainable(), tiny_processor(), [stored], tmp_path / "features", progress=False)
    assert not asked
    model = tiny_trainable().eval()
    assert (
        len(compute_features(model, tiny_processor(), [stored], tmp_path / "f", allow_urls=True, progress=False)) == 1
    )


def nested_in(column, value):
    """A data set with one row, in whose `column` are images, of the path `value`, at places where no row has any."""
    row = one_image_row({"path": None, "bytes": encoded()})
    row["messages"][0]["content"][1]["text"] = "Where is 0.50000?"  # the score that `BoxTeacher` gives
    features = dict(row_features())
    place = {"path": value, "bytes": None}
    if column == "messages":
        parts = {"type": Value("string"), "text": Value("string"), "x": Image()}
        features["messages"] = List({"role": Value("string"), "content": List(parts)})
        for message in row["messages"]:
            message["content"] = [{**part, "x": place} for part in message["content"]]
    elif column == "grounding":
        features["grounding"] = List({**features["grounding"].feature, "x": Image()})
        row["grounding"] = [{**entry, "x": place} for entry in row["grounding"]]
    else:
        features["more"] = {"x": Image()}
        row["more"] = {"x": place}
    features = Features(features)
    return Dataset(pa.Table.from_pylist([row], schema=features.arrow_schema))


@pytest.mark.parametrize("column", ["messages", "grounding", "more"])
def test_images_inside_of_values_are_not_fetched(column, served, tmp_path, monkeypatch, capsys):
    url, asked = served
    dataset = nested_in(column, url)
    path = write_parquet(dataset, tmp_path / "rows.parquet")
    assert read_rows(path)[0]["images"][0].size == (40, 30)
    collate = AgeVlmDataCollator(tiny_processor())
    if column != "grounding":
        assert len(collate([read_mixture([DataPart(str(path))])[0]])["pixel_values"]) == 1
    assert run(monkeypatch, capsys, "data", "check", path)[0] == 0
    masked, _ = add_masks(dataset, BoxTeacher(), tmp_path / "masks", progress=False)
    assert masked[0]["grounding"][0]["mask"] is not None
    assert not asked


def test_benchmarks_fetch_no_images(served, tmp_path):
    """Also where a column becomes one of images when it is read."""
    url, asked = served
    row = {"question": "Is there a cat?", "image": {"path": url, "bytes": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"row 0: its image 'http://.* not fetched"):
        read_table(tmp_path / "rows.parquet", ["question"])
    assert not asked


def test_other_protocols_are_urls_too(tmp_path):
    rows = [one_image_row({"path": path, "bytes": None}) for path in ("hf://datasets/a/b.png", "zip://a.png::b.zip")]
    for row in rows:
        with pytest.raises(ValueError, match="is a URL"):
            read_rows(write_parquet(to_dataset([row]), tmp_path / "rows.parquet"))
    embedded = one_image_row({"path": "https://host/a.png", "bytes": encoded()})  # a name, and no place
    assert read_rows(write_parquet(to_dataset([embedded]), tmp_path / "more.parquet"))[0]["images"][0].size == (40, 30)


def test_the_row_of_a_url_is_named_among_rows_with_several_images_and_none(tmp_path):
    rows = [one_image_row({"path": None, "bytes": encoded()}) for _ in range(4)]
    rows[1]["images"], rows[2]["images"] = [], rows[2]["images"] * 3
    rows[3]["images"] = [{"path": None, "bytes": encoded()}, {"path": "https://host/a.png", "bytes": None}]
    path = write_parquet(to_dataset(rows), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet, row 3: its image 'https://host/a\.png'"):
        read_rows(path)
    kept = read_dataset(path, keep_bad=True)
    assert [row["row_origin"]["problem"] is None for row in stored_images(kept)] == [True, True, True, False]


def test_paths_are_looked_at_without_a_pass_over_the_rows(tmp_path):
    """A hundred thousand rows in less time than a loop in Python over their images would take."""
    rows = datasets.Dataset.from_dict({"images": [[]], "messages": [good_row()["messages"][:1]], "grounding": [[]]}, features=row_features())  # fmt: skip
    table = rows.data.table.take(np.zeros(100_000, int))
    datasets.Dataset(table).save_to_disk(tmp_path / "rows")
    start = time.process_time()
    assert len(read_dataset(tmp_path / "rows")) == 100_000
    assert time.process_time() - start < 2


# --- sizes ---


def test_masks_are_bounded_before_they_are_decoded():
    gigantic = {"size": [100_000, 100_000], "counts": "PPigPZ9"}
    row = good_row()
    row["grounding"][0]["mask"] = gigantic
    start = time.process_time()
    assert "its image is 30 high" in check_row(row)[0].message
    problems = check_row(row, image_sizes=[None, None])
    assert any("claims 100000 x 100000 pixels, but a mask has at most" in p.message for p in problems)
    assert check_dataset([row], progress=False).bad_rows == 1
    long = {"size": [30, 40], "counts": "o" * 400_000}
    row["grounding"][0]["mask"] = long
    assert check_dataset([row], progress=False).bad_rows == 1
    assert time.process_time() - start < 2


@pytest.mark.parametrize("counts", ["o" * 400_000, "P" * 400_000, "1" * 400_000, "00" * 200_000, "0" * 400_000 + "Z"])
def test_long_runs_are_quick(counts):
    row = one_image_row({"bytes": encoded(), "path": None})
    row["grounding"][0]["mask"] = {"size": [30, 40], "counts": counts}
    start = time.process_time()
    problem = AgeVlmDataCollator(tiny_processor(), grid=(4, 4)).find_problem(row)
    assert "The mask of the phrase 'the dog' cannot be read" in problem
    assert time.process_time() - start < 2


# --- JSON and Parquet ---

DEEP = "[" * 100_000
LLAVA_LINE = json.dumps(LLAVA[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", DEEP, "a.json, line 1, is not JSON: nested too deeply"),
        ("a.jsonl", LLAVA_LINE + '\n{"a": ' + DEEP, "a.jsonl, line 2, is not JSON: nested too deeply"),
        ("a.json", '[{"id": 1, "id": 2}]', "a.json, line 1, is not JSON: an object has the key 'id' twice"),
        (
            "a.jsonl",
            f'{LLAVA_LINE}\n{{"x": {{"y": 1, "y": 1}}}}',
            "line 2, is not JSON: an object has the key 'y' twice",
        ),
        ("a.json", '[{"id": ' + "9" * 5000 + "}]", "a.json, line 1, is not JSON: Exceeds the limit"),
        ("a.json", json.dumps(LLAVA).encode("utf-16"), "a.json is not UTF-8"),
        ("a.jsonl", LLAVA_LINE.encode("utf-32"), "a.jsonl is not UTF-8"),
        ("a.json", "", "a.json has no entries"),
        ("a.jsonl", "\n \r\n", "a.jsonl has no entries"),
        ("a.json", "[NaN]", "entry 0 is not an object"),
        ("a.json", "null", "entry 0 is not an object"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, images, monkeypatch, capsys):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)
    message_of_all = message if "JSON" in message or "UTF" in message else "entry 0: conversations|has no rows"
    with pytest.raises(ValueError, match=message_of_all):
        read_source("llava", tmp_path / name, images)
    check_refused(monkeypatch, capsys, tmp_path, message, "data", "check", tmp_path / name)


def test_names_of_images_that_no_file_has(tmp_path, images):
    for name, message in (("a\0.png", "there is no image"), ("x" * 5000, "there is no image"), ({"path": "a.png"}, "the image is")):  # fmt: skip
        path = write(tmp_path / "llava.json", [LLAVA[0] | {"image": name}])
        with pytest.raises(ValueError, match=f"entry 0: .*({message})"):
            read_source("llava", path, images)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [3]}, "is not a conversation of the format rows"),
        ({"messages": ["Hi."]}, "is not a conversation of the format rows"),
        ({"messages": [[{"role": 3, "content": "Hi."}]]}, "is not a conversation of the format rows"),
        ({"messages": [[{"content": "Hi."}]]}, "is not a conversation of the format rows"),
        ({"images": [3]}, "its column images does not hold lists of images"),
        ({"images": [[3.5]]}, "its column images does not hold lists of images"),
        ({"grounding": ["the dog"]}, "its column grounding does not hold lists of phrases"),
        ({"grounding": [[{"message": "first"}]]}, "its column grounding does not hold lists of phrases"),
    ],
)
def test_parquet_columns_of_wrong_types(columns, message, tmp_path, monkeypatch, capsys):
    good = {"messages": [[{"role": "user", "content": "Hi."}]]}
    path = tmp_path / "wrong.parquet"
    datasets.Dataset.from_dict(good | columns).to_parquet(path)
    with pytest.raises(ValueError, match=rf"wrong\.parquet.*{message}"):
        read_mixture([DataPart(str(path))])
    code, printed = run(monkeypatch, capsys, "data", "check", path)
    assert code in (1, 2), printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", "half"])
def test_damaged_folders(file, content, tmp_path, monkeypatch, capsys):
    to_dataset([good_row()]).save_to_disk(tmp_path / "rows")
    path = tmp_path / "rows" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    check_refused(monkeypatch, capsys, tmp_path, f"{tmp_path}/rows", "data", "check", tmp_path / "rows")


def test_huge_numbers_in_rows(tmp_path, images):
    for place in ("message", "start", "image"):
        row = json_row(grounding=[good_row()["grounding"][0] | {place: 2**40, "mask": rle()}])
        with pytest.raises(ValueError, match="row 0"):
            read_rows(write(tmp_path / "rows.json", [row]))
        assert check_part(DataPart(str(tmp_path / "rows.json")), progress=False).bad_rows == 1
