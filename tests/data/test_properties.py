# SPDX-License-Identifier: Apache-2.0
"""Properties of readers, checks and spans: any JSON gives rows or a `ValueError`, and any span its own text or a `ValueError`."""

import contextlib
import copy
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_cases import LLAVA, encoded, good_row, rle, to_dataset
from tiny_training import tiny_processor

from agevlm.data.check import check_dataset, check_row
from agevlm.data.formats import open_source
from agevlm.data.prepared import read_pieces
from agevlm.data.readers import read_dataset, read_json_rows, read_rows
from agevlm.processing.collator import AgeVlmDataCollator, render_conversation
from agevlm.processing.rows import ORIGIN_COLUMN, message_text, place_images

NAMES = [
    "images",
    "messages",
    "grounding",
    "role",
    "content",
    "type",
    "text",
    "image",
    "mask",
    "size",
    "counts",
    "path",
]
NAMES += [
    "bytes",
    "message",
    "start",
    "end",
    "box",
    "score",
    "conversations",
    "from",
    "value",
    "caption",
    "ref_exps",
    "key",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
SCALARS |= st.sampled_from(
    ["user", "assistant", "human", "gpt", "text", "image", "a.png", "<image>", "../a.png", 0, 1, -1]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(value, path=()):
    """The places of all values in a nested one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def damaged(draw, entry):
    """A good entry with up to three of its values replaced by any JSON."""
    entry = copy.deepcopy(entry)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(sorted(places(entry), key=str)))
        inner = entry
        for key in parents:
            inner = inner[key]
        inner[last] = draw(JSON)
    return entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.png").write_bytes(encoded())
    return folder


def rows_or_none(read, path, *arguments, **options):
    """None if the file is refused by a message that names it."""
    try:
        return read(path, *arguments, **options)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


ROW = good_row() | {"images": ["a.png", {"path": "a.png", "bytes": None}]}


@given(st.lists(damaged(ROW) | JSON, max_size=3) | JSON, st.booleans())
def test_any_json_is_rows_or_a_value_error(folder, entries, by_line):
    path = folder / ("any.jsonl" if by_line else "any.json")
    entries = entries if isinstance(entries, list) or not by_line else [entries]
    path.write_text("\n".join(map(json.dumps, entries)) if by_line else json.dumps(entries))
    while not isinstance(entries, list) or (by_line and len(entries) == 1 and isinstance(entries[0], list)):
        entries = (
            entries[0] if isinstance(entries, list) else [entries]
        )  # the content says what a file is, not its name
    dataset = rows_or_none(read_rows, path)
    assert dataset is None or len(dataset) == len(entries)
    with contextlib.suppress(ValueError):
        written = read_json_rows(path)
        check_dataset(written, progress=False)
        if any("messages" in row for row in written):
            kept = read_dataset(path, keep_bad=True)
            assert kept.with_format("arrow")[:][ORIGIN_COLUMN].combine_chunks().field("row").to_pylist() == list(
                range(len(written))
            )


@given(st.lists(damaged(LLAVA[0]) | JSON, min_size=1, max_size=3))
def test_any_llava_is_rows_and_bad_entries(folder, entries):
    path = folder / "other.json"
    path.write_text(json.dumps(entries))
    with tempfile.TemporaryDirectory() as work:
        source = open_source("llava", path, folder)
        found = list(read_pieces(source, source.pieces(Path(work)), Path(work)))
    rows = [row for row in found if isinstance(row, dict)]
    assert [row["row"] if isinstance(row, dict) else row.row for row in found] == list(range(len(entries)))
    bare = [{name: row[name] for name in ("images", "messages", "grounding")} for row in rows]
    assert not rows or len(to_dataset(bare)) == len(rows)
    for row in rows:
        assert check_row(row) == []


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from([".json", ".jsonl", ".parquet"]))
def test_any_file_is_rows_or_a_value_error(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any" + suffix)
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            read_rows(path)


PROCESSOR = tiny_processor()
COLLATOR = AgeVlmDataCollator(PROCESSOR, grid=(2, 2))


@given(damaged(good_row()) | JSON.filter(lambda value: isinstance(value, dict)))
def test_any_row_is_checked_and_collated_or_has_a_problem(row):
    problems = check_row(row)
    problem = COLLATOR.find_problem(row)
    if problem is None and not problems:
        assert COLLATOR([row])["input_ids"].shape[0] == 1
    assert all(problem.message for problem in problems)


TEXTS = st.text(st.sampled_from("ab \n\tä語😀é<>|"), max_size=12)


@given(st.lists(TEXTS, min_size=1, max_size=3), st.data())
def test_any_span_is_its_own_text_or_a_value_error(texts, data):
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    conversation = render_conversation(PROCESSOR, place_images(messages, 0))
    message, start, end = (data.draw(st.integers(-2, 14)) for _ in range(3))
    try:
        first, last = conversation.locate(message, start, end)
    except ValueError:
        valid = 0 <= message < len(texts) and 0 <= start < end <= len(texts[message])
        assert not (valid and texts[message][start:end].strip())
        return
    assert conversation.text[first:last] == message_text(messages[message])[start:end].strip()


@given(st.integers(-3, 30), st.integers(-3, 30), st.integers(-1, 5), st.integers(-1, 2))
def test_the_check_and_the_collator_agree_on_spans(start, end, message, image):
    """Where one of them refuses a phrase's place, so does the other, but for what only costs the phrase."""
    row = good_row()
    row["grounding"] = [
        {"message": message, "start": start, "end": end, "image": image, "box": None, "mask": rle(), "score": None}
    ]
    row["images"][1] = row["images"][0]
    tolerated = ("white space, ", "before the image is shown")
    refused = [p for p in check_row(row) if p.severity == "error" and not any(text in p.message for text in tolerated)]
    if (problem := COLLATOR.find_problem(row)) is None:
        assert not refused
    else:
        assert check_row(row), problem
