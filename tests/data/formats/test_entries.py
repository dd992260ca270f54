# SPDX-License-Identifier: Apache-2.0
"""Large JSON files as tables: every entry, in order, by number and by key, with little memory."""

import json
import sqlite3
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agevlm.data.formats import entries as module
from agevlm.data.formats.entries import Entries, index_json, read_json

IMAGES = [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "ü\u2028.jpg"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "bbox": [1.5, 2, 3.25e1, 4], "text": 'a "quote", ] and }'},
    {"id": 2, "image_id": 3, "half": "\ud800"},
    {"id": 3, "image_id": 7},
    {"id": 4, "image_id": "x"},
    {"id": 5},
    {"id": 6, "image_id": 2**70},
]


def write(file, text, encoding="utf-8"):
    file.write_bytes(text.encode(encoding))
    return file


def indexed(tmp_path, text, tables, encoding="utf-8"):
    index_json(write(tmp_path / "file.json", text, encoding), tmp_path / "index" / "file.sqlite", tables)
    return Entries(tmp_path / "index" / "file.sqlite")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_lists_under_keys(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    whole = {"info": {"year": 2017}, "empty": [], "annotations": ANNOTATIONS, "licenses": [1, [2]], "images": IMAGES}
    tables = {"images": "id", "annotations": "image_id", "empty": None}
    entries = indexed(tmp_path, json.dumps(whole, indent=indent), tables, "utf-8-sig")
    assert list(entries.slice("annotations")) == list(enumerate(ANNOTATIONS))
    assert list(entries.slice("annotations", 1, 3)) == [(1, ANNOTATIONS[1]), (2, ANNOTATIONS[2])]
    assert list(entries.slice("empty")) == []
    assert [entries.count(name) for name in tables] == [2, 6, 0]
    assert entries.find("images", 3) == [IMAGES[1]]
    assert entries.find("annotations", 7) == [ANNOTATIONS[0], ANNOTATIONS[2]]
    assert entries.find_numbered("annotations", 7) == [(0, ANNOTATIONS[0]), (2, ANNOTATIONS[2])]
    assert entries.find("annotations", 2**70) == entries.find("annotations", None) == entries.find("images", 4) == []
    assert entries.keys("annotations") == [3, 7, "x"]
    assert entries.keys("annotations", 1, 2) == [7]
    assert entries.count_keys("annotations") == 3
    assert isinstance(next(entries.slice("annotations"))[1]["bbox"][0], float)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@example([0.0, -1.5e-300, 12], 1, True)  # numbers that are cut behind each of their characters
@example([[0.0, 1e22], 3], 1, False)
@given(st.lists(VALUES, max_size=5), st.integers(1, 9), st.booleans())
def test_any_values_in_any_chunks(tmp_path_factory, values, chunk, lines):
    text = "".join(json.dumps(value) + "\n" for value in values) if lines else json.dumps(values, ensure_ascii=False)
    if lines and values and isinstance(values[0], list):
        return  # a list at the beginning is a file that is a list
    file = tmp_path_factory.mktemp("values") / "a.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    before, module._CHUNK = module._CHUNK, chunk
    try:
        read = [(name, entry) for name, entry, _ in read_json(file)]
    finally:
        module._CHUNK = before
    assert read == [("", value) for value in values]


@pytest.mark.parametrize(
    "text", [json.dumps([*IMAGES, "no object", 3]), "\n".join(map(json.dumps, [*IMAGES, "a", 3]))]
)
def test_a_list_and_lines_are_one_table(tmp_path, text):
    entries = indexed(tmp_path, text, {"": "id"})
    assert [entry for _, entry in entries.slice("")] == [*IMAGES, {}, {}]
    assert entries.keys("") == [3, 7]


@pytest.mark.parametrize(
    ("content", "tables", "message"),
    [
        (b'[{"a": 1},\n{]', [""], "line 2, is not JSON"),
        (b'[{"a": 1},\n{"a": 2}', [""], "line 2, is not JSON: '' where ',' or ']' is expected"),
        (b'{"a": 1}\n\n{"a": \n', [""], "line [34], is not JSON"),
        (b'{"x": [1]', ["x"], "is not JSON"),
        (b'{"x": [1]} [', ["x"], "something follows its end"),
        (b'["\xff"]', [""], "is not UTF-8"),
        (b'[{"a": "' + b"x" * 40, [""], "line 1, is not JSON: Unterminated string"),
        (b'[{"a": 1, "a": 2}]', [""], "line 1, is not JSON: an object has the key 'a' twice"),
        (b"[" * 100_000, [""], "nested too deeply"),
        (b'{"a":' * 100_000, ["x"], "nested too deeply"),
        (b'{"x": [1], "y": {}}', ["y", "x"], "has no list 'y', but has the lists x"),
        (b"[]", ["x"], "has no list 'x', but is a list itself"),
        (b"", ["x"], "line 1, is not JSON: '' where '{' is expected"),
    ],
)
def test_damaged_files_are_named_and_leave_nothing(tmp_path, content, tables, message):
    file = tmp_path / "damaged.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged\.json.*{message}"):
        index_json(file, tmp_path / "work" / "index.sqlite", dict.fromkeys(tables))
    assert list((tmp_path / "work").iterdir()) == []


def test_an_index_is_used_again(tmp_path):
    entries = indexed(tmp_path, "[1]", {"": None})
    assert indexed(tmp_path, "[1, 2]", {"": None}).count("") == entries.count("") == 1


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(number):
        file = tmp_path / f"{number}.json"
        with open(file, "w") as opened:
            opened.write('{"a": [')
            opened.writelines(f'{{"id": {i}, "text": "{"x" * 100}"}},\n' for i in range(number))
            opened.write('{"id": -1}]}')
        tracemalloc.start()
        index_json(file, tmp_path / f"{number}.sqlite", {"a": "id"})
        entries = Entries(tmp_path / f"{number}.sqlite")
        assert sum(1 for _ in entries.slice("a")) == entries.count_keys("a") == number + 1
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak(20_000)  # several chunks
    assert peak(60_000) < small * 1.5


def test_the_index_is_closed_with_its_entries(tmp_path):
    entries = indexed(tmp_path, "[{}, {}]", {"": None})
    connection, rows = entries._index, entries.slice("")
    del entries
    assert len(list(rows)) == 2  # it stays open for those who still read
    del rows
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
